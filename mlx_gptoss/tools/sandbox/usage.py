"""What a process uses, seen from outside: memory, threads, files. Linux and macOS differ here."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mlx_gptoss.tools.sandbox.scratch import FOLDER, open_folder

MAX_FILES = 4096  # entries of a folder that are counted
MAX_DEPTH = 64


class Usage(NamedTuple):
    """What a process takes."""

    memory: int  # bytes in memory or swapped out, with the page tables
    threads: int


def of_process(pid: int) -> Usage:
    """Raises OSError when it cannot be told, as of a process that is gone."""
    return _on_macos(pid) if sys.platform == "darwin" else _on_linux(pid)


def _on_linux(pid: int) -> Usage:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kib = sum(int(fields[name].split()[0]) for name in ("VmRSS", "VmSwap", "VmPTE") if name in fields)
    return Usage(kib << 10, int(fields["Threads"]))


def _on_macos(pid: int) -> Usage:
    """The footprint, which counts compressed and swapped pages, and the threads, from libproc(3)."""
    libc = ctypes.CDLL(None, use_errno=True)
    usage = ctypes.create_string_buffer(16 + 10 * 8)  # rusage_info_v0: a UUID and ten counters
    task = ctypes.create_string_buffer(6 * 8 + 12 * 4)  # proc_taskinfo: six counters, twelve smaller ones
    rusage_info_v0, proc_pidtaskinfo = 0, 4
    if libc.proc_pid_rusage(pid, rusage_info_v0, usage) != 0:
        raise OSError(ctypes.get_errno(), "proc_pid_rusage")
    if libc.proc_pidinfo(pid, proc_pidtaskinfo, ctypes.c_uint64(0), task, len(task)) != len(task):
        raise OSError(ctypes.get_errno(), "proc_pidinfo")
    footprint: int = struct.unpack_from("=10Q", usage, 16)[7]
    threads: int = struct.unpack_from("=12i", task, 6 * 8)[9]
    return Usage(footprint, threads)


def of_folder(folder: str, pid: int) -> tuple[int, int]:
    """Bytes on disk of what is in `folder`, with files deleted but held open by `pid`; and how many.

    A folder of more than MAX_FILES, or deeper than MAX_DEPTH, counts as MAX_FILES + 1: it does not hold up
    the caller.
    """
    handle = os.open(folder, FOLDER)
    try:
        size, count = _of_open_folder(handle, MAX_DEPTH)
    finally:
        os.close(handle)
    return size + _deleted(pid), min(count, MAX_FILES + 1)


def _of_open_folder(handle: int, depth: int) -> tuple[int, int]:
    if depth == 0:
        return 0, MAX_FILES + 1
    size, count = 0, 0
    with os.scandir(handle) as entries:
        for entry in islice(entries, MAX_FILES + 1):
            try:
                size += entry.stat(follow_symlinks=False).st_blocks * 512
                count += 1
                if entry.is_dir(follow_symlinks=False) and count <= MAX_FILES:
                    inner = open_folder(entry.name, handle)
                    try:
                        more = _of_open_folder(inner, depth - 1)
                    finally:
                        os.close(inner)
                    size, count = size + more[0], count + more[1]
            except (FileNotFoundError, NotADirectoryError):  # gone meanwhile, or a link by now
                continue
    return size, count


def _deleted(pid: int) -> int:
    if sys.platform == "darwin":
        return 0
    found: dict[int, int] = {}
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            at = os.stat(f"/proc/{pid}/fd/{name}")
            if at.st_nlink == 0:
                found[at.st_ino] = at.st_blocks * 512
    except (FileNotFoundError, ProcessLookupError):  # gone meanwhile
        pass
    return sum(found.values())
