"""`mlx-gptoss serve` as a process: it serves, says where, stops on a signal, and refuses what is unsafe."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from mlx_gptoss.cli import run
from tests.support.server_help import wait_until


def serve(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_gptoss", "serve", *args],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"GPTOSS_API_KEY": "sk-env"},
    )


def test_a_served_folder_answers_and_stops_on_a_signal(text_folder: Path) -> None:
    process = serve(str(text_folder), "--port", "0", "--kv-budget", "64MB")
    try:
        assert process.stderr is not None
        url = None
        for line in process.stderr:
            if found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", line):
                url = found[1]
                break
        assert url, "it never listened"
        while httpx.get(url + "/health").status_code == 503:
            time.sleep(0.05)
        assert httpx.get(url + "/v1/models").status_code == 401
        headers = {"Authorization": "Bearer sk-env"}
        models = httpx.get(url + "/v1/models", headers=headers).json()
        assert models["data"][0]["id"] == text_folder.name
        body = {"prompt": "a", "max_tokens": 3}
        done = httpx.post(url + "/v1/completions", json=body, headers=headers, timeout=60)
        assert done.json()["usage"]["completion_tokens"] <= 3
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert "Traceback" not in rest


def test_an_idle_model_is_unloaded_and_comes_back(text_folder: Path) -> None:
    process = serve(str(text_folder), "--port", "0", "--kv-budget", "64MB", "--idle-unload", "100ms")
    try:
        assert process.stderr is not None
        found = (re.search(r"listening on (http://127\.0\.0\.1:\d+)", line) for line in process.stderr)
        url = next(match[1] for match in found if match)

        def loaded() -> bool | None:
            told: bool | None = httpx.get(url + "/health").json().get("loaded")
            return told

        wait_until(lambda: loaded() is False, 60)
        headers = {"Authorization": "Bearer sk-env"}
        models = httpx.get(url + "/v1/models", headers=headers).json()
        assert models["data"][0]["loaded"] is False
        body = {"prompt": "a", "max_tokens": 3}
        done = httpx.post(url + "/v1/completions", json=body, headers=headers, timeout=60)
        assert done.json()["usage"]["completion_tokens"] <= 3
        wait_until(lambda: loaded() is False, 60)
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert "Traceback" not in rest and "the model is loaded again" in rest


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["/no/such/folder"], "/no/such/folder"),
        (["demo", "--host", "0.0.0.0"], "--no-auth"),
        (["demo", "--max-active", "0"], "max_active"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str], says: str
) -> None:
    monkeypatch.delenv("GPTOSS_API_KEY", raising=False)
    assert run(["serve", *args]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


def test_the_key_is_never_shown_in_the_help() -> None:
    from mlx_gptoss.cli.serve import serve as command

    shown = CliRunner(env={"GPTOSS_API_KEY": "sk-secret"}).invoke(command, ["--help"]).output
    assert "GPTOSS_API_KEY" in shown and "sk-secret" not in shown
