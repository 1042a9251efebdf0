"""Nothing gets out of the sandbox: every attempt of sandbox/probes.py, as root and as an ordinary user.

The same attempts without a sandbox show that they are attempts: there they get through.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools.sandbox import host, probes, selftest
from mlx_gptoss.tools.sandbox.selftest import Check
from tests.support.other_users import as_nobody

ROOT = str(Path(__file__).resolve().parents[2])
LINUX = sys.platform.startswith("linux")
if LINUX:
    import mlx_gptoss.tools.sandbox.probes_linux  # noqa: F401  registers its attempts

# What this or that machine refuses even without a sandbox: no such device, protocol, module or right.
DEPENDS_ON_THE_MACHINE = {
    *(
        "read a disk",
        "the terminal",
        "a new terminal",
        "a pseudo-terminal",
        "physical memory",
        "the kernel's log",
    ),
    *("raise a resource limit", "the kernel's emergency keys", "init_module", "I/O ports", "huge pages"),
    *("a pair of network sockets", "a socket, AF_CAN", "a socket, AF_TIPC", "a socket, AF_BLUETOOTH"),
    *("a socket, AF_ALG", "a socket, AF_VSOCK", "a socket, AF_XDP", "a socket, AF_NETLINK", "userfaultfd"),
    *("io_uring", "asynchronous I/O", "memfd_secret", "bpf", "perf_event_open", "kcmp", "fanotify", "quotas"),
    *("local descriptor table", "a handle for a file", "attributes of a file", "control groups", "TIOCSTI"),
    *("a call newer than the tables", "a lease on a file", "request_key", "add_key", "keyctl"),
}


@cache
def attempts(layers: tuple[str, ...], fatal: bool = True) -> list[Check]:
    try:
        return selftest.run(layers, fatal)
    except ToolError as error:
        pytest.skip(f"this machine offers no isolation: {error}")


def opened(checks: list[Check], allowed: set[str] | None = None) -> dict[str, str]:
    return {c.name: c.detail for c in checks if not c.held and c.name not in (allowed or set())}


def checks_as_nobody(layers: tuple[str, ...]) -> list[Check]:
    code = f"""
import json
from mlx_gptoss.tools.sandbox import selftest
print(json.dumps(selftest.run({layers!r})))"""
    return [Check(*check) for check in json.loads(as_nobody(code))]


def test_there_are_many_attempts() -> None:
    assert len(probes.PROBES) + len(probes.FATAL) >= (60 if LINUX else 30)


@pytest.mark.parametrize("name", [*probes.PROBES, *probes.FATAL, "files outside are as before"])
def test_it_does_not_get_out(name: str) -> None:
    check = next(c for c in attempts(host.LAYERS) if c.name == name)
    assert check.held or not check.crucial, check.detail


def test_nothing_at_all_gets_out_where_there_are_namespaces() -> None:
    sandbox = host.Sandbox(host.Limits(), host.LAYERS)
    sandbox.close()
    if LINUX and "namespaces" not in sandbox.layers:
        pytest.skip("this user cannot have namespaces")
    assert not opened(attempts(host.LAYERS))


@pytest.mark.skipif(not LINUX, reason="macOS has one layer")
def test_without_namespaces_only_names_get_out() -> None:
    assert not opened(attempts(("landlock", "seccomp")), probes.NOT_CRUCIAL)


@pytest.mark.skipif(not LINUX, reason="macOS has one layer")
def test_without_landlock_nothing_gets_out() -> None:
    assert not opened(attempts(("namespaces", "seccomp")), probes.NOT_CRUCIAL)


def test_nothing_gets_out_as_an_ordinary_user() -> None:
    checks = checks_as_nobody(host.LAYERS)
    assert len(checks) > 60
    assert not opened(checks, probes.NOT_CRUCIAL)


def test_only_names_get_out_as_an_ordinary_user_without_namespaces() -> None:
    assert not opened(checks_as_nobody(("landlock", "seccomp")), probes.NOT_CRUCIAL)


def test_the_self_test_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "run", lambda: attempts(host.LAYERS))
    assert selftest.main() == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert len(table) > 30
    assert last.startswith(f"{len(table)} attempts, ")
    hole = Check("a way out", False, "got out", True)
    monkeypatch.setattr(selftest, "run", lambda: [hole])
    assert selftest.main() == 1
    assert capsys.readouterr().out.startswith("OPEN  ")


@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="an ordinary user may do less")
def test_without_a_sandbox_the_attempts_get_through() -> None:
    refused = {c.name for c in attempts((), fatal=False) if c.held}
    assert not refused - DEPENDS_ON_THE_MACHINE


@pytest.mark.skipif(not LINUX or os.uname().machine != "x86_64", reason="calls of x86")
@pytest.mark.parametrize("call", ["x32", "i386"])
def test_calls_of_another_architecture_end_the_process(call: str) -> None:
    """x32 has its own numbers; int 0x80 makes a call of the 32-bit kernel, here getpid."""
    code = {
        "x32": "import ctypes; ctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 | 39))",
        "i386": """
import ctypes, mmap
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print("got", ctypes.CFUNCTYPE(ctypes.c_int)(address)())""",
    }[call]
    sandbox = host.Sandbox(host.Limits(seconds=10), host.LAYERS)
    try:
        result = sandbox.run(code)
        assert (result.ended, result.text) == ("exited", "")
        assert sandbox.run("1").text == "1\n"
    finally:
        sandbox.close()


@pytest.mark.skipif(not LINUX, reason="the filter is Linux's")
def test_a_terminal_cannot_be_typed_into() -> None:
    """Under the filter alone, with a terminal at hand: TIOCSTI, and TIOCLINUX, which can paste."""
    code = f"""
import fcntl, os, sys
sys.path.insert(0, {ROOT!r})
from mlx_gptoss.tools.sandbox import seccomp
ours, terminal = os.openpty()
os.setsid()
fcntl.ioctl(terminal, 0x540E, 0)
import ctypes
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
seccomp.restrict_calls()
assert os.isatty(terminal)
for request in (0x5412, 0x541C):
    try:
        fcntl.ioctl(terminal, request, b"x")
    except OSError as error:
        print(error.errno)"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=False)
    assert done.stdout == "25\n25\n", done.stderr
