"""A layer's experts, of which some are in memory and the others are read when they are chosen.

The arena is a few stacks of matrices like those of a whole layer, only with a slot for each expert that is in
memory. Records of experts are read straight into the arrays' own memory, and the experts in it are applied
as resident ones are, with slots in the place of experts: the same bits, whatever is where.

Nothing but this file keeps a read from a slot that a kernel may still use (MLX tracks no hazards of memory
that is written behind its back):

- A read starts only once the outputs of the layer's last steps are there (`_in_use`): then nothing that was
  launched reads the arena. That they depend on each other cannot be built on, as other sequences may have
  been in the step before. Within a step, a wave is waited for before its slots are claimed again.
- A step's slots are in an array of its own, which is written before anything that reads it is launched.
- An expert is in the table only once all of its record is read; a failed read leaves an empty slot.
- Waiting is `mx.eval`, which lets go of Python's lock; `mx.synchronize` keeps it, and a reader that needs it
  would wait for ever.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.batch import Batch, Pairs
from mlx_gptoss.model.experts import ExpertsInMemory, Way
from mlx_gptoss.model.slots import Slots

# Steps of up to so many (token, expert) pairs keep their outputs until the next one; larger ones are waited
# for at once, and lose nothing by it: they compute longer than Python takes to go on.
SMALL_STEP = 64
# Outputs that are kept for that; older ones are long done.
KEPT_STEPS = 3


class Read(NamedTuple):
    """A part of a record that was read: its bytes, and the seconds that this took."""

    nbytes: int
    seconds: float


class Records(Protocol):
    """A layer's experts on disk, with the arena that they are read into."""

    def read(self, expert: int, slot: int) -> Sequence[Future[Read]]:
        """Start to read an expert's record, in one or several parts, into a slot."""
        ...

    def copy(self, other: Records, slots: Sequence[tuple[int, int]]) -> None:
        """Take over from another arena of the same layer: (its slot, the slot here)."""
        ...

    def arrays(self) -> list[mx.array]:
        """What is in memory of all experts."""
        ...


@dataclass
class StreamCounts:
    """What a layer did so far. Hits and misses count each expert of a step once; times are seconds.

    Several readers read at a time, and a step goes on meanwhile: it waits less than they read. slots: how
    many experts find a place.
    """

    slots: int
    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class Block:
    """Rows of a forward, the experts chosen for them, their pairs, and how the experts are applied."""

    x: mx.array
    chosen: np.ndarray
    pairs: Pairs
    way: Way


MakeArena: TypeAlias = Callable[[int], tuple[ExpertsInMemory, Records]]
Reading: TypeAlias = list[tuple[int, int, Sequence[Future[Read]]]]
Told: TypeAlias = Callable[[np.ndarray], None]


class StreamedExperts:
    """As Experts. `make` gives an arena of so many slots, and the experts in it, one for each slot.

    lazy: nothing is evaluated while a graph is built, as on a GPU; then what follows a layer is built before
    its choice is read.
    """

    def __init__(self, make: MakeArena, slots: Slots, *, lazy: bool) -> None:
        self.slots, self.counts = slots, StreamCounts(slots.count)
        self.trace: Told | None = None  # told of every step what was chosen, int [T, k]
        self._make, self._lazy = make, lazy
        self._inner, self._records = make(slots.count)
        self._in_use: deque[mx.array] = deque()

    def __call__(self, x: mx.array, chosen: mx.array, batch: Batch) -> mx.array:
        batch.settle()
        if not self._lazy or chosen.size > self.slots.count:
            (y,) = self.sweep([self.block(x, chosen, batch)])
            return y
        mx.async_eval(chosen)
        slots = mx.array(np.zeros(chosen.shape, np.uint32))
        y = self._inner.way(x, chosen)(x, slots, batch)

        def settle() -> None:
            ids = np.asarray(chosen)
            self._hold(self._note(ids))
            np.asarray(slots)[:] = self.slots.places(ids)
            self._keep(y)

        batch.defer(settle)
        return y

    def arrays(self) -> list[mx.array]:
        return [*self._inner.arrays(), *self._records.arrays()]

    def block(self, x: mx.array, chosen: mx.array, batch: Batch) -> Block:
        """Rows for `sweep`; waits until `chosen` is known."""
        return Block(x, np.asarray(chosen), batch, self._inner.way(x, chosen))

    def sweep(self, blocks: Sequence[Block]) -> list[mx.array]:
        """Outputs [T, k, D] of each block; every expert is read once at most."""
        chosen = np.concatenate([b.chosen for b in blocks])
        waves = self.slots.waves(self._note(chosen), chosen)
        if len(waves) == 1:
            self._hold(waves[0])
            return [self._apply(b) for b in blocks]
        return self._in_waves(blocks, waves)

    def prepare(self, experts: Sequence[int]) -> None:
        """Read these, at most as many as there are slots, before they are chosen."""
        self._hold(experts)
        self.counts = StreamCounts(self.slots.count)

    def resize(self, count: int) -> None:
        """Have another number of slots, and in them what was used last."""
        self._wait()
        inner, records = self._make(count)
        slots, places = self.slots.resized(count)
        records.copy(self._records, places)
        self.slots, self._inner, self._records, self.counts.slots = slots, inner, records, count

    def _note(self, chosen: np.ndarray) -> list[int]:
        if self.trace is not None:
            self.trace(chosen)
        return self.slots.note(chosen)

    def _apply(self, block: Block) -> mx.array:
        """One block whose experts are all held."""
        slots = mx.array(self.slots.places(block.chosen), mx.uint32)
        y = block.way(block.x, slots, block.pairs)
        if block.chosen.size > SMALL_STEP:
            mx.eval(y)
        else:
            self._keep(y)
        return y

    def _keep(self, y: mx.array) -> None:
        """Remember outputs that are launched, or will be, and read the arena."""
        self._in_use.append(y)
        if len(self._in_use) > KEPT_STEPS:
            mx.eval(self._in_use.popleft())

    def _wait(self) -> None:
        """Until nothing reads the arena."""
        mx.eval(list(self._in_use))
        self._in_use.clear()

    def _hold(self, experts: Sequence[int]) -> None:
        self._finish(self._start(experts))

    def _start(self, group: Sequence[int], keep: Collection[int] = ()) -> Reading:
        """Start to read what of a group is not held; the slots of `keep` are in use."""
        if any(expert not in self.slots.held for expert in group):
            self._wait()
        claimed = self.slots.claim(group, keep)
        self.counts.hits += len(group) - len(claimed)
        self.counts.misses += len(claimed)
        return [(expert, slot, self._records.read(expert, slot)) for expert, slot in claimed]

    def _finish(self, reading: Reading) -> None:
        """Wait for what is being read, for all of it even when some of it fails."""
        start = time.perf_counter()
        failures = []
        for expert, slot, parts in reading:
            errors = [error for part in parts if (error := part.exception()) is not None]
            failures += errors
            if errors:
                self.slots.give_back(slot)
            else:
                self.slots.fill(expert, slot)
                self.counts.read_bytes += sum(part.result().nbytes for part in parts)
                self.counts.read_seconds += sum(part.result().seconds for part in parts)
        if reading:
            self.counts.wait_seconds += time.perf_counter() - start
        if failures:
            raise failures[0]

    def _in_waves(self, blocks: Sequence[Block], waves: list[list[int]]) -> list[mx.array]:
        """More experts than slots: group by group, the next one being read meanwhile."""
        outputs: list[list[mx.array]] = [[] for _ in blocks]
        places: list[list[np.ndarray]] = [[] for _ in blocks]
        self._finish(self._start(waves[0]))
        for group, following in zip(waves, [*waves[1:], []], strict=True):
            reading = self._start(following, keep=group)
            try:
                for i, block in enumerate(blocks):
                    pairs = np.flatnonzero(np.isin(block.chosen, group))
                    if len(pairs):
                        outputs[i].append(self._some(block, pairs))
                        places[i].append(pairs)
                mx.eval(outputs)
            finally:
                self._finish(reading)
        return [
            mx.concatenate(ys)[mx.array(np.argsort(np.concatenate(at)))].reshape(*b.chosen.shape, -1)
            for b, ys, at in zip(blocks, outputs, places, strict=True)
        ]

    def _some(self, block: Block, pairs: np.ndarray) -> mx.array:
        """The outputs [P, D] of some (token, expert) pairs of a block."""
        rows = block.x[mx.array(pairs // block.chosen.shape[1])]
        slots = mx.array(self.slots.places(block.chosen.reshape(-1)[pairs][:, None]), mx.uint32)
        low_rank = None if block.pairs.low_rank is None else block.pairs.low_rank.some(pairs)
        return block.way(rows, slots, Pairs(len(pairs), 1, low_rank)).squeeze(1)
