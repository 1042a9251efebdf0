#!/bin/sh
# Run mypy ($1) over the package as it is installed: convert/ lies at the top of the repository and is
# imported as mlx_gptoss.convert, which mypy can only see in a tree of that form.
set -eu
tree=build/typecheck
rm -rf "$tree"
mkdir -p "$tree/mlx_gptoss"
for entry in mlx_gptoss/*; do
    ln -s "$PWD/$entry" "$tree/$entry"
done
ln -s "$PWD/convert" "$tree/mlx_gptoss/convert"
MYPYPATH=$tree "$1" --config-file pyproject.toml -p mlx_gptoss -p tests -p benchmarks -p demo -p scripts
