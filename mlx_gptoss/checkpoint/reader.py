"""Reading gpt-oss weights: strict checks from the headers, then layer by layer.

Everything is checked before the first weight is read: names, shapes and dtypes, against the layout
(layouts.py). Weights are then read lazily and evaluated a layer at a time, so no second copy of more than one
layer is ever alive. Expert blocks are viewed as MLX's uint32 words; they are never repacked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.finite import not_finite
from mlx_gptoss.checkpoint.layouts import (
    Form,
    TensorSpec,
    check_tensors,
    detect_layout,
    part_of,
    record_parts,
)
from mlx_gptoss.checkpoint.safetensors import read_folder, read_names
from mlx_gptoss.device import on_gpu, parse_dtype
from mlx_gptoss.errors import CheckpointError, ConfigError
from mlx_gptoss.model.config import read_config
from mlx_gptoss.model.cpu import HostExperts, HostProjection
from mlx_gptoss.model.experts import Experts, ExpertWeights, ResidentExperts
from mlx_gptoss.model.graph import Attention, Layer, MixtureOfExperts, Model
from mlx_gptoss.model.matrix import Embedding, Matrix, stack_rows
from mlx_gptoss.model.projection import Dense, Projection, Stacked
from mlx_gptoss.model.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, MXFP4, Quantization


class Streaming(Protocol):
    """What makes those parts of the graph that are not to be in memory whole."""

    def embedding(self, checkpoint: Checkpoint) -> Embedding: ...

    def experts(self, checkpoint: Checkpoint, layer: int, bias: mx.array) -> Experts: ...


@dataclass(frozen=True)
class Portion:
    """Some of a model's layers; with the `ends`, also what stands outside of the layers."""

    layers: range
    ends: bool = False

    def has(self, spec: TensorSpec) -> bool:
        return self.ends if spec.layer is None else spec.layer in self.layers


class Checkpoint:
    """A folder of weights with checked headers; its parts are read on demand.

    portion: what alone is there, of a model whose other layers are on other machines; files that hold nothing
    of it are not opened. Raises ConfigError or CheckpointError, naming every tensor that is missing, extra or
    misshapen.
    """

    def __init__(
        self, folder: Path, dtype: mx.Dtype | str | None = None, portion: Portion | None = None
    ) -> None:
        self.folder = folder
        self.dtype = parse_dtype(dtype)
        self.config, self.raw_config = read_config(folder)
        self.portion = portion or Portion(range(self.config.num_layers), ends=True)
        self.tensors = read_folder(folder) if portion is None else {}
        self._names = frozenset(self.tensors if portion is None else read_names(folder))
        self.layout = detect_layout(self._names, folder)
        self._quantization = _read_quantization(self.raw_config)
        self.part_config = self.config  # the shape of the layers that are made
        self.make_attention: Callable[..., Attention] = Attention
        self.make_experts: Callable[..., MixtureOfExperts] = MixtureOfExperts
        self.streaming: Streaming | None = None  # set where not all experts are to be in memory
        self.unpacked: tuple[str, ...] = ()  # quantised parts that are to be floats in memory
        self._unchecked: list[tuple[str, mx.array]] = []
        self._files: dict[Path, dict[str, mx.array]] = {}
        specs = self.layout.tensors(self.config, self.quantization_of)
        self.specs = {spec.name: spec for spec in specs if self.portion.has(spec)}
        if portion is not None:
            self.tensors = read_folder(folder, self.specs)
        check_tensors({name: (t.dtype, t.shape) for name, t in self.tensors.items()}, self.specs, folder)

    def quantization_of(self, path: str) -> Quantization | None:
        """How the matrix `path` is packed; None when it is dense."""
        if f"{path}.scales" not in self._names:
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
        if self.streaming is not None:
            return self.streaming.embedding(self)
        return Embedding(self._matrix(self.layout.path("embedding"), cast=False), self.dtype)

    def norm(self) -> mx.array:
        return self._floats(self.layout.path("norms.final"))

    def head(self) -> Projection:
        return self.projection("head")

    def layer(self, index: int) -> Layer:
        """The graph of one layer with its weights, lazily: evaluate `arrays()` to read them."""
        path = {key: self.layout.path(key, index) for key in self.layout.paths}
        qkv = self.layout.qkv
        attention = self.make_attention(
            self.part_config,
            index,
            norm=self._floats(path["norms.attention"]),
            qkv=self.projection(*qkv, layer=index),
            qkv_bias=self._vectors([path[key] + ".bias" for key in qkv]),
            out=self.projection("attention.out", layer=index),
            out_bias=self._floats(path["attention.out"] + ".bias"),
            sinks=self._floats(path["attention.sinks"]),
        )
        moe = self.make_experts(
            self.part_config,
            norm=self._floats(path["norms.experts"]),
            router=self.projection("router", layer=index, bias=self._floats(path["router"] + ".bias")),
            experts=self.experts(index),
        )
        return Layer(attention, moe)

    def projection(self, *keys: str, layer: int = 0, bias: mx.array | None = None) -> Projection:
        """One map out of the matrices of these keys, which share their input.

        Every projection of the graph is made here, so a subclass may wrap them all.
        """
        matrices = [self._matrix(self.layout.path(key, layer)) for key in keys]
        if part_of(keys[0]) in self.unpacked:
            matrices = [Matrix(m.dense(self.dtype)) for m in matrices]
        joined = stack_rows(matrices)
        return Stacked([_applied(m) for m in matrices]) if joined is None else _applied(joined, bias)

    def experts(self, layer: int) -> Experts:
        """The experts of a layer, in the way that suits this device."""
        halves = [self.layout.path(key, layer) for key in self.layout.gate_up]
        down = self.layout.path("experts.down", layer)
        bias = self._vectors([path + self.layout.expert_bias for path in (*halves, down)])
        if self.streaming is not None:
            return self.streaming.experts(self, layer, bias)
        if self.layout.experts is Form.RECORDS:
            weights = self.expert_weights(*self._from_records(layer), bias)
            return ResidentExperts(weights) if on_gpu() else HostExperts(weights)
        gate_up = stack_rows([self._stack(path) for path in halves])
        if gate_up is None:
            raise CheckpointError(
                f"{self.folder}: {' and '.join(halves)} are packed differently: expected one way"
            )
        weights = self.expert_weights(gate_up, self._stack(down), bias)
        return ResidentExperts(weights) if on_gpu() else HostExperts(weights)

    @property
    def expert_weights(self) -> Callable[[Matrix, Matrix, mx.array], ExpertWeights]:
        """What makes a layer's experts of gate_up, down and the biases."""
        return partial(
            ExpertWeights,
            interleaved=self.layout.interleaved,
            limit=self.config.swiglu_limit,
            alpha=self.config.swiglu_alpha,
        )

    def _stack(self, path: str) -> Matrix:
        """The matrices of all experts, [E, outputs, inputs]."""
        form, name = self.layout.experts, path + self.layout.expert_weight
        if form is Form.MATRICES:
            return self._matrix(path)
        if form is Form.TRANSPOSED:
            return Matrix(self._floats(name).swapaxes(-1, -2))
        words = self._take(name).view(mx.uint32).flatten(-2)
        return Matrix(words, self._scales(path + self.layout.expert_scales), None, MXFP4)

    def _from_records(self, layer: int) -> tuple[Matrix, Matrix]:
        """The stacks of gate_up and down, out of the experts' records."""
        records = self._take(self.layout.path("experts.records", layer))
        blocks, scales = [], []
        for part in record_parts(self.config):
            cut = mx.contiguous(records[:, part.start : part.end]).reshape(-1, *part.shape)
            if part.ending == "_blocks":
                blocks.append(cut.view(mx.uint32).flatten(-2))
            else:
                scales.append(self._check_scales(cut, self.layout.path(part.key, layer)))
        gate_up, down = (Matrix(b, s, None, MXFP4) for b, s in zip(blocks, scales, strict=True))
        return gate_up, down

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

    def _floats(self, name: str, *, cast: bool = True) -> mx.array:
        """A tensor of floats, which `check_finite` looks at once it is evaluated."""
        array = self._take(name)
        array = array.astype(self.dtype) if cast else array
        self._unchecked.append((name, array))
        return array

    def check_finite(self) -> None:
        """Raise CheckpointError for NaN or infinity in what was read and evaluated since the last call."""
        unchecked, self._unchecked = self._unchecked, []
        if name := not_finite(unchecked):
            raise CheckpointError(
                f"{self.folder}: {name} holds NaN or infinity: the file is corrupt, download it again"
            )

    def _vectors(self, names: list[str]) -> mx.array:
        """Several side by side along the last axis."""
        return mx.concatenate([self._floats(name) for name in names], axis=-1)

    def _matrix(self, path: str, *, cast: bool = True) -> Matrix:
        quantization = self.quantization_of(path)
        if quantization is None:
            return Matrix(self._floats(f"{path}.weight", cast=cast))
        weight = self._take(f"{path}.weight")
        if quantization.mode != "affine":
            return Matrix(weight, self._scales(f"{path}.scales"), None, quantization)
        # MLX wants scales of the activations' dtype; a cast of 1/32 of the matrix, done once.
        return Matrix(weight, self._floats(f"{path}.scales"), self._floats(f"{path}.biases"), quantization)

    def _scales(self, name: str) -> mx.array:
        return self._check_scales(self._take(name), name)

    def _check_scales(self, scales: mx.array, name: str) -> mx.array:
        """MXFP4 scale bytes; 255 stands for NaN and would silently poison every logit."""
        largest = int(np.asarray(mx.max(scales))) if on_gpu() else int(np.asarray(scales).max())
        if largest == 255:
            raise CheckpointError(
                f"{name}: holds the scale byte 255 (NaN): the file is corrupt, download it again"
            )
        return scales


def load_model(
    folder: Path, dtype: mx.Dtype | str | None = None, progress: Callable[[int, int], None] | None = None
) -> Model:
    """The whole model in memory. `progress(done, total)` counts layers, embedding and head included.

    Raises ConfigError, CheckpointError.
    """
    return read_model(Checkpoint(folder, dtype), progress)


def read_model(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> Model:
    """Read every part of a checked checkpoint, one after the other."""
    total = len(checkpoint.portion.layers) + 2
    tell = progress or (lambda done, total: None)
    embedding = checkpoint.embedding()
    mx.eval(embedding.arrays())
    checkpoint.check_finite()
    tell(1, total)
    layers = read_layers(checkpoint, lambda done: tell(done + 1, total))
    norm, head = checkpoint.norm(), checkpoint.head()
    mx.eval(norm, head.arrays())
    checkpoint.check_finite()
    # Casting left buffers of the files' dtype in MLX's cache; nothing will reuse them.
    mx.clear_cache()
    tell(total, total)
    return Model(checkpoint.config, embedding=embedding, layers=layers, norm=norm, head=head)


def read_layers(checkpoint: Checkpoint, progress: Callable[[int], None] = lambda done: None) -> list[Layer]:
    """Read the layers that a checkpoint has, one after the other."""
    layers: list[Layer] = []
    for index in checkpoint.portion.layers:
        layer = checkpoint.layer(index)
        layer.attention.index = len(layers)  # its place among the caches of those that are here
        mx.eval(layer.arrays())
        checkpoint.check_finite()
        layers.append(layer)
        progress(len(layers))
    return layers


def _applied(matrix: Matrix, bias: mx.array | None = None) -> Projection:
    """The way that suits the device. Only the router has a bias; it is small enough to leave to MLX."""
    return Dense(matrix, bias) if on_gpu() or bias is not None else HostProjection(matrix)


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
