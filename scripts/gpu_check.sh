#!/usr/bin/env bash
# What only a GPU can show: the tests marked gpu, then limits, rollout and grpo (beside TRL) at the shape of a 0.5B model
# with random weights, all on one GPU in less than ten minutes. Results, counts of tests included, go into one JSON.
#
#     bash scripts/gpu_check.sh [FILE]      # default: gpu_check.json
#
# Without a GPU it says so and succeeds. The status is 1 if a test failed and 2 if a benchmark did not finish.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=$(realpath -m "${1:-gpu_check.json}")

if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "[gpu_check] no GPU here: nothing to check"
    exit 0
fi
cd "$ROOT" || exit 2

# A Python that has everything is used as it is; otherwise scripts/env.sh makes .venv.
usable() {
    "$1" -c 'import lightning, jsonargparse, jaxtyping, beartype, hypothesis, pytest, transformers, trl, torch, sys
sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1
}
PYTHON=
for candidate in .venv/bin/python python3 python; do
    if usable "$candidate"; then
        PYTHON=$candidate
        break
    fi
done
if [ -z "$PYTHON" ]; then
    source scripts/env.sh tasks,dev
    PYTHON=.venv/bin/python
    usable "$PYTHON" || { echo "[gpu_check] the torch in .venv sees no GPU" >&2; exit 2; }
fi
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
rm -f "$OUT"

echo "[gpu_check] tests"
timeout 180 "$PYTHON" -m pytest -m gpu -p no:cacheprovider --junitxml="$work/tests.xml"
tests=$?
case $tests in
    0) ;;
    5) echo "[gpu_check] no test is marked gpu" ;;
    *) status=1 ;;
esac

bench() { # SECONDS SECTION [OPTIONS]
    local seconds=$1 section=$2
    shift 2
    echo "[gpu_check] $section"
    if ! timeout "$seconds" "$PYTHON" scripts/bench.py "$section" --device cuda --random_init qwen2.5-0.5b \
        --json "$OUT" "$@"; then
        echo "[gpu_check] $section did not finish within $seconds s, or failed" >&2
        [ "$status" -eq 0 ] && status=2
    fi
}
bench 75 limits
bench 110 rollout --repeats 3
bench 230 grpo --repeats 2 --peer trl --micro_batches 16,32,64 --variants headline,fixed

"$PYTHON" - "$work/tests.xml" "$tests" "$OUT" <<'PYTHON'
import json, sys
from pathlib import Path
from xml.etree import ElementTree

report, status, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
if report.exists():
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
failed = counts["failures"] + counts["errors"]
results = json.loads(out.read_text()) if out.exists() else {}
results["tests"] = {
    "passed": counts["tests"] - failed - counts["skipped"], "failed": failed, "skipped": counts["skipped"],
    "exit_status": status,
}
out.write_text(json.dumps(results, indent=2) + "\n")
print(f"[gpu_check] {results['tests']}, results in {out}")
PYTHON
exit $status
