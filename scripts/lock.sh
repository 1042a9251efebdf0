#!/bin/sh
# Write the lock $2 of the development environment with uv ($1): for macOS and Linux and every Python that
# pyproject.toml allows, and without the name of the index that was asked.
set -eu
exec "$1" pip compile --quiet --universal --upgrade --python-version 3.11 --extra dev \
    --no-annotate --no-header --no-emit-index-url --output-file "$2" pyproject.toml >/dev/null
