"""What the doctor says of each kernel of ours: run by the emulator, on a model in memory."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gptoss import device
from mlx_gptoss.checkpoint import reader
from mlx_gptoss.doctor import Finding, kernels
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.kernels import candidates, decode
from mlx_gptoss.model.kernels import kernel as metal
from mlx_gptoss.model.kernels.decode import DecodeKernels
from mlx_gptoss.model.kernels.kernel import Launch, Program
from mlx_gptoss.model.kernels.record import Record
from mlx_gptoss.model.kernels.verified import Verdict
from tests.metal.emulator import Emulator, missing
from tests.support.checkpoints import write_checkpoint
from tests.support.examiners import end_examiners
from tests.support.random_weights import Shape

SHAPE = Shape(layers=2, hidden=64, intermediate=64, experts=8, heads=4, window=16, vocab=64)
NAMES = ["attention over everything", "attention over a window", "router", "gate_up", "down"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """With its matrices as a GPU has them."""
    monkeypatch.setattr(reader, "on_gpu", lambda: True)
    return kernels.some_layers(write_checkpoint(tmp_path / "model", SHAPE), "float32")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record("M1", tmp_path / "machines.json")


def judged(monkeypatch: pytest.MonkeyPatch, *verdicts: Verdict) -> None:
    """Every examination comes to the next of these."""
    left = iter(verdicts)
    monkeypatch.setattr(DecodeKernels, "examine", lambda self, name: next(left))


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_kernel_whose_text_was_tampered_with_is_named_and_another_is_right(
    monkeypatch: pytest.MonkeyPatch, model: Model, record: Record
) -> None:
    emulator = Emulator()

    def run(program: Program, inputs: Sequence[mx.array], launch: Launch) -> list[mx.array]:
        source = program.source.replace("(u + 1.0f)", "(u + 1.1f)")
        assert (source != program.source) == (program.name == "gate_up")
        return emulator.run(replace(program, source=source), inputs, launch)

    monkeypatch.setattr(metal, "run", run)
    # The emulator takes a second to compile one.
    some = [c for c in candidates.candidates(model) if c.name in ("gate_up", "down")]
    monkeypatch.setattr(decode, "candidates", lambda *model_and_bits: some)
    wrong, right = kernels.examine(model, record, lambda: 0.0)  # a clock that tells nothing
    assert (wrong.name, wrong.verdict) == ("gate_up", "failed") and wrong.detail.startswith("wrong: off by ")
    assert (right.name, right.verdict, right.detail) == ("down", "info", "not faster: +0.0%")


def test_each_verdict_has_its_mark(monkeypatch: pytest.MonkeyPatch, model: Model, record: Record) -> None:
    judged(
        monkeypatch,
        Verdict(True, "right, and a step is 12.0% faster", gain=0.12),
        Verdict(False, "not faster: -1.0%", gain=-0.01),
        Verdict(False, "wrong: NaN or infinity for inputs (1, 64)"),
        Verdict(False, "fails: RuntimeError: does not compile"),
        Verdict(False, "takes too long to examine"),
    )
    found = list(kernels.examine(model, record))
    assert [f.verdict for f in found] == ["ok", "info", "failed", "failed", "warning"]
    assert [dict(f.figures) for f in found] == [{"gain": 0.12}, {"gain": -0.01}, {}, {}, {}]


def test_a_kernel_that_took_two_processes_down_is_not_tried_again_and_one_that_ctrl_c_ended_is(
    monkeypatch: pytest.MonkeyPatch, model: Model, tmp_path: Path
) -> None:
    path = tmp_path / "machines.json"
    record, left = Record("M1", path), []

    def die(*args: object, **rest: object) -> Generator[None, None, Verdict]:
        yield from ()
        left.append(path.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "examining", die)
    with pytest.raises(KeyboardInterrupt):
        list(kernels.examine(model, record))
    judged(monkeypatch, *[Verdict(True, "right", gain=0.1)] * 14)
    for deaths in range(2):
        assert {f.verdict for f in kernels.examine(model, record)} == {"ok"}
        # As the process leaves it that ends there.
        path.write_text(left[0].replace('"deaths": 0', f'"deaths": {deaths}'))
        end_examiners(path)
    first, *others = kernels.examine(model, record)
    assert first.verdict == "failed" and "did not come to an end" in first.detail
    assert {f.verdict for f in others} == {"ok"}


def test_a_model_that_no_kernel_suits_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: Record
) -> None:
    """On the CPU, whose experts are applied in another way."""
    monkeypatch.setattr(reader, "on_gpu", lambda: False)
    model = kernels.some_layers(write_checkpoint(tmp_path / "model", SHAPE), "float32")
    (found,) = kernels.examine(model, record)
    assert found == Finding("kernels", "own kernels", "none", "none suits this model")


def test_without_metal_or_switched_off_none_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "some_layers", None)  # whoever calls it fails
    monkeypatch.setattr(device, "on_metal", lambda: False)
    (found,) = kernels.findings()
    assert found.verdict == "none" and "Metal" in found.detail
    monkeypatch.setattr(device, "on_metal", lambda: True)
    monkeypatch.setenv("GPTOSS_KERNELS", "off")
    (found,) = kernels.findings()
    assert found.verdict == "none" and "GPTOSS_KERNELS" in found.detail


def test_on_metal_the_models_own_layers_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("GPTOSS_KERNELS", raising=False)
    monkeypatch.setattr(device, "on_metal", lambda: True)
    monkeypatch.setattr(reader, "on_gpu", lambda: True)
    judged(monkeypatch, *[Verdict(True, "right", gain=0.1)] * 5)
    folder = write_checkpoint(tmp_path / "model", replace(SHAPE, layers=6))
    assert [f.name for f in kernels.findings(folder)] == NAMES
    assert len(kernels.some_layers(folder).layers) == 4
