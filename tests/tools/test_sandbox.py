"""The sandbox's processes: who ends with whom, who stands still, and who cannot be talked into what."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools.sandbox import host, scratch, usage
from mlx_gptoss.tools.sandbox.host import Limits, Sandbox
from tests.support.other_users import as_nobody

ROOT = str(Path(__file__).resolve().parents[2])
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
PATIENCE = 20.0
AMPLE = Limits(seconds=PATIENCE)


def make(limits: Limits = AMPLE, layers: tuple[str, ...] = host.LAYERS) -> Sandbox:
    try:
        return Sandbox(limits, layers)
    except ToolError as error:
        pytest.skip(f"this machine offers no isolation: {error}")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    made = make()
    yield made
    made.close()


def pids(sandbox: Sandbox) -> tuple[int, int]:
    """Of the interpreter and the supervisor."""
    ours, parent = json.loads(sandbox.run("import os; print([os.getpid(), os.getppid()])").text)
    return ours, parent


class Ending:
    """Waits for the end of a process that is nobody's child here. To be made while it runs."""

    def __init__(self, pid: int) -> None:
        self._handle = os.pidfd_open(pid)

    def comes(self) -> bool:
        ended = bool(select.select([self._handle], [], [], PATIENCE)[0])
        os.close(self._handle)
        return ended


def states(pid: int) -> set[str]:
    """Of all threads: R running, S sleeping, T stopped, ..."""
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        status = Path(f"/proc/{pid}/task/{thread}/stat").read_text()
        found.add(status.rpartition(")")[2].split()[0])
    return found


def stopped(pid: int) -> bool:
    """Whether all threads stand still; the signal takes a moment to reach each of them."""
    for _ in range(1000):
        if states(pid) == {"T"}:
            return True
        threading.Event().wait(0.01)
    return False


# Between cells


@linux
def test_between_cells_nothing_runs(sandbox: Sandbox) -> None:
    interpreter, _ = pids(sandbox)
    assert stopped(interpreter)


@linux
def test_threads_of_a_finished_cell_stand_still_and_the_model_is_told(sandbox: Sandbox) -> None:
    interpreter, _ = pids(sandbox)
    code = """
import threading
count = 0
def spin():
    global count
    while True: count += 1
threading.Thread(target=spin, daemon=True).start()"""
    assert "have not ended" in sandbox.run(code).text
    assert stopped(interpreter)
    used = Path(f"/proc/{interpreter}/stat").read_text().split()[13:15]
    threading.Event().wait(0.3)
    assert Path(f"/proc/{interpreter}/stat").read_text().split()[13:15] == used
    assert int(sandbox.run("count").text) > 0


def test_a_cell_that_reports_its_own_end_and_goes_on_is_ended() -> None:
    """It finds the pipe for that by trying all; then it would run on, as it did before."""
    sandbox = make(Limits(seconds=1.0))
    try:
        code = """
import os
for handle in range(3, 30):
    try: os.write(handle, b"done\\n")
    except OSError: pass
while True: pass"""
        assert sandbox.run(code).ended == "forged"
        assert sandbox.run("1 + 1").text == "2\n"
    finally:
        sandbox.close()


def test_a_cell_that_writes_anything_else_where_its_end_is_told_is_ended(sandbox: Sandbox) -> None:
    code = """
import os
for handle in range(3, 30):
    try: os.write(handle, b"x" * 100)
    except OSError: pass
while True: pass"""
    assert sandbox.run(code).ended == "forged"
    assert sandbox.run("1 + 1").text == "2\n"


def test_what_was_a_marker_once_is_output_now(sandbox: Sandbox) -> None:
    """The frames of the interpreter hold nothing that would end a cell."""
    code = """
import sys, inspect
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()): print(repr(value)[:200])
    frame = frame.f_back
print("still the same cell")"""
    result = sandbox.run(code)
    assert result.ended == "done"
    assert result.text.endswith("still the same cell\n")


def test_a_cell_that_never_reads_does_not_hold_up_its_caller() -> None:
    """It closes the pipe that cells come by, or leaves it full: the next cell is longer than a pipe."""
    sandbox = make(Limits(seconds=1.0))
    try:
        assert sandbox.run("import os; os.closerange(3, 200)").ended == "exited"
        assert sandbox.run("import signal; signal.raise_signal(signal.SIGSTOP)").ended == "time"
        assert sandbox.run("'" + "x" * (4 << 20) + "'[:0]").text == "''\n"
    finally:
        sandbox.close()


def test_a_closed_output_ends_the_output_and_not_the_cell(sandbox: Sandbox) -> None:
    result = sandbox.run("print('before', flush=True); import os; os.close(1); os.close(2); kept = 7")
    assert (result.ended, result.text) == ("done", "before\n")


# Who ends with whom

HOST = """
import sys
from mlx_gptoss.tools.sandbox.host import LAYERS, Limits, Sandbox
sandbox = Sandbox(Limits(), LAYERS)
print(sandbox.run("import os; print([os.getpid(), os.getppid()])").text.strip(), flush=True)
print(sandbox.files, flush=True)
sandbox.run("open('file', 'w').write('x')\\nwhile True: pass")
"""


def other_host() -> tuple[subprocess.Popen[str], int, int, Path]:
    """A host in a process of its own, in the midst of a cell: it, interpreter, supervisor, folder."""
    make().close()
    environment = {**os.environ, "PYTHONPATH": ROOT}
    process = subprocess.Popen(
        [sys.executable, "-c", HOST],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    interpreter, supervisor = json.loads(process.stdout.readline())
    return process, interpreter, supervisor, Path(process.stdout.readline().strip()).parent


@linux
def test_a_running_cell_ends_with_its_host() -> None:
    process, interpreter, supervisor, folder = other_host()
    endings = [Ending(interpreter), Ending(supervisor)]
    assert folder.is_dir()
    process.kill()
    process.wait()
    assert all(ending.comes() for ending in endings)
    assert not folder.exists()


@linux
def test_a_running_cell_ends_with_its_supervisor_and_the_next_start_clears_up() -> None:
    process, interpreter, supervisor, folder = other_host()
    ending = Ending(interpreter)
    os.kill(process.pid, signal.SIGSTOP)  # it would clear up itself
    os.kill(supervisor, signal.SIGKILL)
    assert ending.comes()
    process.kill()
    process.wait()
    assert folder.exists()
    make().close()
    assert not folder.exists()


def test_a_killed_supervisor_is_told_and_a_new_one_can_be_had(sandbox: Sandbox) -> None:
    _, supervisor = pids(sandbox)
    os.kill(supervisor, signal.SIGKILL)
    assert sandbox.run("1").ended == "exited"
    assert not sandbox.alive


def test_an_interrupted_cell_does_not_run_on_and_its_files_stay(sandbox: Sandbox) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        sandbox.run("open('kept.txt', 'w').write('kept')")
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            sandbox.run("variable = 1\nwhile True: pass")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "NameError" in sandbox.run("variable").text
    assert sandbox.run("open('kept.txt').read()").text == "'kept'\n"


@linux
def test_limits_that_are_lower_already_stay(sandbox: Sandbox) -> None:
    """The shell's ulimit may allow less than the sandbox would."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from mlx_gptoss.tools.sandbox.host import Limits, Sandbox
sandbox = Sandbox(Limits(), {sandbox.layers!r})
print(sandbox.run("import resource; resource.getrlimit(resource.RLIMIT_NOFILE)").text)
sandbox.close()"""
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "(100, 100)", done.stderr


def test_threads_that_are_left_and_a_closed_output_go_together(sandbox: Sandbox) -> None:
    code = """
import sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
sys.stdout.close()"""
    assert sandbox.run(code).ended == "done"
    assert sandbox.run("kept = 1").ended == "done"


def test_processor_time_is_limited_too(sandbox: Sandbox) -> None:
    text = sandbox.run("import resource; resource.getrlimit(resource.RLIMIT_CPU)[1] > 0").text
    assert text == "True\n"


# Limits that are watched from outside


FILL = """
import os, itertools
for name in itertools.count():
    print("x" * 10000, flush=True)
    with open(str(name), "wb") as file: file.write(bytes(1 << 20))"""


@pytest.mark.skipif(sys.platform == "darwin", reason="the layers are Linux's")
@pytest.mark.parametrize(
    "hide",
    [
        "",
        "import os\nfor _ in range(100): os.mkdir('d' * 200); os.chdir('d' * 200)",
        "import os; os.mkdir('closed', 0o300); os.chdir('closed')",
    ],
    ids=["in sight", "deeper than a path is long", "in a folder that cannot be listed"],
)
def test_files_are_watched_while_a_cell_prints(hide: str) -> None:
    """On disk, the kernel does not limit the folder: the supervisor does, as it does memory on macOS."""
    sandbox = make(Limits(seconds=PATIENCE, memory=256 << 20), ("landlock", "seccomp"))
    try:
        assert sandbox.run(hide + FILL).ended == "files"
        assert sandbox.run("import os; os.listdir('.')").text == "[]\n"  # room again
    finally:
        sandbox.close()


def test_usage_is_that_of_the_process() -> None:
    block = bytearray(b"x") * (64 << 20)
    used = usage.of_process(os.getpid())
    assert len(block) < used.memory < 16 << 30
    assert 1 <= used.threads < 1000


def test_usage_of_a_process_that_is_gone_is_an_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(OSError):
        usage.of_process(process.pid)


# The folder


def test_a_folder_goes_away_whatever_is_in_it() -> None:
    folder = scratch.Scratch()
    here = os.getcwd()
    os.chdir(folder.files)
    try:
        for _ in range(1100):  # deeper than Python recurses, longer than a path may be
            os.mkdir("deeper")
            os.chdir("deeper")
    finally:
        os.chdir(here)
    os.mkdir(f"{folder.files}/closed", 0o000)
    os.symlink(here, f"{folder.files}/link")
    path = folder.path
    folder.remove()
    assert not os.path.exists(path)
    assert os.path.isdir(here)


def test_folders_whose_owner_was_killed_are_cleared_and_others_stay() -> None:
    code = """
import os, signal
from mlx_gptoss.tools.sandbox.scratch import Scratch
folder = Scratch()
open(f"{folder.files}/left", "w").close()
print(folder.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)"""
    in_use = scratch.Scratch()
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True
    )
    left = done.stdout.strip()
    assert os.path.isdir(left), done.stderr
    scratch.clear_abandoned()
    assert not os.path.exists(left)
    assert os.path.isdir(in_use.files)
    in_use.remove()


@linux
def test_a_folder_goes_away_for_an_ordinary_user_whatever_modes_it_has() -> None:
    code = """
import os
from mlx_gptoss.tools.sandbox import scratch, usage
folder = scratch.Scratch()
for name in ("a", "b"): os.makedirs(f"{folder.files}/{name}/inner/innermost")
open(f"{folder.files}/a/inner/file", "w").write("x" * 5000)
for path in ("b/inner/innermost", "b/inner", "b", "a/inner", "a"): os.chmod(f"{folder.files}/{path}", 0)
print(usage.of_folder(folder.files, os.getpid())[1])
for path in ("a/inner", "a"): os.chmod(f"{folder.files}/{path}", 0)
path = folder.path
folder.remove()
print(os.path.exists(path))"""
    assert as_nobody(code).split() == ["7", "False"]


def test_a_link_with_the_name_of_a_folder_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / f"{scratch.PREFIX}link").symlink_to(tmp_path / "precious")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch.clear_abandoned()
    assert (tmp_path / "precious" / "file").exists()


def test_a_folder_that_became_a_link_is_not_followed(tmp_path: Path) -> None:
    """A cell may exchange one for the other between a look at it and the next step."""
    (tmp_path / "link").symlink_to(Path.home())
    handle = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError):
        scratch.open_folder("link", handle)
    os.close(handle)
