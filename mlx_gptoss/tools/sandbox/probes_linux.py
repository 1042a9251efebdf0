"""Attempts to get out of the sandbox by what Linux offers. Importing this adds them to `probes.PROBES`.

Most call the kernel directly, with arguments that do nothing or cannot work: any answer but "not permitted"
or "no such call" means that the call was reached.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import signal
import socket
import struct
from pathlib import Path
from typing import Any

from mlx_gptoss.tools.sandbox.probes import FATAL, Outside, fill, in_child, probe

_COLUMN = ("x86_64", "aarch64").index(platform.machine())
SIGEV_THREAD_ID = 4
F_SETSIG, F_SETOWN_EX, F_NOTIFY, F_SETPIPE_SZ = 10, 15, 1026, 1031
FIOASYNC, FIOSETOWN, TIOCSTI = 0x5452, 0x8901, 0x5412


def _call(numbers: tuple[int, int], *arguments: Any) -> str:
    """The kernel's answer to a system call. Raises OSError where it was not let through."""
    libc = ctypes.CDLL(None, use_errno=True)
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(numbers[_COLUMN]), *wide)
    code = ctypes.get_errno()
    if result == -1 and code in (errno.EPERM, errno.ENOSYS, errno.EACCES, errno.ENOTSUP):
        raise OSError(code, os.strerror(code))
    return f"answered {errno.errorcode[code] if result == -1 else result}"


def _reaches(name: str, x86_64: int | None, aarch64: int | None, *arguments: Any) -> None:
    """An attempt to make a system call; arguments that are functions get the tester's things."""
    numbers = (x86_64, aarch64)
    if numbers[_COLUMN] is not None:
        probe(name)(lambda it: _call(numbers, *[a(it) if callable(a) else a for a in arguments]))  # type: ignore


def _host(it: Outside) -> int:
    return it.pid


# Other processes: their memory, their existence, their signals

for _name in ("environ", "mem", "cmdline", "maps", "stat"):
    probe(f"/proc/PID/{_name}")(lambda it, n=_name: os.open(f"/proc/{it.pid}/{n}", os.O_RDONLY))  # type: ignore
probe("list /proc")(lambda it: os.listdir("/proc"))
probe("/proc/PID/root")(lambda it: os.listdir(f"/proc/{it.pid}/root"))
probe("/proc/PID/fd")(lambda it: os.listdir(f"/proc/{it.pid}/fd"))
probe("/proc/self/root")(lambda it: Path(f"/proc/self/root{it.secret}").read_text())
probe("the kernel's settings")(lambda it: os.open("/proc/sys/kernel/core_pattern", os.O_RDWR))
probe("the kernel's emergency keys")(lambda it: os.open("/proc/sysrq-trigger", os.O_WRONLY))
probe("list /sys")(lambda it: os.listdir("/sys/class"))
probe("control groups")(lambda it: os.listdir("/sys/fs/cgroup"))
probe("list /dev/shm")(lambda it: os.listdir("/dev/shm"))
probe("the kernel's log")(lambda it: os.open("/dev/kmsg", os.O_RDONLY))
probe("physical memory")(lambda it: os.open("/dev/mem", os.O_RDONLY))
_reaches("ptrace", 101, 117, 2, _host, 0, 0)
_reaches("process_vm_readv", 310, 270, _host, None, 0, None, 0, 0)
_reaches("process_vm_writev", 311, 271, _host, None, 0, None, 0, 0)
_reaches("kcmp", 312, 272, _host, _host, 0, 0, 0)
_reaches("pidfd_open", 434, 434, _host, 0)
_reaches("pidfd_send_signal", 424, 424, -1, 0, None, 0)
_reaches("pidfd_getfd", 438, 438, -1, 0, 0)
_reaches("process_madvise", 440, 440, -1, None, 0, 21, 0)
_reaches("migrate_pages", 256, 238, _host, 0, None, None)
_reaches("get_robust_list", 274, 100, _host, None, None)
_reaches("getpgid of the host", 121, 155, _host)
_reaches("getsid of the host", 124, 156, _host)
_reaches("tkill", 200, 130, _host, 0)
_reaches("tgkill", 234, 131, _host, _host, 0)
_QUEUED = struct.pack("iii", 0, 0, -1).ljust(128, b"\0")
_reaches("rt_sigqueueinfo", 129, 138, _host, 0, _QUEUED)
_reaches("rt_tgsigqueueinfo", 297, 240, _host, _host, 0, _QUEUED)
_reaches("limits of the host", 302, 261, _host, 7, None, bytes(16))
_reaches("processor time of another process", 228, 113, lambda it: (~it.pid << 3) | 2, bytes(16))


@probe("F_SETOWN, F_SETSIG and O_ASYNC")
def _own_pipe(it: Outside) -> object:
    """The way a pipe sends any signal to any process, were it not for SIGURG, which nobody notices."""
    ours, theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETOWN, it.pid)
    fcntl.fcntl(ours, F_SETSIG, signal.SIGURG)
    fcntl.fcntl(ours, fcntl.F_SETFL, fcntl.fcntl(ours, fcntl.F_GETFL) | os.O_ASYNC)
    return os.write(theirs, b"x")


probe("F_SETOWN")(lambda it: fcntl.fcntl(0, fcntl.F_SETOWN, it.pid))
probe("F_SETOWN_EX")(lambda it: fcntl.fcntl(0, F_SETOWN_EX, struct.pack("ii", 1, it.pid)))
probe("F_SETSIG")(lambda it: fcntl.fcntl(os.pipe()[0], F_SETSIG, signal.SIGURG))
probe("O_ASYNC")(lambda it: fcntl.fcntl(os.pipe()[0], fcntl.F_SETFL, os.O_ASYNC))
probe("FIOASYNC")(lambda it: fcntl.ioctl(os.pipe()[0], FIOASYNC, struct.pack("i", 1)))
probe("FIOSETOWN")(lambda it: fcntl.ioctl(socket.socketpair()[0], FIOSETOWN, struct.pack("i", it.pid)))
probe("a lease on a file")(
    lambda it: fcntl.fcntl(os.open("leased", os.O_CREAT), fcntl.F_SETLEASE, fcntl.F_RDLCK)
)
probe("F_NOTIFY")(lambda it: fcntl.fcntl(os.open("/usr/lib", os.O_RDONLY), F_NOTIFY, 2))


@probe("a timer that signals another thread")
def _timer(it: Outside) -> object:
    event = struct.pack("Qiii", 0, 0, SIGEV_THREAD_ID, it.pid).ljust(64, b"\0")
    return _call((222, 107), 1, event, bytes(8))


_reaches(
    "a timer that signals", 222, 107, 1, struct.pack("Qii", 0, signal.SIGURG, 0).ljust(64, b"\0"), bytes(8)
)

# New processes and programs

for _name, _flags in (("clone", 0), ("clone as vfork", 0x4000), ("clone with shared files", 0x400)):
    probe(_name)(lambda it, f=_flags: in_child(lambda: _process((56, 220), f | signal.SIGCHLD, 0, 0, 0, 0)))  # type: ignore
probe("clone3")(
    lambda it: in_child(lambda: _process((435, 435), struct.pack("8Q", 0, 0, 0, 0, 17, 0, 0, 0), 64))
)
_reaches("execve", 59, 221, b"/nonexistent", None, None)
_reaches("execveat", 322, 281, -1, b"nonexistent", None, None, 0)


def _process(numbers: tuple[int, int], *arguments: Any) -> int:
    answer = _call(numbers, *arguments)
    return int(answer.removeprefix("answered "))


# Sockets that carry more than the network, and ways around them

for _name, _family, _type in (
    *(("NETLINK", 16, socket.SOCK_RAW), ("PACKET", 17, socket.SOCK_RAW), ("CAN", 29, socket.SOCK_RAW)),
    *(("TIPC", 30, socket.SOCK_RDM), ("BLUETOOTH", 31, socket.SOCK_RAW), ("ALG", 38, socket.SOCK_SEQPACKET)),
    *(("VSOCK", 40, socket.SOCK_STREAM), ("XDP", 44, socket.SOCK_RAW)),
):
    probe(f"a socket, AF_{_name}")(lambda it, f=_family, t=_type: socket.socket(f, t))  # type: ignore
probe("a pair of network sockets")(lambda it: socket.socketpair(socket.AF_INET))
probe("a datagram to a UNIX socket")(lambda it: _datagram(f"{it.socket}-2"))
probe("a datagram to an abstract socket")(lambda it: _datagram("\0" + it.socket))
probe("sendmsg")(lambda it: _pair(socket.SOCK_STREAM).sendmsg([b"x"]))
probe("connect a pair elsewhere")(lambda it: _pair(socket.SOCK_DGRAM).connect(f"{it.socket}-2"))
probe("listen")(lambda it: socket.socketpair()[0].bind("listener"))
probe("options of a socket")(
    lambda it: socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)
)
_reaches("io_uring", 425, 425, 1, bytes(120))
_reaches("asynchronous I/O", 206, 0, 1, bytes(8))


def _pair(kind: int) -> socket.socket:
    """One of a pair; ctypes keeps the other from being closed with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    theirs.detach()
    return ours


def _datagram(address: str) -> object:
    try:
        return _pair(socket.SOCK_DGRAM).sendto(b"x", address)
    except (ConnectionRefusedError, FileNotFoundError) as error:
        return f"reached: {error}"


# IPC and memory that is counted nowhere

_reaches("list SysV shared memory", 31, 195, 0, 14, bytes(128))
_reaches("list SysV message queues", 71, 187, 0, 12, bytes(128))
_reaches("list SysV semaphores", 66, 191, 0, 0, 19, bytes(128))
_reaches("semop", 65, 193, lambda it: it.semaphore, bytes(6), 1)
_reaches("msgrcv", 70, 188, lambda it: it.queue, bytes(64), 8, 0, 0o4000)
_reaches("a POSIX message queue", 240, 180, b"probe", os.O_RDONLY, 0, None)
_reaches("memfd_create", 319, 279, b"probe", 0)
_reaches("memfd_secret", 447, 447, 0)
_reaches("userfaultfd", 323, 282, 1)
_reaches("vmsplice", 278, 75, 1, None, 0, 0)
_reaches("locked memory", 149, 228, 0, 4096)
_reaches("all memory locked", 151, 230, 3)
_reaches("what is in the page cache", 27, 232, 0, 4096, bytes(1))
probe("memory shared with nobody")(lambda it: mmap.mmap(-1, 4096))
probe("huge pages")(lambda it: mmap.mmap(-1, 1 << 21, flags=mmap.MAP_PRIVATE | 0x40000))
probe("merge pages with others")(lambda it: mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE).madvise(12))
probe("larger pipes")(lambda it: fcntl.fcntl(os.pipe()[0], F_SETPIPE_SZ, 1 << 20))
probe("/dev/zero, shared")(
    lambda it: mmap.mmap(os.open("/dev/zero", os.O_RDONLY), 4096, access=mmap.ACCESS_READ)
)

# What happens to files outside

_reaches("inotify", 294, 26, 0)
_reaches("fanotify", 300, 262, 0, 0)
_reaches("a handle for a file", 303, 264, -100, lambda it: it.secret.encode(), bytes(8), bytes(4), 0)
_reaches("open by handle", 304, 265, -100, bytes(16), 0)
_reaches("attributes of a file", 191, 8, lambda it: it.secret.encode(), b"user.x", bytes(8), 8)
_reaches("a device", 259, 33, -100, b"device", 0o20600, 0x103)
_reaches("quotas", 179, 60, 0, None, 0, None)
_reaches("sync of all disks", 306, 267, -1)

# Priorities, processors, clocks, rights, and the kernel itself

_reaches("setpriority", 141, 140, 0, 0, 0)
_reaches("sched_setaffinity", 203, 122, 0, 0, None)
_reaches("sched_setscheduler", 144, 119, 0, 0, bytes(4))
_reaches("sched_setattr", 314, 274, 0, None, 0)
_reaches("ioprio_set", 251, 30, 1, 0, 0)
_reaches("set a clock", 227, 112, 0, None)
_reaches("tune a clock", 159, 171, None)
_reaches("prlimit of the own process", 302, 261, 0, 13, bytes(16), None)  # of niceness: none as it is
_reaches("outlive the supervisor", 157, 167, 1, 0, 0, 0, 0)
_reaches("prctl, dumpable", 157, 167, 4, 1, 0, 0, 0)
_reaches("another filter", 317, 277, 1, 0, None)
_reaches("personality", 135, 92, 0xFFFFFFFF)
_reaches("capset", 126, 91, None, None)
_reaches("setresuid", 117, 147, -1, -1, -1)
_reaches("setgroups", 116, 159, 0, None)
_reaches("unshare", 272, 97, 0)
_reaches("setns", 308, 268, -1, 0)
_reaches("mount", 165, 40, b"none", b"/nonexistent", b"tmpfs", 0, None)
_reaches("umount", 166, 39, b"/nonexistent", 0)
_reaches("pivot_root", 155, 41, b"/nonexistent", b"/nonexistent")
_reaches("chroot", 161, 51, b"/nonexistent")
_reaches("fsopen", 430, 430, b"tmpfs", 0)
_reaches("open_tree", 428, 428, -1, b"nonexistent", 0)
_reaches("mount_setattr", 442, 442, -1, b"nonexistent", 0, bytes(32), 32)
_reaches("add_key", 248, 217, b"user", b"probe", b"x", 1, -2)
_reaches("request_key", 249, 218, b"user", b"probe", None, -2)
_reaches("keyctl", 250, 219, 0, -3, 1)
_reaches("bpf", 321, 280, 0, None, 0)
_reaches("perf_event_open", 298, 241, None, 0, -1, -1, 0)
_reaches("init_module", 175, 105, None, 0, None)
_reaches("reboot", 169, 142, 0, 0, 0, None)
_reaches("swapon", 167, 224, None, 0)
_reaches("sethostname", 170, 161, None, -1)
_reaches("syslog", 103, 116, 10, None, 0)
_reaches("I/O ports", 172, None, 0)
_reaches("local descriptor table", 154, None, 0, None, 0)
_reaches("a call newer than the tables", 999, 999)
probe("TIOCSTI")(lambda it: fcntl.ioctl(1, TIOCSTI, b"x"))
probe("a pseudo-terminal")(lambda it: os.open("/dev/ptmx", os.O_RDWR))

# Past limits that are Linux's: on address space, and on files without a name.

FATAL["memory by mapping"] = lambda it: len([mmap.mmap(-1, it.memory, mmap.MAP_PRIVATE) for _ in range(4)])
FATAL["deleted files past the limit"] = lambda it: fill(it.memory // 4, delete=True)
