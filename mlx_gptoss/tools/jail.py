"""Shutting a Linux process in without privileges: Landlock for files, seccomp for everything else.

Landlock (kernel 5.13 and later, landlock(7)) leaves the process its own folder to write, and Python and the
system's libraries to read. The seccomp filter (seccomp(2)) takes away sockets of every kind, new processes
and programs, signals to others, and the system calls that only an administrator needs. Neither can be
undone. Standard library only: this runs inside the process it shuts in. Raises OSError where the kernel does
not offer both.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

_libc = ctypes.CDLL(None, use_errno=True)

# Landlock: system calls have the same numbers on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
# The newest right of each ABI version: 13 rights, then refer, truncate, none, ioctl.
RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}

READABLE = (
    *("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/timezone"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"),
    *("/dev/urandom", "/dev/random", "/dev/zero"),
)

# System calls by architecture: x86-64, 64-bit Arm (None: it has no such call).
DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "io_uring_setup": (425, 425),  # would open sockets behind the filter's back
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "setpriority": (141, 140),
    "truncate": (76, 45),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
}
# Landlock does not guard these. They report success and do nothing, so that copying a file still works.
IGNORED: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
CLONE, CLONE3, PRLIMIT, TGKILL = (56, 220), (435, 435), (302, 261), (234, 131)
CLONE_THREAD = 0x10000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# seccomp's answers, and the classic BPF instructions used.
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
OFFSET_NUMBER, OFFSET_ARCH, OFFSET_ARGUMENT0 = 0, 4, 16


def shut_in(folder: str) -> None:
    """Leave this process `folder` to write, Python to read, and no network, processes or signals."""
    if _libc.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS, without which neither may be used
        raise _error("no_new_privs")
    _restrict_files(folder)
    _restrict_calls()


def _error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


def _restrict_files(folder: str) -> None:
    abi = _libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock (Linux 5.13 or later, not switched off)")
    handled = (1 << RIGHTS_BY_ABI.get(abi, 16)) - 1
    attributes = struct.pack("=Q", handled)
    ruleset = _libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise _error("landlock_create_ruleset")
    read = READ_FILE | READ_DIR | EXECUTE
    for path in (*READABLE, sys.prefix, sys.base_prefix, sys.exec_prefix, *_library_folders()):
        _allow_path(ruleset, path, read & handled)
    _allow_path(ruleset, os.devnull, (READ_FILE | WRITE_FILE) & handled)
    _allow_path(ruleset, folder, handled & ~EXECUTE)
    if _libc.syscall(RESTRICT_SELF, ruleset, 0) != 0:
        raise _error("landlock_restrict_self")
    os.close(ruleset)


def _library_folders() -> list[str]:
    """Where modules are imported from: a virtual environment may keep them outside its prefix."""
    return [path for path in sys.path if os.path.isdir(path)]


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this system
    if not os.path.isdir(path):
        rights &= FILE_RIGHTS
    rule = struct.pack("=Qi", rights, handle)
    done = _libc.syscall(ADD_RULE, ruleset, 1, rule, 0)
    os.close(handle)
    if done != 0:
        raise _error(f"landlock_add_rule({path})")


def _restrict_calls() -> None:
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"there is no system call filter for {machine}")
    column = list(AUDIT_ARCH).index(machine)
    program = [(LOAD, 0, 0, OFFSET_ARCH), (EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL)]
    program.append((LOAD, 0, 0, OFFSET_NUMBER))
    if machine == "x86_64":  # the x32 numbers, another way to the same calls
        program += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, ERRNO | errno.EPERM)]
    answers = [(calls[column], ERRNO | errno.EPERM) for calls in DENIED.values()]
    answers += [(calls[column], ERRNO) for calls in IGNORED.values()]
    answers.append((CLONE3[column], ERRNO | errno.ENOSYS))  # its flags cannot be seen: libc then uses clone
    for number, answer in answers:
        if number is not None:
            program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, answer)]
    refuse = (RETURN, 0, 0, ERRNO | errno.EPERM)
    # Threads are clones with CLONE_THREAD; anything else would be a process.
    program += [(EQUAL, 0, 3, CLONE[column]), (LOAD, 0, 0, OFFSET_ARGUMENT0), (ANY_BIT, 1, 0, CLONE_THREAD)]
    program += [refuse, (LOAD, 0, 0, OFFSET_NUMBER)]
    # Limits of this process only; signals to threads of this process only (that is how abort() works).
    program += [(EQUAL, 0, 3, PRLIMIT[column]), (LOAD, 0, 0, OFFSET_ARGUMENT0), (EQUAL, 1, 0, 0)]
    program += [refuse, (LOAD, 0, 0, OFFSET_NUMBER)]
    program += [(EQUAL, 0, 3, TGKILL[column]), (LOAD, 0, 0, OFFSET_ARGUMENT0), (EQUAL, 1, 0, os.getpid())]
    program += [refuse, (RETURN, 0, 0, ALLOW)]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    if _libc.prctl(22, 2, header, 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise _error("seccomp")
