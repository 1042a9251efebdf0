"""The python tool: a notebook that cannot get out. Where this machine cannot shut it in, it must refuse."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.harmony import PYTHON, ToolCall
from mlx_gptoss.tools import builtin_tools
from mlx_gptoss.tools.python import PythonTool
from mlx_gptoss.tools.sandbox import host


def make(**limits: float) -> PythonTool:
    try:
        return PythonTool(**limits)  # type: ignore[arg-type]
    except ToolError as error:
        pytest.skip(f"this machine offers no isolation: {error}")


@pytest.fixture(scope="module")
def tool() -> Iterator[PythonTool]:
    with make(output=2000) as tool:
        yield tool


def test_a_call_returns_what_was_printed_and_the_last_value(tool: PythonTool) -> None:
    call = ToolCall(0, "c1", "python", "print('one')\n1 + 1", "python")
    assert tool.handle(call) == "one\n2\n"


def test_variables_stay_from_cell_to_cell(tool: PythonTool) -> None:
    assert tool.run("kept = [1, 2]") == ""
    assert tool.run("kept.append(3)") == ""
    assert tool.run("kept") == "[1, 2, 3]\n"


def test_an_exception_is_shown_with_the_lines_of_the_cell_only(tool: PythonTool) -> None:
    text = tool.run("def half(x):\n    return x / 0\nhalf(1)")
    assert text.startswith("Traceback")
    assert "return x / 0" in text
    assert text.rstrip().endswith("ZeroDivisionError: division by zero")
    assert "kernel.py" not in text
    assert "SyntaxError" in tool.run("def f(:")
    assert "SystemExit" in tool.run("raise SystemExit(3)")


def test_unicode_and_output_of_every_kind_comes_through(tool: PythonTool) -> None:
    assert tool.run("print('é 🙂 日本')") == "é 🙂 日本\n"
    assert tool.run("import sys; print('to stderr', file=sys.stderr)") == "to stderr\n"
    assert tool.run("import os; os.write(1, b'raw'); None") == "raw"
    assert "EOFError" in tool.run("input()")


def test_output_is_cut_at_its_limit_and_said_to_be(tool: PythonTool) -> None:
    text = tool.run("print('begun')\nfor _ in range(100000): print('é' * 50)\n1 / 0")
    assert text.startswith("begun\né")
    assert "\n[... cut here: " in text
    assert text.endswith("ZeroDivisionError: division by zero\n")
    assert len(text) < 2100
    assert tool.run("'still here'") == "'still here'\n"


def test_files_can_be_kept_in_its_own_folder(tool: PythonTool) -> None:
    assert tool.run("import os; os.listdir('.')") == "[]\n"
    assert tool.run("open('a.txt', 'w').write('hello')") == "5\n"
    assert tool.run("import shutil; shutil.copy('a.txt', 'b.txt'); open('b.txt').read()") == "'hello'\n"


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import urllib.request; urllib.request.urlopen('http://192.0.2.1/')",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 0)",
        f"import os; os.listdir({str(Path.home())!r})",
        "open('/etc/passwd').read()",
        f"open({str(Path(__file__))!r}).read()",
        "open('../outside.txt', 'w')",
        "import os; os.symlink('/etc/passwd', 'link'); open('link').read()",
        "import os; open(f'/proc/{os.getppid()}/environ').read()",
        "import os; os.truncate('/etc/hostname', 0)",
        "import os; os.unlink('/etc/hostname')",
    ],
)
def test_it_cannot_get_out(tool: PythonTool, code: str) -> None:
    if sys.platform == "darwin" and ("/etc/passwd" in code or "/proc/" in code):
        pytest.skip("macOS lets every process read its public system files")
    text = tool.run(code).rstrip().splitlines()[-1]
    assert any(word in text for word in ("PermissionError", "OSError", "URLError", "FileNotFoundError")), text


def test_a_forked_shell_does_not_run(tool: PythonTool) -> None:
    assert tool.run("import os; os.system('echo out > shell.txt') != 0") == "True\n"
    assert tool.run("import os; os.path.exists('shell.txt')") == "False\n"


def test_modes_of_files_outside_stay_as_they_are(tool: PythonTool, tmp_path: Path) -> None:
    before = tmp_path.stat().st_mode
    tool.run(f"import os; os.chmod({str(tmp_path)!r}, 0)")
    assert tmp_path.stat().st_mode == before


def test_threads_work(tool: PythonTool) -> None:
    code = "import threading\nt = threading.Thread(target=lambda: print('in a thread'))\nt.start()\nt.join()"
    assert tool.run(code) == "in a thread\n"


def test_memory_is_limited_and_the_variables_survive(tool: PythonTool) -> None:
    tool.run("before = 1")
    assert "MemoryError" in tool.run("block = bytearray(8 << 30)")
    if sys.platform != "darwin":  # there the process is ended instead
        assert tool.run("before") == "1\n"


def test_a_cell_that_runs_too_long_is_stopped_and_the_next_one_works() -> None:
    with make(seconds=0.5) as tool:
        tool.run("x = 1")
        text = tool.run("print('begun', flush=True)\nwhile True: pass")
        assert text.startswith("begun\nTimeoutError: the code ran for more than 0.5 seconds")
        assert "All variables are lost" in text
        assert "NameError" in tool.run("x")


def test_a_process_that_dies_is_reported_and_replaced() -> None:
    with make() as tool:
        assert "exit status 4" in tool.run("import os; os._exit(4)")
        assert "ended" in tool.run("import os; os.abort()")
        assert tool.run("1") == "1\n"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import os\nfor fd in range(3, 30):\n try: os.write(fd, b'done\\n')\n except OSError: 0\nwhile 1: 0",
         "RuntimeError: the code reported its own end, went on, and was stopped. All variables are lost."),
        ("import threading, time\nthreading.stack_size(1 << 16)\nfor _ in range(600): "
         "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
         "too many threads and was stopped. All variables are lost."),
    ],
    ids=["forged", "threads"],
)  # fmt: skip
def test_the_model_is_told_why_the_process_ended(code: str, told: str) -> None:
    with make(seconds=2.0) as tool:
        text = tool.run(code)
        # A cell may be over before anybody counted, and the system itself may count threads.
        for _ in range(50):
            if told in text or "can't start new thread" in text:
                break
            text = tool.run("import time; time.sleep(0.2)")
        else:
            raise AssertionError(text)
        assert tool.run("1") == "1\n"


def test_a_killed_supervisor_is_replaced() -> None:
    with make() as tool:
        os.kill(int(tool.run("import os; print(os.getppid())")), signal.SIGKILL)
        assert "ended" in tool.run("1")
        assert tool.run("1") == "1\n"


def test_unsafe_code_may_do_what_the_user_may() -> None:
    """Start programs that go on between cells, read the home folder, use the network."""
    with PythonTool(unsafe=True) as tool:
        code = "import os, subprocess, sys; os.path.expanduser('~')"
        assert tool.run(code) == f"{os.path.expanduser('~')!r}\n"
        start = "p = subprocess.Popen([sys.executable, '-c', 'open(\"gone-on\", \"w\")'])\np.wait()"
        assert tool.run(start) == "0\n"
        assert tool.run("os.path.exists('gone-on')") == "True\n"
        text = tool.run("p = subprocess.Popen(['sleep', '60']); print(p.pid)")
        if sys.platform.startswith("linux"):
            state = Path(f"/proc/{int(text)}/stat").read_text().rpartition(")")[2].split()[0]
            assert state != "T"
        assert "socket" in tool.run("import socket; socket.socket()")


def test_closing_ends_the_process_and_deletes_the_folder() -> None:
    tool = make()
    folder = Path(tool.run("import os; print(os.getcwd())").strip())
    assert folder.is_dir()
    tool.close()
    assert not folder.exists()
    assert tool.run("1") == "1\n"
    tool.close()


@pytest.mark.skipif(sys.platform == "darwin", reason="there is one layer, and it is always put on")
def test_without_isolation_it_refuses_unless_told_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LAYERS", ("none at all",))
    with pytest.raises(ToolError, match=r"cannot be isolated .* got through with: read a .*--unsafe-python"):
        PythonTool()
    with PythonTool(unsafe=True) as tool:
        assert tool.run("1 + 1") == "2\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="has one layer")
def test_it_tells_what_it_cannot_hold_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LAYERS", ("landlock", "seccomp"))
    with make() as tool:
        assert "names outside" in tool.weaknesses


def test_a_process_that_does_not_come_up_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "START", "raise SystemExit('no interpreter today')")
    with pytest.raises(ToolError, match="no interpreter today"):
        PythonTool(unsafe=True).run("1")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Landlock is Linux's")
def test_where_the_kernel_offers_landlock_the_tool_works() -> None:
    """The other tests skip where there is no isolation: this one sees to it that they do not."""
    landlock_version = ctypes.CDLL(None).syscall(444, None, 0, 1)
    if landlock_version < 1:
        pytest.skip("this kernel has no Landlock")
    with PythonTool() as tool:
        assert tool.run("1") == "1\n"


def test_the_declaration_says_what_holds_here() -> None:
    text = PythonTool(unsafe=True, seconds=30).namespace.description
    assert "time out after 30.0 seconds" in text
    assert "/mnt/data" not in text
    assert "Internet access for this session is disabled." in text
    assert text.split("\n\n")[0] == PYTHON.description.split("\n\n")[0]


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory": -1}, {"output": 0}])
def test_limits_must_be_above_zero(limits: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(limits))):
        PythonTool(**limits)  # type: ignore[arg-type]


def test_built_in_tools_are_enabled_by_name(tmp_path: Path) -> None:
    tools = builtin_tools(["python", "browser", "python"], folder=tmp_path, unsafe_python=True)
    assert [tool.namespace.name for tool in tools] == ["python", "browser"]
    with pytest.raises(ToolError, match="'bash' is no built-in tool: expected one of python, browser"):
        builtin_tools(["bash"])
    with pytest.raises(ToolError, match="give it a folder"):
        builtin_tools(["browser"])
