"""A conversion against its source, tensor by tensor: which bytes are the same, how far the others are off.

Both sides are read through `sources`, so that every layout is compared under the same names. Memory holds a
few rows of one tensor at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlx_gptoss.convert import mxfp4
from mlx_gptoss.convert.manifest import Manifest, TensorEntry
from mlx_gptoss.convert.sources import Source, SourceTensor, open_source, to_float32
from mlx_gptoss.errors import CheckpointError

CHUNK_VALUES = 4 << 20  # values of a tensor in memory at a time, or one row where that is more

# How far a recorded error may be from the true one, relatively: without the search the converter measures
# only one chunk in several.
_TOLERANCE = {"affine": 0.25}


@dataclass
class Comparison:
    """identical: tensors whose bytes, or exact values, are the source's. errors: relative error (root of the
    squared error over the squared norm) of every other tensor that has one. problems: (tensor, what differs).
    """

    identical: set[str] = field(default_factory=set)
    errors: dict[str, float] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)


def compare_with_source(
    folder: Path, manifest: Manifest, source: Path, tick: Callable[[int], None]
) -> Comparison:
    """Compare every tensor of the manifest. `tick` is called with the source's bytes as they are read.

    Raises what opening the source raises: ConfigError, CheckpointError, ConversionError.
    """
    origin, made = open_source(source), open_source(folder)
    result = Comparison()
    for name, entry in sorted(manifest.tensors.items()):
        if entry.action in ("copy", "relayout"):
            _compare_exact(name, entry, origin, made, result, tick)
        elif entry.relative_error is not None:
            found = _measure(name, origin, made, tick)
            if found is None:
                result.problems.append((name, "the source has no such tensor"))
            else:
                result.errors[name] = found
                if not math.isclose(
                    found, entry.relative_error, rel_tol=_TOLERANCE.get(entry.action, 1e-3), abs_tol=1e-6
                ):
                    said = f"the manifest says {entry.relative_error:.3%}"
                    result.problems.append((name, f"its error against the source is {found:.3%}, {said}"))
    return result


def _compare_exact(
    name: str,
    entry: TensorEntry,
    origin: Source,
    made: Source,
    result: Comparison,
    tick: Callable[[int], None],
) -> None:
    """A tensor that claims to be the source's: by hash, or by value where it has another dtype."""
    tensor = _stored(origin, name, entry.dtype)
    if tensor is None:
        result.problems.append((name, "the source has no such tensor"))
        return
    if (tensor.dtype, tensor.shape) == (entry.dtype, entry.shape):
        digest = hashlib.sha256()
        for rows in _chunks(tensor, tick):
            digest.update(np.ascontiguousarray(rows).data)
        same = digest.hexdigest() == entry.sha256
    else:
        same = _measure(name, origin, made, tick) == 0.0
    if same:
        result.identical.add(name)
    else:
        result.problems.append((name, "its bytes are not the source's"))


def _stored(source: Source, name: str, dtype: str) -> SourceTensor | None:
    """The source's tensor `name`; of one packed in affine groups, the packed parts by their own names."""
    if dtype == "U32" or name.endswith((".scales", ".biases")):
        path, _, suffix = name.rpartition(".")
        matrix = source.tensors.get(f"{path}.weight")
        return matrix.packed.get(suffix) if matrix is not None else None
    return source.tensors.get(name)


def _measure(name: str, origin: Source, made: Source, tick: Callable[[int], None]) -> float | None:
    """Relative error of the dequantised tensor `name`; None when the source has nothing like it."""
    plain = name.removesuffix("_blocks")
    before, after = origin.tensors.get(plain), _values(made, name)
    if before is None or after is None:
        return None
    if before.shape != after.shape:
        raise CheckpointError(f"{name}: the source has {list(before.shape)}, expected {list(after.shape)}")
    error = norm = 0.0
    first = 0
    for rows in _chunks(before, tick):
        last = first + len(rows)
        values = to_float32(rows)
        difference = values - to_float32(after.read(first, last))
        error += float(np.sum(np.square(difference), dtype=np.float64))
        norm += float(np.sum(np.square(values), dtype=np.float64))
        first = last
    return math.sqrt(error / norm) if norm else math.sqrt(error)


def _values(source: Source, name: str) -> SourceTensor | None:
    """`name` as floats: MXFP4 blocks are multiplied out with their scales."""
    if not name.endswith("_blocks"):
        return source.tensors.get(name)
    plain = name.removesuffix("_blocks")
    blocks, scales = source.tensors.get(name), source.tensors.get(f"{plain}_scales")
    if blocks is None or scales is None:
        return None
    shape = (*blocks.shape[:-2], blocks.shape[-2] * mxfp4.GROUP)

    def read(first: int, last: int) -> np.ndarray:
        return mxfp4.dequantize(blocks.read(first, last), scales.read(first, last))

    return SourceTensor(plain, "F32", shape, blocks.sources, read)


def _chunks(tensor: SourceTensor, tick: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The tensor's rows, some at a time."""
    step = max(1, CHUNK_VALUES // max(1, math.prod(tensor.shape[1:])))
    for first in range(0, tensor.rows, step):
        rows = tensor.read(first, min(first + step, tensor.rows))
        yield rows
        tick(rows.nbytes)
