"""Reading gpt-oss weights: one table of names, strict checks from the headers, then layer by layer.

Four layouts are known, each recognised by the tensors it holds:
- "hf": Hugging Face's names, experts in MXFP4 (`gate_up_proj_blocks` + `_scales`); the other matrices dense,
  or quantised as config.json's `quantization` says (what the converter of this package writes).
- "original": OpenAI's own names, q, k and v in one matrix, experts in MXFP4.
- "bf16": Hugging Face's names with dense experts, stored transposed [experts, inputs, outputs].
- "mlx": mlx-lm's conversions, gate and up apart, everything quantised by path.

Everything is checked before the first weight is read: names, shapes and dtypes. Weights are then read lazily
and evaluated a layer at a time, so no second copy of more than one layer is ever alive. Expert blocks are
viewed as MLX's uint32 words; they are never repacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.safetensors import TensorInfo, read_folder
from mlx_gptoss.device import on_gpu, parse_dtype
from mlx_gptoss.errors import CheckpointError, ConfigError
from mlx_gptoss.model.config import read_config
from mlx_gptoss.model.graph import Attention, Experts, Layer, MixtureOfExperts, Model, Router, cpu
from mlx_gptoss.model.matrix import Dense, Embedding, Matrix, Projection, Stacked, stack_rows
from mlx_gptoss.model.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, MXFP4, Quantization

FLOATS = ("BF16", "F16", "F32")
LISTED_AT_MOST = 10

# Part -> name in each layout; "{i}" is the layer. Vectors and matrices of the "hf", "bf16" and "mlx" layouts
# share their names; only the experts differ.
_HF_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm.weight",
    "head": "lm_head",
    "attention.norm": "model.layers.{i}.input_layernorm.weight",
    "attention.q": "model.layers.{i}.self_attn.q_proj",
    "attention.k": "model.layers.{i}.self_attn.k_proj",
    "attention.v": "model.layers.{i}.self_attn.v_proj",
    "attention.out": "model.layers.{i}.self_attn.o_proj",
    "attention.sinks": "model.layers.{i}.self_attn.sinks",
    "moe.norm": "model.layers.{i}.post_attention_layernorm.weight",
    "moe.router": "model.layers.{i}.mlp.router",
}
_ORIGINAL_NAMES = {
    "embedding": "embedding",
    "norm": "norm.scale",
    "head": "unembedding",
    "attention.norm": "block.{i}.attn.norm.scale",
    "attention.qkv": "block.{i}.attn.qkv",
    "attention.out": "block.{i}.attn.out",
    "attention.sinks": "block.{i}.attn.sinks",
    "moe.norm": "block.{i}.mlp.norm.scale",
    "moe.router": "block.{i}.mlp.gate",
    "moe.gate_up": "block.{i}.mlp.mlp1_weight.blocks",
    "moe.gate_up_scales": "block.{i}.mlp.mlp1_weight.scales",
    "moe.gate_up_bias": "block.{i}.mlp.mlp1_bias",
    "moe.down": "block.{i}.mlp.mlp2_weight.blocks",
    "moe.down_scales": "block.{i}.mlp.mlp2_weight.scales",
    "moe.down_bias": "block.{i}.mlp.mlp2_bias",
}
_EXPERTS = "model.layers.{i}.mlp.experts."
NAMES: dict[str, dict[str, str]] = {
    "hf": _HF_NAMES
    | {
        "moe.gate_up": _EXPERTS + "gate_up_proj_blocks",
        "moe.gate_up_scales": _EXPERTS + "gate_up_proj_scales",
        "moe.gate_up_bias": _EXPERTS + "gate_up_proj_bias",
        "moe.down": _EXPERTS + "down_proj_blocks",
        "moe.down_scales": _EXPERTS + "down_proj_scales",
        "moe.down_bias": _EXPERTS + "down_proj_bias",
    },
    "original": _ORIGINAL_NAMES,
    "bf16": _HF_NAMES
    | {
        "moe.gate_up": _EXPERTS + "gate_up_proj",
        "moe.gate_up_bias": _EXPERTS + "gate_up_proj_bias",
        "moe.down": _EXPERTS + "down_proj",
        "moe.down_bias": _EXPERTS + "down_proj_bias",
    },
    "mlx": _HF_NAMES
    | {
        "moe.gate": _EXPERTS + "gate_proj",
        "moe.up": _EXPERTS + "up_proj",
        "moe.down": _EXPERTS + "down_proj",
    },
}


def detect_layout(names: set[str] | dict[str, TensorInfo], where: Path) -> str:
    """Which layout the tensor names are of. Raises CheckpointError when they are of none."""
    for layout, part in (("hf", "moe.gate_up"), ("original", "moe.gate_up"), ("mlx", "moe.gate")):
        name = NAMES[layout][part].format(i=0)
        if name in names or f"{name}.weight" in names:
            return layout
    if NAMES["bf16"]["moe.gate_up"].format(i=0) in names:
        return "bf16"
    shown = ", ".join(sorted(names)[:3]) or "none"
    raise CheckpointError(
        f"{where}: no known gpt-oss layout (tensors: {shown} ..): expected Hugging Face's names with "
        "MXFP4 or bf16 experts, OpenAI's original names, or an mlx-lm conversion"
    )


@dataclass(frozen=True)
class _Problems:
    """What is wrong with the headers, collected so that one error tells of all of it."""

    found: list[str]

    def add(self, text: str) -> None:
        self.found.append(text)

    def raise_if_any(self, where: Path) -> None:
        if self.found:
            shown = "; ".join(self.found[:LISTED_AT_MOST])
            more = len(self.found) - LISTED_AT_MOST
            tail = f"; and {more} more" if more > 0 else ""
            count = f"{len(self.found)} problem{'s' if len(self.found) > 1 else ''}"
            raise CheckpointError(f"{where}: the tensors do not fit the config, {count}: {shown}{tail}")


class Checkpoint:
    """A folder of weights whose headers were found right; parts are read when they are asked for.

    Raises ConfigError or CheckpointError, naming every tensor that is missing, extra or misshapen.
    """

    def __init__(self, folder: Path, dtype: mx.Dtype | str | None = None) -> None:
        self.folder = folder
        self.dtype = parse_dtype(dtype)
        self.config, self.raw_config = read_config(folder)
        self.tensors = read_folder(folder)
        self.layout = detect_layout(self.tensors, folder)
        self.names = NAMES[self.layout]
        self._quantization = _read_quantization(self.raw_config)
        self._files: dict[Path, dict[str, mx.array]] = {}
        _check(self)

    # --- what config.json says of a path

    def quantization_of(self, path: str) -> Quantization | None:
        """How the matrix `path` is packed; None when it is dense."""
        if f"{path}.scales" not in self.tensors:
            return None
        default, by_path = self._quantization
        chosen = by_path.get(path, default)
        if chosen is None:
            raise ConfigError(
                f"{self.folder}: {path}.scales is there and config.json's `quantization` does not say how "
                f"{path} is packed: the two contradict each other"
            )
        return chosen

    # --- parts of the graph

    def embedding(self) -> Embedding:
        return Embedding(self._matrix(self.names["embedding"], cast=False), self.dtype)

    def norm(self) -> mx.array:
        return self._vector(self.names["norm"])

    def head(self) -> Projection:
        return _projection([self._matrix(self.names["head"])])

    def layer(self, index: int) -> Layer:
        """The graph of one layer with its weights, lazily: evaluate `arrays()` to read them."""
        name = {part: template.format(i=index) for part, template in self.names.items()}
        attention = Attention(
            self.config,
            index,
            norm=self._vector(name["attention.norm"]),
            **self._qkv(name),
            out=_projection([self._matrix(name["attention.out"])]),
            out_bias=self._vector(name["attention.out"] + ".bias"),
            sinks=self._vector(name["attention.sinks"]),
        )
        router = Router(self._matrix(name["moe.router"]), self._vector(name["moe.router"] + ".bias"))
        moe = MixtureOfExperts(
            self.config, norm=self._vector(name["moe.norm"]), router=router, experts=self._experts(name)
        )
        return Layer(attention, moe)

    def _qkv(self, name: dict[str, str]) -> dict[str, Any]:
        paths = [name[p] for p in ("attention.q", "attention.k", "attention.v", "attention.qkv") if p in name]
        biases = [self._vector(p + ".bias") for p in paths]
        return {
            "qkv": _projection([self._matrix(p) for p in paths]),
            "qkv_bias": biases[0] if len(biases) == 1 else mx.concatenate(biases),
        }

    def _experts(self, name: dict[str, str]) -> Experts:
        if self.layout == "mlx":
            halves = [self._matrix(name["moe.gate"]), self._matrix(name["moe.up"])]
            gate_up = stack_rows(halves)
            if gate_up is None:
                raise CheckpointError(
                    f"{self.folder}: {name['moe.gate']} and {name['moe.up']} "
                    "are packed differently: expected one way"
                )
            biases = [self._vector(name[p] + ".bias") for p in ("moe.gate", "moe.up", "moe.down")]
            bias = mx.concatenate(biases, axis=-1)
            return Experts(gate_up, self._matrix(name["moe.down"]), bias, self.config, interleaved=False)
        bias = mx.concatenate(
            [self._vector(name["moe.gate_up_bias"]), self._vector(name["moe.down_bias"])], axis=-1
        )
        if self.layout == "bf16":
            matrices = [Matrix(self._vector(name[p]).swapaxes(-1, -2)) for p in ("moe.gate_up", "moe.down")]
        else:
            matrices = [self._mxfp4(name[p], name[p + "_scales"]) for p in ("moe.gate_up", "moe.down")]
        return Experts(matrices[0], matrices[1], bias, self.config, interleaved=True)

    # --- tensors

    def _take(self, name: str) -> mx.array:
        """The lazy array of a tensor, handed over: nothing here keeps it alive."""
        path = self.tensors[name].path
        if name not in self._files.get(path, {}):
            try:
                loaded = mx.load(str(path), format="safetensors")
            except RuntimeError as error:
                raise CheckpointError(f"{path}: not readable ({error}): download the file again") from None
            assert isinstance(loaded, dict)
            self._files[path] = loaded
        return self._files[path].pop(name)

    def _vector(self, name: str) -> mx.array:
        return self._take(name).astype(self.dtype)

    def _matrix(self, path: str, *, cast: bool = True) -> Matrix:
        quantization = self.quantization_of(path)
        weight = self._take(f"{path}.weight")
        if quantization is None:
            return Matrix(weight.astype(self.dtype) if cast else weight)
        scales = self._take(f"{path}.scales")
        if quantization.mode != "affine":
            return Matrix(weight, _checked_scales(scales, f"{path}.scales"), None, quantization)
        biases = self._take(f"{path}.biases")
        # MLX wants scales of the activations' dtype; a cast of 1/32 of the matrix, done once.
        return Matrix(weight, scales.astype(self.dtype), biases.astype(self.dtype), quantization)

    def _mxfp4(self, blocks: str, scales: str) -> Matrix:
        words = self._take(blocks).view(mx.uint32).flatten(-2)
        return Matrix(words, _checked_scales(self._take(scales), scales), None, MXFP4)


def load_model(
    folder: Path, dtype: mx.Dtype | str | None = None, progress: Callable[[int, int], None] | None = None
) -> Model:
    """The whole model in memory. `progress(done, total)` counts layers, embedding and head included.

    Raises ConfigError, CheckpointError.
    """
    return read_model(Checkpoint(folder, dtype), progress)


def read_model(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> Model:
    """Read every part of a checked checkpoint, one after the other."""
    config = checkpoint.config
    total = config.num_layers + 2
    tell = progress or (lambda done, total: None)
    embedding = checkpoint.embedding()
    mx.eval(embedding.arrays())
    tell(1, total)
    layers = []
    for i in range(config.num_layers):
        layer = checkpoint.layer(i)
        mx.eval(layer.arrays())
        layers.append(layer)
        tell(i + 2, total)
    norm, head = checkpoint.norm(), checkpoint.head()
    mx.eval(norm, head.arrays())
    # Casting left buffers of the files' dtype in MLX's cache: they are of no more use.
    mx.clear_cache()
    tell(total, total)
    return Model(config, embedding=embedding, layers=layers, norm=norm, head=head)


def _projection(parts: list[Matrix]) -> Projection:
    """One map out of matrices that share their input, stacked where they are packed alike."""
    joined = stack_rows(parts)
    if joined is None:
        return Stacked([_projection([p]) for p in parts])
    return Dense(joined) if on_gpu() else cpu.HostProjection(joined)


def _checked_scales(scales: mx.array, name: str) -> mx.array:
    """MXFP4 scale bytes; 255 stands for NaN and would poison every logit without a word."""
    largest = int(np.asarray(mx.max(scales))) if on_gpu() else int(np.asarray(scales).max())
    if largest == 255:
        raise CheckpointError(
            f"{name}: holds the scale byte 255 (NaN): the file is corrupt, download it again"
        )
    return scales


def _read_quantization(raw: dict[str, Any]) -> tuple[Quantization | None, dict[str, Quantization | None]]:
    """config.json's `quantization` (or mlx-lm's copy of it): the default, and what differs by path."""
    key = "quantization" if raw.get("quantization") is not None else "quantization_config"
    block = raw.get(key)
    if block is None:
        return None, {}
    if not isinstance(block, dict):
        raise ConfigError(f"config.json: {key} is {block!r}: expected an object")
    if key == "quantization_config" and "group_size" not in block:
        method = block.get("quant_method", "mxfp4")
        if method != "mxfp4":
            raise ConfigError(
                f"config.json: quantization_config.quant_method is {method!r}: expected 'mxfp4', "
                "which is how gpt-oss is published; convert the model from an MXFP4 or bf16 checkpoint"
            )
        return None, {}

    def read(where: str, entry: dict[str, Any]) -> Quantization:
        mode = entry.get("mode", "affine")
        bits, group = entry.get("bits"), entry.get("group_size")
        affine = mode == "affine" and bits in AFFINE_BITS and group in AFFINE_GROUP_SIZES
        fits = affine or (mode, bits, group) == ("mxfp4", 4, 32)
        if not (fits and isinstance(bits, int) and isinstance(group, int)):
            raise ConfigError(
                f"config.json: {where} is mode {mode!r}, bits {bits!r}, group_size {group!r}: expected "
                "affine with 2, 3, 4, 5, 6 or 8 bits and groups of 32, 64 or 128, or mxfp4 with 4 bits and "
                "groups of 32"
            )
        return Quantization(mode, bits, group)

    default = read("quantization", block) if "bits" in block else None
    by_path: dict[str, Quantization | None] = {}
    for path, entry in block.items():
        if isinstance(entry, dict):
            by_path[path] = read(f"quantization[{path!r}]", entry)
        elif entry is False:
            by_path[path] = None
    return default, by_path


# --- checks, from the headers alone


def _check(ckpt: Checkpoint) -> None:
    problems = _Problems([])
    expected = dict(expected_tensors(ckpt))
    for name, (shape, dtypes) in expected.items():
        info = ckpt.tensors.get(name)
        if info is None:
            problems.add(f"{name} is missing")
        elif info.shape != shape:
            problems.add(f"{name} has shape {list(info.shape)}, expected {list(shape)}")
        elif info.dtype not in dtypes:
            problems.add(f"{name} is {info.dtype}, expected {' or '.join(dtypes)}")
    for name in ckpt.tensors:
        if name not in expected:
            problems.add(f"{name} is not part of the model")
    problems.raise_if_any(ckpt.folder)


def expected_tensors(ckpt: Checkpoint) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[str, ...]]]]:
    """Name, shape and allowed dtypes of every tensor that the config calls for in this layout."""
    c = ckpt.config
    q_rows, kv_rows = c.num_attention_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def matrix(
        path: str, outputs: int, inputs: int, stack: tuple[int, ...] = ()
    ) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[str, ...]]]]:
        q = ckpt.quantization_of(path)
        if q is None:
            yield f"{path}.weight", ((*stack, outputs, inputs), FLOATS)
            return
        yield f"{path}.weight", ((*stack, outputs, inputs * q.bits // 32), ("U32",))
        groups = (*stack, outputs, inputs // q.group_size)
        yield f"{path}.scales", (groups, FLOATS if q.mode == "affine" else ("U8",))
        if q.mode == "affine":
            yield f"{path}.biases", (groups, FLOATS)

    yield from matrix(ckpt.names["embedding"], c.vocab_size, c.hidden_size)
    yield ckpt.names["norm"], ((c.hidden_size,), FLOATS)
    yield from matrix(ckpt.names["head"], c.vocab_size, c.hidden_size)
    rows = {
        "attention.q": q_rows,
        "attention.k": kv_rows,
        "attention.v": kv_rows,
        "attention.qkv": q_rows + 2 * kv_rows,
        "moe.router": c.num_experts,
    }
    for i in range(c.num_layers):
        name = {part: template.format(i=i) for part, template in ckpt.names.items()}
        yield name["attention.norm"], ((c.hidden_size,), FLOATS)
        yield name["moe.norm"], ((c.hidden_size,), FLOATS)
        yield name["attention.sinks"], ((c.num_attention_heads,), FLOATS)
        for part in rows.keys() & name.keys():
            yield from matrix(name[part], rows[part], c.hidden_size)
            yield name[part] + ".bias", ((rows[part],), FLOATS)
        yield from matrix(name["attention.out"], c.hidden_size, q_rows)
        yield name["attention.out"] + ".bias", ((c.hidden_size,), FLOATS)
        yield from _expected_experts(ckpt, name, matrix)


def _expected_experts(
    ckpt: Checkpoint, name: dict[str, str], matrix: Callable[..., Iterator[Any]]
) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[str, ...]]]]:
    c = ckpt.config
    e, d, f = c.num_experts, c.hidden_size, c.intermediate_size
    if ckpt.layout == "mlx":
        for part, outputs, inputs in (("moe.gate", f, d), ("moe.up", f, d), ("moe.down", d, f)):
            yield from matrix(name[part], outputs, inputs, (e,))
            yield name[part] + ".bias", ((e, outputs), FLOATS)
        return
    for part, outputs, inputs in (("moe.gate_up", 2 * f, d), ("moe.down", d, f)):
        yield name[part + "_bias"], ((e, outputs), FLOATS)
        if ckpt.layout == "bf16":
            yield name[part], ((e, inputs, outputs), FLOATS)
        else:
            yield name[part], ((e, outputs, inputs // 32, 16), ("U8",))
            yield name[part + "_scales"], ((e, outputs, inputs // 32), ("U8",))
