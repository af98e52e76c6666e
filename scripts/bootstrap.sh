#!/bin/sh
# Installs this project with an extra (cluster, or dev for all of it) into .venv.
# Does nothing when that is done already. Usage: scripts/bootstrap.sh cluster|dev
set -eu
cd "$(dirname "$0")/.."
extra=$1
log=.venv/install.log

fail() {
    echo "error: $*" >&2
    exit 1
}

# Those that the pinned torch is built for.
works="3.11, 3.12, 3.13 or 3.14"
in_range='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'

find_python() {
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c "$in_range" 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "Python $works is needed; found $(python3 --version 2>/dev/null || echo none)"
}

# Shows that something happens while pip runs: a number that grows on a terminal, else nothing.
meter() {
    while [ -t 1 ] && sleep 1 && kill -0 "$1" 2>/dev/null; do
        printf '\r%s: %s MB ' "$2" "$(du -sm .venv 2>/dev/null | cut -f1)"
    done
}

pip_install() {
    what=$1
    shift
    echo "installing $what"
    started=$(date +%s)
    mkdir -p .venv/tmp
    meter $$ "  $what" &
    meter_pid=$!
    status=0
    # In the foreground, so that Ctrl-C ends it.
    TMPDIR="$PWD/.venv/tmp" .venv/bin/python -m pip install --disable-pip-version-check \
        --quiet --progress-bar off --retries 3 "$@" >"$log" 2>&1 || status=$?
    kill "$meter_pid" 2>/dev/null || true
    wait "$meter_pid" 2>/dev/null || true
    rm -rf .venv/tmp
    if [ "$status" -ne 0 ]; then
        if grep -Eqi 'NewConnectionError|NameResolution|unreachable|timed out|ProxyError' "$log"; then
            fail "pip cannot reach the package index: is there a network? Details: $log"
        fi
        tail -n 15 "$log" >&2
        fail "pip could not install $what; all it said is in $log"
    fi
    echo "  done in $(($(date +%s) - started)) s"
}

case "$(uname -s)" in
    MINGW* | MSYS* | CYGWIN*) fail "Linux or macOS is needed; on Windows use WSL2" ;;
esac

# The folder is part of it: what was installed names absolute paths.
wanted="$(cksum <pyproject.toml) $PWD"
for stamp in .venv/.installed-dev ".venv/.installed-$extra"; do
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; then
        exit 0
    fi
done

python=$(find_python) || exit 1
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "Python's venv module is missing: apt install python$version-venv"
if ! .venv/bin/python -c "import pip; $in_range" 2>/dev/null; then
    echo "creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || fail "could not create .venv"
fi

torch=$(sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
if [ "$(uname -s)" = Linux ] && ! .venv/bin/python -c 'from importlib.metadata import version
version("torch")' 2>/dev/null; then
    echo "torch comes first. On Linux pip takes its CUDA build, about 2.5 GB to download and 5 GB on"
    echo "disk, unless pip is configured with PyTorch's CPU index (PIP_EXTRA_INDEX_URL): then 200 MB"
fi
# First and by its exact version, so that a CPU build that pip is configured to find is taken.
pip_install "$torch (the largest part)" "$torch"
pip_install "realtime-ai-serve[$extra]" --editable ".[$extra]"
echo "$wanted" >".venv/.installed-$extra"
