"""The pace is what was fastest here, if clearly so and in no more memory; else it stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gptoss import device
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.engine import runner as running
from mlx_gptoss.engine.runner import LocalRunner
from mlx_gptoss.model import tuning
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.kernels.decode import DecodeKernels
from mlx_gptoss.model.kernels.record import Record
from mlx_gptoss.model.pace import USUAL, Paces
from mlx_gptoss.model.tuning import keep, known, tune
from tests.model.test_streamed import streamed
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

SHAPE = Shape(layers=6, hidden=32, intermediate=32, experts=8, heads=4, window=16, vocab=160)
Cost = Callable[[Paces], float]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return read_model(Checkpoint(write_checkpoint(tmp_path / "m", SHAPE), "float32"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 2, "ROUNDS": 2, "CONTEXT": 4, "PROMPT": 4}.items():
        monkeypatch.setattr(tuning, name, value)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 100)


def clock_of(model: Model, cost: Cost) -> Callable[[], float]:
    """A clock by which whatever runs takes what its pace costs."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += cost(model.paces)
        return now

    return clock


@pytest.mark.parametrize(
    ("cost", "best"),
    [
        (lambda p: 1.0, USUAL),
        (lambda p: 0.99 if p == Paces(decode=4) else 1.0, USUAL),
        (lambda p: 0.9 if p == Paces(decode=4) else 1.0, Paces(decode=4)),
        (lambda p: 0.9 if p == Paces(awaited=2) else 1.0, Paces(awaited=2)),
        (lambda p: 1.0 / (1 + p.prompt), Paces(prompt=4)),
        (lambda p: 1.0 / (1 + p.decode + 2 * p.awaited), Paces(decode=4, awaited=4)),
    ],
)
def test_the_fastest_pace_is_found(model: Model, cost: Cost, best: Paces) -> None:
    model.paces = Paces(decode=3)
    tuned = tune(model, clock_of(model, cost))
    assert tuned.paces == best and model.paces == Paces(decode=3)
    assert {*tuned.seconds["awaited"]} == {0, 1, 2, 4}  # no more than there are layers


def test_a_prompt_may_not_take_more_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 100 * model.paces.prompt)
    assert tune(model, clock_of(model, lambda p: 1.0 / p.prompt)).paces == USUAL
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 100 + model.paces.prompt // 4)
    assert tune(model, clock_of(model, lambda p: 1.0 / p.prompt)).paces == Paces(prompt=4)


def test_what_was_measured_is_known_to_the_next_process_with_metal(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record("M1", tmp_path / "machines.json")
    monkeypatch.setattr(tuning, "on_metal", lambda: True)
    assert known(model, record) == USUAL
    keep(Paces(4, 2, 2), model, record)
    assert known(model, Record("M1", tmp_path / "machines.json")) == Paces(4, 2, 2)
    assert known(model, Record("M2", tmp_path / "machines.json")) == USUAL
    model.layers.pop()
    assert known(model, record) == USUAL
    model.layers.append(model.layers[0])
    for nonsense in ({}, {"decode": 1}, {"decode": -1, "awaited": 1, "prompt": 1}, 3):
        name = next(iter(record_names(tmp_path / "machines.json")))
        record.put(tuning.SECTION, name, nonsense)
        assert known(model, record) == USUAL


def record_names(path: Path) -> list[str]:
    import json

    return list(json.loads(path.read_text())["M1"][tuning.SECTION])


def test_a_runner_tunes_itself_with_metal_alone(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record("M1", tmp_path / "machines.json")
    runner = LocalRunner(model, kernels=DecodeKernels(model, device.kernel_mode(), record))
    assert runner.tune() == ["nothing to tune: command buffers and kernels of our own are Metal's"]
    assert not (tmp_path / "machines.json").exists() and model.paces is USUAL
    monkeypatch.setattr(running, "on_metal", lambda: True)
    monkeypatch.setattr(tuning, "on_metal", lambda: True)
    told = runner.tune()
    assert [line.split(":")[0] for line in told] == ["decode", "awaited", "prompt"]
    assert known(model, record) == model.paces


def test_streamed_experts_are_not_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "on_metal", lambda: True)
    model = streamed(write_checkpoint(tmp_path / "m", SHAPE), 4)
    record = Record("M1", tmp_path / "machines.json")
    runner = LocalRunner(
        model,
        streamed=running.streamed_experts(model),
        kernels=DecodeKernels(model, "off", record),
    )
    assert runner.tune() == ["nothing to tune: with experts on the disk, that decides"]
