"""An identity for the model in a folder, without reading its files whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from mlx_gptoss.checkpoint.safetensors import TensorInfo, read_folder
from mlx_gptoss.files import open_regular, read_limited
from mlx_gptoss.model.config import MAX_BYTES

# Of each tensor, the bytes read at both ends and in the middle; all of them would take minutes.
SAMPLED = 1 << 12


def fingerprint(folder: Path, context: str = "", tensors: Mapping[str, TensorInfo] | None = None) -> str:
    """SHA-256 (hex) of `context`, config.json, and each tensor's name, dtype, shape and sampled bytes.

    tensors: those of them that count (default: all). Raises OSError and CheckpointError.
    """
    digest = hashlib.sha256(context.encode())
    digest.update(read_limited(folder / "config.json", MAX_BYTES))
    for name, tensor in sorted((read_folder(folder) if tensors is None else tensors).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        with open_regular(tensor.path) as file:
            last = max(0, tensor.nbytes - SAMPLED)
            for at in (0, last // 2, last):
                file.seek(tensor.start + at)
                digest.update(file.read(min(SAMPLED, tensor.nbytes)))
    return digest.hexdigest()
