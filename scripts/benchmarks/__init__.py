"""The parts of scripts/bench.py: each contender is a process of its own, and one of them works at a time."""
