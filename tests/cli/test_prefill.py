"""How much of a prompt is read, told while it is read."""

from __future__ import annotations

import pytest

from mlx_gptoss.cli.prefill import LONG, shown_reading, to_read
from mlx_gptoss.cli.terminal.talk import Settings
from mlx_gptoss.harmony import Done, Event, TextDelta
from mlx_gptoss.sampling import PromptProgress
from tests.support.scripted_model import scripted_engine


def test_only_what_has_to_be_computed_is_counted() -> None:
    reads = [PromptProgress(read, 500, 2500) for read in (500, 1500, 2500)]
    assert [to_read(progress) for progress in reads] == [(0, 2000), (1000, 2000), (2000, 2000)]


def test_a_prompt_that_is_soon_read_tells_nothing() -> None:
    assert to_read(PromptProgress(9000, 9000, 9000 + LONG - 1)) is None
    assert to_read(PromptProgress(9000, 9000, 9000 + LONG)) == (0, LONG)


@pytest.mark.parametrize("reads", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_is_watched_comes_through_whole(reads: int, count: int) -> None:
    said: list[Event] = [TextDelta(str(n)) for n in range(count)]
    told: list[Event] = [PromptProgress(1000 * n, 0, 5000) for n in range(reads)]
    assert list(shown_reading(iter([*told, *said]))) == said


def test_a_chat_is_told_how_much_of_its_prompt_is_read() -> None:
    llm, _ = scripted_engine(lambda context: "<|channel|>final<|message|>x<|return|>", prefill_chunk=64)
    with llm:
        *events, done = Settings().session(llm).stream("y" * 1000)
    told = [event for event in events if isinstance(event, PromptProgress)]
    assert isinstance(done, Done) and {item.prompt_tokens for item in told} == {done.usage.prompt_tokens}
    reads = [item.read_tokens for item in told]
    assert reads == sorted(set(reads)) and len(reads) > 1 and reads[-1] <= done.usage.prompt_tokens
    assert events[: len(told)] == told
