"""Training on several machines: here processes of one, joined by MLX's ring."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.tune import TuneOptions, tune
from tests.support.tuning import style_rows, write_rows

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="MLX has no ring here")

RANK = """
import sys
from mlx_gptoss.errors import TuneError
from mlx_gptoss.tune import TuneOptions, tune
try:
    options = TuneOptions(rank=2, tokens=256, steps=4, every=2, samples=0, lr=1e-3)
    tune("demo", sys.argv[1], sys.argv[2], options)
except TuneError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", style_rows("ring", 16))
    write_rows(folder / "valid.jsonl", style_rows("ring valid", 4))
    return folder


def together(data: Path, *folders: Path) -> list[tuple[int, str]]:
    """A process for each folder, training together: exit status and errors of each."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in folders]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    file = data / "hosts.json"
    file.write_text(json.dumps(hosts))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(data), str(folder)],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    try:
        return [(process.wait(300), process.communicate()[1]) for process in started]
    finally:
        for process in started:
            process.kill()


def test_two_processes_train_the_adapter_of_one_that_takes_both_shares(data: Path, tmp_path: Path) -> None:
    options = TuneOptions(rank=2, tokens=256, steps=4, every=2, samples=0, lr=1e-3, accumulate=2)
    tune("demo", data, tmp_path / "one", options)
    shared = tmp_path / "shared"
    assert [status for status, _ in together(data, shared, shared)] == [0, 0]
    one, two = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("one", "shared"))
    assert isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys()
    assert max(np.abs(np.array(one[name] - two[name])).max() for name in one) < 1e-5
    # Machines that do not see the same folder cannot go on together.
    for status, told in together(data, shared, tmp_path / "mine"):
        assert status == 1 and "the machines are at steps 4 and 0" in told
