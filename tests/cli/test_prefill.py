"""How much of a prompt is read, told while it is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from mlx_gptoss.cli import prefill
from mlx_gptoss.cli.prefill import PrefillWatch, shown_reading
from mlx_gptoss.engine.stats import EngineStats
from tests.support.scripted_model import scripted_engine


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "PATIENCE", 0.0)
    monkeypatch.setattr(prefill, "PERIOD", 0.0)


def told(before: EngineStats, moments: list[EngineStats]) -> list[tuple[int, int]]:
    """What is told of an engine that is seen at these moments."""
    left, over, said = iter(moments), threading.Event(), []

    def stats() -> EngineStats:
        try:
            return next(left)
        except StopIteration:
            over.set()
            return moments[-1]

    with PrefillWatch(stats, before, lambda read, total: said.append((read, total))):
        assert over.wait(30)
    return list(dict.fromkeys(said))


def test_only_what_has_to_be_computed_is_counted() -> None:
    before = EngineStats(prompt_tokens=1000, cached_tokens=500, computed_tokens=700, generated_tokens=50)
    moments = [
        EngineStats(prompt_tokens=3000, cached_tokens=1500, computed_tokens=done, generated_tokens=50)
        for done in (700, 1200, 1800)
    ]
    assert told(before, moments) == [(0, 1000), (500, 1000), (1000, 1000)]


def test_it_ends_with_the_first_token_and_begins_again_with_the_next_prompt() -> None:
    moments = [
        EngineStats(prompt_tokens=100, computed_tokens=40),
        EngineStats(prompt_tokens=100, computed_tokens=101, generated_tokens=1),
        EngineStats(prompt_tokens=100, computed_tokens=110, generated_tokens=10),
        EngineStats(prompt_tokens=300, cached_tokens=110, computed_tokens=150, generated_tokens=10),
    ]
    assert told(EngineStats(), moments) == [(40, 100), (40, 90)]


def test_what_is_watched_comes_through_whole() -> None:
    def items() -> Iterator[int]:
        yield from range(5)

    assert list(shown_reading(EngineStats, items())) == [0, 1, 2, 3, 4]
    assert list(shown_reading(EngineStats, iter(()))) == []


def test_a_real_engine_is_seen_reading() -> None:
    said: list[tuple[int, int]] = []
    answer = "<|channel|>final<|message|>x<|return|>"
    llm, model = scripted_engine(lambda context: answer, prefill_chunk=64)
    reading = threading.Event()
    forward = type(model).__call__

    def slowly(self: object, *args: object, **more: object) -> object:
        reading.wait(0.05)
        return forward(self, *args, **more)  # type: ignore[arg-type]

    with llm, pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "__call__", slowly)
        before = llm.stats()
        with PrefillWatch(llm.stats, before, lambda read, total: said.append((read, total))):
            done = llm.respond("y" * 1000)
    assert done.text == "x"
    totals = {total for _, total in said}
    assert totals == {done.usage.prompt_tokens}
    reads = [read for read, _ in said]
    assert reads == sorted(reads) and len(set(reads)) > 3 and reads[-1] <= done.usage.prompt_tokens
