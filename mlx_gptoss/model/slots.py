"""Which experts of a layer are in memory when not all of them are: slots, and who gives theirs up.

The expert that was used longest ago leaves, or of the oldest quarter (of two at least) the one that was used
least of late: a layer's choices have strong recency and some lasting favourites. Slots belong to a layer: one
list for all layers, in least-recently-used order, forgets every expert before the next token asks for it
again.

Nothing here reads or computes, so a recorded trace is replayed by the same code that ran.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

# What a use counts for after each further step: half of it is left after some 70 (benchmarks/experts.py).
FADE = 0.99
# Up to so many (token, expert) pairs Python's own containers are faster than numpy: the code of numpy's calls
# has left the core's cache while a layer computed, and each costs 10 to 50 us then.
FEW = 64


class Slots:
    """The slots of one layer: at any time some of them hold an expert each."""

    def __init__(self, slots: int, experts: int) -> None:
        self.count, self.experts = slots, experts
        self.uses = [0] * experts  # (token, expert) pairs so far
        self._lately = [0.0] * experts
        self._worth = 1.0  # of a use in `_lately` now: it grows, which fades earlier ones
        self._held: OrderedDict[int, int] = OrderedDict()  # expert -> slot, the longest unused first
        self._free = list(range(slots - 1, -1, -1))
        self._spared: set[int] = set()  # the experts of the last tokens, while waves go by

    @property
    def held(self) -> Collection[int]:
        """The experts that are in a slot, the longest unused first."""
        return self._held.keys()

    def places(self, chosen: np.ndarray) -> list[list[int]] | np.ndarray:
        """The slots of experts [T, k] that are held."""
        if chosen.size <= FEW:
            held = self._held
            return [[held[expert] for expert in row] for row in chosen.tolist()]
        table = np.zeros(self.experts, np.uint32)
        table[list(self._held)] = list(self._held.values())
        places: np.ndarray = table[chosen]
        return places

    def note(self, chosen: np.ndarray) -> list[int]:
        """Count what a step chose, int [T, k]; the experts among it."""
        self._spared = set()
        counts: dict[int, int] = {}
        if chosen.size <= FEW:
            for row in chosen.tolist():
                for expert in row:
                    counts[expert] = counts.get(expert, 0) + 1
        else:
            each = np.bincount(chosen.reshape(-1)).tolist()
            counts = {expert: count for expert, count in enumerate(each) if count}
        self._worth /= FADE
        if self._worth > 1e100:
            self._lately = [lately / self._worth for lately in self._lately]
            self._worth = 1.0
        for expert, count in counts.items():
            self.uses[expert] += count
            self._lately[expert] += self._worth
        return sorted(counts)

    def waves(self, need: Sequence[int], chosen: np.ndarray) -> list[list[int]]:
        """`need`, all at once where it fits; else in groups of a quarter of the slots.

        What is held comes first, so that nothing is read twice, and what the last tokens chose, which the
        next one likely wants, comes last: with what of it is held already it fills half of the slots and
        stays, while the other half is used and read in turn.
        """
        if len(need) <= self.count:
            return [list(need)]
        size = max(1, self.count // 4)
        last = list(dict.fromkeys(chosen.reshape(-1)[::-1].tolist()))[: self.count - 2 * size]
        self._spared = set(last)
        order = sorted(need, key=lambda e: (e not in self._held, e in self._spared, e))
        return [order[i : i + size] for i in range(0, len(order), size)]

    def claim(self, group: Iterable[int], keep: Collection[int] = ()) -> list[tuple[int, int]]:
        """(expert, slot) for each of a group that is not held. It is held once `fill` says so.

        The slots of the group, and of `keep`, which is in use, stay as they are.
        """
        missing, stay = [], {*keep}
        for expert in group:
            stay.add(expert)
            if expert in self._held:
                self._held.move_to_end(expert)
            else:
                missing.append(expert)
        return [(expert, self._free.pop() if self._free else self._evict(stay)) for expert in missing]

    def _evict(self, stay: Collection[int]) -> int:
        others = [e for e in self._held if e not in stay and e not in self._spared]
        oldest = others[: max(2, self.count // 4)]
        return self._held.pop(min(oldest, key=lambda e: self._lately[e]))

    def fill(self, expert: int, slot: int) -> None:
        """The expert is in the slot now."""
        self._held[expert] = slot

    def give_back(self, slot: int) -> None:
        """A claimed slot in which there is no expert after all."""
        self._free.append(slot)

    def resized(self, count: int) -> tuple[Slots, list[tuple[int, int]]]:
        """Another number of slots with what was used last, and from which slot to which it has to go."""
        made = Slots(count, self.experts)
        made.uses, made._lately, made._worth = self.uses, self._lately, self._worth
        kept = list(self._held)[-count:]
        places = [(self._held[expert], slot) for expert, slot in made.claim(kept)]
        for expert, (_, slot) in zip(kept, places, strict=True):
            made.fill(expert, slot)
        return made, places

    def favourites(self) -> list[int]:
        """The experts used most, as many as there are slots, the most used last."""
        return sorted(range(self.experts), key=lambda expert: self.uses[expert])[-self.count :]


def replay(slots: Slots, steps: Iterable[np.ndarray]) -> Iterator[int]:
    """The misses of each step of a trace: what the steps chose, int [T, k]."""
    for chosen in steps:
        misses, before = 0, list[int]()
        for group in slots.waves(slots.note(chosen), chosen):
            claimed = slots.claim(group, before)
            for expert, slot in claimed:
                slots.fill(expert, slot)
            misses += len(claimed)
            before = group
        yield misses
