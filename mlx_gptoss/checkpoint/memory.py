"""How much memory a checkpoint will take and how many bytes a token reads, from the files' headers alone.

Used by `inspect`, and by the engine before it loads anything. All sizes are bytes. What each part becomes in
memory follows reader.py: quantised words, MXFP4 scales and the embedding stay as they are stored, all
other floats become the compute dtype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx

from mlx_gptoss.checkpoint.layouts import FLOATS, PARTS, TensorSpec, record_parts
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.checkpoint.safetensors import TensorInfo
from mlx_gptoss.device import available_memory, kept_buffers, on_gpu
from mlx_gptoss.errors import MemoryLimitError
from mlx_gptoss.model.cache import window_room
from mlx_gptoss.model.config import FULL, ModelConfig

# Python, MLX and its libraries, and the activations of one decoded token. A GPU's working set, which is what
# is counted there, holds the activations alone.
RUNTIME_BYTES = 100 * 2**20
GPU_RUNTIME_BYTES = 64 * 2**20
# What a tokenizer takes for each token, and the tokens of gpt-oss's.
TOKEN_BYTES = 1800
VOCABULARY = 201_088
# The parts worth unpacking, the one that gains most first: attention's matrices see every row of a prompt.
UNPACKED = ("attention", "head")


@dataclass(frozen=True)
class Part:
    """One part of the model in one stored format. `read` is what one decoded token reads of it."""

    name: str
    format: str
    tensors: int
    stored: int
    loaded: int
    read: float


@dataclass(frozen=True)
class Expert:
    """One expert of one layer: its bytes on disk, and in memory."""

    stored: int
    loaded: int


@dataclass(frozen=True)
class MemoryPlan:
    """A checkpoint's bytes: on disk, in memory, per decoded token, per token of context."""

    config: ModelConfig
    layout: str
    dtype: mx.Dtype
    parts: tuple[Part, ...]
    transient: int  # the largest tensor that is cast while loading: its stored form is alive beside the cast
    expert: Expert
    layers: tuple[int, ...]  # loaded bytes of each layer
    slots: int | None = None  # experts of a layer that are in memory; None: all
    unpacked: tuple[str, ...] = ()  # quantised parts that are floats in memory
    vocabulary: int = 0  # tokens of its tokenizer, 0 without one

    @property
    def stored(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(p.stored for p in self.parts)

    @property
    def weights(self) -> int:
        """Bytes of the loaded weights."""
        return sum(p.loaded for p in self.parts)

    @property
    def read_per_token(self) -> int:
        """Bytes of weights that one decoded token reads (its keys and values come on top).

        That is everything but most of the embedding, where it reads one row, and of the experts, where it
        reads experts_per_token in each layer.
        """
        return round(sum(p.read for p in self.parts))

    @property
    def kv_per_token(self) -> int:
        """Bytes of keys and values that a token adds in the full-attention layers."""
        return self._token_layer * self.config.layer_types.count(FULL)

    @property
    def kv_window(self) -> int:
        """Bytes of keys and values of the sliding layers of one sequence, whatever its length."""
        sliding = self.config.num_layers - self.config.layer_types.count(FULL)
        return self._token_layer * sliding * window_room(self.config.sliding_window - 1)

    @property
    def _token_layer(self) -> int:
        return 2 * self.config.num_kv_heads * self.config.head_dim * self.dtype.size

    def summary(self) -> str:
        """In one phrase: how the experts and most of the rest are stored, and the bytes of it all."""
        rest = max((p for p in self.parts if p.name != "experts"), key=lambda p: p.stored)
        experts = max((p for p in self.parts if p.name == "experts"), key=lambda p: p.stored)
        return f"experts {experts.format}, the rest {rest.format}, weights {gigabytes(self.weights)}"

    def kv(self, context: int) -> int:
        """Bytes of the KV caches of one sequence of `context` tokens."""
        return self.kv_per_token * context + self.kv_window

    def total(self, context: int = 0) -> int:
        """Bytes a process needs to run one sequence of `context` tokens: weights, caches, the runtime."""
        running = self.kv(context) if context else 0
        kept = 0 if on_gpu() else kept_buffers(self.weights)
        return self.weights + max(running, self.transient) + kept + runtime_bytes(self.vocabulary)

    @property
    def slot(self) -> int:
        """Bytes of a slot in every layer."""
        return self.expert.loaded * self.config.num_layers

    @property
    def streamed(self) -> str:
        """What is where, when not all experts are in memory: a few words for one line, else none."""
        if self.slots is None:
            return ""
        held, absent = self.slots * self.slot, self.config.num_experts - self.slots
        on_disk = absent * self.expert.stored * self.config.num_layers
        return (
            f"{gigabytes(self.stored)}; {self.slots} of {self.config.num_experts} experts a layer in memory "
            f"({gigabytes(held)}), {gigabytes(on_disk)} of experts read when a token needs them; "
        )

    def require(self, available: int | None = None) -> None:
        """Raise MemoryLimitError when the weights do not fit into `available` (default: free) bytes."""
        room = available_memory() if available is None else available
        if self.total() > room:
            cure = ", or let the GPU have more (sudo sysctl iogpu.wired_limit_mb=N)" if on_gpu() else ""
            streamed = f", {self.slots} experts a layer" if self.slots is not None else ""
            raise MemoryLimitError(
                f"the model needs {gigabytes(self.total())} (weights {gigabytes(self.weights)} as "
                f"{_name(self.dtype)}{streamed}) and {gigabytes(room)} are free: close other programs, use a "
                f"smaller or more strongly quantised model (mlx-gptoss convert makes 4 bits){cure}",
                needed=self.total(),
                available=room,
            )


def runtime_bytes(vocabulary: int = VOCABULARY) -> int:
    """What a process takes beside its model, on this device. vocabulary: tokens of its tokenizer."""
    return GPU_RUNTIME_BYTES if on_gpu() else RUNTIME_BYTES + TOKEN_BYTES * vocabulary


def plan(folder: Path | str, dtype: mx.Dtype | str | None = None) -> MemoryPlan:
    """The plan of the checkpoint in `folder` for a compute dtype (default: the device's).

    Reads headers only. Raises ConfigError and CheckpointError like loading does.
    """
    return plan_checkpoint(Checkpoint(Path(folder), dtype))


def plan_checkpoint(
    checkpoint: Checkpoint, slots: int | None = None, unpacked: tuple[str, ...] = ()
) -> MemoryPlan:
    """The plan of a checkpoint whose headers are already read.

    slots: see MemoryPlan; with them, the embedding's rows are read as they are wanted. unpacked: parts.
    """
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
    config, transient, expert = checkpoint.config, 0, Expert(0, 0)
    layers = [0] * config.num_layers
    every = config.num_experts * len(checkpoint.portion.layers)
    for name, tensor in checkpoint.tensors.items():
        spec = checkpoint.specs[name]
        bias = spec.packing is None and len(spec.shape) == 2  # of experts: small, and all in memory
        whole = _loaded(tensor, spec, checkpoint.dtype, unpacked)
        if spec.part == "experts" and len(spec.shape) == 2 and not bias:  # records: without their padding
            whole = config.num_experts * record_parts(config)[-1].end
        loaded = whole
        of_expert = spec.part == "experts" and not bias
        if of_expert:
            expert = Expert(expert.stored + tensor.nbytes, expert.loaded + whole)
        if slots is not None:
            if of_expert:
                loaded = whole * slots // config.num_experts
            elif spec.part == "experts":
                loaded += whole * slots // config.num_experts
                expert = Expert(expert.stored, expert.loaded + whole)
            elif spec.part == "embedding":
                loaded = 0
        if whole != tensor.nbytes and loaded and (slots is None or not of_expert):
            transient = max(transient, tensor.nbytes)
        if spec.layer is not None:
            layers[spec.layer] += loaded
        row = sums[spec.part, _format(tensor, spec)]
        row[0] += 1
        row[1] += tensor.nbytes
        row[2] += loaded
        row[3] += whole * _share_read(spec.part, checkpoint.config)
    parts = [
        Part(name, form, int(count), int(stored), int(loaded), read)
        for (name, form), (count, stored, loaded, read) in sums.items()
    ]
    parts.sort(key=lambda p: (PARTS.index(p.name), -p.stored))
    one = Expert(expert.stored // every, expert.loaded // every)
    layout = checkpoint.layout.name
    vocabulary = config.vocab_size if (checkpoint.folder / "tokenizer.json").exists() else 0
    return MemoryPlan(
        config=config,
        layout=layout,
        dtype=checkpoint.dtype,
        parts=tuple(parts),
        transient=transient,
        expert=one,
        layers=tuple(layers),
        slots=slots,
        unpacked=unpacked,
        vocabulary=vocabulary,
    )


def plan_experts(checkpoint: Checkpoint, wanted: int | str, free: int, beside: int) -> MemoryPlan:
    """The plan by which a checkpoint runs in `free` bytes, `beside` of which something else shall have.

    wanted: bytes for experts, "all", or "auto": all where they fit, else as many as do. What else there is
    gives way before a token's own experts do. Raises MemoryLimitError.
    """
    whole, config = plan_checkpoint(checkpoint), checkpoint.config
    if wanted == "all" or (wanted == "auto" and whole.total() + beside <= free):
        whole.require(free)
        return _unpacked(checkpoint, whole, free - beside)
    fewest = config.experts_per_token
    least = plan_checkpoint(checkpoint, fewest)
    if isinstance(wanted, int):
        slots = wanted // least.slot
        if slots < fewest:
            raise MemoryLimitError(
                f"expert_memory is {gigabytes(wanted)}: a token needs {fewest} experts in each layer, "
                f"{gigabytes(fewest * least.slot)}",
                needed=fewest * least.slot,
                available=wanted,
            )
        if slots >= config.num_experts:
            whole.require(free)
            return _unpacked(checkpoint, whole, free - beside)
    else:
        slots = fewest + max(0, free - beside - least.total()) // least.slot
        slots = min(slots, config.num_experts)
    made = plan_checkpoint(checkpoint, slots)
    if wanted == "auto":  # with the weights grows what MLX keeps beside them
        while slots > fewest and made.total() + beside > free:
            slots -= 1
            made = plan_checkpoint(checkpoint, slots)
    made.require(free)
    return _unpacked(checkpoint, made, free - beside)


def _unpacked(checkpoint: Checkpoint, made: MemoryPlan, room: int) -> MemoryPlan:
    """The plan with quantised parts unpacked where they fit and that pays: on the CPU backend, whose
    quantised products are slower than the host's BLAS.
    """
    if on_gpu() or checkpoint.dtype != mx.float32:
        return made
    for part in UNPACKED:
        more = plan_checkpoint(checkpoint, made.slots, (*made.unpacked, part))
        if more.weights > made.weights and more.total() <= room:
            made = more
    return made


def gigabytes(count: float) -> str:
    """1.27 GB, 4.4 MB, 0.8 kB, 12 bytes: decimal, as disks, bandwidths and model cards count."""
    if count >= 1e8:
        return f"{count / 1e9:.2f} GB"
    if count >= 1e5:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.1f} kB" if count >= 100 else f"{count:.0f} bytes"


def _format(tensor: TensorInfo, spec: TensorSpec) -> str:
    packing = spec.packing
    if packing is None:
        return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(tensor.dtype, tensor.dtype)
    return packing.mode if packing.mode != "affine" else f"affine {packing.bits}-bit / {packing.group_size}"


def _loaded(tensor: TensorInfo, spec: TensorSpec, dtype: mx.Dtype, unpacked: Collection[str]) -> int:
    """Bytes in memory once reader.py has read it."""
    if spec.part in unpacked and spec.packing is not None:
        return tensor.nbytes * 8 // spec.packing.bits * dtype.size if tensor.dtype == "U32" else 0
    kept = spec.part == "embedding" and spec.packing is None
    return tensor.nbytes if kept or tensor.dtype not in FLOATS else prod(tensor.shape) * dtype.size


def _share_read(part: str, config: ModelConfig) -> float:
    if part == "embedding":
        return 1 / config.vocab_size
    return config.experts_per_token / config.num_experts if part == "experts" else 1.0


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
