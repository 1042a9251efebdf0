"""`mlx-gptoss doctor`: what works is told as such, and what was tampered with is found and named."""

from __future__ import annotations

import getpass
import json
import socket
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_gptoss import cli, device
from mlx_gptoss.checkpoint.layouts import record_parts
from mlx_gptoss.checkpoint.memory import plan
from mlx_gptoss.cli import doctor as command
from mlx_gptoss.doctor import Finding, answers, chosen, machine, sandbox, speed
from mlx_gptoss.doctor.private import without_names
from mlx_gptoss.doctor.speed import EXPERT, SPARE
from mlx_gptoss.errors import ToolError
from mlx_gptoss.model.config import read_config
from mlx_gptoss.tools.sandbox import selftest
from mlx_gptoss.tools.sandbox.selftest import Check
from tests.support.checkpoints import hf_config, write_checkpoint
from tests.support.random_weights import SHAPES


@pytest.fixture(autouse=True)
def small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "STREAMED", 1 << 20)
    monkeypatch.setattr(speed, "A_WHILE", 0.01)
    monkeypatch.setattr(speed, "EXPERT", 1 << 16)
    monkeypatch.setattr(speed, "SPARE", 0)


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


def test_an_open_door_of_the_sandbox_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        Check("reads a file", True, "", True),
        Check("kills a process", False, "it was killed", True),
        Check("sees the time", False, "it did", False),
    ]
    monkeypatch.setattr(selftest, "run", lambda: checks)
    found = by_name(list(sandbox.findings()))
    assert found["python tool"].verdict == found["kills a process"].verdict == "failed"
    assert found["sees the time"].verdict == "warning"
    assert found["python tool"].detail == "1 of 3 attempts to get out were held back; the tool refuses to run"
    monkeypatch.setattr(selftest, "run", lambda: checks[::2])
    found = by_name(list(sandbox.findings()))
    assert found["python tool"].detail == "1 of 2 attempts to get out were held back"


def test_no_sandbox_at_all_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> list[Check]:
        raise ToolError("seccomp is off", "python")

    monkeypatch.setattr(selftest, "run", refuse)
    (found,) = sandbox.findings()
    assert found.verdict == "failed" and "seccomp is off" in found.detail


def test_little_memory_and_disk_are_told_with_what_20b_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda: 5_000_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9}))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = by_name(list(machine.findings()))
    assert found["memory"].verdict == found["disk"].verdict == "warning"
    assert "5.0 GB" in found["memory"].detail and "11.2 GB" in found["memory"].detail
    assert "1.0 GB free" in found["disk"].detail


@pytest.mark.parametrize(("free", "verdict"), [(2.5, "ok"), (1.5, "warning")])
def test_a_disk_has_room_for_20b_and_its_conversion_or_not(
    monkeypatch: pytest.MonkeyPatch, free: float, verdict: str
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free * machine.NEEDED}))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert by_name(list(machine.findings()))["disk"].verdict == verdict


@pytest.mark.parametrize(
    ("memory", "chip", "raised"), [(32, 18e9, 28672), (16, 11e9, 12288), (32, 31e9, None)]
)
def test_a_macs_working_set_is_told_with_the_way_to_raise_it(
    monkeypatch: pytest.MonkeyPatch, memory: int, chip: float, raised: int | None
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(device, "working_set", lambda: int(chip))
    monkeypatch.setattr(device, "total_memory", lambda: memory * 2**30)
    told = by_name(list(machine.findings()))["working set"]
    assert (
        told.figures == {"bytes": chip}
        and f"{chip / 1e9:.1f} of {memory * 1.073741824:.1f} GB" in told.detail
    )
    if raised is None:  # no more than leaves macOS four GiB or an eighth
        assert "sysctl" not in told.detail
    else:
        assert f"iogpu.wired_limit_mb={raised}" in told.detail


def test_memory_and_disk_are_measured_and_what_needs_a_gpu_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(speed, "cache_folder", lambda: tmp_path)
    found = by_name(list(speed.findings()))
    assert found["memory read"].figures["bytes_per_second"] > 0
    assert {name.rpartition("_")[2] for name in found["disk read"].figures} == {"1", "4", "8"}
    assert found["GPU to CPU"].verdict == ("info" if device.on_gpu() else "none")
    assert found["disk read"].detail.endswith("Hub's cache") and list(tmp_path.iterdir()) == []


def test_a_models_own_file_is_read_where_there_is_one(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1 << 21))
    found = by_name(list(speed.findings(weights)))["disk read"]
    assert found.verdict == "info" and found.detail.endswith(", MODEL")


def test_a_gpus_memory_is_read_by_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    found = by_name(list(speed.findings(tmp_path / "none")))
    assert found["memory read"].detail.startswith("the GPU reads")
    assert found["GPU to CPU"].figures["seconds"] > 0


class Clock:
    """Passes take so many seconds, one after the other, and then all as long as the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *spans: float) -> None:
        self._spans, self._now, self._running = list(spans), 0.0, False
        monkeypatch.setattr(time, "perf_counter", self)

    def __call__(self) -> float:
        if self._running:
            self._now += self._spans.pop(0) if len(self._spans) > 1 else self._spans[0]
        self._running = not self._running
        return self._now


@pytest.mark.parametrize("gpu", [False, True])
def test_the_best_pass_of_a_while_is_the_bandwidth(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: gpu)
    Clock(monkeypatch, 0.003, 0.002, 0.002, 0.001, 0.004)
    passes = speed.PASSES if gpu else 1
    assert speed.measure_bandwidth() == pytest.approx(passes * (1 << 20) / 0.001)


def test_a_crossing_is_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CROSSINGS", 5)
    Clock(monkeypatch, 0.009, 0.002, 0.003, 0.001, 0.003)
    assert speed.measure_crossing() == pytest.approx(0.003)


def test_a_crossing_is_told_in_microseconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(speed, "measure_crossing", lambda: 1.5e-4)
    told = by_name(list(speed.findings(tmp_path / "none")))["GPU to CPU"]
    assert told.detail.startswith("150 µs ") and told.figures == {"seconds": 1.5e-4}


def test_reads_are_of_an_expert_and_leave_gigabytes_free(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(SHAPES["20b"])))
    config, _ = read_config(tmp_path)
    assert record_parts(config)[-1].end == EXPERT and SPARE >= 2**30


@pytest.mark.parametrize(
    ("endpoint", "port"), [("http://hub", 80), ("https://hub", 443), ("http://hub:8080", 8080)]
)
def test_the_hub_is_asked_at_its_own_port(monkeypatch: pytest.MonkeyPatch, endpoint: str, port: int) -> None:
    asked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", connect)
    told = by_name(list(machine.findings()))["Hub"]
    assert asked == [("hub", port)] and told == Finding(
        "machine", "Hub", "warning", "not reachable: Connection refused"
    )


def test_disk_rates_are_told_in_gigabytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(speed, "measure_bandwidth", lambda: 1.5e9)
    Clock(monkeypatch, 0.001, 0.0005, 0.00025)  # for 1,048,576 bytes each
    found = by_name(list(speed.findings()))
    assert found["disk read"].detail == "1.0, 2.1, 4.2 GB/s by 1, 4, 8 reads at a time, Hub's cache"
    assert found["memory read"].detail.endswith("1.5 GB/s")


@pytest.mark.parametrize("missing", [0, 1])
def test_a_disk_is_not_filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: int) -> None:
    monkeypatch.setattr(speed, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(speed, "SPARE", 5000)
    free = speed.READS * speed.EXPERT + 5000 - missing
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    if missing:
        monkeypatch.setattr(speed, "scratch_rates", None)  # whoever calls it fails
    told = by_name(list(speed.findings()))["disk read"]
    assert (told.verdict, bool(told.figures)) == (("warning", False) if missing else ("info", True))
    assert not missing or told.detail == "not measured: a file of 1 MB would leave too little room"


def test_a_disk_that_cannot_be_read_or_written_is_one_line(tmp_path: Path) -> None:
    found = by_name(list(speed.findings(tmp_path / "gone")))["disk read"]
    assert found.verdict == "warning" and found.detail == "not measured: No such file or directory"


def test_a_file_too_small_to_tell_is_not_read_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "cache_folder", lambda: tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(speed.READS * speed.EXPERT - 1))
    assert by_name(list(speed.findings(weights)))["disk read"].detail.endswith("Hub's cache")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds, and is tested elsewhere, passes."""
    monkeypatch.setattr(selftest, "run", lambda: [Check("reads a file", True, "", True)])
    monkeypatch.setattr(answers, "findings", lambda: iter([Finding("demo model", "logits", "ok", "right")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_command_prints_a_report_of_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selftest, "run", lambda: [Check("reads a file", True, "", True)])
    report = tmp_path / "report.md"
    shown = CliRunner().invoke(cli.cli, ["doctor", "--report", str(report)], env={"COLUMNS": "80"})
    assert shown.exit_code == 0 and "everything that applies here works" in shown.output
    lines = shown.output.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80  # one screen
    written = report.read_text()
    for told in (f"mlx {version('mlx')}", "memory read", "greedy replies", "python tool"):
        assert told in written
    for private in (str(Path.home()), str(tmp_path), f" {getpass.getuser()} "):
        assert private not in written


@pytest.mark.usefixtures("quick")
def test_what_fails_is_told_without_whose_machine_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> Iterator[Finding]:
        raise OSError(
            f"{tmp_path}/secret folder/x of {getpass.getuser()} on {socket.gethostname()}: no\nmore"
        )

    monkeypatch.setattr(answers, "findings", fail)
    report = tmp_path / "report.md"
    shown = CliRunner().invoke(cli.cli, ["doctor", "--json", "--report", str(report)])
    assert shown.exit_code == 1
    (failed,) = (entry for entry in json.loads(shown.output) if entry["verdict"] == "failed")
    assert failed["section"] == "demo model" and failed["detail"].startswith("OSError: PATH folder/x of ")
    for text in (report.read_text(), failed["detail"]):
        assert str(tmp_path) not in text and "no" in text and "more" not in text
        assert "of USER on HOST" in text


@pytest.mark.parametrize(
    ("text", "model", "public"),
    [
        ("~/models/x is gone", None, "PATH is gone"),
        (f"{Path.home()}/a b/model.safetensors: cut", f"{Path.home()}/a b", "PATH: cut"),
        ("alice/tuned/model.safetensors: cut", "alice/tuned", "PATH: cut"),
        ("no folder 'alice/tuned'", "alice/tuned", "no folder 'MODEL'"),
        ("demo model: 5 GB/s, 5/6, https://huggingface.co/x", "demo", None),
    ],
)
def test_paths_and_models_are_taken_out_of_a_text(text: str, model: str | None, public: str | None) -> None:
    assert without_names(text, model) == (text if public is None else public)


def test_a_home_with_a_space_is_taken_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/Users/Jane Doe"))
    assert without_names("/Users/Jane Doe/models is gone") == "PATH is gone"


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("no user")])
def test_a_user_without_a_name_is_none_to_take_out(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def none() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", none)
    assert without_names("USER is not here: /x/y") == "USER is not here: PATH"


@pytest.mark.usefixtures("quick")
def test_a_model_is_examined_too(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "mine")
    shown = CliRunner().invoke(cli.cli, ["doctor", str(folder), "--json"])
    found = {(entry["section"], entry["name"]): entry for entry in json.loads(shown.output)}
    assert shown.exit_code == 0
    assert found["model", "files"]["verdict"] == found["model", "memory"]["verdict"] == "ok"
    assert found["model", "decode"]["figures"]["most_tokens_per_second"] > 0
    weights = min(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-9])
    shown = CliRunner().invoke(cli.cli, ["doctor", str(folder), "--json"])
    (failed,) = (entry for entry in json.loads(shown.output) if entry["verdict"] == "failed")
    assert failed["name"] == "files" and shown.exit_code == 1 and "mine" not in failed["detail"]


@pytest.mark.parametrize(
    ("model", "told"),
    [("20b", "mlx-gptoss pull 20b"), ("./nowhere", "no folder './nowhere'"), ("dem", "did you mean 'demo'")],
)
def test_a_model_that_is_not_here_is_told_before_anything_is_examined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, told: str
) -> None:
    monkeypatch.setattr(machine, "findings", None)  # whoever calls it fails
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cli.run(["doctor", model]) == 1
    captured = capsys.readouterr()
    assert told in captured.err and captured.out == ""


def test_what_of_a_model_fits_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    needed = by_name(list(chosen.findings(folder, None)))["memory"].figures["needed_bytes"]
    few = int(needed) + (1 << 20)
    monkeypatch.setattr(chosen, "available_memory", lambda: few)
    monkeypatch.setattr(chosen, "SCRATCH", 10 << 20)
    found = by_name(list(chosen.findings(folder, 1e9)))
    assert found["memory"].verdict == "warning" and "experts a layer fit" in found["memory"].detail
    assert "of the disk" in found["decode"].detail
    read = plan(folder).read_per_token
    assert found["decode"].figures["most_tokens_per_second"] == pytest.approx(1e9 / read)
    monkeypatch.setattr(chosen, "available_memory", lambda: 1000)
    (_, failed) = chosen.findings(folder, 1e9)
    assert failed.verdict == "failed" and "are free" in failed.detail


def test_a_report_without_a_folder_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--report", "/nowhere/report.md"]) == 2
    assert "there is no folder '/nowhere'" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_a_failure_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "run", lambda: [Check("kills a process", False, "it was killed", True)])
    shown = CliRunner().invoke(cli.cli, ["doctor", "--json"])
    assert shown.exit_code == 1
    failed = [entry for entry in json.loads(shown.output) if entry["verdict"] == "failed"]
    assert {entry["name"] for entry in failed} == {"python tool", "kills a process"}


def test_cells_of_a_report_keep_their_bars() -> None:
    (row,) = command.markdown([Finding("a", "b", "ok", "c | d")]).splitlines()[2:]
    assert row == r"| a | b | ok | c \| d |"
