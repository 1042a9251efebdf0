"""What `bench --submit` writes: valid, tabulated as it is, and without a word about whose machine it was."""

from __future__ import annotations

import getpass
import json
import re
import socket
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mlx_gptoss.cli import run
from mlx_gptoss.cli.submission import Submission, UsedKernel
from mlx_gptoss.doctor import speed
from mlx_gptoss.model.kernels.decode import DecodeKernels
from mlx_gptoss.model.kernels.verified import Verdict
from scripts import make_results
from tests.support.checkpoints import write_checkpoint

SCHEMA = json.loads((make_results.FOLDER / make_results.SCHEMA).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file as the command writes it, of a model in a folder with a telling name."""
    folder = tmp_path_factory.mktemp("alice-secret")
    model, file = write_checkpoint(folder / "model"), folder / "result.json"
    words = [
        "bench",
        str(model),
        "--contexts",
        "8",
        "--batches",
        "1,2",
        "--tokens",
        "3",
        "--kv-budget",
        "32MB",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "STREAMED", 1 << 20)
        patch.setattr(speed, "A_WHILE", 0.01)
        patch.setenv("GPTOSS_KERNELS", "off")
        patch.setenv("MLX_MAX_OPS_PER_BUFFER", "100")
        assert run([*words, "--kv-budget", "32MB", "--expert-memory", "450kB", "--submit", str(file)]) == 0
    return file.read_text(encoding="utf-8")


def test_the_file_is_as_the_schema_says(written: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(written), SCHEMA)
    made = Submission.model_validate_json(written)
    assert (made.settings.kernels, made.settings.max_ops_per_buffer) == ("off", 100)
    assert made.settings.kv_budget == 32_000_000 and made.settings.expert_memory == 450_000
    assert made.kernels == [] and not made.settings.tuned
    assert made.experts is not None and made.experts.slots == 5
    assert made.speeds[0].bandwidth_share is not None and made.speeds[1].bandwidth_share is None


def test_the_kernels_in_use_are_told_with_their_gains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used = {"gate_up": Verdict(True, "right", gain=0.1), "router": Verdict(True, "asked for")}
    monkeypatch.setattr(DecodeKernels, "used", used)
    file = tmp_path / "result.json"
    words = ["bench", "demo", "--contexts", "8", "--batches", "1", "--tokens", "2", "--tune"]
    assert run([*words, "--submit", str(file)]) == 0
    made = Submission.model_validate_json(file.read_text(encoding="utf-8"))
    assert [(k.name, k.gain) for k in made.kernels] == [("gate_up", 0.1), ("router", None)]
    assert made.settings.tuned


def test_nothing_in_it_is_personal(written: str) -> None:
    personal = ["alice", "model.safetensors", str(Path.home()), getpass.getuser(), socket.gethostname()]
    assert not [word for word in personal if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", written)]


def test_a_submitted_file_is_tabulated(written: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(written)
    (tmp_path / make_results.SCHEMA).write_text("{}")
    made = Submission.model_validate_json(written)
    rows = [line for line in make_results.table(make_results.read(tmp_path)).splitlines() if line[:1] == "|"]
    assert len(rows) == 2 + len(made.speeds)
    cells = [cell.strip() for cell in rows[2].strip("|").split("|")]
    assert cells[0] == made.machine.chip and cells[2] == "other" and cells[3] == "mxfp4"
    assert cells[9] == f"{made.speeds[0].decode_rate:,.1f}" and cells[10].endswith("%")


def test_the_page_in_the_repository_is_made_of_what_is_there() -> None:
    page = (make_results.FOLDER / make_results.TABLE).read_text(encoding="utf-8")
    submitted = make_results.read(make_results.FOLDER)
    assert page == make_results.table(submitted)
    assert bool(submitted) == (make_results.EMPTY not in page)


def put(data: Any, path: str, value: object) -> None:
    *way, last = path.split(".")
    for step in way:
        data = data[int(step) if step.isdecimal() else step]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema_version", 2),
        ("host", "alices-mac.local"),
        ("machine.chip", "/Users/alice"),
        ("machine.system", "Linux 6.1.0-built-by-alice"),
        ("model.layout", "models/alice"),
        ("model.formats", {"experts": "/Users/alice"}),
        ("settings.draft", "models/alice"),
        ("versions.python", "alice"),
        ("model.formats", {"/Users/alice": "mxfp4"}),
        ("kernels", [{"name": "/Users/alice", "gain": 0.1}]),
        ("kernels", [{"name": "down", "gain": "faster"}]),
        ("speeds.0.decode_rate", -1.0),
        ("speeds.0.decode_rate", "fast"),
        ("speeds.0.runtime", "alice-engine"),
        ("speeds", []),
    ],
)
def test_what_does_not_belong_there_is_refused_by_schema_and_validator(
    written: str, tmp_path: Path, path: str, value: object
) -> None:
    data = json.loads(written)
    put(data, path, value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)
    (tmp_path / "theirs.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"^theirs\.json: "):
        make_results.read(tmp_path)


def test_no_json_is_refused_by_the_name_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"^broken\.json: the file: "):
        make_results.read(tmp_path)


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "demo", "--submit", str(tmp_path / "gone" / "result.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_several_machines_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    assert run(["bench", "demo", "--hosts", "a,b", "--submit", str(file)]) == 2
    assert "cannot be used with --hosts" in capsys.readouterr().err and not file.exists()


@pytest.mark.parametrize(
    "name",
    ["attention over a window", "attention over everything, keys and values in 8 and 8 bits", "gate_up"],
)
def test_names_of_kernels_are_taken(name: str) -> None:
    assert UsedKernel(name=name, gain=0.1).name == name
