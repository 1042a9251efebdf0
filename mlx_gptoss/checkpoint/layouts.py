"""The layouts of gpt-oss checkpoints: every tensor's name, storage and part of the model.

A layout is a row of LAYOUTS; the reader, the memory plan, the converter and the model card all use it. Plain
data: nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from math import prod
from pathlib import Path
from typing import NamedTuple

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.quantization import MXFP4, Quantization

# The parts of the model, in its order. A tensor's key begins with the part it belongs to.
PARTS = ("embedding", "attention", "router", "experts", "norms", "head")
FLOATS = ("BF16", "F16", "F32")
RECORD_ALIGNMENT = 16384
MAX_LISTED = 10  # problems spelled out in one error

PackingOf = Callable[[str], Quantization | None]
"""How the matrix at a path is packed; None when it is dense."""
Place = tuple[str, int | None]
"""A key, and the layer where it is of one."""


class Form(Enum):
    """How a stack of experts is stored.

    BLOCKS: MXFP4, blocks uint8 [E, outputs, inputs / 32, 16] and scales uint8 [E, outputs, inputs / 32].
    TRANSPOSED: dense, [E, inputs, outputs].
    MATRICES: [E, outputs, inputs], dense or packed as config.json says of its path.
    RECORDS: MXFP4, all of an expert side by side (see record_parts), uint8 [E, record_size].
    """

    BLOCKS = auto()
    TRANSPOSED = auto()
    MATRICES = auto()
    RECORDS = auto()


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a checkpoint must hold: a piece of what has this key.

    layer: None for what stands outside of the layers. packing: that of the matrix it is a piece of.
    """

    name: str
    key: str
    layer: int | None
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    packing: Quantization | None = None

    @property
    def part(self) -> str:
        """The part of the model that it belongs to."""
        return part_of(self.key)


@dataclass(frozen=True)
class Layout:
    """One way to name and store the tensors.

    kind: what a manifest calls a conversion's source of this layout. paths: key -> path, "{i}" for the layer.
    A matrix's path is completed by ".weight" (of a packed one ".scales" and ".biases" too) and ".bias", that
    of a stack of experts by the three endings given here; a vector's path is its name.
    """

    name: str
    kind: str
    paths: Mapping[str, str]
    experts: Form
    expert_weight: str
    expert_scales: str
    expert_bias: str

    def path(self, key: str, layer: int = 0) -> str:
        return self.paths[key].format(i=layer)

    @property
    def qkv(self) -> tuple[str, ...]:
        """The keys of q, k and v: one for all, or each by itself."""
        return self._present("attention.qkv", "attention.q", "attention.k", "attention.v")

    @property
    def gate_up(self) -> tuple[str, ...]:
        """The keys of the experts' first matrix: one with alternating rows, or gate and up by themselves."""
        return self._present("experts.gate_up", "experts.gate", "experts.up")

    @property
    def interleaved(self) -> bool:
        """Whether the rows of the experts' first matrix alternate gate, up, gate, up."""
        return len(self.gate_up) == 1

    def _present(self, *keys: str) -> tuple[str, ...]:
        return tuple(key for key in keys if key in self.paths)

    @property
    def mark(self) -> str:
        """A tensor that only this layout has."""
        if self.experts is Form.RECORDS:
            return self.path("experts.records")
        return self.path(self.gate_up[0]) + self.expert_weight

    def places(self, layers: int) -> Iterator[tuple[str, int]]:
        """Key and layer of everything, in the model's order."""
        inside = [key for key, path in self.paths.items() if "{i}" in path]
        yield "embedding", 0
        yield from ((key, layer) for layer in range(layers) for key in inside)
        yield from (("norms.final", 0), ("head", 0))

    def tensors(self, config: ModelConfig, packing_of: PackingOf) -> Iterator[TensorSpec]:
        """Every tensor of a checkpoint of this shape."""
        size = sizes(config)
        for key, layer in self.places(config.num_layers):
            path, part, shape = self.path(key, layer), part_of(key), size[key]
            place = (key, layer if "{i}" in self.paths[key] else None)
            if key == "experts.records":
                yield TensorSpec(path, *place, (config.num_experts, *shape), ("U8",), MXFP4)
            elif part == "experts":
                yield from self._stack(path, place, (config.num_experts, *shape), packing_of)
            elif len(shape) == 1:
                yield TensorSpec(path, *place, shape)
            else:
                yield from _matrix(path, place, shape, packing_of(path))
                if part in ("attention", "router"):
                    yield TensorSpec(f"{path}.bias", *place, shape[:1])

    def _stack(
        self, path: str, place: Place, shape: tuple[int, ...], packing_of: PackingOf
    ) -> Iterator[TensorSpec]:
        count, outputs, inputs = shape
        packing = self.stack_packing(path, packing_of)
        yield TensorSpec(path + self.expert_bias, *place, (count, outputs))
        if self.experts is Form.BLOCKS:
            groups = (count, outputs, inputs // MXFP4.group_size)
            yield TensorSpec(path + self.expert_weight, *place, (*groups, 16), ("U8",), packing)
            yield TensorSpec(path + self.expert_scales, *place, groups, ("U8",), packing)
        elif self.experts is Form.TRANSPOSED:
            yield TensorSpec(path + self.expert_weight, *place, (count, inputs, outputs))
        elif self.experts is Form.MATRICES:
            yield from _matrix(path, place, shape, packing)

    def stack_packing(self, path: str, packing_of: PackingOf) -> Quantization | None:
        """How the stack of experts at a path is packed; None when it is dense."""
        if self.experts is Form.MATRICES:
            return packing_of(path)
        return None if self.experts is Form.TRANSPOSED else MXFP4


def _matrix(
    path: str, place: Place, shape: tuple[int, ...], packing: Quantization | None
) -> Iterator[TensorSpec]:
    if packing is None:
        yield TensorSpec(f"{path}.weight", *place, shape)
        return
    *rows, columns = shape
    groups = (*rows, columns // packing.group_size)
    affine = packing.mode == "affine"
    yield TensorSpec(f"{path}.weight", *place, (*rows, columns * packing.bits // 32), ("U32",), packing)
    yield TensorSpec(f"{path}.scales", *place, groups, FLOATS if affine else ("U8",), packing)
    if affine:
        yield TensorSpec(f"{path}.biases", *place, groups, FLOATS, packing)


def part_of(key: str) -> str:
    """The part of the model that a key belongs to."""
    return key.partition(".")[0]


def sizes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every key the length of its vector, or the outputs and inputs of its matrix (of each expert's)."""
    d, f = c.hidden_size, c.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "embedding": (c.vocab_size, d),
        "norms.attention": (d,),
        "attention.q": (q, d),
        "attention.k": (kv, d),
        "attention.v": (kv, d),
        "attention.qkv": (q + 2 * kv, d),
        "attention.out": (d, q),
        "attention.sinks": (c.num_attention_heads,),
        "norms.experts": (d,),
        "router": (c.num_experts, d),
        "experts.gate_up": (2 * f, d),
        "experts.gate": (f, d),
        "experts.up": (f, d),
        "experts.down": (d, f),
        "experts.records": (record_size(c),),
        "norms.final": (d,),
        "head": (c.vocab_size, d),
    }


class RecordPart(NamedTuple):
    """Blocks or scales of one of an expert's matrices: bytes [start, end) of its record."""

    key: str
    ending: str
    shape: tuple[int, ...]
    start: int
    end: int


def record_parts(c: ModelConfig) -> list[RecordPart]:
    """What an expert's record holds, in its order: the blocks of both matrices, then their scales.

    Blocks are a multiple of 16 bytes, so that they can be taken as words where they lie.
    """
    matrices = {"experts.gate_up": 2 * c.intermediate_size, "experts.down": c.hidden_size}
    inputs = {"experts.gate_up": c.hidden_size, "experts.down": c.intermediate_size}
    parts, at = [], 0
    for ending, each in (("_blocks", (16,)), ("_scales", ())):
        for key, outputs in matrices.items():
            shape = (outputs, inputs[key] // MXFP4.group_size, *each)
            parts.append(RecordPart(key, ending, shape, at, at := at + prod(shape)))
    return parts


def record_size(c: ModelConfig) -> int:
    """Bytes from one record to the next: whole pages of a Mac, so that a read touches no other's."""
    return -(-record_parts(c)[-1].end // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


# Hugging Face's names; the layouts that use them differ in the experts alone.
_HF = {
    "embedding": "model.embed_tokens",
    "norms.attention": "model.layers.{i}.input_layernorm.weight",
    "attention.q": "model.layers.{i}.self_attn.q_proj",
    "attention.k": "model.layers.{i}.self_attn.k_proj",
    "attention.v": "model.layers.{i}.self_attn.v_proj",
    "attention.out": "model.layers.{i}.self_attn.o_proj",
    "attention.sinks": "model.layers.{i}.self_attn.sinks",
    "norms.experts": "model.layers.{i}.post_attention_layernorm.weight",
    "router": "model.layers.{i}.mlp.router",
    "norms.final": "model.norm.weight",
    "head": "lm_head",
}
_TOGETHER = {
    "experts.gate_up": "model.layers.{i}.mlp.experts.gate_up_proj",
    "experts.down": "model.layers.{i}.mlp.experts.down_proj",
}
_APART = {
    "experts.gate": "model.layers.{i}.mlp.experts.gate_proj",
    "experts.up": "model.layers.{i}.mlp.experts.up_proj",
    "experts.down": "model.layers.{i}.mlp.experts.down_proj",
}
_ORIGINAL = {
    "embedding": "embedding",
    "norms.attention": "block.{i}.attn.norm.scale",
    "attention.qkv": "block.{i}.attn.qkv",
    "attention.out": "block.{i}.attn.out",
    "attention.sinks": "block.{i}.attn.sinks",
    "norms.experts": "block.{i}.mlp.norm.scale",
    "router": "block.{i}.mlp.gate",
    "experts.gate_up": "block.{i}.mlp.mlp1",
    "experts.down": "block.{i}.mlp.mlp2",
    "norms.final": "norm.scale",
    "head": "unembedding",
}

# As published; the other matrices dense, or packed as config.json's `quantization` says (what this package's
# converter writes).
HF = Layout("hf", "hf-mxfp4", _HF | _TOGETHER, Form.BLOCKS, "_blocks", "_scales", "_bias")
_RECORDS = _TOGETHER | {"experts.records": "model.layers.{i}.mlp.experts.records"}
# As HF, with an expert's bytes side by side: what this package's converter writes for streaming.
STREAMING = Layout("streaming", "streaming", _HF | _RECORDS, Form.RECORDS, "", "", "_bias")
# mlx-lm's conversions.
MLX = Layout("mlx", "mlx", _HF | _APART, Form.MATRICES, ".weight", ".scales", ".bias")
_ROWS = (
    HF,
    # OpenAI's own files.
    Layout("original", "original", _ORIGINAL, Form.BLOCKS, "_weight.blocks", "_weight.scales", "_bias"),
    # Fine-tunes that transformers saved.
    Layout("bf16", "hf-bf16", _HF | _TOGETHER, Form.TRANSPOSED, "", "", "_bias"),
    MLX,
    STREAMING,
)
LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in _ROWS}


def check_tensors(
    found: Mapping[str, tuple[str, tuple[int, ...]]], specs: Mapping[str, TensorSpec], where: Path
) -> None:
    """Compare name -> (dtype, shape) with what must be there.

    Raises CheckpointError naming every tensor that is missing, extra, misshapen or of another dtype.
    """
    problems = []
    for name, spec in specs.items():
        dtype, shape = found.get(name, (None, ()))
        if dtype is None:
            problems.append(f"{name} is missing")
        elif shape != spec.shape:
            problems.append(f"{name} has shape {list(shape)}, expected {list(spec.shape)}")
        elif dtype not in spec.dtypes:
            problems.append(f"{name} is {dtype}, expected {' or '.join(spec.dtypes)}")
    problems += [f"{name} is not part of the model" for name in found if name not in specs]
    if problems:
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(
            f"{where}: the tensors do not fit the config, {len(problems)} "
            f"problem{'s' if len(problems) > 1 else ''}: {'; '.join(problems[:MAX_LISTED])}{more}"
        )


def detect_layout(names: Collection[str], where: Path) -> Layout:
    """Which layout the tensor names are of. Raises CheckpointError when they are of none."""
    for layout in LAYOUTS.values():
        if layout.mark in names:
            return layout
    shown = ", ".join(sorted(names)[:3]) or "none"
    raise CheckpointError(
        f"{where}: no known gpt-oss layout (tensors: {shown} ..): expected Hugging Face's names with "
        "MXFP4 or bf16 experts, OpenAI's original names, or an mlx-lm conversion"
    )
