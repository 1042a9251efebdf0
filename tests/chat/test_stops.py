"""Properties of stop texts, for any text in any pieces."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gptoss.chat.stops import UntilStop

# Few letters, so that stop texts occur, overlap, and begin inside one another.
TEXT = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)
PIECES = st.lists(TEXT, max_size=6)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """(the text before it, the stop text) of the one that is complete first; of two, the longer."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def held_back(text: str, stops: list[str]) -> str:
    """The longest end of a text without a stop text that can still become one."""
    ends = (text[i:] for i in range(len(text)))
    return next((end for end in ends if any(stop.startswith(end) for stop in stops)), "")


@settings(max_examples=500)
@given(PIECES, STOPS)
def test_output_is_the_text_before_the_first_stop_text_in_whatever_pieces_it_comes(
    pieces: list[str], stops: list[str]
) -> None:
    until = UntilStop(stops)
    shown = "".join([*(until.push(piece) for piece in pieces), until.finish()])
    assert (shown, until.found) == first_stop("".join(pieces), stops)
    assert until.over == (until.found is not None)


@settings(max_examples=500)
@given(PIECES, STOPS)
def test_what_may_become_a_stop_text_is_held_back_and_nothing_else(
    pieces: list[str], stops: list[str]
) -> None:
    until, text, shown = UntilStop(stops), "", ""
    for piece in pieces:
        text += piece
        shown += until.push(piece)
        before, found = first_stop(text, stops)
        assert shown == (before if found else text.removesuffix(held_back(text, stops)))


@given(PIECES, STOPS.filter(bool), TEXT)
def test_nothing_is_shown_after_a_stop_text(pieces: list[str], stops: list[str], more: str) -> None:
    until = UntilStop(stops)
    for piece in [*pieces, stops[0]]:
        until.push(piece)
    found = until.found
    assert until.over and until.push(more) == until.finish() == "" and until.found == found
