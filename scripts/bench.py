"""Measure this machine's limits, and lit_posttrain beside Hugging Face and TRL: python scripts/bench.py --help."""

import signal
import sys

from benchmarks.cli import main

if __name__ == "__main__":
    # A time limit's signal too ends the workers and removes the random model.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
