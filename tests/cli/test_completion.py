"""What the Tab key offers in a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_gptoss.checkpoint import registry
from tests.support.random_weights import SHAPES
from tests.support.sparse_checkpoint import write_sparse


def offered(words: str, folder: Path, state: Path, cache: Path) -> list[str]:
    """What bash is offered for the last word of a line."""
    done = subprocess.run(
        [sys.executable, "-c", "from mlx_gptoss.cli import main; main()"],
        env=os.environ
        | {
            "_MLX_GPTOSS_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
            "XDG_STATE_HOME": str(state),
            "HF_HUB_CACHE": str(cache),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """A folder to be in, the state and the Hub's cache of somebody who has models."""
    here, state, cache = tmp_path / "here", tmp_path / "state", tmp_path / "cache"
    (here / "checkpoints" / "a").mkdir(parents=True)
    (cache / "models--openai--gpt-oss-20b").mkdir(parents=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    registry.remember(write_sparse(tmp_path / "elsewhere" / "mine-q4", SHAPES["tiny"]))
    return here, state, cache


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("mlx-gptoss ch", ["chat"]),
        ("mlx-gptoss chat 1", ["120b"]),
        ("mlx-gptoss serve sa", ["safeguard-20b", "safeguard-120b"]),
        ("mlx-gptoss chat mi", ["mine-q4"]),
        ("mlx-gptoss inspect openai", ["openai/gpt-oss-20b"]),
        ("mlx-gptoss convert che", ["checkpoints/"]),
        ("mlx-gptoss chat checkpoints/", ["checkpoints/a/"]),
        ("mlx-gptoss remove ", ["mine-q4", "openai/gpt-oss-20b", "checkpoints/"]),
        ("mlx-gptoss pull 2", ["20b"]),
        ("mlx-gptoss chat demo --eff", ["--effort"]),
        ("mlx-gptoss chat demo --effort h", ["high"]),
    ],
)
def test_commands_models_and_folders_are_offered(
    machine: tuple[Path, Path, Path], words: str, found: list[str]
) -> None:
    assert offered(words, *machine) == found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_that_the_shell_reads(shell: str, tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "mlx_gptoss", "completion", shell], capture_output=True, text=True, check=True
    )
    assert "mlx-gptoss" in made.stdout and "_MLX_GPTOSS_COMPLETE" in made.stdout
    if shutil.which(shell):
        (tmp_path / "script").write_text(made.stdout)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
