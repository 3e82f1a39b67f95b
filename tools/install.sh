#!/bin/sh
# tools/install.sh VENV [PYTHON [EXTRAS [OLDEST]]]: an environment with this project installed in place, and a stamp when
# it is whole. Its Python is the one that tools/python.sh finds. Adds the extra "cuda" where a working NVIDIA driver is
# seen, unless given extras.
set -eu
venv=$1
extras=${3:-}
python=$(sh "$(dirname "$0")/python.sh" "${4:-11}" "${2:-}")

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
