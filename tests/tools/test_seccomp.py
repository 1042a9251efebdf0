"""The system call filter, on both architectures: the program is run here, as the kernel would."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from mlx_gptoss.tools.sandbox import seccomp, syscalls

PID = 4242
ALLOWED = "allowed"
KILLED = "killed"


def answer(machine: str, number: int, *arguments: int, architecture: int | None = None) -> str:
    """What the filter says to a call: "allowed", "killed", or the name of an error ("0" for success)."""
    architecture = seccomp.AUDIT_ARCH[machine] if architecture is None else architecture
    padded = [a & (2**64 - 1) for a in (*arguments, *[0] * (6 - len(arguments)))]
    data = struct.pack("=iIQ6Q", number, architecture, 0, *padded)
    program = seccomp.program(machine, PID)
    value, at = 0, 0
    while True:
        operation, true, false, operand = program[at]
        at += 1
        if operation == 0x06:  # return
            kind = operand & 0xFFFF0000
            code = operand & 0xFFFF
            if kind == 0x00050000:
                return errno.errorcode[code] if code else "0"
            return {0x7FFF0000: ALLOWED, 0x80000000: KILLED}[kind]
        if operation == 0x20:  # load
            (value,) = struct.unpack_from("=I", data, operand)
        elif operation == 0x54:  # and
            value &= operand
        else:
            compare = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}
            at += true if compare[operation] else false


def number(name: str, machine: str) -> int:
    tables = (syscalls.FREE, syscalls.JUDGED, syscalls.PRETENDED, syscalls.UNSUPPORTED, syscalls.MISSING)
    found = next(table[name] for table in tables if name in table)[seccomp.MACHINES.index(machine)]
    assert found is not None
    return found


machines = pytest.mark.parametrize("machine", seccomp.MACHINES)


@machines
def test_listed_calls_pass_and_all_others_are_refused(machine: str) -> None:
    column = seccomp.MACHINES.index(machine)
    free = {numbers[column] for numbers in syscalls.FREE.values()}
    others = {
        numbers[column]
        for table in (syscalls.JUDGED, syscalls.PRETENDED, syscalls.UNSUPPORTED, syscalls.MISSING)
        for numbers in table.values()
    }
    for candidate in range(600):
        if candidate in free:
            assert answer(machine, candidate) == ALLOWED
        elif candidate not in others:
            assert answer(machine, candidate) in ("EPERM", "ENOSYS")


@machines
def test_calls_of_another_architecture_end_the_process(machine: str) -> None:
    other = {"x86_64": 0x40000003, "aarch64": 0x40000028}[machine]  # i386, 32-bit Arm
    assert answer(machine, number("read", machine), architecture=other) == KILLED
    if machine == "x86_64":
        assert answer(machine, 0x40000000 | 39) == KILLED


@machines
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("kill", (PID, 9), ALLOWED),
        ("kill", (PID + 1, 9), "EPERM"),
        ("kill", (0, 9), "EPERM"),
        ("kill", (-1, 9), "EPERM"),
        ("kill", (PID | 1 << 32, 9), ALLOWED),  # the kernel looks at 32 bits, too
        ("tgkill", (PID, 77, 6), ALLOWED),
        ("tgkill", (PID + 1, PID + 1, 6), "EPERM"),
        ("clone", (0x3D0F00,), ALLOWED),
        ("clone", (0x7D0F00,), ALLOWED),
        ("clone", (17,), "EPERM"),
        ("clone", (0x3D0F00 & ~0x400,), "EPERM"),  # a table of handles of its own
        ("clone", (0x3D0F00 | 1 << 32,), "EPERM"),
        ("clone3", (0,), "ENOSYS"),
        ("fcntl", (0, 3), ALLOWED),
        ("fcntl", (0, 4, 0o4000), ALLOWED),
        ("fcntl", (0, 4, 0o4000 | 0o20000), "EPERM"),
        ("fcntl", (0, 8, 1), "EPERM"),
        ("fcntl", (0, 10, 9), "EPERM"),
        ("fcntl", (0, 15), "EPERM"),
        ("fcntl", (0, 1 << 32 | 8, 1), "EPERM"),
        ("fcntl", (0, 1024), "EPERM"),
        ("fcntl", (0, 1026), "EPERM"),
        ("fcntl", (0, 1031, 1 << 20), "EPERM"),
        ("fcntl", (0, 6), "0"),
        ("ioctl", (0, 0x5401), ALLOWED),
        ("ioctl", (0, 0x5412), "ENOTTY"),
        ("ioctl", (0, 0x5452), "ENOTTY"),
        ("ioctl", (0, 0x8901), "ENOTTY"),
        ("mmap", (0, 4096, 3, 0x22), ALLOWED),
        ("mmap", (0, 4096, 3, 0x21), "EPERM"),
        ("mmap", (0, 4096, 3, 0x23), "EPERM"),  # MAP_SHARED_VALIDATE
        ("mmap", (0, 4096, 3, 0x40022), "EPERM"),
        ("mmap", (0, 4096, 5, 0x01), ALLOWED),
        ("madvise", (0, 4096, 4), ALLOWED),
        ("madvise", (0, 4096, 12), "EPERM"),
        ("madvise", (0, 4096, 100), "EPERM"),
        ("prctl", (15,), ALLOWED),
        ("prctl", (1, 0), "EPERM"),
        ("prctl", (4, 0), "EPERM"),
        ("prctl", (22, 0), "EPERM"),
        ("prlimit64", (0, 7, 0), ALLOWED),
        ("prlimit64", (0, 7, 1 << 40), "EPERM"),
        ("prlimit64", (PID + 1, 7, 0), "EPERM"),
        ("socketpair", (1, 1, 0), ALLOWED),
        ("socketpair", (2, 1, 0), "EPERM"),
        ("sendto", (3, 1, 1, 0, 0), ALLOWED),
        ("sendto", (3, 1, 1, 0, 1 << 40), "EPERM"),
        ("clock_gettime", (1,), ALLOWED),
        ("clock_gettime", ((~PID << 3) | 2,), "EPERM"),
        ("sched_getaffinity", (0,), ALLOWED),
        ("sched_getaffinity", (1,), "ENOSYS"),
        ("getpgid", (0,), ALLOWED),
        ("getsid", (1,), "EPERM"),
        ("flock", (), "0"),
        ("fchmodat", (), "0"),
        ("setxattr", (), "ENOTSUP"),
    ],
)
def test_calls_are_judged_by_their_arguments(
    machine: str, name: str, arguments: tuple[int, ...], expected: str
) -> None:
    assert answer(machine, number(name, machine), *arguments) == expected


@machines
def test_newer_calls_seem_to_be_missing(machine: str) -> None:
    assert answer(machine, 999) == "ENOSYS"


def test_the_numbers_are_those_of_the_system_headers() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers here")
    known = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", header.read_text()))
    for table in (syscalls.FREE, syscalls.JUDGED, syscalls.PRETENDED, syscalls.UNSUPPORTED, syscalls.MISSING):
        for name, (x86_64, _) in table.items():
            assert name not in known or x86_64 == int(known[name]), name


def test_the_numbers_for_arm_are_those_of_the_system_headers() -> None:
    header = Path("/usr/include/asm-generic/unistd.h")  # what 64-bit Arm uses
    if not header.exists():
        pytest.skip("no kernel headers here")
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
    checked = 0
    for table in (syscalls.FREE, syscalls.JUDGED, syscalls.PRETENDED, syscalls.UNSUPPORTED, syscalls.MISSING):
        for name, (_, aarch64) in table.items():
            if aarch64 is not None and name in known:
                checked += 1
                assert aarch64 == int(known[name]), name
    assert checked > 100
