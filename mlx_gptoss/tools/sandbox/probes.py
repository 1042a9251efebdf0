"""Attempts to get out of the sandbox, made from within. Those that any system knows; see `probes_linux.py`.

An attempt raises OSError, MemoryError or RuntimeError where it is refused; whatever it returns is what it
got. Where nothing holds it back, no attempt does harm: signals are number 0, files are the tester's.
"""

from __future__ import annotations

import _multiprocessing
import _posixshmem
import ctypes
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFUSED = (OSError, MemoryError, RuntimeError)
IPC_NOWAIT = 0o4000
GETVAL = 5 if sys.platform == "darwin" else 12


@dataclass(frozen=True)
class Outside:
    """What the tester has outside of the sandbox, for attempts to reach it."""

    pid: int
    home: str
    folder: str  # of its own, writable
    secret: str  # a file in that folder
    port: int  # a TCP server on 127.0.0.1
    socket: str  # the path of a listening UNIX socket
    shared_memory: str  # the name of a POSIX segment
    segment: int  # the ids of SysV shared memory, message queue and semaphore
    queue: int
    semaphore: int
    memory: int  # the sandbox's limit, in bytes


Attempt = Callable[[Outside], object]
PROBES: dict[str, Attempt] = {}
# Where there is no mount namespace, names can be asked for, one by one; nothing else is told by them.
NOT_CRUCIAL = {"names outside", "sizes and times outside"}
if sys.platform == "darwin":
    # Seatbelt guards what is done with a socket, not that there is one, and knows no priorities.
    NOT_CRUCIAL |= {"a TCP socket", "a UDP socket", "a raw socket", "an IPv6 socket", "a UNIX socket"}
    NOT_CRUCIAL |= {"a UNIX datagram socket", "change another's priority", "change the own priority"}


def probe(name: str) -> Callable[[Attempt], Attempt]:
    """Register an attempt."""

    def register(attempt: Attempt) -> Attempt:
        assert name not in PROBES, name
        PROBES[name] = attempt
        return attempt

    return register


def run(outside: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """Make every attempt: its name, whether it was refused, and with what, or what it got."""
    it, results = Outside(**outside), []
    handles = _open_handles()
    for name, attempt in PROBES.items():
        try:
            got = attempt(it)
        except REFUSED as error:
            results.append((name, True, f"{type(error).__name__}: {error}"))
        except Exception as error:  # the attempt itself is broken: nothing was shown
            results.append((name, False, f"{type(error).__name__}: {error}"))
        else:
            results.append((name, False, f"got {got!r}"[:200]))
        for handle in _open_handles() - handles:
            os.close(handle)
    return results


def _open_handles() -> set[int]:
    found = set()
    for handle in range(256):
        try:
            os.get_inheritable(handle)
        except OSError:
            continue
        found.add(handle)
    return found


def in_child(start: Callable[[], int]) -> str:
    """The effect of what, like fork, returns 0 in the new process."""
    pid = start()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return f"process {pid}"


# Files

probe("read a file")(lambda it: Path(it.secret).read_text())
probe("read a public system file")(lambda it: Path("/etc/passwd").read_text())
probe("read through a symbolic link")(lambda it: (_link(it.secret, os.symlink)).read_text())
probe("read through a hard link")(lambda it: (_link(it.secret, os.link)).read_text())
probe("move a file in")(lambda it: _move_in_and_back(it.secret))
probe("list the home folder")(lambda it: os.listdir(it.home))
probe("list a folder")(lambda it: os.listdir(it.folder))
probe("list the temporary folder")(lambda it: os.listdir(os.path.dirname(it.folder)))
probe("enter a folder and list it")(lambda it: _list_from_within(it.folder))
probe("climb by ..")(lambda it: os.listdir("../../.."))
probe("create a file")(lambda it: Path(it.folder, "new").write_text("x"))
probe("create a folder")(lambda it: os.mkdir(f"{it.folder}/new-folder"))
probe("create a named pipe")(lambda it: os.mkfifo(f"{it.folder}/new-pipe"))
probe("overwrite a file")(lambda it: os.close(os.open(it.secret, os.O_WRONLY)))
probe("empty a file as it is opened")(lambda it: os.open(it.secret, os.O_RDONLY | os.O_TRUNC))
probe("empty a file by truncate")(lambda it: os.truncate(it.secret, 0))
probe("overwrite Python's own files")(lambda it: os.open(os.__file__, os.O_WRONLY))
probe("write into Python's packages")(lambda it: _new_file(os.path.dirname(os.__file__)))
probe("names outside")(lambda it: _refused_unless(os.access(it.secret, os.F_OK)))
probe("sizes and times outside")(lambda it: os.stat(it.secret))
probe("read a disk")(lambda it: os.open(_first("/dev/rdisk0", "/dev/vda", "/dev/sda"), os.O_RDONLY))
probe("the terminal")(lambda it: os.open("/dev/tty", os.O_RDWR))
probe("a new terminal")(lambda it: os.openpty())


def _refused_unless(done: bool) -> None:
    if not done:
        raise PermissionError("it did not work")


def _move_in_and_back(path: str) -> None:
    os.replace(path, "moved")
    os.replace("moved", path)


def _link(target: str, make: Callable[[str, str], None]) -> Path:
    name = f"link-{make.__name__}"
    make(target, name)
    return Path(name)


def _list_from_within(folder: str) -> list[str]:
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(folder)
        return os.listdir(".")
    finally:
        os.fchdir(here)


def _new_file(folder: str) -> str:
    path = Path(folder, "mlx-gptoss-probe")
    path.touch()
    path.unlink()
    return str(path)


def _first(*names: str) -> str:
    return next((name for name in names if os.path.exists(name)), names[-1])


# Processes and signals

probe("fork")(lambda it: in_child(os.fork))
probe("start a program")(lambda it: subprocess.run([sys.executable, "-c", ""], check=True))
probe("run a shell")(lambda it: _refused_unless(os.waitstatus_to_exitcode(os.system("exit 3")) == 3))
probe("posix_spawn")(lambda it: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}))
probe("signal the host")(lambda it: os.kill(it.pid, 0))
probe("signal the host's group")(lambda it: os.killpg(os.getpgid(it.pid), 0))
probe("signal the supervisor")(lambda it: os.kill(os.getppid(), 0))
probe("signal everybody")(lambda it: os.kill(-1, 0))
probe("change another's priority")(lambda it: _set_priority(it.pid))
probe("change the own priority")(lambda it: os.nice(1))
probe("raise a resource limit")(lambda it: _raise_limit())
probe("another user's rights")(lambda it: os.setuid(0) if os.getuid() else os.setgroups([]))


def _set_priority(pid: int) -> str:
    os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid))
    return "set"


def _raise_limit() -> str:
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except ValueError as error:  # what Python makes of a refusal
        raise PermissionError(str(error)) from None
    after = resource.getrlimit(resource.RLIMIT_AS)
    _refused_unless(after != before)
    return f"{before} became {after}"


# Network and other sockets

probe("a TCP socket")(lambda it: socket.socket(socket.AF_INET))
probe("a UDP socket")(lambda it: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
probe("a raw socket")(lambda it: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
probe("an IPv6 socket")(lambda it: socket.socket(socket.AF_INET6))
probe("a UNIX socket")(lambda it: socket.socket(socket.AF_UNIX))
probe("a UNIX datagram socket")(lambda it: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
probe("connect to a server of this machine")(
    lambda it: socket.create_connection(("127.0.0.1", it.port), timeout=1)
)
probe("send a datagram")(lambda it: _udp().sendto(b"x", ("127.0.0.1", it.port)))
probe("listen on a port")(lambda it: socket.create_server(("127.0.0.1", 0)))
probe("connect to a UNIX socket")(lambda it: _connect_unix(it.socket))


def _udp() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def _connect_unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        return "connected"


# Memory that others see

probe("another's POSIX shared memory")(lambda it: _posixshmem.shm_open(it.shared_memory, os.O_RDWR))
probe("new POSIX shared memory")(lambda it: _new_shared_memory())
probe("a POSIX semaphore")(lambda it: _multiprocessing.SemLock(1, 1, 1, f"/probe-{os.getpid()}", True))
probe("another's SysV shared memory")(lambda it: _done("shmat", it.segment, None, 0))
probe("another's SysV message queue")(lambda it: _done("msgsnd", it.queue, b"\1" + bytes(15), 8, IPC_NOWAIT))
probe("another's SysV semaphore")(lambda it: _done("semctl", it.semaphore, 0, GETVAL))
probe("new SysV shared memory")(lambda it: _created("shm", _done("shmget", 0, ctypes.c_size_t(4096), 0o1600)))
probe("new SysV message queue")(lambda it: _created("msg", _done("msgget", 0, 0o1600)))
probe("new SysV semaphore")(lambda it: _created("sem", _done("semget", 0, 1, 0o1600)))


def _done(name: str, *arguments: Any) -> int:
    """Call a function of the C library. Raises OSError where it returns -1."""
    result: int = ctypes.CDLL(None, use_errno=True)[name](*arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _created(kind: str, number: int) -> str:
    """Remove it again."""
    _done(f"{kind}ctl", number, *((0, 0) if kind == "sem" else (0, None)))
    return f"{kind} {number}"


def _new_shared_memory() -> str:
    name = f"/probe-{os.getpid()}"
    os.close(_posixshmem.shm_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    _posixshmem.shm_unlink(name)
    return name


# Past the limits. Where the system itself does not refuse, the supervisor ends the process: these are made
# one by one.

FATAL: dict[str, Attempt] = {
    "memory in one piece": lambda it: _kept([_touched(4 * it.memory)]),
    "memory piece by piece": lambda it: _kept([_touched(1 << 20) for _ in range(4 * it.memory >> 20)]),
    "files past the limit": lambda it: fill(it.memory // 4),
    "a million files": lambda it: _create(1 << 20),
    "thousands of threads": lambda it: _threads(4000),
}


def _kept(blocks: list[bytes]) -> int:
    """How much it is, after the supervisor had the time to notice."""
    time.sleep(1.0)
    return sum(map(len, blocks))


def _touched(size: int) -> bytes:
    return b"x" * size


def fill(limit: int, delete: bool = False) -> int:
    """Write 16 times the limit, slowly enough for it to be noticed."""
    written, handles, piece = 0, [], _touched(limit // 16)
    try:
        while written < 16 * limit:
            handles.append(os.open(f"fill-{written}", os.O_CREAT | os.O_WRONLY))
            if delete:
                os.unlink(f"fill-{written}")
            written += os.write(handles[-1], piece)
            time.sleep(0.01)
    finally:
        for handle in handles:
            os.close(handle)
        for path in Path().glob("fill-*"):
            path.unlink()
    return written


def _create(number: int) -> int:
    try:
        for i in range(number):
            os.close(os.open(f"created-{i}", os.O_CREAT))
    finally:
        for path in Path().glob("created-*"):
            path.unlink()
    return number


def _threads(number: int) -> int:
    go_on = threading.Event()
    threading.stack_size(1 << 16)
    try:
        for _ in range(number):
            threading.Thread(target=go_on.wait, daemon=True).start()
        time.sleep(1.0)  # for the supervisor to notice
    finally:
        go_on.set()
    return threading.active_count()
