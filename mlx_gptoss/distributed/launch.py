"""A model over several hosts, from the plan to a runner: who has what, and what is left to caches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from mlx_gptoss.checkpoint.fingerprint import fingerprint
from mlx_gptoss.checkpoint.memory import MemoryPlan, plan_experts, runtime_bytes
from mlx_gptoss.checkpoint.reader import Checkpoint, Portion, read_model
from mlx_gptoss.distributed.group import Group
from mlx_gptoss.distributed.plan import Machine, Share, plan_pipeline
from mlx_gptoss.distributed.runner import PipelineRunner
from mlx_gptoss.distributed.stage import Stage
from mlx_gptoss.errors import MemoryLimitError, RequestError
from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.config import FULL, SLIDING, ModelConfig


@dataclass(frozen=True)
class Spread:
    """How a model lies on the machines of a group.

    memory: all of it. left: bytes for the caches of all ranks together, which divide them as their layers do,
    so that nobody's room is exceeded.
    """

    shares: list[Share]
    memory: MemoryPlan
    left: int

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
    for share in shares:
        if share.slots is not None:
            raise MemoryLimitError(
                f"{share.machine.host}: {len(share.layers)} layers need more memory than is free there: add "
                "a machine, give this one less with --split, or close other programs there",
                needed=share.needed,
                available=share.machine.room,
            )
    kinds = checkpoint.config.layer_types
    if SLIDING in kinds and SLIDING not in kinds[: shares[0].layers.stop]:
        raise RequestError(
            f"split gives the first machine {len(shares[0].layers)} layers: expected so many that one of "
            "them is a sliding one",
            "split",
        )
    room = sum(machine.room for machine in machines)
    each = runtime_bytes() + beside
    memory = plan_experts(checkpoint, "all", room - (len(machines) - 1) * each, kv + beside)
    left = min(
        int(
            (share.machine.room - each - _weights(memory, share)) / _share_of_caches(checkpoint.config, share)
        )
        for share in shares
    )
    return Spread(shares, memory, max(0, left))


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

    progress(done, total): counts the layers of all ranks, from several threads. Raises HostError, and what
    reading rank 0's part raises.
    """
    done, lock = {"here": 0, "there": 0}, threading.Lock()

    def tell(where: str, layers: int) -> None:
        with lock:
            done[where] = layers
            if progress is not None:
                progress(sum(done.values()), checkpoint.config.num_layers)

    with ThreadPoolExecutor(1, "ranks") as pool:
        opened = pool.submit(group.open, _orders(checkpoint, plan, source, kv_bits), partial(tell, "there"))
        try:
            runner = call(lambda: _read_first(group, checkpoint, plan, kv_bits, partial(tell, "here")))
        except BaseException:
            group.close()  # which ends the other as well
            raise
        opened.result()
    return runner


def _orders(checkpoint: Checkpoint, plan: Spread, source: Source, kv_bits: KVBits) -> list[dict[str, object]]:
    """What each rank, from 1 on, is told to load (see rank.py)."""
    made: list[dict[str, object]] = []
    for share in plan.shares[1:]:
        portion = Portion(share.layers)
        tensors = {n: t for n, t in checkpoint.tensors.items() if portion.has(checkpoint.specs[n])}
        made.append(
            {
                **asdict(source),
                "dtype": str(checkpoint.dtype).removeprefix("mlx.core."),
                "layers": [share.layers.start, share.layers.stop],
                "unpacked": list(plan.memory.unpacked),
                "kv_bits": list(kv_bits),
                "fingerprint": fingerprint(checkpoint.folder, "", tensors),
            }
        )
    return made


def _read_first(
    group: Group, checkpoint: Checkpoint, plan: Spread, kv_bits: KVBits, progress: Callable[[int], None]
) -> PipelineRunner:
    """Read rank 0's part, and put a runner on it and the group. On the thread that is to use it."""
    here = plan.ranges[0]
    own = Checkpoint(checkpoint.folder, checkpoint.dtype, Portion(here, ends=True))
    own.unpacked = plan.memory.unpacked
    model = read_model(own, lambda done, total: progress(max(0, min(done - 1, total - 2))))
    stage = Stage(*(own.config, own.dtype, model.layers, here, kv_bits), interleaved=own.layout.interleaved)
    return PipelineRunner(group, model, stage, plan.ranges, kv_bits)
