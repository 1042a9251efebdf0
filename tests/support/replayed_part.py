"""A part of a model whose layers are replayed as on a GPU, in a process of its own.

    python -m tests.support.replayed_part FOLDER RANK PORT PORT

Two of them make a group. Each prints the largest difference of its hidden states from those of layers whose
graph is built each time, relative to their scale, and how often Python built one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.part import PartOfCheckpoint
from mlx_gptoss.checkpoint.reader import read_layers
from mlx_gptoss.distributed.collective import Collective, collective_settings
from mlx_gptoss.distributed.stage import PartStage
from mlx_gptoss.model import graph
from mlx_gptoss.model.batch import Batch
from mlx_gptoss.model.graph import Attention
from tests.model.test_streamed import as_on_a_gpu

LIMIT = 120.0  # seconds; whoever waits for the other one is ended
STEPS = 4


def main() -> None:
    """Compare, and print."""
    folder, rank, *ports = Path(sys.argv[1]), *map(int, sys.argv[2:])
    timer = threading.Timer(LIMIT, os._exit, (1,))
    timer.daemon = True
    timer.start()
    patch = pytest.MonkeyPatch()
    as_on_a_gpu(patch)
    patch.setattr(graph, "on_gpu", lambda: True)
    collective = Collective(collective_settings("ring", rank, ["127.0.0.1"] * 2, ports, [(), ()]))
    heads, channels = (range(1), range(64)) if rank == 0 else (range(1, 4), range(64, 160))
    part = PartOfCheckpoint(folder, "float32", heads, channels, collective)
    config, layers = part.part_config, read_layers(part)
    stage = PartStage(config, mx.float32, layers, range(config.num_layers), (None, None), interleaved=True)
    collective.measure(stage)  # which traces layers before the two have met
    built = 0
    project = Attention.project

    def counting(self: Attention, x: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        nonlocal built
        built += 1
        return project(self, x, batch)

    patch.setattr(Attention, "project", counting)

    def hidden(cache: int) -> np.ndarray:
        stage.make(cache, 0)
        rng = np.random.default_rng(3)
        rows = [
            mx.array(rng.normal(size=(n, config.hidden_size)).astype(np.float32)) for n in (20, *[1] * STEPS)
        ]
        return np.concatenate([np.array(stage.forward(x, [[cache, len(x)]], None)) for x in rows])

    replayed, count = hidden(0), built
    patch.setattr(graph, "on_gpu", lambda: False)
    wanted = hidden(1)
    told = {"difference": float(np.abs(replayed - wanted).max() / np.abs(wanted).max()), "built": count}
    print(json.dumps(told), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
