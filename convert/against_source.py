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
from typing import TypeAlias, TypeGuard

import numpy as np

from mlx_gptoss.checkpoint.layouts import HF, STREAMING
from mlx_gptoss.convert.manifest import Manifest, TensorEntry
from mlx_gptoss.convert.merge import merged
from mlx_gptoss.convert.recipes import BFLOAT16
from mlx_gptoss.convert.sources import open_source
from mlx_gptoss.convert.tensors import SourceTensor, to_float32
from mlx_gptoss.errors import CheckpointError

CHUNK_VALUES = 4 << 20  # values of a tensor in memory at a time, or one row where that is more

# How far a recorded error may be from the true one, relatively: without the search the converter measures
# only one chunk in several.
_TOLERANCE = {"affine": 0.25}


Pairs: TypeAlias = list[tuple[SourceTensor, SourceTensor]]


@dataclass
class Comparison:
    """identical: tensors whose bytes, or exact values, are the source's. errors: relative error (root of the
    squared error over the squared norm) of every other tensor that has one. problems: (tensor, what differs).
    """

    identical: set[str] = field(default_factory=set)
    errors: dict[str, float] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)


def compare_with_source(
    folder: Path, manifest: Manifest, source: Path, tick: Callable[[int], None], adapter: Path | None = None
) -> Comparison:
    """Compare every tensor of the manifest. `tick` is called with the source's bytes as they are read.

    adapter: a folder with the adapter that is merged into the conversion.

    Raises what opening the source or the adapter raises: ConfigError, CheckpointError, ConversionError,
    AdapterError.
    """
    opened = open_source(source)
    if adapter is not None:
        opened = merged(opened, adapter, BFLOAT16)
    origin, made = opened.tensors, open_source(folder).tensors
    stored = {piece.name: piece for tensor in origin.values() for piece in (tensor, *tensor.pieces)}
    matrix = {piece.name: tensor for tensor in made.values() for piece in (tensor, *tensor.pieces)}
    result = Comparison()
    for name, entry in sorted(manifest.tensors.items()):
        exact = entry.action in ("copy", "relayout")
        if not exact and entry.relative_error is None:
            continue  # scales and biases: their weight's error is theirs
        theirs, ours = stored.get(name), matrix.get(name)
        before = None if ours is None else origin.get(ours.name)
        stacks = _stacks(name, origin, made)
        if stacks and exact:
            error = 0.0 if _same_pieces(stacks, tick) else math.inf
        elif stacks:
            error = _measure(stacks, tick)
        elif exact and _as_stored(theirs, entry):
            error = 0.0 if _sha256(theirs, tick) == entry.sha256 else math.inf
        elif before is None or ours is None:
            result.problems.append((name, "the source has no such tensor"))
            continue
        else:
            error = _measure([(before, ours)], tick)
        if exact and error == 0.0:
            result.identical.add(name)
        elif exact:
            result.problems.append((name, "its bytes are not the source's"))
        else:
            result.errors[name] = error
            stated = entry.relative_error
            assert stated is not None
            if not math.isclose(error, stated, rel_tol=_TOLERANCE.get(entry.action, 1e-3), abs_tol=1e-6):
                differs = f"its error against the source is {error:.3%}, the manifest says {stated:.3%}"
                result.problems.append((name, differs))
    return result


def _as_stored(theirs: SourceTensor | None, entry: TensorEntry) -> TypeGuard[SourceTensor]:
    """Whether the source's tensor has the form of the conversion's. A stack of dense experts is turned."""
    if theirs is None or (entry.part == "experts" and theirs.path is not None):
        return False
    return (theirs.dtype, theirs.shape) == (entry.dtype, entry.shape)


def _sha256(tensor: SourceTensor, tick: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    for rows in _chunks(tensor, tick):
        digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def _stacks(name: str, *tensors: dict[str, SourceTensor]) -> list[tuple[SourceTensor, SourceTensor]]:
    """The source's stacks of experts, and ours, that lie in the records `name`; none for another tensor."""
    experts, _, last = name.rpartition(".")
    if last != STREAMING.path("experts.records").rpartition(".")[2]:
        return []
    names = [f"{experts}.{HF.path(key).rpartition('.')[2]}" for key in ("experts.gate_up", "experts.down")]
    origin, made = tensors
    return [(origin[n], made[n]) for n in names if n in origin and n in made]


def _same_pieces(pairs: Pairs, tick: Callable[[int], None]) -> bool:
    """Whether the blocks and scales of stacks of experts are the same bytes."""
    return all(
        _sha256(theirs, tick) == _sha256(ours, lambda count: None)
        for before, after in pairs
        for theirs, ours in zip(before.pieces, after.pieces, strict=True)
    )


def _measure(pairs: Pairs, tick: Callable[[int], None]) -> float:
    """Relative error of the values of some tensors against those of others."""
    error = norm = 0.0
    for before, after in pairs:
        if before.shape != after.shape:
            raise CheckpointError(
                f"{after.name}: the source has {list(before.shape)}, expected {list(after.shape)}"
            )
        first = 0
        for rows in _chunks(before, tick):
            last = first + len(rows)
            values = to_float32(rows)
            difference = values - to_float32(after.read(first, last))
            error += float(np.sum(np.square(difference), dtype=np.float64))
            norm += float(np.sum(np.square(values), dtype=np.float64))
            first = last
    return math.sqrt(error / norm) if norm else math.sqrt(error)


def _chunks(tensor: SourceTensor, tick: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The tensor's rows, some at a time."""
    step = max(1, CHUNK_VALUES // max(1, math.prod(tensor.shape[1:])))
    for first in range(0, tensor.rows, step):
        rows = tensor.read(first, min(first + step, tensor.rows))
        yield rows
        tick(rows.nbytes)
