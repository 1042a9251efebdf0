"""Who has which part of a model, in one table; and what `--hosts` and `--split` say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlx_gptoss.checkpoint.reader import Checkpoint
    from mlx_gptoss.distributed.plan import Machine, Share


def machines_of(text: str) -> list[Machine]:
    """Macs of so much memory, "48GB,32GB", with what Metal lets their GPUs keep; or hosts, which are asked.

    Raises RequestError, HostError.
    """
    from mlx_gptoss.checkpoint.expectation import macs_working_set
    from mlx_gptoss.distributed.check import machines_of
    from mlx_gptoss.distributed.hosts import read_hosts
    from mlx_gptoss.distributed.plan import Machine

    sizes = [re.fullmatch(r"\s*(\d{1,5}) ?GB\s*", part, re.IGNORECASE) for part in text.split(",")]
    if not all(sizes):
        return machines_of(read_hosts(text))
    found = [int(size[1]) for size in sizes if size is not None]
    return [Machine(f"a Mac with {size} GB", macs_working_set(size * 2**30)) for size in found]


def planned_shares(
    checkpoint: Checkpoint, machines: Sequence[Machine], parallel: str, split: str | None
) -> list[Share]:
    """The plan for machines. Raises RequestError, MemoryLimitError."""
    from mlx_gptoss.distributed.plan import parse_split, plan_pipeline, plan_tensor
    from mlx_gptoss.engine.options import EngineOptions
    from mlx_gptoss.llm import SCRATCH, wanted_kv

    make = plan_tensor if parallel == "tensor" else plan_pipeline
    counts = None if split is None else parse_split(split)
    return make(checkpoint, machines, wanted_kv(checkpoint, EngineOptions()), SCRATCH, counts)


def describe_shares(shares: Sequence[Share]) -> list[dict[str, Any]]:
    """The plan as JSON-ready values; ranges as [first, end)."""
    ranges = ("layers", "heads", "channels")
    found = []
    for share in shares:
        values = asdict(share)
        found.append(
            values
            | {name: [values[name].start, values[name].stop] for name in ranges}
            | {"room": share.machine.room, "machine": share.machine.host}
        )
    return found


def show_shares(checkpoint: Checkpoint, shares: Sequence[Share]) -> None:
    """The table. What all ranks have alike is no column."""
    from mlx_gptoss.checkpoint.memory import gigabytes
    from mlx_gptoss.cli.tables import show_table

    config = checkpoint.config
    every = (config.num_layers, config.num_kv_heads, config.intermediate_size)

    def part(held: range, of: int) -> str:
        if len(held) == of:
            return ""
        return f"{held.start}-{held.stop - 1} ({len(held)})" if held else "none"

    rows = []
    for share in shares:
        parts = zip((share.layers, share.heads, share.channels), every, strict=True)
        held = "" if share.slots is None else f"{share.slots} of {config.num_experts}"
        sizes = map(gigabytes, (share.weights, share.kv, share.machine.room))
        rows.append((str(share.rank), share.machine.host, *(part(*p) for p in parts), *sizes, held))
    headings = ("rank", "host", "layers", "KV heads", "expert columns", "weights", "KV cache", "room")
    show_table((*headings, "experts in memory"), rows, left=2)
    click.echo("rank 0 has embedding and head as well")
