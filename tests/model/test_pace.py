"""A forward is handed to Metal in parts: early where it is awaited, and never far ahead of the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.model import pace
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.pace import Paces
from tests.model.test_streamed import as_on_a_gpu, streamed
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

SHAPE = Shape(layers=9, hidden=64, intermediate=64, experts=16, heads=4, window=16, vocab=160)
PROMPT = np.arange(pace.FEW_ROWS + 1) % SHAPE.vocab


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("pace"), SHAPE)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was launched and waited for, on a machine that passes for one with Metal."""
    found: list[str] = []
    launch, wait = mx.async_eval, mx.eval

    def noting(name: str, call: Any) -> Any:
        def noted(*arrays: Any) -> None:
            found.append(name)
            call(*arrays)

        return noted

    monkeypatch.setattr(pace, "on_metal", lambda: True)
    monkeypatch.setattr(mx, "async_eval", noting("launch", launch))
    monkeypatch.setattr(mx, "eval", noting("wait", wait))
    return found


def run(model: Model, told: list[str], tokens: np.ndarray, *, awaited: bool = False) -> np.ndarray:
    """Logits of the last token; what was told is that of the forward alone."""
    cache = model.make_cache()
    told.clear()
    out = model(mx.array(tokens, mx.int32), [Segment(len(tokens), cache)], [len(tokens) - 1], awaited=awaited)
    return np.array(out)


def test_a_pipelined_step_is_launched_whole(folder: Path, told: list[str]) -> None:
    run(read_model(Checkpoint(folder, "float32")), told, PROMPT[:1])
    assert told == []


def test_a_step_that_is_awaited_is_launched_every_few_layers(folder: Path, told: list[str]) -> None:
    run(read_model(Checkpoint(folder, "float32")), told, PROMPT[:5], awaited=True)
    assert told == ["launch"] * (SHAPE.layers // Paces().awaited)


@pytest.mark.parametrize("awaited", [False, True])
def test_a_prompt_is_launched_layer_by_layer_and_at_most_a_few_are_under_way(
    folder: Path, told: list[str], awaited: bool
) -> None:
    """What one layer needs in between is freed before much more is asked for."""
    run(read_model(Checkpoint(folder, "float32")), told, PROMPT, awaited=awaited)
    ahead = np.cumsum([1 if what == "launch" else -1 for what in told])
    assert told.count("launch") == SHAPE.layers
    assert ahead.max() == pace.LAYERS_AHEAD + 1 and ahead[-1] == pace.LAYERS_AHEAD


@pytest.mark.parametrize(("paces", "launches"), [(Paces(), 0), (Paces(decode=2), 4), (Paces(decode=4), 2)])
def test_a_measured_pace_is_kept_to(folder: Path, told: list[str], paces: Paces, launches: int) -> None:
    model = read_model(Checkpoint(folder, "float32"))
    model.paces = paces
    run(model, told, PROMPT[:1])
    assert told == ["launch"] * launches
    model.paces = Paces(awaited=3, prompt=2)
    run(model, told, PROMPT[:1], awaited=True)
    assert told == ["launch"] * 3
    run(model, told, PROMPT)
    assert told.count("launch") == 4


def test_the_pace_changes_no_bit(folder: Path, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_model(Checkpoint(folder, "float32"))
    paced = [run(model, told, PROMPT), run(model, told, PROMPT[:5], awaited=True)]
    monkeypatch.setattr(pace, "on_metal", lambda: False)
    plain = [run(model, told, PROMPT), run(model, told, PROMPT[:5], awaited=True)]
    assert told == []
    assert all(np.array_equal(a, b) for a, b in zip(paced, plain, strict=True))


def test_streamed_experts_are_launched_by_themselves(
    folder: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's output is not to be had before its experts are read, which the next layer sees to."""
    plain = run(read_model(Checkpoint(folder, "float32")), told, PROMPT[:1], awaited=True)
    as_on_a_gpu(monkeypatch)
    model = streamed(folder, 8)
    assert np.array_equal(run(model, told, PROMPT[:1], awaited=True), plain)
    assert told.count("launch") == SHAPE.layers
