# Sourced by test.sh and demo.sh: makes .venv if it is missing or out of date, then puts it first on PATH.
#
#     source scripts/env.sh EXTRAS        # extras of pyproject.toml: tasks, or tasks,dev
#
# Nothing outside the repository is written. A second call takes no time: .venv/.installed names what is in there.
# shellcheck shell=bash

lp_say() { printf '[env] %s\n' "$*"; }
lp_fail() { printf '[env] %s\n' "$*" >&2; exit 1; }

lp_python() {  # the first Python on PATH that is new enough
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    lp_fail "Python 3.11 or newer is needed; found: $(python3 --version 2>&1 || echo none). Install one and run this again."
}

lp_torch_options() {  # without an NVIDIA GPU the CPU build is enough, and several GB smaller
    if [ "$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then return; fi
    local index=https://download.pytorch.org/whl/cpu
    if "$1" -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=4)" >/dev/null 2>&1; then
        echo "--extra-index-url $index"
    fi
}

lp_install() {
    local extras=$1 python options requirement
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(lp_python)
        lp_say "making .venv with $python"
        rm -rf .venv
        if ! "$python" -m venv .venv >/dev/null 2>.venv.log; then
            cat .venv.log >&2
            rm -rf .venv .venv.log
            lp_fail "'$python -m venv' failed; on Debian and Ubuntu: sudo apt-get install python3-venv"
        fi
        rm -f .venv.log
    fi
    rm -f .venv/.installed
    lp_pip() { .venv/bin/python -m pip install -qq --disable-pip-version-check --constraint scripts/constraints.txt "$@"; }
    # Of the same release pip prefers a local version such as 2.13.0+cpu, so an index with CPU builds is all it takes.
    requirement=$(grep '^torch==' scripts/constraints.txt)
    options=$(lp_torch_options .venv/bin/python)
    lp_say "1/2 installing $requirement ${options:+(CPU build)}"
    # shellcheck disable=SC2086
    lp_pip $options "$requirement" || lp_fail "pip could not install $requirement (its message is above)"
    lp_say "2/2 installing lit_posttrain and its dependencies [$extras]: a few minutes, once"
    lp_pip --editable ".[$extras]" || lp_fail "pip could not install the dependencies (its message is above)"
    case ",$extras," in
        *,dev,*)  # the last release with PPO, read by tests; beside the present one and without what it depends on
            rm -rf .venv/peers
            .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
                --target .venv/peers/trl-1.12 trl==1.12.0 || lp_fail "pip could not install trl 1.12 for the tests"
            ;;
    esac
}

lp_environment() {
    local extras=$1 wanted installed start=$SECONDS
    wanted=$(cat pyproject.toml scripts/constraints.txt scripts/env.sh | cksum | cut -d' ' -f1)
    installed=$(cat .venv/.installed 2>/dev/null || true)
    case "$installed" in
        "$wanted $extras" | "$wanted $extras,"*) ;;
        *)
            lp_install "$extras"
            echo "$wanted $extras" >.venv/.installed
            lp_say "ready after $((SECONDS - start)) s"
            ;;
    esac
    export PATH="$PWD/.venv/bin:$PATH"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
lp_environment "${1:?usage: source scripts/env.sh EXTRAS}"
