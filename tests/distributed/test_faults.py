"""A rank that dies, hangs, comes late, or is not what it should be: a typed error, and nothing stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import mlx_gptoss
from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.distributed.channel import Channel, dial
from mlx_gptoss.distributed.group import Group, Patience
from mlx_gptoss.distributed.hosts import Host
from mlx_gptoss.distributed.launch import Source, load_spread, spread
from mlx_gptoss.distributed.session import versions
from mlx_gptoss.distributed.starter import Handle, LocalStarter
from mlx_gptoss.errors import HostError, RequestError
from mlx_gptoss.llm import LLM
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server import ServerSettings, create_app
from tests.support.groups import PATIENT, pipeline

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=())
ENDLESS = SamplingParams(temperature=0.0, max_tokens=900, stop_token_ids=())
PROMPT = list(range(100, 160))
WAIT = 60  # seconds, for what takes one or two on an idle machine
HOSTS = [Host("localhost"), Host("localhost")]


def load(**patience: Any) -> LLM:
    wanted = Patience(**({"silence": 120.0, "start": 300.0} | patience))
    return mlx_gptoss.load("demo", max_context=1024, hosts=["localhost", "localhost"], patience=wanted)


def pids(parent: int | None = None) -> list[int]:
    """The ranks' processes that some process (default: this one) has started."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,state=,command="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 3) for line in listed.stdout.splitlines()]
    return [
        int(pid)
        for pid, above, state, command in rows
        if int(above) == (parent or os.getpid()) and "distributed.rank" in command and state != "Z"
    ]


def until(reached: Callable[[], bool]) -> None:
    """Wait for something that takes a while on a busy machine."""
    deadline = time.monotonic() + WAIT
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True)
        return bool(state.stdout.strip()) and not state.stdout.startswith("Z")
    return False


def answer(llm: LLM) -> list[int] | HostError:
    try:
        return list(llm.generate(PROMPT, GREEDY))
    except HostError as error:
        return error


@pytest.fixture(scope="module")
def expected() -> list[int]:
    with mlx_gptoss.load("demo", max_context=1024) as one:
        return list(one.generate(PROMPT, GREEDY))


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_what_runs_and_the_group_comes_back(
    fault: signal.Signals, expected: list[int]
) -> None:
    silence = 1.0 if fault == signal.SIGSTOP else 120.0
    with load(silence=silence) as llm:
        (rank,) = pids()
        streams = [llm.submit(PROMPT[i:], ENDLESS) for i in range(3)]
        next(iter(streams[0]))
        os.kill(rank, fault)
        for stream in streams:
            with pytest.raises(HostError, match=r"rank 1 \(localhost\)") as raised:
                list(stream)
            assert raised.value.retry_after
        found: Any = None

        def answered() -> bool:
            nonlocal found
            found = answer(llm)
            return isinstance(found, list)

        until(answered)
        assert found == expected
        assert not alive(rank)
        assert llm.stats().running == 0
    assert pids() == []


def test_a_loss_between_requests_costs_no_request_its_answer(expected: list[int]) -> None:
    with load() as llm:
        assert answer(llm) == expected
        (rank,) = pids()
        os.kill(rank, signal.SIGKILL)
        until(lambda: pids() not in ([], [rank]))
        until(lambda: answer(llm) == expected)


def test_a_group_that_is_lost_too_often_stays_down() -> None:
    with load(restarts=0) as llm:
        for rank in pids():
            os.kill(rank, signal.SIGKILL)

        def given_up() -> bool:
            found = answer(llm)
            return isinstance(found, HostError) and found.retry_after is None

        until(given_up)
        with pytest.raises(HostError, match="stays down"):
            list(llm.generate(PROMPT, GREEDY))
        assert pids() == []


def test_over_http_it_is_503_with_retry_after() -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
    with load() as llm, TestClient(create_app(llm, ServerSettings()), base_url="http://localhost") as client:

        def refused() -> bool:
            for rank in pids():
                os.kill(rank, signal.SIGKILL)
            found = client.post("/v1/chat/completions", json=body)
            assert found.status_code in (200, 503), found.text
            if found.status_code == 503:
                assert found.json()["error"]["code"] == "host_lost" and found.headers["Retry-After"] == "10"
            return found.status_code == 503

        until(refused)


def test_ranks_end_with_rank_0_however_it_ends() -> None:
    loading = "mlx_gptoss.load('demo', hosts=['localhost'] * 2)"
    script = f"import mlx_gptoss, time; loaded = {loading}; print(1, flush=True); time.sleep(600)"

    def started() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    faults = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    parents = [started() for _ in faults]
    for fault, parent in zip(faults, parents, strict=True):
        with parent:
            assert parent.stdout is not None and parent.stdout.readline()
            ranks = pids(parent.pid)
            assert len(ranks) == 1
            parent.send_signal(fault)
            parent.wait(WAIT)
            until(lambda ranks=ranks: not any(map(alive, ranks)))  # type: ignore[misc]


class Impostor:
    """Starts no process, but something that says hello as a rank does."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.channels: list[Channel] = []

    def start(self, rank: int, arguments: Sequence[str], secret: bytes) -> Handle:
        self.channels.append(channel := dial((arguments[4], int(arguments[3])), secret))
        channel.tell(["hello", {"rank": rank, "memory": 1 << 40, "port": 1, **self.facts}])
        return LocalStarter().start(rank, ["-c", "import sys; sys.stdin.read()"], secret)


class Other:
    """Starts another program than it should."""

    def __init__(self, program: str) -> None:
        self.program = program

    def start(self, rank: int, arguments: Sequence[str], secret: bytes) -> Handle:
        return LocalStarter().start(rank, ["-c", self.program], secret)


def test_another_version_is_refused() -> None:
    other = {"versions": versions() | {"mlx": "0.1"}}
    group = Group(HOSTS, lambda host: Impostor(other), PATIENT)
    with pytest.raises(HostError, match=r"rank 1 \(localhost\) has other versions: .*mlx 0\.1; this machine"):
        group.gather()
    assert pids() == []


def test_a_process_that_ends_or_says_nothing_is_named() -> None:
    with pytest.raises(HostError, match="rank 1 .* ended with exit code 3 before it had said hello"):
        Group(HOSTS, lambda host: Other("import sys; sys.exit(3)"), PATIENT).gather()
    silent = Other("import sys; sys.stdin.read()")
    with pytest.raises(HostError, match=r"rank 1 \(localhost\): no sign of life within 0.5 s"):
        Group(HOSTS, lambda host: silent, Patience(start=0.5)).gather()


def test_a_rank_that_lives_and_does_not_get_on_is_lost() -> None:
    made = Impostor({"versions": versions()})
    group = Group(HOSTS, lambda host: made, PATIENT)
    group.gather()
    made.channels[0].tell(["beat", {"busy": PATIENT.step + 1}])
    with pytest.raises(HostError, match="has worked on one step for 301 s"):
        group.open([{}])


def test_prefixes_on_disk_outlive_a_loss(tmp_path: Path) -> None:
    with mlx_gptoss.load(
        "demo",
        max_context=1024,
        hosts=["localhost", "localhost"],
        patience=PATIENT,
        prefix_cache=tmp_path,
    ) as llm:
        first = answer(llm)
        until(lambda: len(list(tmp_path.rglob("*.prefix"))) > 0 and llm.stats().running == 0)
        os.kill(pids()[0], signal.SIGKILL)
        until(lambda: llm.stats().rank_losses == 1 and isinstance(answer(llm), list))
        before = llm.stats().cached_tokens
        assert answer(llm) == first
        assert llm.stats().cached_tokens > before


def test_closing_a_lost_group_with_prefixes_to_write_leaves_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"hosts": ["localhost", "localhost"], "prefix_cache": tmp_path}
    llm = mlx_gptoss.load("demo", max_context=1024, patience=PATIENT, **options)
    for _ in llm.generate(PROMPT, GREEDY):
        pass
    os.kill(pids()[0], signal.SIGKILL)
    llm.close()
    assert pids() == []


def test_nonsense_from_a_rank_is_a_loss_that_names_it() -> None:
    made = Impostor({"versions": versions()})
    group = Group(HOSTS, lambda host: made, PATIENT)
    group.gather()
    made.channels[0].tell(["what", "is", "this"])
    with pytest.raises(HostError, match=r"rank 1 \(localhost\) sent \['what'"):
        group.open([{}])


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A copy of the demo model, for a rank to read."""
    return Path(shutil.copytree(resolve("demo"), tmp_path / "copy"))


def opened(folder: Path) -> None:
    """Have the other rank read this folder."""
    checkpoint = Checkpoint(resolve("demo"))
    with closing(Group(HOSTS, patience=PATIENT)) as group:
        plan = spread(checkpoint, group.gather(), 1 << 26, 0, None)
        load_spread(lambda job: job(), group, checkpoint, plan, Source(str(folder), None, True), (None, None))


def test_other_weights_on_a_rank_are_refused(damaged: Path) -> None:
    checkpoint = Checkpoint(damaged)
    last = checkpoint.tensors["model.layers.3.mlp.experts.down_proj_blocks"]
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(last.start)
        file.write(bytes([1, 2, 3]))
    with pytest.raises(HostError, match="layers 2 to 3 in .* are not those of rank 0"):
        opened(damaged)


def test_truncated_weights_on_a_rank_are_named(damaged: Path) -> None:
    os.truncate(damaged / "model.safetensors", 1_000_000)
    with pytest.raises(HostError, match=r"rank 1 \(localhost\) failed: CheckpointError: .*model.safetensors"):
        opened(damaged)


def test_a_missing_model_on_a_rank_is_named(damaged: Path) -> None:
    with pytest.raises(HostError, match="failed: ModelNotFoundError"):
        opened(damaged / "nothing")


def test_what_one_machine_alone_can_do_is_refused() -> None:
    with pytest.raises(RequestError, match="expert_memory"):
        mlx_gptoss.load("demo", hosts=["localhost", "localhost"], expert_memory="1GB")
    with pytest.raises(RequestError, match="give hosts"):
        mlx_gptoss.load("demo", split=[2, 2])
    with pytest.raises(RequestError, match="split is 4,1"):
        mlx_gptoss.load("demo", hosts=["localhost", "localhost"], split=[4, 1])
    assert pids() == []


def test_closing_ends_a_hung_rank() -> None:
    with pipeline(resolve("demo"), 3) as runner:
        os.kill(pids()[0], signal.SIGSTOP)
        threading.Thread(target=runner.close).start()
        until(lambda: pids() == [])
