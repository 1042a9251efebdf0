"""Groups of ranks on this machine, by hand: a runner on them, without an engine and its thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.distributed.group import Group, Patience
from mlx_gptoss.distributed.hosts import Host
from mlx_gptoss.distributed.launch import Source, load_spread, spread, spread_tensor
from mlx_gptoss.distributed.runner import PipelineRunner
from mlx_gptoss.model.cache import KVBits

# Tests run beside others on few cores: a rank that is silent may just not have had its turn.
PATIENT = Patience(silence=120.0, start=300.0)


@contextmanager
def pipeline(
    folder: Path,
    ranks: int,
    split: Sequence[int] | None = None,
    kv_bits: KVBits = (None, None),
    patience: Patience = PATIENT,
    rooms: Sequence[int] | None = None,
) -> Iterator[PipelineRunner]:
    """A runner over so many ranks on this machine, used by this thread. rooms: bytes that each may take."""
    checkpoint = Checkpoint(folder)
    with closing(Group([Host("localhost")] * ranks, patience=patience)) as group:
        machines = group.gather()
        if rooms is not None:
            machines = [replace(m, room=room) for m, room in zip(machines, rooms, strict=True)]
        plan = spread(checkpoint, machines, 1 << 26, 0, split)
        source = Source.of(str(folder), folder, offline=True)
        yield load_spread(lambda job: job(), group, checkpoint, plan, source, kv_bits)


@contextmanager
def tensor(
    folder: Path, hosts: int, split: Sequence[int] | None = None, kv_bits: KVBits = (None, None)
) -> Iterator[PipelineRunner]:
    """A runner over a part of every layer on so many hosts, all of them this machine."""
    checkpoint = Checkpoint(folder)
    names = [Host("localhost")] * (hosts + 1)
    with closing(Group(names, patience=PATIENT, collective="ring")) as group:
        plan = replace(spread_tensor(checkpoint, group.gather(), 1 << 26, 0, split), forced=True)
        source = Source.of(str(folder), folder, offline=True)
        yield load_spread(lambda job: job(), group, checkpoint, plan, source, kv_bits)
