"""Properties of what guesses tokens, and of when it is worth it."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.engine.runner import LocalRunner
from mlx_gptoss.engine.speculate import (
    AFTER,
    LEAST_READ,
    LEAST_RIGHT,
    LONGEST,
    PLAIN_EVERY,
    ROUNDS,
    SHORTEST,
    ModelDrafter,
    PromptLookup,
    Speculation,
)
from tests.support.hash_model import WINDOW, HashModel, expected
from tests.support.hash_model import prompt_of as prompt
from tests.support.scheduling import cache_bytes


def last_continuation(tokens: list[int], limit: int) -> list[int]:
    """What followed the latest earlier place of the longest run that ends the tokens, by brute force."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                return tokens[end : end + limit]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=12), st.integers(1, 5))
def test_lookup_finds_the_latest_place_of_the_longest_run(pieces: list[list[int]], limit: int) -> None:
    lookup, tokens = PromptLookup(), list[int]()
    for piece in pieces:
        tokens = [*tokens, *piece]
        assert lookup.propose(tokens, limit) == last_continuation(tokens, limit)
    assert lookup.nbytes == 0 and not lookup.behind


def drafter(chunk: int = 64) -> tuple[ModelDrafter, HashModel]:
    model = HashModel()
    return ModelDrafter(LocalRunner(model), chunk), model  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_draft_model_guesses_greedily_and_reads_only_what_is_new(limit: int) -> None:
    made, model = drafter()
    tokens = prompt(1, 30)
    guesses = made.propose(tokens, limit)
    assert guesses == expected(tokens, limit) and not made.behind
    assert [len(shares[0][1]) for shares in model.forwards] == [30, *[1] * (limit - 1)]
    assert made.nbytes == cache_bytes(HashModel(), 512, 1)
    for right in range(limit + 1):
        # Some of the guesses were right; then came a token of the target's own.
        model.forwards.clear()
        tokens = [*tokens, *guesses[:right], 7]
        guesses = made.propose(tokens, limit)
        assert guesses == expected(tokens, limit)
        unread = 2 if right == limit else 1  # the last guess was never read
        assert [len(shares[0][1]) for shares in model.forwards] == [unread, *[1] * (limit - 1)]


def test_every_so_many_rounds_go_without_a_guess() -> None:
    made, _model = drafter()
    rounds = [bool(made.propose(prompt(1, 5), 2)) for _ in range(2 * PLAIN_EVERY)]
    assert [i + 1 for i, guessed in enumerate(rounds) if not guessed] == [PLAIN_EVERY, 2 * PLAIN_EVERY]
    assert not made.behind


@pytest.mark.parametrize(("chunk", "read"), [(1, LEAST_READ), (LEAST_READ, LEAST_READ), (40, 40)])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_draft_model_reads_a_chunk_a_round_and_says_when_it_is_behind(
    chunk: int, read: int, more: int
) -> None:
    made, model = drafter(chunk)
    tokens = prompt(1, 3 * read + more)
    behind = []
    while not (guesses := made.propose(tokens, 3)):
        behind.append(made.behind)
    assert behind == [True] * (3 if more > 0 else 2) and not made.behind
    assert guesses == expected(tokens, 3)
    assert [len(shares[0][1]) for shares in model.forwards[: len(behind)]] == [read] * len(behind)


def test_a_draft_model_that_lost_its_window_replays_it() -> None:
    made, model = drafter(LEAST_READ)
    tokens = prompt(1, 400)
    while not made.propose(tokens, 2):
        pass
    tokens = [*tokens[:20], *prompt(2, 20)]
    model.forwards.clear()
    while not (guesses := made.propose(tokens, 2)):
        pass
    assert guesses == expected(tokens, 2)
    assert sum(len(shares[0][1]) for shares in model.forwards) == WINDOW - 1 + 20 + 1


class Anything:
    nbytes = 0
    behind = False

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        return [0] * limit


@pytest.mark.parametrize(
    ("limit", "room", "n"), [(4, 9, 4), (4, 4, 4), (4, 3, 3), (4, 1, 1), (4, 0, 0), (4, -1, 0)]
)
def test_no_more_is_guessed_than_is_allowed_and_wanted(limit: int, room: int, n: int) -> None:
    speculation = Speculation(Anything(), limit)
    assert len(speculation.propose([1], room)) == n
    speculation.on = False
    assert speculation.propose([1], room) == []


@pytest.mark.parametrize(("proposed", "accepted"), list(product((AFTER - 1, AFTER, 4 * AFTER), range(14))))
def test_wrong_guesses_end_guessing_when_enough_were_seen(proposed: int, accepted: int) -> None:
    speculation = Speculation(Anything(), proposed)
    ended = speculation.record(proposed, accepted, 1.0)
    assert ended == (proposed >= AFTER and accepted < LEAST_RIGHT * proposed) != speculation.on
    assert not speculation.record(proposed, 0, 1.0) or not ended


@pytest.mark.parametrize("first", ["guessed", "plain"])
@pytest.mark.parametrize(("seconds", "slow"), [(0.29, False), (0.30, False), (0.31, True)])
def test_slow_guesses_end_guessing_when_enough_was_measured(first: str, seconds: float, slow: bool) -> None:
    """Two tokens come out of each round with a guess, in two and some times what one takes without."""
    speculation = Speculation(Anything(), 4)
    rounds = {"guessed": (3, 1, 2 * seconds), "plain": (0, 0, 0.3)}
    last = "plain" if first == "guessed" else "guessed"
    for _ in range(ROUNDS):
        assert not speculation.record(*rounds[first])
    for i in range(ROUNDS - 1):
        assert not speculation.record(*rounds[last]), i
    # A round without a guess is never the one that ends it.
    assert speculation.record(*rounds[last]) == (slow and last == "guessed")
    assert speculation.record(*rounds["guessed"]) == (slow and last == "plain")
    assert speculation.on is not slow and not speculation.record(*rounds["guessed"])


def test_rounds_in_which_a_draft_model_was_reading_count_for_nothing() -> None:
    anything = Anything()
    speculation = Speculation(anything, 4)
    anything.behind = True
    for proposed in (0, AFTER):
        assert not speculation.record(proposed, 0, 5.0)
    assert speculation == Speculation(anything, 4)
