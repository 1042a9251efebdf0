"""The system call filter (seccomp(2)): an allow list, compiled to classic BPF. Standard library only.

Every call is answered in the filter, in this order: calls of another architecture end the process; a call
that is not listed in `syscalls.py` is refused; one whose arguments matter is judged by the branches of
`judged`. A filter sees registers, not what they point to, so calls that take their arguments in memory
(clone3, sendmsg) cannot be judged and are not allowed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_gptoss.tools.sandbox import syscalls

MACHINES = ("x86_64", "aarch64")  # the columns of the tables
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000  # x86-64: another way to the same calls

# seccomp's answers, and the instructions of classic BPF that are used.
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
LOAD, AND, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
OFFSET_NUMBER, OFFSET_ARCH, OFFSET_ARGUMENTS = 0, 4, 16
REFUSED = ERRNO | errno.EPERM
DONE = ERRNO  # errno 0: reports success

# What glibc and musl ask for when they start a thread; a process would lack CLONE_THREAD.
THREAD_FLAGS = (0x3D0F00, 0x7D0F00)
# Harmless ioctls: TCGETS and TIOCGWINSZ (what isatty and the terminal's size need), FIONREAD, FIONBIO,
# FIONCLEX, FIOCLEX.
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_GETLK, F_OFD_GETLK, F_DUPFD_CLOEXEC, F_GETPIPE_SZ. Not F_SETOWN and
# F_SETSIG, which send signals to anyone, nor F_NOTIFY, leases, seals and F_SETPIPE_SZ.
FCNTLS = (0, 1, 2, 3, 5, 36, 1030, 1032)
F_SETFL, O_ASYNC = 4, 0o20000
# Locks: there is no other process to share a file with, and records of locks are the kernel's memory.
LOCKS = (6, 7, 37, 38)
MAP_HUGETLB, SHARED_ANONYMOUS = 0x40000, 0x21
# All but those that touch pages of other processes (MERGEABLE, PAGEOUT) or of the machine (HWPOISON).
ADVICE = (0, 1, 2, 3, 4, 8, 9, 14, 15, 16, 17, 18)
PR_SET_NAME, PR_GET_NAME = 15, 16
AF_UNIX = 1
CLOCKS = tuple(range(12))  # a negative clock is the processor time of any process


@dataclass(frozen=True)
class Test:
    """A condition on the low 32 bits of an argument, and that the high ones are 0 if `wide`.

    kind: "in" (one of `values`), "clear" (none of the bits of values[0] set) or "not all" (not all of them).
    """

    argument: int
    kind: str
    values: Sequence[int]
    wide: bool = False


Branch = tuple[Sequence[Test], int]  # if all tests hold, this is the answer
Instruction = tuple[int, int, int, int]
FAIL = -1  # a jump out of the branch


def judged(pid: int) -> dict[str, list[Branch]]:
    """The branches of each judged call, for the process `pid`; where none holds, the call is refused."""
    me = [Test(0, "in", (pid,))]
    me_or_0 = [Test(0, "in", (0, pid))]
    clock = [Test(0, "in", CLOCKS)]
    return {
        "clone": [([Test(0, "in", THREAD_FLAGS, wide=True)], ALLOW)],
        "clock_getres": [(clock, ALLOW)],
        "clock_gettime": [(clock, ALLOW)],
        "clock_nanosleep": [(clock, ALLOW)],
        "fcntl": [
            ([Test(1, "in", FCNTLS)], ALLOW),
            ([Test(1, "in", (F_SETFL,)), Test(2, "clear", (O_ASYNC,))], ALLOW),
            ([Test(1, "in", LOCKS)], DONE),
        ],
        "getpgid": [(me_or_0, ALLOW)],
        "getsid": [(me_or_0, ALLOW)],
        "ioctl": [([Test(1, "in", IOCTLS)], ALLOW), ([], ERRNO | errno.ENOTTY)],
        "kill": [(me, ALLOW)],
        "madvise": [([Test(2, "in", ADVICE)], ALLOW)],
        # Part of a shared anonymous mapping can be unmapped and stays in memory, past every limit.
        "mmap": [([Test(3, "clear", (MAP_HUGETLB,)), Test(3, "not all", (SHARED_ANONYMOUS,))], ALLOW)],
        "prctl": [([Test(0, "in", (PR_SET_NAME, PR_GET_NAME))], ALLOW)],
        "prlimit64": [([*me_or_0, Test(2, "in", (0,), wide=True)], ALLOW)],  # read, not set
        # glibc asks about a thread by its id, and goes on without an answer.
        "sched_getaffinity": [(me_or_0, ALLOW), ([], ERRNO | errno.ENOSYS)],
        # With an address, a datagram could go to anyone.
        "sendto": [([Test(4, "in", (0,), wide=True)], ALLOW)],
        "socketpair": [([Test(0, "in", (AF_UNIX,))], ALLOW)],
        "tgkill": [(me, ALLOW)],  # how abort() works
    }


def program(machine: str, pid: int) -> list[Instruction]:
    """The filter for the process `pid`, as BPF instructions (code, jump if true, jump if false, operand)."""
    column = MACHINES.index(machine)
    code: list[Instruction] = [(LOAD, 0, 0, OFFSET_ARCH), (EQUAL, 1, 0, AUDIT_ARCH[machine])]
    code += [(RETURN, 0, 0, KILL), (LOAD, 0, 0, OFFSET_NUMBER)]
    if machine == "x86_64":
        code += [(AT_LEAST, 0, 1, X32_BIT), (RETURN, 0, 0, KILL)]
    for table, answer in (
        (syscalls.FREE, ALLOW),
        (syscalls.PRETENDED, DONE),
        (syscalls.UNSUPPORTED, ERRNO | errno.EOPNOTSUPP),
        (syscalls.MISSING, ERRNO | errno.ENOSYS),
    ):
        for numbers in table.values():
            code += _case(numbers[column], [(RETURN, 0, 0, answer)])
    for name, branches in judged(pid).items():
        block = [instruction for branch in branches for instruction in _branch(*branch)]
        code += _case(syscalls.JUDGED[name][column], [*block, (RETURN, 0, 0, REFUSED)])
    # Calls newer than these tables: libraries fall back when the kernel seems not to have them.
    newest = max(n for table in _tables() for row in table.values() if (n := row[column]) is not None)
    code += [(AT_LEAST, 0, 1, newest + 1), (RETURN, 0, 0, ERRNO | errno.ENOSYS)]
    return [*code, (RETURN, 0, 0, REFUSED)]


def _tables() -> tuple[syscalls.Numbers, ...]:
    return (
        *(syscalls.FREE, syscalls.JUDGED, syscalls.PRETENDED),
        *(syscalls.UNSUPPORTED, syscalls.MISSING),
    )


def _case(number: int | None, block: list[Instruction]) -> list[Instruction]:
    """The block, which returns, for this number only."""
    return [] if number is None else [(EQUAL, 0, len(block), number), *block]


def _branch(tests: Sequence[Test], answer: int) -> list[Instruction]:
    code = [instruction for test in tests for instruction in _test(test)]
    code.append((RETURN, 0, 0, answer))
    out = []
    for at, (operation, true, false, operand) in enumerate(code):
        left = len(code) - at - 1
        out.append((operation, left if true == FAIL else true, left if false == FAIL else false, operand))
    return out


def _test(test: Test) -> list[Instruction]:
    low = OFFSET_ARGUMENTS + 8 * test.argument  # little endian, on both architectures
    code: list[Instruction] = [(LOAD, 0, 0, low + 4), (EQUAL, 0, FAIL, 0)] if test.wide else []
    code.append((LOAD, 0, 0, low))
    if test.kind == "clear":
        return [*code, (ANY_BIT, FAIL, 0, test.values[0])]
    if test.kind == "not all":
        return [*code, (AND, 0, 0, test.values[0]), (EQUAL, FAIL, 0, test.values[0])]
    last = len(test.values) - 1
    return code + [(EQUAL, last - i, FAIL if i == last else 0, v) for i, v in enumerate(test.values)]


def restrict_calls() -> None:
    """Put this process, all its threads, under the filter. For good. Raises OSError where there is none."""
    machine = platform.machine()
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"there is no system call filter for {machine}")
    code = b"".join(struct.pack("=HBBI", *i) for i in program(machine, os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    seccomp = {"x86_64": 317, "aarch64": 277}[machine]
    set_mode_filter, all_threads = 1, 1
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(seccomp, set_mode_filter, all_threads, header) != 0:
        raise OSError(ctypes.get_errno(), "this kernel has no seccomp filters")
