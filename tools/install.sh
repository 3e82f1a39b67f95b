#!/bin/sh
# tools/install.sh VENV [PYTHON [EXTRAS]]: an environment with this project installed in place, and a stamp when it is
# whole.
# Picks the newest Python from 3.13 down to 3.11 that runs, unless given one. Adds the extra "cuda" where a working
# NVIDIA driver is seen.
set -eu
venv=$1
python=${2:-}
extras=${3:-}

works() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

if [ -z "$python" ]; then
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if works "$candidate"; then python=$candidate; break; fi
    done
fi
if [ -z "$python" ] || ! works "$python"; then
    echo "error: no Python from 3.11 to 3.13 with venv and pip was found${python:+ ($python is not one)}; set PYTHON=/path/to/python" >&2
    exit 2
fi

if [ -z "$extras" ]; then
    extras=dev
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        extras=dev,cuda
    fi
fi

echo "installing into $venv with $("$python" --version) (extras: $extras) ..." >&2
rm -f "$venv/installed"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
touch "$venv/installed"
