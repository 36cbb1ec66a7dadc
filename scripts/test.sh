#!/usr/bin/env bash
# The default suite: linters, formatter, type checker, then every test that is neither slow nor for a GPU.
#
#     bash scripts/test.sh                  # all of it, on up to four cores
#     bash scripts/test.sh -k advantages    # arguments go to pytest, in one process; the linters are left out then
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" tasks,dev

step() { printf '\n[test] %s\n' "$*"; }

# One thread a test: tiny tensors lose time to more, and two-process tests would hang on forked thread pools.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

if [ $# -eq 0 ]; then
    step "ruff check"
    ruff check .
    step "ruff format --check"
    ruff format --check .
    step "pyright"
    pyright
    # On several cores; a file's tests stay together, because they share what is costly to make.
    set -- -n "$(python -c 'import os; print(min(4, os.cpu_count() or 1))')" --dist loadfile
fi
step "pytest"
status=0
python -m pytest -m "not slow and not gpu" --durations=10 "$@" || status=$?
step "$([ $status -eq 0 ] && echo "all green" || echo "pytest failed with status $status") after ${SECONDS} s"
exit $status
