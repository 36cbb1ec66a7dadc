#!/usr/bin/env bash
# From nothing to a model that learned: environment, SmolLM2-135M-Instruct, GRPO, and a before/after table.
# Interrupted (Ctrl-C, a crash, a power cut) and typed again, it goes on where it was.
#
#     bash scripts/demo.sh                  # everything under logs/demo/
#     bash scripts/demo.sh --fresh          # throw an earlier demo away and begin again
#     bash scripts/demo.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" tasks
exec python scripts/demo.py "$@"
