"""Which Mac runs which model, and how fast at best: a model of it as a table. Nothing is measured here.

    python -m benchmarks.macs

Slots come from the memory plan of the true shapes (dense parts in 4 bits, as `mlx-gptoss convert` makes them)
in Metal's default working set, hit rates from checkpoint/expectation.py. A token takes its bytes at 60 % of
the memory's bandwidth, 0.25 ms a layer for reading the router's choice, and its misses at 70 % of the disk's
speed. Published results of other MLX runtimes lie at about half of such bounds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from mlx_gptoss.checkpoint.expectation import expected_hits, macs_working_set, read_from_disk
from mlx_gptoss.checkpoint.memory import plan_experts
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.engine.options import EngineOptions
from mlx_gptoss.errors import MemoryLimitError
from mlx_gptoss.llm import SCRATCH, wanted_kv
from tests.support.random_weights import SHAPES, MlxRecipe
from tests.support.sparse_checkpoint import write_sparse

# Memory in GB, its bandwidth and the SSD's reads in GB/s, as published by Apple and by testers.
MACS = (
    ("M1, M2 (base)", 8, 68, 1.6),
    ("M1, M2 (base)", 16, 68, 1.6),
    ("M4", 16, 120, 2.9),
    ("M4", 24, 120, 2.9),
    ("M5", 32, 153, 6.3),
    ("M1 Max", 32, 400, 5.5),
    ("M4 Pro", 48, 273, 6.5),
    ("M4 Max", 64, 546, 7.0),
    ("M5 Max", 64, 614, 14.5),
    ("M4 Max", 128, 546, 7.0),
)
BANDWIDTH_SHARE, DISK_SHARE, ROUTER_READ = 0.6, 0.7, 0.25e-3


def main() -> None:
    print("| Mac | model | experts in memory | hit rate | SSD a token | tokens/s, at best |")
    print("|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("20b", "120b"):
            write_sparse(Path(folder) / name, SHAPES[name], "mlx", MlxRecipe(4))
        for chip, memory, bandwidth, disk in MACS:
            for name in ("20b", "120b"):
                print(_row(Path(folder) / name, f"{chip}, {memory} GB", memory, bandwidth * 1e9, disk * 1e9))


def _row(folder: Path, mac: str, memory: int, bandwidth: float, disk: float) -> str:
    checkpoint = Checkpoint(folder, "bfloat16")
    count, layers = checkpoint.config.num_experts, checkpoint.config.num_layers
    room = macs_working_set(memory * 2**30)
    try:
        made = plan_experts(checkpoint, "auto", room, SCRATCH + wanted_kv(checkpoint, EngineOptions()))
    except MemoryLimitError:
        return f"| {mac} | {folder.name} | does not fit | | | |"
    held = count if made.slots is None else made.slots
    read = read_from_disk(made)
    seconds = made.read_per_token / (bandwidth * BANDWIDTH_SHARE) + read / (disk * DISK_SHARE)
    if made.slots is not None:
        seconds += layers * ROUTER_READ
    hits = expected_hits(held, count)
    bytes_read = f"{read / 1e6:,.0f} MB" if read else "nothing"
    return f"| {mac} | {folder.name} | {held} of {count} | {hits:.0%} | {bytes_read} | {1 / seconds:.0f} |"


if __name__ == "__main__":
    main()
