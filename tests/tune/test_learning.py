"""End to end: what a run teaches the demo model, asked through the engine that serves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mlx_gptoss as gptoss
from mlx_gptoss.tune import TuneOptions, tune
from tests.support.tuning import style_rows, write_rows

LEARN = TuneOptions(
    rank=16, scale=4.0, tokens=768, steps=30, every=30, lr=3e-3, warmup=0.1, samples=0, patience=0
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    write_rows(folder / "train.jsonl", style_rows("style train", 200))
    write_rows(folder / "valid.jsonl", style_rows("style valid", 24))
    return tune("demo", folder, folder / "adapter", LEARN).folder


@pytest.fixture(scope="module")
def llm(adapter: Path) -> Iterator[gptoss.LLM]:
    with gptoss.load("demo", adapters={"style": adapter}) as loaded:
        yield loaded


def right(llm: gptoss.LLM, adapter: str, count: int = 80) -> float:
    """The share of unseen questions that are answered in the new form, and rightly."""

    def answered(row: dict[str, Any]) -> bool:
        question, answer = row["messages"]
        greedy = gptoss.SamplingParams(temperature=0.0, max_tokens=200)
        effort = row["reasoning_effort"]
        reply = llm.respond(question["content"], params=greedy, reasoning_effort=effort, adapter=adapter)
        return bool(reply.text == answer["content"])

    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(answered, style_rows("style test", count))) / count


def test_a_new_form_of_answer_is_learned_in_thirty_steps(llm: gptoss.LLM) -> None:
    assert right(llm, "base", 24) == 0
    assert right(llm, "style") >= 0.6
