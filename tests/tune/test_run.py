"""A run from data to an adapter: its options, its files, how it ends, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_gptoss.errors import MemoryLimitError, TuneError
from mlx_gptoss.tune import TuneOptions, tune
from mlx_gptoss.tune import run as module
from mlx_gptoss.tune.gradient import gradient
from mlx_gptoss.tune.options import read_settings
from mlx_gptoss.tune.run import Check, Event, Started, Step
from tests.support.tuning import style_rows, write_rows

# Small enough for tests that look at the run and not at what is learned.
QUICK: dict[str, Any] = {"rank": 2, "tokens": 256, "steps": 6, "every": 2, "samples": 0, "lr": 1e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", style_rows("run", 16))
    write_rows(folder / "valid.jsonl", style_rows("run valid", 4))
    return folder


class Stopped(Exception):
    """What a test ends a run with."""


def test_a_run_leaves_an_adapter_a_report_and_its_state(data: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    options = TuneOptions(**QUICK | {"samples": 1})
    finished = tune("demo", data, tmp_path / "run", options, on_event=events.append)
    assert isinstance(events[0], Started) and events[0].total == 6 and events[-1] == finished
    steps = [e for e in events if isinstance(e, Step)]
    checks = [e for e in events if isinstance(e, Check)]
    assert [e.step for e in steps] == [1, 2, 3, 4, 5, 6] and [e.step for e in checks] == [0, 2, 4, 6]
    assert steps[0].lr < options.lr >= steps[-1].lr and checks[-1].valid is not None
    assert checks[0].valid is not None and checks[-1].valid < checks[0].valid
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "adapters.safetensors", "adapter_config.json", "state.safetensors", "report.md", "loss.svg"
    }  # fmt: skip
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| data_sha256 |" in report and "Step 0:" in report and "Step 6:" in report
    about = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert about["model"] == "demo" and about["mlx_gptoss"]["step"] == finished.best_step


MUON = {"optimizer": "muon", "parts": "all", "layers": "last:2", "accumulate": 2}


@pytest.mark.parametrize("options", [{}, MUON])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_bytes(
    data: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    chosen = TuneOptions(**QUICK | {"steps": 4} | options)

    def stop(at: int, kind: type) -> Any:
        def listen(event: Event) -> None:
            if isinstance(event, kind) and getattr(event, "step", None) == at:
                raise Stopped

        return listen

    tune("demo", data, tmp_path / "whole", chosen)
    for at, kind in ((1, Step), (3, Step), (4, Check)):
        with pytest.raises(Stopped):
            tune("demo", data, tmp_path / "parts", chosen, on_event=stop(at, kind))
    tune("demo", data, tmp_path / "parts", chosen)
    for name in ("adapters.safetensors", "state.safetensors", "adapter_config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


KILLED = """
import os, signal, sys
from mlx_gptoss.tune import TuneOptions, tune
from mlx_gptoss.checkpoint import adapter
moment, count = sys.argv[1].split(), 0
def reached(kind):
    global count
    count += kind == moment[0]
    if count == int(moment[1]):
        os.kill(os.getpid(), signal.SIGKILL)
def write_whole(path, write):
    def killed(partial):
        write(partial)
        reached("write")
    original(path, killed)
    reached("written")
original = adapter.write_whole
import mlx_gptoss.tune.state, mlx_gptoss.tune.report
for module in (adapter, mlx_gptoss.tune.state, mlx_gptoss.tune.report):
    module.write_whole = write_whole
options = TuneOptions(rank=2, tokens=256, steps=4, every=1, samples=0, lr=1e-3)
tune("demo", sys.argv[2], sys.argv[3], options, on_event=lambda event: reached(type(event).__name__))
"""


def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(data: Path, tmp_path: Path) -> None:
    """SIGKILL at ten moments, each in the run that goes on after the one before."""
    tune("demo", data, tmp_path / "whole", TuneOptions(**QUICK | {"steps": 4, "every": 1}))
    for moment in (
        *("Started 1", "Check 1", "Step 1", "write 1", "written 1", "write 3"),  # nothing is kept so far
        *("written 3", "Step 2", "write 5", "Finished 1"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, moment, str(data), str(tmp_path / "parts")], capture_output=True
        )
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr.decode())
    tune("demo", data, tmp_path / "parts", TuneOptions(**QUICK | {"steps": 4, "every": 1}))
    for name in ("adapters.safetensors", "state.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_folder_with_another_run_is_refused_unless_it_is_to_be_thrown_away(
    data: Path, tmp_path: Path
) -> None:
    tune("demo", data, tmp_path, TuneOptions(**QUICK | {"steps": 1}))
    with pytest.raises(TuneError, match="steps 1, and now it is 2: use another --out, or --restart"):
        tune("demo", data, tmp_path, TuneOptions(**QUICK | {"steps": 2}))
    tune("demo", data, tmp_path, TuneOptions(**QUICK | {"steps": 2}), restart=True)


def test_a_run_without_gain_stops_and_keeps_its_best(data: Path, tmp_path: Path) -> None:
    options = TuneOptions(**QUICK | {"steps": 40, "every": 1, "patience": 2, "lr": 0.05, "warmup": 0.0})
    finished = tune("demo", data, tmp_path, options)
    assert "no gain in 2 validations" in finished.why and 0 < finished.best_step < 40


def test_a_loss_that_is_no_number_ends_the_run_and_loses_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = gradient, 0

    def broken(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        measured, grads = real(*args)
        return (
            (type(measured)(float("nan"), measured.count, measured.tokens), grads)
            if calls == 4
            else (measured, grads)
        )

    monkeypatch.setattr(module, "gradient", broken)
    with pytest.raises(TuneError, match=r"the loss is nan at step 4: lower --lr .* of step 2"):
        tune("demo", data, tmp_path, TuneOptions(**QUICK))
    assert (tmp_path / "adapters.safetensors").exists()


def test_a_full_disk_is_told_and_leaves_what_was_there(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune("demo", data, tmp_path, TuneOptions(**QUICK | {"steps": 1}))
    before = (tmp_path / "state.safetensors").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tune("demo", data, tmp_path / "other", TuneOptions(**QUICK | {"steps": 1}))
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert not [p for p in (tmp_path / "other").iterdir() if "partial" in p.name]


def test_what_must_not_be_forgotten_decides_which_adapter_is_kept(data: Path, tmp_path: Path) -> None:
    """The old answers to the very questions that get new ones: learning these is harm."""
    keep = write_rows(tmp_path / "keep.jsonl", style_rows("run", 4, old=True))
    options = TuneOptions(**QUICK | {"keep": str(keep), "lr": 0.02, "every": 6, "patience": 0})
    checks: list[Check] = []
    with pytest.raises(TuneError, match="further than 0.02 nats a token from what it says of --keep"):
        tune(
            "demo", data, tmp_path / "run", options,
            on_event=lambda event: checks.append(event) if isinstance(event, Check) else None,
        )  # fmt: skip
    start, end = checks
    assert start.valid is not None and end.valid is not None and end.valid < start.valid
    assert (
        start.keep == pytest.approx(0, abs=1e-5) and end.keep is not None and end.keep > 0.02 and not end.best
    )


def test_a_step_that_does_not_fit_is_refused_with_what_would(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 1_200_000_000)
    with pytest.raises(
        MemoryLimitError, match=r"takes .* GB .* are free: use --tokens \d+, or --stream"
    ) as caught:
        tune("demo", data, tmp_path, TuneOptions(**QUICK | {"tokens": 1 << 20}))
    assert caught.value.needed is not None and caught.value.available == 1_200_000_000


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, "rank is 0: expected a whole number >= 1"),
        ({"parts": "attention,mlp"}, "parts is 'attention,mlp'"),
        ({"lr": -1}, "lr is -1: expected a number above 0"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd': expected adamw or muon"),
        ({"warmup": 1.0}, "warmup is 1.0"),
    ],
)
def test_an_option_that_cannot_be_is_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(TuneError) as caught:
        TuneOptions(**options)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", [0, 1, 2, 3]), ("last:3", [1, 2, 3]), ("0,2-3", [0, 2, 3])]
)
def test_layers_are_chosen_by_words(layers: str, expected: list[int]) -> None:
    from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
    from mlx_gptoss.checkpoint.reader import Checkpoint

    config = Checkpoint(DEMO_FOLDER).config
    assert TuneOptions(layers=layers).layer_numbers(config) == expected
    for wrong in ("4", "last:0", "first"):
        with pytest.raises(TuneError, match="expected all, last:N, or numbers from 0 to 3"):
            TuneOptions(layers=wrong).layer_numbers(config)


def test_mlx_lms_settings_are_read(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(
        "model: demo\ntrain: true\ndata: here\nadapter_path: there\niters: 100\nlearning_rate: 1e-4\n"
        "num_layers: 8\nbatch_size: 4\nmax_seq_length: 512\nseed: 3\noptimizer: adam\nsteps_per_eval: 20\n"
        "lora_parameters:\n  rank: 4\n  scale: 20.0\n  dropout: 0.0\n"
        "  keys: [self_attn.q_proj, mlp.experts.gate_proj, mlp.experts.up_proj]\n"
    )
    settings, places = read_settings(tmp_path / "lora.yaml")
    assert places == {"model": "demo", "data": "here", "adapter_path": "there"}
    chosen = TuneOptions(**settings)
    assert (chosen.rank, chosen.scale, chosen.steps, chosen.lr, chosen.layers) == (
        4,
        20.0,
        100,
        1e-4,
        "last:8",
    )
    assert (chosen.tokens, chosen.seed, chosen.every, chosen.optimizer) == (2048, 3, 20, "adamw")
    assert chosen.part_names() == ("q_proj", "gate_up_proj")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rnak: 4", "unknown setting 'rnak'"),
        ("fine_tune_type: full", "expected lora"),
        ("iters: many", "iters is 'many'"),
        ("lora_parameters: {dropout: 0.1}", "dropout is 0.1"),
        ("- a", "expected settings"),
        ("a: [", "not YAML"),
    ],
)
def test_a_setting_that_is_not_known_is_told(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(text)
    with pytest.raises(TuneError, match="lora.yaml") as caught:
        read_settings(tmp_path / "lora.yaml")
    assert told in str(caught.value)
