"""Properties of `mlx-gptoss bench`: a report that can be read by machines and pasted by people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_gptoss.cli import run
from mlx_gptoss.doctor import speed
from mlx_gptoss.model.trace import read_trace
from tests.support.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def small_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "STREAMED", 1 << 20)
    monkeypatch.setattr(speed, "A_WHILE", 0.01)


def test_the_report_has_a_row_for_each_context_and_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_checkpoint(tmp_path))
    common = [
        "bench",
        folder,
        "--kv-budget",
        "32MB",
        "--contexts",
        "8,20",
        "--batches",
        "1,2",
        "--tokens",
        "3",
    ]
    assert run([*common, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(r["context"], r["batch"]) for r in report["rows"]] == [(8, 1), (8, 2), (20, 1), (20, 2)]
    assert all(r["prefill_rate"] > 0 and r["decode_rate"] > 0 for r in report["rows"])
    assert report["bandwidth_bytes_per_second"] > 0 and report["machine"]["mlx"]
    assert run(common) == 0
    shown = capsys.readouterr().out
    assert shown.count("| mlx-gptoss |") == 4


def test_wrong_numbers_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(tmp_path), "--contexts", "a"]) == 1
    assert "--contexts is 'a'" in capsys.readouterr().err
    assert run(["bench", str(tmp_path), "--tokens", "1"]) == 1
    assert "tokens is 1" in capsys.readouterr().err


def test_streamed_experts_are_measured_and_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_checkpoint(tmp_path / "model"))
    trace = tmp_path / "trace.jsonl"
    few = ["--contexts", "8", "--batches", "1", "--tokens", "3", "--kv-budget", "32MB"]
    words = ["bench", folder, *few, "--expert-memory", "450kB", "--trace", str(trace)]
    assert run([*words, "--json"]) == 0
    experts = json.loads(capsys.readouterr().out)["experts"]
    assert experts["slots"] == 5 and 0 <= experts["hit_rate"] <= 1
    assert experts["read_per_token"] > 0 and experts["predicted_decode_rate"] > 0
    assert set(experts["disk_bytes_per_second"]) == {"1", "4", "8"}
    assert read_trace(trace).slots == 5
    assert run(words) == 0
    assert "5 experts a layer in memory" in capsys.readouterr().out


def test_without_metal_tuning_says_so_and_keeps_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = str(write_checkpoint(tmp_path / "m"))
    options = ["--kv-budget", "32MB", "--contexts", "8", "--batches", "1", "--tokens", "2", "--json"]
    assert run(["bench", folder, "--tune", *options]) == 0
    told = capsys.readouterr()
    line = "nothing to tune: command buffers and kernels of our own are Metal's"
    assert line in told.err and json.loads(told.out)["tuned"] == [line]
    assert not list(tmp_path.glob("state/**/machines.json"))
