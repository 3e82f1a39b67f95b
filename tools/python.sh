#!/bin/sh
# tools/python.sh [OLDEST [PYTHON]]: prints the newest Python from 3.13 down to 3.OLDEST (11) that has venv and pip, on the
# path or else of pyenv, or PYTHON if it is such a one. Exit code 2, in one line, if there is none.
set -eu
oldest=${1:-11}
given=${2:-}

works() {
    "$1" -c "import sys, venv, ensurepip; sys.exit(not (3, $oldest) <= sys.version_info[:2] <= (3, 13))" >/dev/null 2>&1
}

if [ -n "$given" ]; then
    candidates=$given
else
    installed=${PYENV_ROOT:-$HOME/.pyenv}/versions
    candidates="python3.13 python3.12 python3.11 python3 python"
    for minor in 13 12 11; do
        candidates="$candidates $(ls -d "$installed"/3.$minor.*/bin/python 2>/dev/null || true)"
    done
fi
for candidate in $candidates; do
    if works "$candidate"; then
        echo "$candidate"
        exit 0
    fi
done
echo "error: no Python from 3.$oldest to 3.13 with venv and pip was found${given:+ ($given is not one)}; set PYTHON=/path/to/python" >&2
exit 2
