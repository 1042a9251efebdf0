"""A model over several hosts, from the plan to a runner: who has what, and what is left to caches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from mlx_gptoss.checkpoint.expert_file import ExpertFiles
from mlx_gptoss.checkpoint.fingerprint import fingerprint
from mlx_gptoss.checkpoint.memory import MemoryPlan, gigabytes, plan_checkpoint, plan_experts, runtime_bytes
from mlx_gptoss.checkpoint.reader import Checkpoint, Portion, read_model
from mlx_gptoss.distributed.group import Group
from mlx_gptoss.distributed.plan import Machine, Share, cast_while_loading, plan_pipeline, plan_tensor
from mlx_gptoss.distributed.runner import PipelineRunner
from mlx_gptoss.distributed.session import Member
from mlx_gptoss.distributed.stage import Stage
from mlx_gptoss.distributed.tensor import TensorRunner
from mlx_gptoss.errors import RequestError
from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.config import FULL, SLIDING, ModelConfig

Parallel = Literal["pipeline", "tensor"]


@dataclass(frozen=True)
class Spread:
    """How a model lies on the machines of a group.

    memory: all of it. left: bytes for the caches of all ranks together, which divide them as their layers (or
    heads) do, so that nobody's room is exceeded. parallel: "pipeline", or "tensor": then shares are those of
    ranks 1 to N, and embedding and head stand beside the first. forced: even where it does not pay.
    """

    shares: list[Share]
    memory: MemoryPlan
    left: int
    parallel: Parallel = "pipeline"
    forced: bool = False

    def __str__(self) -> str:
        """A line for each rank, to follow another."""
        config, lines = self.memory.config, []
        for share in self.shares:
            what = f"layers {share.layers.start} to {share.layers.stop - 1}"
            if self.parallel == "tensor":
                what = (
                    f"{len(share.heads)} of {config.num_kv_heads} KV heads, "
                    f"{len(share.channels)} of {config.intermediate_size} expert columns"
                )
            ends = "embedding, head, " if share.rank == 0 else ""
            sizes = f"weights {gigabytes(share.weights)} of {gigabytes(share.machine.room)} free"
            if share.slots is not None:
                sizes += f", {share.slots} of {config.num_experts} experts a layer, the others read from disk"
            lines.append(f"\n  {share.machine.host}: {ends}{what}: {sizes}")
        return "".join(lines)

    def loading(self, share: Share) -> int:
        """Bytes that a rank's process takes at most until it has loaded."""
        return share.weights + runtime_bytes() + cast_while_loading(self.memory, share.rank)

    @property
    def max_running(self) -> int | None:
        """How many sequences' experts find places at the same time, whichever those are; None: of all."""
        slots = [share.slots for share in self.shares if share.slots is not None]
        return min(slots) // self.memory.config.experts_per_token if slots else None

    @property
    def ranges(self) -> list[range]:
        """The layers of each rank."""
        return [share.layers for share in self.shares]


def spread(
    checkpoint: Checkpoint, machines: Sequence[Machine], kv: int, beside: int, split: Sequence[int] | None
) -> Spread:
    """The plan for a pipeline over machines; arguments as plan_pipeline's. Raises RequestError,
    MemoryLimitError.
    """
    shares = plan_pipeline(checkpoint, machines, kv, beside, split)
    kinds = checkpoint.config.layer_types
    if SLIDING in kinds and SLIDING not in kinds[: shares[0].layers.stop]:
        raise RequestError(
            f"split gives the first machine {len(shares[0].layers)} layers: expected so many that one of "
            "them is a sliding one",
            "split",
        )
    room = sum(machine.room for machine in machines)
    each = runtime_bytes() + beside
    if any(share.slots is not None for share in shares):
        memory = plan_checkpoint(checkpoint)
    else:
        memory = plan_experts(checkpoint, "all", room - (len(machines) - 1) * each, kv + beside)
        shares = [replace(share, weights=_weights(memory, share)) for share in shares]
    left = min(
        int((share.machine.room - each - share.weights) / _share_of_caches(checkpoint.config, share))
        for share in shares
    )
    return Spread(shares, memory, max(0, left))


def spread_tensor(
    checkpoint: Checkpoint, machines: Sequence[Machine], kv: int, beside: int, split: Sequence[int] | None
) -> Spread:
    """The plan for tensor parallelism; machines: of every process, of which two are on the first."""
    first, second, *others = machines
    hosts = [Machine(first.host, first.room + second.room), *others]
    shares = plan_tensor(checkpoint, hosts, kv, beside, split)
    heads = checkpoint.config.num_kv_heads
    left = min(
        (share.machine.room - share.needed + share.kv) * heads // len(share.heads)
        for share in shares
        if share.heads
    )
    return Spread(shares, plan_checkpoint(checkpoint), left, "tensor")


def _weights(memory: MemoryPlan, share: Share) -> int:
    ends = memory.weights - sum(memory.layers) if share.rank == 0 else 0
    return sum(memory.layers[i] for i in share.layers) + ends


def _share_of_caches(config: ModelConfig, share: Share) -> float:
    """The largest part of any sequence's caches that a rank can have."""
    kinds = config.layer_types
    own = kinds[share.layers.start : share.layers.stop]
    return max(own.count(kind) / kinds.count(kind) for kind in (FULL, SLIDING) if kind in kinds)


@dataclass(frozen=True)
class Source:
    """Where every rank finds the model: a folder, or a Hub id and the revision that rank 0 has."""

    model: str
    revision: str | None
    offline: bool

    @classmethod
    def of(cls, model: str, folder: Path, offline: bool) -> Source:
        """Of what was asked for, and the folder that it was here."""
        if Path(model).exists():
            return cls(str(folder.resolve()), None, offline)
        return cls(model, folder.name if folder.parent.name == "snapshots" else None, offline)


def load_spread(
    call: Callable[[Callable[[], PipelineRunner]], PipelineRunner],
    group: Group,
    checkpoint: Checkpoint,
    plan: Spread,
    source: Source,
    kv_bits: KVBits,
    progress: Callable[[int, int], None] | None = None,
) -> PipelineRunner:
    """Read all parts at the same time; a runner on them. call: runs a job on the thread that is to use it.

    progress(done, total): counts the layers of all ranks, from several threads. Raises HostError, what
    reading rank 0's part raises, and RequestError where tensor parallelism does not pay.
    """
    done, lock = {"here": 0, "there": 0}, threading.Lock()
    total = sum(len(share.layers) for share in plan.shares)

    def tell(where: str, layers: int) -> None:
        with lock:
            done[where] = layers
            if progress is not None:
                progress(sum(done.values()), total)

    with ThreadPoolExecutor(1, "ranks") as pool:
        opened = pool.submit(group.open, _orders(checkpoint, plan, source, kv_bits), partial(tell, "there"))
        try:
            runner = call(lambda: _read_first(group, checkpoint, plan, kv_bits, partial(tell, "here")))
        except BaseException:
            group.close()  # which ends the other as well
            raise
        opened.result()
    if plan.parallel == "tensor" and not plan.forced:
        try:
            require_gain(plan, group.members)
        except RequestError:
            group.close()
            raise
    return runner


def require_gain(plan: Spread, members: Sequence[Member]) -> None:
    """Raises RequestError when sums take longer than dividing the weights saves, as the ranks measured it."""
    step = max(float(member.facts["step"]) for member in members)
    sums = 2 * plan.memory.config.num_layers
    cost = sums * max(float(member.facts["all_sum"]) for member in members)
    # One machine takes as much longer as it reads more.
    alone = max(
        float(member.facts["step"]) * plan.memory.read_per_token / share.read
        for member, share in zip(members, plan.shares, strict=True)
    )
    if cost > alone - step:
        raise RequestError(
            f"tensor parallelism does not pay here: the {sums} all_sums of a token take {1e3 * cost:.2f} ms "
            f"({1e6 * cost / sums:.0f} us each) and save {1e3 * (alone - step):.2f} ms of {1e3 * alone:.2f}: "
            "use a pipeline (parallel='pipeline'), a faster link, or force it",
            "parallel",
        )


def _orders(checkpoint: Checkpoint, plan: Spread, source: Source, kv_bits: KVBits) -> list[dict[str, object]]:
    """What each rank, from 1 on, is told to load (see rank.py)."""
    made: list[dict[str, object]] = []
    tensor = plan.parallel == "tensor"
    for share in plan.shares if tensor else plan.shares[1:]:
        portion = Portion(share.layers)
        tensors = {n: t for n, t in checkpoint.tensors.items() if portion.has(checkpoint.specs[n])}
        made.append(
            {
                **asdict(source),
                "dtype": str(checkpoint.dtype).removeprefix("mlx.core."),
                "weights": sorted({tensor.path.name for tensor in tensors.values()}),
                "layers": [share.layers.start, share.layers.stop],
                "unpacked": list(plan.memory.unpacked),
                "slots": share.slots,
                "kv_bits": list(kv_bits),
                "fingerprint": fingerprint(checkpoint.folder, "", tensors),
            }
        )
        if tensor:
            for name, some in (("heads", share.heads), ("channels", share.channels)):
                made[-1][name] = [some.start, some.stop]
    return made


def _read_first(
    group: Group, checkpoint: Checkpoint, plan: Spread, kv_bits: KVBits, progress: Callable[[int], None]
) -> PipelineRunner:
    """Read rank 0's part, and put a runner on it and the group. On the thread that is to use it."""
    here = plan.ranges[0] if plan.parallel == "pipeline" else range(0)
    own = Checkpoint(checkpoint.folder, checkpoint.dtype, Portion(here, ends=True))
    own.unpacked = plan.memory.unpacked
    if (slots := plan.shares[0].slots) is not None:
        own.streaming = ExpertFiles(own, slots)
    model = read_model(own, lambda done, total: progress(max(0, min(done - 1, total - 2))))
    if plan.parallel == "tensor":
        return TensorRunner(group, model, plan.shares, kv_bits)
    stage = Stage(*(own.config, own.dtype, model.layers, here, kv_bits), interleaved=own.layout.interleaved)
    return PipelineRunner(group, model, stage, plan.ranges, kv_bits)
