"""Checkpoints of true sizes without their bytes: right headers over sparse files, written in milliseconds."""

from __future__ import annotations

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
from tests.support.random_weights import MlxRecipe, Shape, Source


def write_sparse(folder: Path, shape: Shape, layout: str = "hf", recipe: MlxRecipe | None = None) -> Path:
    """config.json and one model.safetensors whose tensors read as zeros."""
    source, recipe = Source(shape), recipe or MlxRecipe()
    tensors, config = {
        "hf": lambda: (hf_tensors(source), hf_config(shape)),
        "original": lambda: (original_tensors(source), original_config(shape)),
        "mlx": lambda: (mlx_tensors(source, recipe), mlx_config(shape, recipe)),
    }[layout]()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    _write_header(folder / "model.safetensors", list(tensors))
    return folder


def _write_header(path: Path, tensors: list[Tensor]) -> None:
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
