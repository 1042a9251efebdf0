"""Landlock (landlock(7), Linux 5.13): files outside stay closed, by the kernel, without privileges.

Where the kernel has it, also no TCP (ABI 4), and no signals and abstract sockets across (ABI 6).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

# System calls with the same numbers on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
# How many rights to files an ABI knows: 13, then refer, truncate, (none), ioctl.
RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
GUARDS_TRUNCATION = 3  # before this ABI, whatever may be read may be emptied by opening it
CONNECT_AND_BIND_TCP = 0b11
ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The version that this kernel has; 0 where it has none."""
    version = _libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    return max(0, int(version))


def restrict_files(folder: str, readable: Iterable[str]) -> None:
    """Leave this thread `folder` to write and `readable` to read. For good.

    Raises OSError where the kernel has no Landlock. The caller has set no_new_privs.
    """
    version = abi()
    if version < 1:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock (Linux 5.13 or later, not switched off)")
    handled = (1 << RIGHTS_BY_ABI.get(version, 16)) - 1
    attributes = struct.pack("=Q", handled)
    attributes += struct.pack("=Q", CONNECT_AND_BIND_TCP) if version >= 4 else b""
    attributes += struct.pack("=Q", ABSTRACT_SOCKETS_AND_SIGNALS) if version >= 6 else b""
    ruleset = _libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise _error("landlock_create_ruleset")
    try:
        for path in readable:
            _allow_path(ruleset, path, (READ_FILE | READ_DIR | EXECUTE) & handled)
        _allow_path(ruleset, os.devnull, (READ_FILE | WRITE_FILE) & handled)
        _allow_path(ruleset, folder, handled & ~EXECUTE)
        if _libc.syscall(RESTRICT_SELF, ruleset, 0) != 0:
            raise _error("landlock_restrict_self")
    finally:
        os.close(ruleset)


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


def _error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")
