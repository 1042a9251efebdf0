"""Processes on other hosts begin, are told secrets out of sight, and end whatever becomes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue

import pytest

from mlx_gptoss.distributed import group, ssh
from mlx_gptoss.distributed.group import Patience
from mlx_gptoss.distributed.hosts import Host
from mlx_gptoss.distributed.launch import Parallel
from mlx_gptoss.distributed.ssh import HostProcess, is_here, starter_of
from mlx_gptoss.errors import HostError
from mlx_gptoss.llm import load
from mlx_gptoss.sampling import SamplingParams
from tests.support.fake_ssh import FakeSsh

MAC = Host("mac2.test")
# Tells what it was given, then reads until its input ends.
ECHO = (
    "import os, sys; print(os.getpid(), flush=True)\nfor line in sys.stdin: print(line.strip(), flush=True)"
)
# Holds a name by which `kill` knows it for a process of this package.
STUCK = (
    "import os, signal; print(os.getpid(), 'mlx_gptoss', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSsh:
    for module in (ssh, group):
        monkeypatch.setattr(module, "is_here", lambda host: host.is_local)  # asks no resolver
    return FakeSsh(tmp_path, monkeypatch)


@pytest.fixture
def begin(fake: FakeSsh) -> Iterator[Callable[[str, dict[str, str]], tuple[HostProcess, Queue[str]]]]:
    begun: list[HostProcess] = []

    def made(code: str, environment: dict[str, str]) -> tuple[HostProcess, Queue[str]]:
        lines: Queue[str] = Queue()
        begun.append(HostProcess(MAC, ["-c", code], environment, lines.put))
        return begun[-1], lines

    yield made
    for process in begun:
        process.kill()


Begin = Callable[[str, dict[str, str]], tuple[HostProcess, Queue[str]]]


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        # Where nobody collects the orphans of a container, they stay as zombies.
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_ssh_never_asks_and_gives_up_in_time(begin: Begin, fake: FakeSsh) -> None:
    begin(ECHO, {})
    (arguments,) = fake.log
    options = arguments[: arguments.index("--")]
    assert {"BatchMode=yes", f"ConnectTimeout={ssh.CONNECT}"} <= set(options)
    assert arguments[arguments.index("--") + 1] == "mac2.test"


def test_arguments_and_environment_arrive_as_they_are(begin: Begin, fake: FakeSsh) -> None:
    odd = "a b'c\"d$HOME`ls`\\n;&|*?\n!#"
    process, lines = begin("import os, sys; print(ascii([os.environ['ODD'], *sys.argv]))", {"ODD": odd})
    assert lines.get(timeout=20) == ascii([odd, "-c"])
    assert process.wait(20) == 0
    quoted = HostProcess(MAC, ["-c", "import sys; print(ascii(sys.argv[1:]))", odd], {}, lines.put)
    assert lines.get(timeout=20) == ascii([odd])
    assert quoted.wait(20) == 0


@pytest.mark.parametrize("host", ["localhost", "mac2.test"])
def test_modules_of_the_working_folder_are_not_the_standard_librarys(
    host: str, fake: FakeSsh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert starter_of(Host(host), {}).start(1, ["-c", "import colorsys"], b"").wait(60) == 0
    assert HostProcess(Host(host), ["-c", "import colorsys"], {}).wait(60) == 0


def test_a_secret_is_in_no_list_of_processes(begin: Begin, fake: FakeSsh) -> None:
    secret = bytes(range(200, 232))
    starter = starter_of(MAC, {})
    handle = starter.start(1, ["-c", "import sys; sys.exit(len(sys.stdin.readline()) - 60)"], secret)
    assert handle.wait(20) == 5  # 64 digits and the line's end
    assert not any(secret.hex() in word for arguments in fake.log for word in arguments)


def test_a_process_ends_when_its_input_does(begin: Begin) -> None:
    process, lines = begin(ECHO, {})
    pid = int(lines.get(timeout=20))
    process.write(b"hello\n")
    assert lines.get(timeout=20) == "hello"
    process.kill()
    assert gone(pid)


def test_a_process_that_listens_no_more_is_ended_on_its_host(begin: Begin) -> None:
    process, lines = begin(STUCK, {})
    pid = int(lines.get(timeout=20).split()[0])
    process.kill()
    assert gone(pid)


def test_a_process_ends_when_the_program_that_began_it_is_killed(fake: FakeSsh) -> None:
    code = (
        "from mlx_gptoss.distributed.hosts import Host\n"
        "from mlx_gptoss.distributed.ssh import HostProcess\n"
        f"HostProcess(Host('mac2.test'), ['-c', {ECHO!r}], {{}}, lambda line: print(line, flush=True))\n"
        "import time; time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        program.send_signal(signal.SIGKILL)
    assert gone(pid)


@pytest.mark.parametrize(
    ("host", "told"),
    [
        (
            "down",
            "down: ssh: connect to .*: Connection refused; check that `ssh down true` asks nothing",
        ),
        ("bare", "bare: no mlx-gptoss is installed there .*; install this version of gptoss-mlx there"),
    ],
)
def test_a_host_that_cannot_run_it_is_one_line(fake: FakeSsh, host: str, told: str) -> None:
    with pytest.raises(HostError, match=told) as caught:
        HostProcess(Host(host), ["-c", ECHO], {})
    assert "\n" not in str(caught.value)


# How pip, pip for a path with a space, and uv let the command find its interpreter.
@pytest.mark.parametrize(
    "start",
    [
        "#!{}\n",
        "#!/bin/sh\n'''exec' \"{}\" \"$0\" \"$@\"\n' '''\n",
        "#!/bin/sh\n'''exec' '{}' \"$0\" \"$@\"\n' '''\n",
    ],
)
def test_the_interpreter_of_the_command_is_found(fake: FakeSsh, tmp_path: Path, start: str) -> None:
    folder = "an env" if "exec" in start else "env"
    for name, text in (
        (f"{folder}/python", f'#!/bin/sh\nFOUND=yes exec {sys.executable} "$@"\n'),
        ("bin/mlx-gptoss", start.format(tmp_path / folder / "python") + "import this\n"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    lines: Queue[str] = Queue()
    process = HostProcess(Host("moved"), ["-c", "import os; print(os.environ['FOUND'])"], {}, lines.put)
    assert lines.get(timeout=20) == "yes" and process.wait(20) == 0


def test_an_interpreter_without_the_package_is_not_taken(
    fake: FakeSsh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")  # no mlx-gptoss
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    other.chmod(0o755)
    with pytest.raises(HostError, match="no mlx-gptoss is installed there"):
        HostProcess(MAC, ["-c", ECHO], {}, python=str(other))


def test_what_has_ended_is_not_ended_again(begin: Begin, fake: FakeSsh) -> None:
    process, lines = begin(ECHO, {})
    pid = int(lines.get(timeout=20))
    process.end()
    assert gone(pid) and len(fake.log) == 1


def test_a_host_that_never_answers_is_given_up(fake: FakeSsh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "BEGIN", 0.2)
    with pytest.raises(HostError, match="slow: ssh did not get there within 0.2 s"):
        HostProcess(Host("slow"), ["-c", ECHO], {})


def test_without_ssh_it_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ssh, "is_here", lambda host: host.is_local)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="mac2.test: ssh cannot be run: No such file"):
        HostProcess(MAC, ["-c", ECHO], {})


def test_what_a_host_complains_of_is_told_under_its_name(
    begin: Begin, capfd: pytest.CaptureFixture[str]
) -> None:
    process, _ = begin("import sys; print('no \\x1b[2Jmemory', file=sys.stderr)", {})
    process.wait(20)
    assert "[mac2.test] no \ufffd[2Jmemory" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "me@127.0.0.1"])
def test_this_machine_is_known(name: str) -> None:
    assert is_here(Host(name))


def test_this_machine_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Studio.local")
    assert is_here(Host("studio")) and is_here(Host("me@studio.local"))
    assert not is_here(Host("192.0.2.1"))  # an address of documentation, which no machine has


@pytest.mark.parametrize("name", ["0.0.0.0", "::"])
def test_no_address_of_all_machines_is_this_one(name: str) -> None:
    assert not is_here(Host(name))


@pytest.mark.parametrize("parallel", ["pipeline", "tensor"])
def test_a_model_is_loaded_over_ssh(fake: FakeSsh, parallel: Parallel) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=3, stop_token_ids=())
    question, hosts = list(range(100, 120)), ["localhost", "mac2.test"]
    patience = Patience(silence=120.0, start=300.0)
    with load("demo", hosts=hosts, parallel=parallel, force=True, patience=patience) as llm:
        found = list(llm.generate(question, greedy))
    with load("demo") as llm:
        assert found == list(llm.generate(question, greedy))
    assert fake.log[0][-2] == "mac2.test"


def test_ranks_that_use_rdma_are_told_to_synchronise_fast(fake: FakeSsh, tmp_path: Path) -> None:
    hosts = [
        {"ssh": "localhost", "ips": ["127.0.0.1"], "rdma": [None, "rdma_en2"]},
        {"ssh": "mac2.test", "ips": ["127.0.0.1"], "rdma": ["rdma_en2", None]},
    ]
    (tmp_path / "hosts.json").write_text(json.dumps({"envs": ["OURS=1"], "hosts": hosts}))
    patience = Patience(silence=120.0, start=300.0)
    with pytest.raises(HostError, match="cannot join the others by jaccl"):  # which no machine here has
        load("demo", hosts=tmp_path / "hosts.json", parallel="tensor", patience=patience)
    assert "export MLX_METAL_FAST_SYNCH=1\nexport OURS=1\n" in fake.log[0][-1]
