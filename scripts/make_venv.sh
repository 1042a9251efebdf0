#!/bin/sh
# Create a virtual environment in $1 with the first Python >= 3.11 found, or with uv, which brings its own.
set -eu
target=$1

for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3.14 python3 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "creating $target with $("$candidate" --version)"
        exec "$candidate" -m venv "$target"
    fi
done

if command -v uv >/dev/null 2>&1; then
    echo "creating $target with uv"
    exec uv venv --quiet --seed --python 3.12 "$target"
fi

echo "no Python 3.11 or newer and no uv found: install one of them" \
    "(macOS: 'brew install python@3.12' or 'brew install uv'; Debian: 'apt install python3-venv')," \
    "or name one: make PYTHON=/path/to/python3 test" >&2
exit 1
