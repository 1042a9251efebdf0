"""The parts of a model side by side in one process: a thread each, whose sums meet at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.part import PartOfCheckpoint
from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.sequence_cache import SequenceCache

DEADLINE = 60.0  # seconds for the others to come to a sum


class Meeting:
    """Adds up what `count` threads bring."""

    def __init__(self, count: int) -> None:
        self._brought: list[np.ndarray] = [np.zeros(())] * count
        self._barrier = threading.Barrier(count)
        self.sums = 0

    def give_up(self) -> None:
        """Let nobody wait for a thread that has failed."""
        self._barrier.abort()

    def total(self, rank: int) -> Callable[[mx.array], mx.array]:
        def add_up(x: mx.array) -> mx.array:
            self._brought[rank] = np.array(x.astype(mx.float32))
            if self._barrier.wait(DEADLINE) == 0:
                self.sums += 1
            found = mx.array(sum(self._brought[1:], self._brought[0])).astype(x.dtype)
            self._barrier.wait(DEADLINE)
            return found

        return add_up


Cuts = Sequence[tuple[range, range]]  # KV heads and columns of each part


def run_parts(
    folder: Path, cuts: Cuts, pieces: Sequence[np.ndarray], kv_bits: KVBits = (None, None)
) -> list[np.ndarray]:
    """What becomes of embedded tokens [T, D], piece by piece, in each part: hidden states, end to end."""
    meeting = Meeting(len(cuts))

    def run(rank: int) -> np.ndarray:
        try:
            return part_of(rank)
        except BaseException:
            meeting.give_up()
            raise

    def part_of(rank: int) -> np.ndarray:
        heads, channels = cuts[rank]
        part = PartOfCheckpoint(folder, "float32", heads, channels, meeting.total(rank))
        layers = [part.layer(i) for i in range(part.config.num_layers)]
        mx.eval([layer.arrays() for layer in layers])
        part.check_finite()

        cache, found = SequenceCache(part.part_config, mx.float32, kv_bits), []
        for piece in pieces:
            batch, x = Batch([Segment(len(piece), cache)], part.config.experts_per_token), mx.array(piece)
            for layer in layers:
                x = layer(x, batch)
            batch.settle()
            cache.advance(len(piece))
            found.append(np.array(x))
        return np.concatenate(found)

    with ThreadPoolExecutor(len(cuts)) as threads:
        return list(threads.map(run, range(len(cuts))))
