"""Namespaces (namespaces(7)): a file system that holds nothing but Python and the folder; no network, no IPC.

They are had through a user namespace, without privileges, where the system allows that; some do not. The
supervisor makes the folder a memory file system of a fixed size (`private_folder`), the process that runs
the cells then leaves everything else behind (`leave_for`): what is outside has no name there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from pathlib import Path

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWNET = 0x10000000, 0x40000000
BIND, REC, PRIVATE, NOSUID, NODEV = 0x1000, 0x4000, 0x40000, 0x2, 0x4
DETACH = 2
# mount_setattr(2), Linux 5.12: the same number on every architecture.
MOUNT_SETATTR, AT_RECURSIVE = 442, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
MAX_FILES = 4096

_libc = ctypes.CDLL(None, use_errno=True)


def private_folder(folder: str, size: int) -> None:
    """In a namespace of this process, mount a memory file system of `size` bytes at `folder`.

    Raises OSError where the system does not let ordinary users do so.
    """
    _unshare(NEWUSER | NEWNS)
    _mount("tmpfs", folder, "tmpfs", NOSUID | NODEV, f"size={size},nr_inodes={MAX_FILES},mode=700")


def unmount(folder: str) -> None:
    """Give up what `private_folder` mounted, with what is in it."""
    _check(_libc.umount2(os.fsencode(folder), DETACH), "umount")


def leave_for(root: str, folder: str, readable: Iterable[str]) -> None:
    """Enter namespaces with `readable` and `folder` only, under their old names; `root` is a spare folder."""
    _unshare(NEWUSER | NEWNS | NEWIPC | NEWNET | NEWUTS | NEWCGROUP)
    _mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    shown: list[str] = []
    for path in sorted(set(readable), key=lambda p: (p.count("/"), p)):
        if os.path.exists(path) and not any(path.startswith(f"{above}/") for above in shown):
            _show(path, root)
            shown.append(path)
    target = f"{root}{folder}"
    os.makedirs(target, exist_ok=True)
    _mount(folder, target, None, BIND | REC)
    for parent, names, _ in os.walk(root):
        names[:] = [n for n in names if not os.path.ismount(f"{parent}/{n}")]
        os.chmod(parent, 0o111)  # to walk through, not to list
    os.chdir(root)
    _check(_libc.syscall({"x86_64": 155, "aarch64": 41}[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", DETACH), "umount")
    _set_attributes("/", ATTR_RDONLY)
    os.chdir(folder)


def drop_capabilities() -> None:
    """Give up what is left of an administrator's rights. For good: the caller has set no_new_privs."""
    version = struct.pack("=Ii", 0x20080522, 0)
    _check(_libc.capset(version, bytes(24)), "capset")


def _show(path: str, root: str) -> None:
    target = f"{root}{path}"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path) and not os.path.isabs(os.readlink(path)):  # such as /lib on most systems
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
        attributes = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV
    else:
        Path(target).touch()
        attributes = ATTR_RDONLY | ATTR_NOSUID  # may be a device
    _mount(path, target, None, BIND | REC)
    _set_attributes(target, attributes, AT_RECURSIVE)


def _unshare(kinds: int) -> None:
    """Enter new namespaces, as the same user, with mounts that nobody else sees."""
    user, group = os.geteuid(), os.getegid()
    _check(_libc.unshare(kinds), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount("none", "/", None, REC | PRIVATE)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    names = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    done = _libc.mount(names[0], names[1], names[2], ctypes.c_ulong(flags), names[3])
    _check(done, f"mount {target}")


def _set_attributes(target: str, attributes: int, flags: int = 0) -> None:
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)
    at = ctypes.c_int(-100)  # AT_FDCWD
    done = _libc.syscall(MOUNT_SETATTR, at, os.fsencode(target), flags, wanted, ctypes.c_size_t(len(wanted)))
    _check(done, f"mount_setattr {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno() or errno.EPERM
        raise OSError(code, f"{what}: {os.strerror(code)}")
