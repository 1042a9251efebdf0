"""Uploads and downloads by real processes that are killed half-way: what was finished is not sent again."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.converted import write_converted
from tests.support.hub_server import HubServer

REPO = "someone/tiny-gpt-oss-mlx"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in range(3)]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def start(server: HubServer, home: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_stand_in",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_gptoss", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def kill_when_held(server: HubServer, process: "subprocess.Popen[str]") -> None:
    assert server.held.wait(120)
    process.kill()
    process.communicate(timeout=120)


def test_a_killed_upload_and_a_killed_download_go_on_where_they_were(
    server: HubServer, tmp_path: Path
) -> None:
    folder, home = tmp_path / "model", tmp_path / "home"
    manifest = write_converted(folder)
    last = manifest.files[SHARDS[2]].sha256
    server.hold(f"/lfs/{last}", after=1000)
    kill_when_held(server, start(server, home, "share", str(folder), REPO))
    assert server.repos[REPO].files() == {}, "nothing is visible before everything is there"
    stored = set(server.storage)
    assert last not in stored

    server.requests.clear()
    assert "sent: http" in finish(start(server, home, "share", str(folder), REPO))
    sent = {path.removeprefix("/lfs/") for path in server.paths("PUT")}
    assert last in sent and not sent & stored

    server.held.clear()
    server.hold(f"/{SHARDS[2]}", after=1000)
    kill_when_held(server, start(server, home, "verify", REPO))
    finished = {path.name for path in home.rglob("snapshots/*/*")}
    assert SHARDS[2] not in finished

    server.requests.clear()
    assert "everything agrees" in finish(start(server, home, "verify", REPO))
    fetched = {path.rsplit("/", 1)[1] for path in server.paths("GET") if "/resolve/" in path}
    assert SHARDS[2] in fetched and not fetched & finished

    server.requests.clear()
    assert "everything agrees" in finish(start(server, home, "verify", REPO, "--offline"))
    assert server.requests == []
