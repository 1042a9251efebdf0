"""From a source and a recipe to a list of jobs, all decided before the first byte is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from mlx_gptoss.checkpoint.layouts import (
    HF,
    LAYOUTS,
    MLX,
    RECORD_ALIGNMENT,
    RecordPart,
    record_parts,
    record_size,
)
from mlx_gptoss.checkpoint.safetensors import DTYPES
from mlx_gptoss.convert import affine, mxfp4
from mlx_gptoss.convert.finite import not_finite
from mlx_gptoss.convert.manifest import Action
from mlx_gptoss.convert.recipes import Recipe
from mlx_gptoss.convert.sources import Source
from mlx_gptoss.convert.tensors import Extent, SourceTensor, to_float32
from mlx_gptoss.errors import ConversionError
from mlx_gptoss.model.quantization import MXFP4, Quantization

CHUNK_VALUES = 1 << 19  # values of a matrix in memory at a time, in each worker
EXPERT_ROWS = 512  # rows of an unquantised expert made float32 at a time
SAMPLED = 32  # without the search, the error is measured on one chunk in so many

# What Hugging Face's config says of a checkpoint whose experts alone are quantised.
_MXFP4_CONFIG = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


@dataclass(frozen=True)
class Output:
    """A tensor of the result; `alignment`: what its place in a file is a multiple of, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    packing: Quantization | None = None  # of a packed weight; its scales and biases have none
    alignment: int = 64

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class Chunk(NamedTuple):
    """Rows of a job's outputs, and sums of squares over what was measured: of the error, of the source."""

    arrays: tuple[np.ndarray, ...]
    squared_error: float = 0.0
    squared_norm: float = 0.0


@dataclass(frozen=True)
class Job:
    """Makes one or several tensors that share their rows, from the same rows of the source.

    `extent`: the bytes of the only output, copied as they are. Else `compute(first, last)` makes the rows
    [first, last) of every output, `chunk_rows` at a time, in any order and from any thread; `in_order`: the
    first ones first, for an output so large that it is not read a second time.
    """

    part: str
    action: Action
    sources: tuple[str, ...]
    outputs: tuple[Output, ...]
    extent: Extent | None = None
    compute: Callable[[int, int], Chunk] | None = None
    chunk_rows: int = 1
    in_order: bool = False

    @property
    def name(self) -> str:
        return self.outputs[0].name

    @property
    def rows(self) -> int:
        return self.outputs[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


@dataclass
class Jobs:
    """All jobs in the order of the result, how matrices are packed (path -> format), remarks for the user.

    dense: whether the experts are not quantised either.
    """

    dense: bool = False
    all: list[Job] = field(default_factory=list)
    quantizations: dict[str, Quantization] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def outputs(self) -> list[Output]:
        return [output for job in self.all for output in job.outputs]

    def note(self, text: str) -> None:
        """A remark, made once however many tensors call for it."""
        if text not in self.notes:
            self.notes.append(text)


def make_jobs(
    source: Source,
    recipe: Recipe,
    *,
    search: bool = True,
    mxfp4_search: bool = False,
    for_streaming: bool = False,
) -> Jobs:
    """Decide what is made of every tensor. Raises ConversionError for what cannot be done.

    for_streaming: all that an expert has lies side by side.
    """
    jobs = Jobs(recipe.experts == "bf16")
    stacks: list[SourceTensor] = []  # of one layer
    for tensor in source.tensors.values():
        if tensor.path is None:
            jobs.all.append(_plain_job(tensor, tensor.part))
        elif tensor.part != "experts":
            jobs.all.extend(_matrix_jobs(jobs, tensor, recipe, search))
        elif jobs.dense:
            jobs.all.append(_dense_experts_job(tensor))
        elif for_streaming:
            stacks.append(tensor)
            if len(stacks) == 2:
                jobs.all.append(_records_job(source, stacks, search=mxfp4_search))
                stacks = []
        elif tensor.pieces:
            jobs.all.extend(_plain_job(piece, tensor.part) for piece in tensor.pieces)
        else:
            jobs.all.append(_expert_job(tensor, search=mxfp4_search))
    return jobs


def make_config(source: Source, jobs: Jobs) -> dict[str, Any]:
    """The result's config.json: every key of Hugging Face's form, and how the matrices are packed.

    With dense parts quantised, `quantization` holds what mlx-lm reads: a default, and an entry per path that
    differs from it. Without any, the result is a Hugging Face checkpoint, and says so in their words.
    """
    given = {key: value for key, value in source.raw_config.items() if value is not None}
    config = {**source.config.to_hf(), **given}
    if jobs.dense:
        return config
    if not jobs.quantizations:
        return {**config, "quantization_config": _MXFP4_CONFIG}
    default = Counter(jobs.quantizations.values()).most_common(1)[0][0]
    quantization: dict[str, Any] = asdict(default)
    for path, chosen in jobs.quantizations.items():
        if chosen != default:
            quantization[path] = asdict(chosen)
    for layer in range(source.config.num_layers):
        for key in (*MLX.gate_up, "experts.down"):
            quantization[MLX.path(key, layer)] = asdict(MXFP4)
        if (router := MLX.path("router", layer)) not in jobs.quantizations:
            quantization[router] = False
    return {**config, "quantization": quantization}


# --- one tensor


def _plain_job(tensor: SourceTensor, part: str) -> Job:
    """Bytes copied where they lie in order; else read row by row; floats stored as bfloat16."""
    cast = tensor.dtype == "F32"
    output = Output(tensor.name, "BF16" if cast else tensor.dtype, tensor.shape, tensor.quantization)
    if tensor.extent is not None and not cast:
        return Job(part, "copy", tensor.sources, (output,), tensor.extent)
    compute = partial(_cast if cast else _relayout, tensor)
    action: Action = "cast" if cast else "relayout"
    return Job(part, action, tensor.sources, (output,), None, compute, _chunk_rows(tensor))


def _relayout(tensor: SourceTensor, first: int, last: int) -> Chunk:
    return Chunk((np.ascontiguousarray(tensor.read(first, last)),))


def _cast(tensor: SourceTensor, first: int, last: int) -> Chunk:
    values = to_float32(tensor.read(first, last))
    norm = _square_sum(tensor, values)
    bits = affine.to_bfloat16(values)
    return Chunk((bits,), _square_sum(tensor, values - to_float32(bits)), norm)


def _matrix_jobs(jobs: Jobs, tensor: SourceTensor, recipe: Recipe, search: bool) -> Iterator[Job]:
    path, part = tensor.path, tensor.part
    assert path is not None
    wanted = _wanted(jobs, tensor, recipe)
    kept = tensor.quantization if wanted is None else wanted
    if kept is None:
        yield _plain_job(tensor, part)
        return
    jobs.quantizations[path] = kept
    if kept == tensor.quantization and tensor.pieces:
        yield from (_plain_job(piece, part) for piece in tensor.pieces)
        return
    if tensor.quantization is not None and kept.bits >= tensor.quantization.bits:
        jobs.note(
            f"{part} was quantised to {tensor.quantization.bits} bits before: {kept.bits} bits cannot bring "
            "back what was lost; convert from the original checkpoint where you can"
        )
    rows, columns = tensor.shape
    outputs = (
        Output(f"{path}.weight", "U32", (rows, columns * kept.bits // 32), kept),
        Output(f"{path}.scales", "BF16", (rows, columns // kept.group_size)),
        Output(f"{path}.biases", "BF16", (rows, columns // kept.group_size)),
    )
    # MLX's quantiser takes bfloat16; a source in another format goes through the search, in float32.
    fast = not search and tensor.dtype == "BF16"
    chunk_rows = _chunk_rows(tensor)
    compute = partial(_fast_rows, tensor, kept, chunk_rows) if fast else partial(_searched_rows, tensor, kept)
    action: Action = "affine" if fast else "affine-search"
    yield Job(part, action, tensor.sources, outputs, None, compute, chunk_rows)


def _wanted(jobs: Jobs, tensor: SourceTensor, recipe: Recipe) -> Quantization | None:
    """The format the recipe asks for, with a smaller group where the rows do not divide by its own."""
    part = tensor.part
    bits = recipe.bits(part)
    if bits is None:
        return None
    columns, wanted = tensor.shape[1], recipe.group_size
    group = next((g for g in (wanted, 64, 32) if g <= wanted and columns % g == 0), None)
    if group is None:
        jobs.note(f"{part}: {columns} columns do not divide into groups of 32 or more, kept in bfloat16")
        return None
    if group != wanted:
        jobs.note(
            f"{part}: {columns} columns do not divide into groups of {wanted}, quantised in groups of {group}"
        )
    return Quantization("affine", bits, group)


def _searched_rows(tensor: SourceTensor, q: Quantization, first: int, last: int) -> Chunk:
    values = to_float32(tensor.read(first, last))
    norm = _square_sum(tensor, values)
    result = affine.search(values, q.bits, q.group_size)
    assert result.squared_error is not None
    return Chunk(result[:3], result.squared_error, norm)


def _fast_rows(tensor: SourceTensor, q: Quantization, chunk_rows: int, first: int, last: int) -> Chunk:
    values = tensor.read(first, last)
    measure = first // chunk_rows % SAMPLED == 0
    if measure:
        norm = _square_sum(tensor, to_float32(values))
    result = affine.quantize(values, q.bits, q.group_size, measure=measure)
    if ((result.scales & 0x7FFF) > 0x7F80).any():  # NaN
        raise not_finite(tensor.sources[:1])
    return Chunk(result[:3], result.squared_error or 0.0, norm if measure else 0.0)


def _expert_job(tensor: SourceTensor, *, search: bool) -> Job:
    """Unquantised experts [E, rows, columns] -> MXFP4 blocks and scales, an expert at a time."""
    experts, rows, columns = tensor.shape
    if columns % mxfp4.GROUP:
        raise ConversionError(f"{tensor.name} has {columns} inputs, MXFP4 needs a multiple of {mxfp4.GROUP}")
    groups = columns // mxfp4.GROUP
    outputs = (
        Output(tensor.name + HF.expert_weight, "U8", (experts, rows, groups, mxfp4.GROUP // 2), MXFP4),
        Output(tensor.name + HF.expert_scales, "U8", (experts, rows, groups)),
    )
    action: Action = "mxfp4-search" if search else "mxfp4"
    return Job("experts", action, tensor.sources, outputs, None, partial(_expert_rows, tensor, search), 1)


def _dense_experts_job(tensor: SourceTensor) -> Job:
    """Experts [E, rows, columns] -> bfloat16 [E, columns, rows], as transformers saves them."""
    experts, rows, columns = tensor.shape
    output = Output(tensor.name + LAYOUTS["bf16"].expert_weight, "BF16", (experts, columns, rows))
    compute = partial(_dense_expert_rows, tensor)
    return Job("experts", "cast", tensor.sources, (output,), None, compute, 1, in_order=True)


def _dense_expert_rows(tensor: SourceTensor, first: int, last: int) -> Chunk:
    chunk = _cast(tensor, first, last)
    return chunk._replace(arrays=(chunk.arrays[0].swapaxes(1, 2),))


def _records_job(source: Source, stacks: list[SourceTensor], *, search: bool) -> Job:
    """The records of a layer's experts, out of its gate_up and its down."""
    gate_up, down = stacks
    path = gate_up.path
    assert path is not None
    name = path.replace(HF.path("experts.gate_up").rpartition(".")[2], "records")
    size = record_size(source.config)
    output = Output(name, "U8", (gate_up.rows, size), MXFP4, RECORD_ALIGNMENT)
    copied = all(tensor.pieces for tensor in stacks)
    action: Action = "relayout" if copied else "mxfp4-search" if search else "mxfp4"
    sources = (*gate_up.sources, *down.sources)
    compute = partial(_record_rows, record_parts(source.config), size, stacks, search)
    return Job("experts", action, sources, (output,), None, compute, 1, in_order=True)


def _record_rows(
    parts: list[RecordPart], size: int, stacks: list[SourceTensor], search: bool, first: int, last: int
) -> Chunk:
    records = np.zeros((last - first, size), np.uint8)
    error = norm = 0.0
    for tensor, key in zip(stacks, ("experts.gate_up", "experts.down"), strict=True):
        if tensor.pieces:
            made = Chunk(tuple(piece.read(first, last) for piece in tensor.pieces))
        else:
            made = _expert_rows(tensor, search, first, last)
        if (made.arrays[1] == 255).any():
            raise not_finite(tensor.sources)
        for part, array in zip((p for p in parts if p.key == key), made.arrays, strict=True):
            records[:, part.start : part.end] = array.reshape(last - first, -1)
        error += made.squared_error
        norm += made.squared_norm
    return Chunk((records,), error, norm)


def _expert_rows(tensor: SourceTensor, search: bool, first: int, last: int) -> Chunk:
    _, rows, columns = tensor.shape
    blocks = np.empty((last - first, rows, columns // mxfp4.GROUP, mxfp4.GROUP // 2), np.uint8)
    scales = np.empty(blocks.shape[:-1], np.uint8)
    error = norm = 0.0
    for index, expert in enumerate(tensor.read(first, last)):
        for start in range(0, rows, EXPERT_ROWS):
            part = slice(start, start + EXPERT_ROWS)
            values = to_float32(expert[part])
            norm += _square_sum(tensor, values)
            blocks[index, part], scales[index, part], part_error = mxfp4.quantize(values, search=search)
            error += part_error
    return Chunk((blocks, scales), error, norm)


def _chunk_rows(tensor: SourceTensor) -> int:
    return max(1, CHUNK_VALUES * tensor.rows // max(1, prod(tensor.shape)))


def _square_sum(tensor: SourceTensor, values: np.ndarray) -> float:
    """Sum of squares. Raises CheckpointError for values that are not finite."""
    flat = values.reshape(-1)
    total = float(np.einsum("i,i->", flat, flat))
    if not np.isfinite(total) and not np.isfinite(flat).all():
        raise not_finite(tensor.sources[:1])
    return total
