"""Which experts keep their slots, and in which order more experts than slots take turns."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gptoss.model.slots import Slots, replay

E, K = 16, 4


def take(slots: Slots, experts: list[int], keep: tuple[int, ...] = ()) -> list[int]:
    """Let these be held; those that had to be read."""
    claimed = slots.claim(experts, keep)
    for expert, slot in claimed:
        slots.fill(expert, slot)
    return [expert for expert, _ in claimed]


def steps(seed: int, count: int, rows: int = 1) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield np.stack([rng.choice(E, K, replace=False) for _ in range(rows)])


def test_every_slot_has_one_expert() -> None:
    slots = Slots(5, E)
    for chosen in steps(0, 200):
        take(slots, slots.note(chosen))
        (places,) = slots.places(np.array([list(slots.held)]))
        assert len(slots.held) <= 5 and len(set(places)) == len(places)
        assert set(chosen.reshape(-1)) <= set(slots.held)


def test_the_longest_unused_expert_leaves() -> None:
    slots = Slots(4, E)
    take(slots, [0, 1, 2, 3])
    take(slots, [0])
    assert take(slots, [4]) == [4]
    assert list(slots.held) == [2, 3, 0, 4]


def test_of_the_oldest_quarter_the_less_used_leaves() -> None:
    slots = Slots(8, E)
    for _ in range(3):
        slots.note(np.array([[0]]))
    take(slots, list(range(8)))
    take(slots, [8])
    assert 0 in slots.held and 1 not in slots.held


def test_of_two_the_less_used_leaves_however_few_slots_there_are() -> None:
    slots = Slots(3, E)
    for _ in range(3):
        slots.note(np.array([[0]]))
    take(slots, [0, 1, 2])
    take(slots, [2, 3])
    assert set(slots.held) == {0, 2, 3}


def test_what_is_in_use_stays() -> None:
    slots = Slots(4, E)
    take(slots, [0, 1, 2, 3])
    assert take(slots, [4, 5], keep=(0, 1)) == [4, 5]
    assert set(slots.held) == {0, 1, 4, 5}


def test_a_slot_that_was_given_back_is_used_again() -> None:
    slots = Slots(2, E)
    ((_, slot),) = slots.claim([0])
    slots.give_back(slot)
    assert 0 not in slots.held
    assert take(slots, [1, 2]) == [1, 2] and sorted(slots.places(np.array([[1], [2]]))) == [[0], [1]]


def test_many_choices_are_counted_and_placed_as_few_are() -> None:
    for seed in range(3):
        one, other = Slots(E, E), Slots(E, E)
        (chosen,) = steps(seed, 1, rows=50)
        take(one, sorted({e for row in chosen for e in one.note(row[None])}))
        take(other, other.note(chosen))
        assert one.uses == other.uses == np.bincount(chosen.reshape(-1), minlength=E).tolist()
        places = other.places(chosen)
        assert np.array_equal(places, [one.places(row[None])[0] for row in chosen])


def test_uses_fade_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps there were, a use of long ago counts for less than one of late."""
    slots = Slots(8, E)
    take(slots, list(range(8)))
    slots.note(np.array([[0]]))
    for _ in range(40_000):
        slots.note(np.array([[5]]))
    slots.note(np.array([[1]]))
    take(slots, [8])
    assert 0 not in slots.held and 1 in slots.held


@given(st.integers(4, E), st.integers(0, 10_000), st.integers(2, 40))
def test_waves_need_each_expert_once_and_never_more_slots_than_there_are(
    count: int, seed: int, rows: int
) -> None:
    slots = Slots(count, E)
    for chosen in [*steps(seed, 3), *steps(seed + 1, 3, rows)]:
        need = slots.note(chosen)
        held = set(slots.held)
        waves = slots.waves(need, chosen)
        assert sorted(e for group in waves for e in group) == need
        read: list[int] = []
        before: tuple[int, ...] = ()
        for group in waves:
            assert len({*group, *before}) <= count
            read += take(slots, group, before)
            assert set(group) <= set(slots.held)
            before = tuple(group)
        assert sorted(read) == sorted(set(need) - held)


def test_after_waves_a_step_may_take_any_slot_but_its_own() -> None:
    slots = Slots(5, E)
    for one, many in zip(steps(1, 30), steps(2, 30, rows=9), strict=True):
        list(replay(slots, [many]))
        take(slots, slots.note(one))


def test_what_the_last_tokens_chose_is_held_after_the_waves() -> None:
    slots = Slots(8, E)
    for chosen in steps(3, 20, rows=12):
        list(replay(slots, [chosen]))
        assert set(chosen[-1]) <= set(slots.held)


def test_frequency_keeps_what_plain_recency_would_lose() -> None:
    """Zipf choices: never much worse than plain recency, and better where slots are scarce."""
    rng = np.random.default_rng(5)
    weight = 1 / np.arange(1, 65) ** 1.2
    trace = [rng.choice(64, (1, K), replace=False, p=weight / weight.sum()) for _ in range(1500)]
    for count in (8, 16, 32):
        ours = sum(replay(Slots(count, 64), trace))
        plain = Plain(count, 64)
        theirs = sum(replay(plain, trace))
        assert len(trace) * K - ours >= 0.97 * (len(trace) * K - theirs)
        assert count > 16 or ours < theirs


class Plain(Slots):
    """Slots whose longest unused expert leaves, however often it was used."""

    def note(self, chosen: np.ndarray) -> list[int]:
        found = super().note(chosen)
        self._lately = [0.0] * self.experts
        return found


@pytest.mark.parametrize("count", [4, 7, E])
def test_a_replay_counts_what_was_not_held(count: int) -> None:
    trace = list(steps(9, 50, rows=3))
    misses = list(replay(Slots(count, E), trace))
    if count == E:
        assert sum(misses) == len({e for chosen in trace for e in chosen.reshape(-1)})
    assert all(0 <= m <= len(np.unique(c)) for m, c in zip(misses, trace, strict=True))


def test_favourites_are_the_most_used() -> None:
    slots = Slots(2, E)
    slots.note(np.array([[1, 2], [2, 3], [2, 3]]))
    assert slots.favourites() == [3, 2]
