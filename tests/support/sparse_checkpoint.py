"""Checkpoints of true sizes without their bytes: right headers over sparse files, written in milliseconds.

python -m tests.support.sparse_checkpoint --shape 120b --out DIR        only the experts are without bytes
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tests.support.checkpoints import (
    Tensor,
    hf_config,
    hf_tensors,
    mlx_config,
    mlx_tensors,
    original_config,
    original_tensors,
)
from tests.support.random_weights import SHAPES, MlxRecipe, Shape, Source


def write_sparse(
    folder: Path, shape: Shape, layout: str = "hf", recipe: MlxRecipe | None = None, *, dense: bool = False
) -> Path:
    """config.json and one model.safetensors that reads as zeros; with `dense` its experts alone do."""
    source, recipe = Source(shape), recipe or MlxRecipe()
    tensors, config = {
        "hf": lambda: (hf_tensors(source), hf_config(shape)),
        "original": lambda: (original_tensors(source), original_config(shape)),
        "mlx": lambda: (mlx_tensors(source, recipe), mlx_config(shape, recipe)),
    }[layout]()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    _write(folder / "model.safetensors", list(tensors), dense)
    return folder


def _write(path: Path, tensors: list[Tensor], dense: bool) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for t in tensors:
        header[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
        for t in tensors if dense else ():
            if t.dtype == "BF16":
                file.seek(8 + len(raw) + header[t.name]["data_offsets"][0])
                for chunk in t.chunks():
                    file.write(chunk.tobytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="120b")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    write_sparse(given.out, SHAPES[given.shape], dense=True)
