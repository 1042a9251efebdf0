"""Which machine has which part of a model: decided from the headers, before anything is read.

Two ways to split. A pipeline gives each machine some of the layers, in proportion to its room. Tensor
parallelism gives each some KV heads and some columns of the experts of every layer, so that all of them read
about as many bytes a token. Embedding, final norm and head stand on rank 0. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import gcd, lcm

from mlx_gptoss.checkpoint.layouts import PARTS
from mlx_gptoss.checkpoint.memory import MemoryPlan, gigabytes, plan_checkpoint, runtime_bytes
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.errors import MemoryLimitError, RequestError
from mlx_gptoss.model.quantization import MXFP4
from mlx_gptoss.model.sequence_cache import SequenceCache

# The context that says how much of the KV cache each layer needs; long enough that windows are full.
TYPICAL_CONTEXT = 4096
# What a rank has at least of an even share of the experts' columns, where it has room.
LEAST_SHARE = 0.75


@dataclass(frozen=True)
class Machine:
    """A host, and the bytes that a model may take there."""

    host: str
    room: int


@dataclass(frozen=True)
class Share:
    """What one rank has of a model. heads: KV heads; channels: intermediate channels of every expert.

    weights, kv: what these take; needed: with everything else. read: what a decoded token reads of the
    weights. slots: how many experts of a layer are in memory where not all find room, the others being read
    from the disk.
    """

    rank: int
    machine: Machine
    layers: range
    heads: range
    channels: range
    weights: int
    kv: int
    needed: int
    read: int
    slots: int | None = None


def parse_split(text: str) -> tuple[int, ...]:
    """The counts in "14,10". Raises RequestError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise RequestError(
            f"split is {text!r}: expected a count for each machine, such as 14,10, none of them 0", "split"
        )
    return tuple(map(int, parts))


def plan_pipeline(
    checkpoint: Checkpoint,
    machines: Sequence[Machine],
    kv: int,
    beside: int,
    split: Sequence[int] | None = None,
) -> list[Share]:
    """Whole layers for each machine, which all together have `kv` bytes for caches.

    beside: what each leaves free. split: how many layers each has (default: in proportion to its room).
    Where a machine's layers do not fit, it has as many experts of each in memory as do. Raises RequestError
    for a split that the model does not have, MemoryLimitError where not even one token's experts fit.
    """
    config, whole = checkpoint.config, plan_checkpoint(checkpoint)
    fewest = plan_checkpoint(checkpoint, config.experts_per_token)
    rooms = [machine.room - runtime_bytes() - beside for machine in machines]
    counts = _checked(split, len(machines), config.num_layers, "layers")
    if counts is None:
        counts = in_proportion(config.num_layers, [rooms[0] - _ends(whole), *rooms[1:]])
    caches, shares = _kv_by_layer(checkpoint, kv), []
    for rank, (machine, layers) in enumerate(zip(machines, _ranges(counts), strict=True)):
        cached = sum(caches[i] for i in layers)
        beyond = runtime_bytes() + max(cached + beside, cast_while_loading(whole, rank))

        def weights(plan: MemoryPlan, rank: int = rank, layers: range = layers) -> int:
            return sum(plan.layers[i] for i in layers) + (_ends(plan) if rank == 0 else 0)

        held, slots = weights(whole), None
        if held + beyond > machine.room:
            held, each = weights(fewest), whole.expert.loaded * len(layers)
            left = machine.room - held - beyond
            if left < 0:
                raise _does_not_fit(machine, held + beyond, f"{len(layers)} layers")
            slots = min(config.experts_per_token + left // each, config.num_experts - 1)
            held += (slots - config.experts_per_token) * each
        heads, channels = range(config.num_kv_heads), range(config.intermediate_size)
        needed = held + beyond
        read = int(_read(whole, "embedding", "head")) if rank == 0 else 0
        read += int(_read(whole, "attention", "router", "experts", "norms") * len(layers) / config.num_layers)
        shares.append(Share(rank, machine, layers, heads, channels, held, cached, needed, read, slots))
    return shares


def plan_tensor(
    checkpoint: Checkpoint,
    machines: Sequence[Machine],
    kv: int,
    beside: int,
    split: Sequence[int] | None = None,
) -> list[Share]:
    """Some KV heads and some columns of the experts of every layer for each machine.

    kv, beside: as in plan_pipeline. split: how many groups of columns each has (default: as lets all read
    about the same bytes a token, within bounds, and find room). Raises RequestError, MemoryLimitError.
    """
    config, whole, count = checkpoint.config, plan_checkpoint(checkpoint), len(machines)
    unit = column_unit(checkpoint)
    groups = config.intermediate_size // unit
    loaded = {part: sum(p.loaded for p in whole.parts if p.name == part) for part in PARTS}
    # Rank 0 has the head as well, so that it gets the smaller part of what does not divide.
    heads = [config.num_kv_heads // count + (r >= count - config.num_kv_heads % count) for r in range(count)]
    share = [h / config.num_kv_heads for h in heads]
    caches = [int(kv * s) for s in share]
    fixed = runtime_bytes() + beside + loaded["router"] + loaded["norms"]
    ends = loaded["embedding"] + loaded["head"]
    used = [fixed + int(loaded["attention"] * s) + c for s, c in zip(share, caches, strict=True)]
    used[0] += ends + runtime_bytes()  # in a process of its own
    reads = [_read(whole, "attention") * s + _read(whole, "router", "norms") for s in share]
    reads[0] += _read(whole, "embedding", "head")
    each, per_token = loaded["experts"] / groups, _read(whole, "experts") / groups
    counts = _checked(split, count, groups, f"groups of {unit} columns")
    if counts is None:
        rooms = [machine.room - u for machine, u in zip(machines, used, strict=True)]
        counts = _evenly_read(groups, reads, per_token, [int(room // each) for room in rooms])
    shares = []
    for rank, (machine, kv_heads, columns) in enumerate(
        zip(machines, _ranges(heads), _ranges(counts), strict=True)
    ):
        needed = used[rank] + int(each * len(columns))
        if needed > machine.room:
            raise _does_not_fit(machine, needed, f"{len(columns)} of {groups} groups of the experts' columns")
        channels = range(columns.start * unit, columns.stop * unit)
        held = needed - caches[rank] - runtime_bytes() * (1 + (rank == 0)) - beside
        layers, read = range(config.num_layers), int(reads[rank] + per_token * len(columns))
        shares.append(Share(rank, machine, layers, kv_heads, channels, held, caches[rank], needed, read))
    return shares


def column_unit(checkpoint: Checkpoint) -> int:
    """The columns of an expert's second matrix that lie together: groups that share a scale stay whole."""
    path = checkpoint.layout.path("experts.down")
    packing = checkpoint.layout.stack_packing(path, checkpoint.quantization_of)
    least = gcd(checkpoint.config.intermediate_size, MXFP4.group_size)
    return lcm(least, 1 if packing is None else packing.group_size)


def in_proportion(count: int, free: Sequence[int]) -> tuple[int, ...]:
    """At least one of `count` things for each, the others one by one to where they leave the largest share
    free: whenever there is a way in which all fit, they do (D'Hondt's method).
    """
    counts = [1] * len(free)
    for _ in range(count - len(free)):
        counts[min(range(len(free)), key=lambda r: (counts[r] + 1) / max(free[r], 1))] += 1
    return tuple(counts)


def _evenly_read(count: int, reads: Sequence[float], each: float, fitting: Sequence[int]) -> tuple[int, ...]:
    """So many of `count` groups for each that all read alike: one by one to who reads least and has room for
    one more. First each gets most of an even share, as prompts are computed at the pace of who has most.
    """
    counts = [max(1, min(int(LEAST_SHARE * count / len(reads)), room)) for room in fitting]
    for _ in range(count - sum(counts)):
        open_ = [r for r in range(len(reads)) if counts[r] < fitting[r]] or range(len(reads))
        counts[min(open_, key=lambda r: reads[r] + counts[r] * each)] += 1
    return tuple(counts)


def _checked(split: Sequence[int] | None, machines: int, count: int, things: str) -> tuple[int, ...] | None:
    if machines > count:
        raise RequestError(
            f"{machines} machines: the model has {count} {things}, so at most as many machines", "hosts"
        )
    if split is None:
        return None
    if len(split) != machines or sum(split) != count or min(split) < 1:
        shown = ",".join(map(str, split))
        raise RequestError(
            f"split is {shown}: expected {machines} counts above 0, one for each machine, that make "
            f"{count} in all, the model's {things}",
            "split",
        )
    return tuple(split)


def _ranges(counts: Sequence[int]) -> list[range]:
    return [range(a, b) for a, b in pairwise(accumulate(counts, initial=0))]


def cast_while_loading(plan: MemoryPlan, rank: int) -> int:
    """What lives beside the weights until a rank has loaded: the stored form of what is cast. The layers' is
    small.
    """
    return plan.transient if rank == 0 else 0


def _ends(plan: MemoryPlan) -> int:
    return plan.weights - sum(plan.layers)


def _read(plan: MemoryPlan, *parts: str) -> float:
    """What a decoded token reads of these parts of the model."""
    return sum(part.read for part in plan.parts if part.name in parts)


def _kv_by_layer(checkpoint: Checkpoint, kv: int) -> list[int]:
    """The layers' parts of what caches may take: as a typical context divides it."""
    cache = SequenceCache(checkpoint.config, checkpoint.dtype)
    window = cache.window_history + 1
    sizes = [
        layer.token_bytes * (TYPICAL_CONTEXT if layer in cache.full else window) for layer in cache.layers
    ]
    return [kv * size // sum(sizes) for size in sizes]


def _does_not_fit(machine: Machine, needed: int, what: str) -> MemoryLimitError:
    return MemoryLimitError(
        f"{machine.host}: {what} need {gigabytes(needed)} and {gigabytes(machine.room)} are free: add a "
        "machine, give this one less with --split, or close other programs there",
        needed=needed,
        available=machine.room,
    )
