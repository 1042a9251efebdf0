"""The commands of adapters: tune, adapter inspect, export and merge, and --adapter."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from mlx_gptoss.checkpoint.adapter import read_adapter, write_adapter
from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.cli import run
from mlx_gptoss.model.config import read_config
from mlx_gptoss.model.low_rank import ATTENTION
from tests.support.adapters import random_adapter
from tests.support.tuning import style_rows, write_rows

CONFIG = read_config(DEMO_FOLDER)[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", style_rows("cli", 12))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "a"
    write_adapter(folder, random_adapter(CONFIG, 4, (0, 1, 2, 3), names=(*ATTENTION, "router")), CONFIG)
    return folder


def test_a_run_shows_its_losses_and_goes_on_when_it_is_run_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "demo", str(data), "--out", str(tmp_path / "run"), "--tokens", "256", "--rank", "2"]
    assert run([*command, "--steps", "4", "--every", "2", "--samples", "1"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"4 steps: 11 examples, 1 to validate on; [\d,]+ parameters, about .* of memory", err)
    assert [line.split(":")[0] for line in err.splitlines()[1:]] == ["step 0", "step 2", "step 4"]
    assert "● validation" in out and "└──" in out and "best" in out
    assert re.search(r"run: adapter of step \d \(all 4 steps are taken", out)
    assert run([*command, "--steps", "4", "--every", "2", "--samples", "1"]) == 0
    assert "going on from step 4 of 4" in capsys.readouterr().err
    assert run([*command, "--steps", "5"]) == 1
    assert "steps 4, and now it is 5" in capsys.readouterr().err


def test_settings_may_come_from_a_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora.yaml").write_text(
        f"model: demo\ndata: {data}\nadapter_path: {tmp_path / 'run'}\niters: 1\nmax_seq_length: 256\n"
        "lora_parameters: {rank: 2, scale: 1.0}\nvalid: none\nsamples: 0\n"
    )
    assert run(["tune", "-c", str(tmp_path / "lora.yaml")]) == 0
    assert read_adapter(tmp_path / "run", CONFIG).rank == 2
    assert run(["tune", "demo"]) == 2 and "missing DATA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "line 1: not JSON"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 1: nothing to learn"),
        ("", "holds no examples"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(
    row: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text(row)
    assert run(["tune", "demo", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "run")]) == 1
    out, err = capsys.readouterr()
    assert not out and told in err and err.count("\n") == 1


def test_an_adapter_is_shown_and_written_for_others(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["adapter", "inspect", "demo", str(adapter), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["part"] for row in report["parts"]] == [*ATTENTION, "router"]
    assert report["parts"][0]["layers"] == [0, 1, 2, 3] and report["parts"][0]["rank"] == 4
    assert run(["adapter", "inspect", "demo", str(adapter)]) == 0
    assert "q_proj" in capsys.readouterr().out
    assert run(["adapter", "export", "demo", str(adapter), str(tmp_path / "peft"), "--format", "peft"]) == 0
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    assert read_adapter(tmp_path / "peft", CONFIG).parameters == report["parameters"]


@pytest.mark.parametrize(("recipe", "most"), [("mxfp4", 1e-3), ("mxfp4-q8", 0.01)])
def test_a_merged_model_says_what_the_adapted_one_says(
    recipe: str,
    most: float,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    target = tmp_path / "merged"
    assert run(["adapter", "merge", "demo", str(adapter), str(target), "--recipe", recipe]) == 0
    out = capsys.readouterr().out
    found = re.search(r"KL (\S+) nats .*, same likeliest token (\S+)%", out)
    assert found is not None and float(found[1]) < most and float(found[2]) > 90
    assert run(["verify", str(target), "--source", str(DEMO_FOLDER), "--adapter", str(adapter)]) == 0
    assert run(["verify", str(target), "--source", str(DEMO_FOLDER)]) == 1  # the base alone
    assert run(["verify", str(target), "--adapter", str(adapter)]) == 2
    capsys.readouterr()
    prompt = ["--chat", "-p", "What is 2 + 2?", "--temperature", "0", "--max-tokens", "20"]
    assert run(["generate", str(target), *prompt]) == 0
    merged = capsys.readouterr().out
    assert run(["generate", "demo", *prompt]) == 0
    assert capsys.readouterr().out != merged


def test_an_adapter_of_the_experts_is_merged_into_bfloat16_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "a", random_adapter(CONFIG, 4, (1,)), CONFIG)
    assert run(["adapter", "merge", "demo", str(tmp_path / "a"), str(tmp_path / "merged")]) == 1
    err = capsys.readouterr().err
    assert re.search(r"adapts the experts \(gate_up_proj\), .* times as much\); keep the adapter apart", err)
    assert not (tmp_path / "merged").exists()
    apart, target = str(tmp_path / "a"), str(tmp_path / "merged")
    assert run(["adapter", "merge", "demo", apart, target, "--recipe", "bf16"]) == 0
    found = re.search(r"KL (\S+) nats .*, same likeliest token (\S+)%", capsys.readouterr().out)
    assert found is not None and float(found[1]) < 0.002 and float(found[2]) > 97
    (tmp_path / "text").write_text("What is the capital of Peru? Lima is the capital of Peru.")
    check = ["verify", target, "--source", str(DEMO_FOLDER), "--text", str(tmp_path / "text")]
    assert run([*check, "--adapter", apart]) == 0
    found = re.search(r"KL divergence (\S+) nats", capsys.readouterr().out)
    assert found is not None and float(found[1]) < 0.002
    assert run(["convert", target, str(tmp_path / "again")]) == 0  # it is read like any other


def test_answers_come_from_the_adapter_that_is_named(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "demo", "--tokens", "1 2 3", "--temperature", "0", "--max-tokens", "8"]
    said = []
    for more in ([], ["--adapter", str(adapter)], ["--adapter", f"x={adapter}"]):
        assert run([*command, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1] and said[0] == said[2]  # a named one waits to be asked for
    assert run([*command, "--adapter", "a", "--adapter", "b"]) == 2
    assert run([*command, "--adapter", "nowhere"]) == 1
    assert "expected an adapter's folder or a Hub id" in capsys.readouterr().err


def test_an_adapter_is_shared_with_a_card_and_without_what_it_was_trained_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["tune", "demo", str(data), "--out", str(out), "--tokens", "256", "--rank", "2", "--steps", "2"]
    assert run([*command, "--every", "1"]) == 0
    capsys.readouterr()
    share = ["share", str(out), "someone/answers", "--dry-run", "--json"]
    assert run(share) == 1
    assert "the base model is 'demo', expected a Hub id" in capsys.readouterr().err
    assert run([*share, "--base-model", "openai/gpt-oss-20b"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["files"]) == {"adapters.safetensors", "adapter_config.json", "README.md"}
    assert set(report["not_sent"]) == {"state.safetensors", "report.md", "loss.svg"}
    card = report["card"]
    assert "base_model: openai/gpt-oss-20b\nbase_model_relation: adapter" in card
    assert "Trained on 11 examples" in card and "| loss on validation data |" in card
    assert "--adapter someone/answers" in card
