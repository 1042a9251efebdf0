"""Models on this machine: listed, downloaded, removed, and found by their names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from mlx_gptoss.checkpoint import hub, registry
from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.checkpoint.memory import plan, plan_checkpoint
from mlx_gptoss.checkpoint.names import SHORT_NAMES, did_you_mean, expand, short_name
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.cli import run
from mlx_gptoss.cli.start import CHOICES
from mlx_gptoss.errors import ConfigError, ModelNotFoundError
from tests.support.hub_server import HubServer
from tests.support.random_weights import SHAPES
from tests.support.sparse_checkpoint import write_sparse

DEMO_FILES = {path.name: path.read_bytes() for path in DEMO_FOLDER.iterdir() if path.is_file()}

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command line in this process, with a state folder of its own: exit status, stdout, stderr."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: object) -> tuple[int, str, str]:
        status = run([str(a) for a in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def listed(command: Command) -> dict[str, dict[str, Any]]:
    status, out, err = command("models", "--json")
    assert status == 0, err
    return {item["name"]: item for item in json.loads(out)}


# ----------------------------------------------------------------------------------------------- names


def test_short_names_are_the_ids_of_openais_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for short, full in SHORT_NAMES.items():
        assert full == f"openai/gpt-oss-{short}" and expand(short) == expand(short.upper()) == full
        assert short_name(full) == short
    assert expand("someone/20b") == "someone/20b" and short_name("someone/20b") == "someone/20b"
    (tmp_path / "20b").mkdir()
    assert expand("20b") == "20b"  # a folder of that name comes first
    assert expand(Path("120b")) == "120b"


def test_every_short_name_is_downloaded_from_openai(server: HubServer) -> None:
    for short, full in SHORT_NAMES.items():
        server.add_repo(full, DEMO_FILES)
        assert f"models--{full.replace('/', '--')}" in str(hub.resolve(short))
        assert hub.resolve(short, offline=True) == hub.resolve(full)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("gpt-oss-20b", "openai/gpt-oss-20b"),
        ("2ob", "20b"),
        ("dmo", "demo"),
        ("safegard-20b", "safeguard-20b"),
    ],
)
def test_a_mistyped_model_is_told_what_was_meant(server: HubServer, typed: str, meant: str) -> None:
    with pytest.raises(ModelNotFoundError, match=re.escape(f"did you mean {meant!r}?")):
        hub.resolve(typed)
    assert server.requests == []


def test_a_mistyped_id_is_told_what_was_meant(server: HubServer) -> None:
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'openai/gpt-oss-120b'\?"):
        hub.resolve("openai/gpt-oss120b")
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'openai/gpt-oss-20b'\?"):
        hub.resolve("openai/gpt-oss20b", offline=True)
    assert did_you_mean("mistral-large") == did_you_mean("openai/gpt-oss-20b") == ""


def test_a_mistyped_command_is_told_what_was_meant(command: Command) -> None:
    status, out, err = command("chta", "demo")
    assert (status, out) == (2, "")
    assert err == "error: no such command 'chta'. Did you mean 'chat'? (see `mlx-gptoss --help`)\n"


# ------------------------------------------------------------------------------------ the list of folders


def test_converted_models_are_found_by_name_from_anywhere(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "deep" / "tiny-q4"
    assert command("convert", "demo", target)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("tiny-q4") == target
    found = listed(command)["tiny-q4"]
    assert found["origin"] == "converted" and found["recipe"] == "mxfp4-q4"
    assert found["bytes"] == sum(path.stat().st_size for path in target.iterdir())
    assert found["fits"] is True and found["folder"] == str(target)
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'tiny-q4'\?"):
        hub.resolve("tiny-q5")


def test_the_newest_of_two_conversions_has_the_name(command: Command, tmp_path: Path) -> None:
    for where in ("old", "new"):
        assert command("convert", "demo", tmp_path / where / "tiny")[0] == 0
    assert hub.resolve("tiny") == tmp_path / "new" / "tiny"
    assert set(listed(command)) == {"demo", "tiny", str(tmp_path / "old" / "tiny")}


def test_folders_elsewhere_are_listed_once_they_were_given(command: Command, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_sparse(tmp_path / "mine" / name, SHAPES["tiny"])
    assert command("models", tmp_path / "mine")[0] == 0
    assert set(listed(command)) == {"demo", "a", "b"}
    (tmp_path / "mine" / "a" / "config.json").unlink()
    assert set(listed(command)) == {"demo", "b"}  # what has gone drops out
    status, _, err = command("models", tmp_path / "cache")
    assert status == 1 and "holds no gpt-oss model" in err


@pytest.mark.parametrize("content", [b"{", b"{}", b"[1]", b"[" * 100_000])
def test_a_damaged_list_says_what_to_do(command: Command, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state" / "mlx-gptoss" / "models.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="delete it"):
        registry.remembered()
    status, _, err = command("models")
    assert status == 1 and "delete it" in err and err.count("\n") == 1


def test_a_list_that_cannot_be_written_does_not_fail_a_conversion(command: Command, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    status, out, err = command("convert", "demo", tmp_path / "tiny")
    assert status == 0 and (tmp_path / "tiny" / "config.json").is_file() and "relative error" in out
    assert err.startswith("note: `mlx-gptoss models` will not list")


# ----------------------------------------------------------------------------------------- pull and remove


def test_a_download_is_pulled_listed_and_removed(
    server: HubServer, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("openai/gpt-oss-20b", DEMO_FILES)
    server.add_repo("someone/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"})
    status, out, err = command("pull", "20b")
    assert status == 0 and "next: mlx-gptoss chat 20b" in out
    assert re.search(r"openai/gpt-oss-20b: [\d.]+ MB to download into", err)
    assert command("pull", "20b")[2] == ""  # it is there
    size = sum(map(len, DEMO_FILES.values()))
    found = listed(command)
    assert set(found) == {"demo", "20b"}
    assert (found["20b"]["bytes"], found["20b"]["origin"], found["20b"]["fits"]) == (size, "downloaded", True)
    monkeypatch.setenv("COLUMNS", "300")
    assert re.search(r"20b +downloaded .* yes", command("models")[1])
    status, out, _ = command("remove", "20b", "--yes")
    assert status == 0 and re.fullmatch(r"deleted openai/gpt-oss-20b: [\d.]+ MB freed\n", out)
    assert set(listed(command)) == {"demo"}
    assert not list((tmp_path / "cache").glob("models--openai*"))


def test_an_interrupted_download_is_listed_as_such_and_goes_on_after_its_last_whole_file(
    server: HubServer, command: Command
) -> None:
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    first, second = DEMO_FILES["model.safetensors"], bytes(3_000_000)
    files = {name: data for name, data in DEMO_FILES.items() if name != "model.safetensors"}
    shards = {"model-1.safetensors": first, "model-2.safetensors": second}
    server.add_repo("someone/tiny", files | shards | {"model.safetensors.index.json": index})
    server.cut("/model-2.safetensors", after=0, times=99)
    assert command("pull", "someone/tiny")[0] == 1
    server.faults.clear()
    found = listed(command)["someone/tiny"]
    assert found["problem"] == "incomplete" and found["fits"] is None
    assert len(first) < found["bytes"] < len(first) + len(second)
    assert "someone/tiny is incomplete: `mlx-gptoss pull someone/tiny` goes on" in command("models")[1]
    server.requests.clear()
    status, _, err = command("pull", "someone/tiny")
    assert status == 0 and "3.0 MB to download into" in err and "3.9 MB are there" in err
    assert sum(r.sent for r in server.requests if "/resolve/" in r.path) == len(second)
    assert listed(command)["someone/tiny"]["problem"] != "incomplete"


def test_nothing_is_removed_without_a_yes(
    server: HubServer, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "tiny"
    assert command("convert", "demo", target)[0] == 0
    status, _, err = command("remove", "tiny")
    assert status == 2 and "add --yes" in err and (target / "config.json").exists()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(click, "confirm", lambda text, abort: (_ for _ in ()).throw(click.Abort()))
    assert command("remove", "tiny")[0] == 130 and (target / "config.json").exists()


def test_of_a_conversion_only_its_own_files_are_removed(command: Command, tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    assert command("convert", "demo", target)[0] == 0
    (target / "notes.txt").write_text("mine")
    status, out, _ = command("remove", target, "--yes")
    assert status == 0 and "left in" in out and "notes.txt" in out
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    assert "tiny" not in listed(command)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("demo", "is part of this package"),
        ("20b", "is not on this machine: `mlx-gptoss models` lists what is"),
        ("nowhere", "is not on this machine"),
    ],
)
def test_what_cannot_be_removed_is_one_line(
    server: HubServer, command: Command, name: str, told: str
) -> None:
    status, out, err = command("remove", name, "--yes")
    assert (status, out) == (1, "") and told in err and err.count("\n") == 1


def test_a_folder_that_convert_did_not_write_is_not_removed(command: Command, tmp_path: Path) -> None:
    folder = write_sparse(tmp_path / "mine", SHAPES["tiny"])
    status, _, err = command("remove", folder, "--yes")
    assert status == 1 and "has no manifest.json" in err and (folder / "model.safetensors").exists()


def test_only_models_of_the_hub_can_be_pulled(server: HubServer, command: Command) -> None:
    status, _, err = command("pull", "demo")
    assert status == 1 and "is not on the Hub" in err and server.requests == []


# ------------------------------------------------------------------------------------------- the first page


def test_alone_in_a_pipe_it_is_the_help(command: Command) -> None:
    status, out, err = command()
    assert status == 2 and "Usage: mlx-gptoss" in err + out and "Commands:" in err + out


def test_the_first_page_knows_the_true_sizes(tmp_path: Path) -> None:
    for choice in CHOICES:
        shape = SHAPES[choice.name.split()[0]]
        if choice.command.startswith("mlx-gptoss pull"):
            made = plan(write_sparse(tmp_path / choice.name, shape), "bfloat16")
            assert choice.weights == made.weights
            least = plan_checkpoint(Checkpoint(tmp_path / choice.name, "bfloat16"), 4)
            assert choice.least == least.weights
