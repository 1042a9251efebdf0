"""Files: read those that somebody else may have written, and keep our own where they belong."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
from io import BufferedReader
from pathlib import Path

# What writes past the system's cache are multiples of, and lie at.
BLOCK = mmap.PAGESIZE


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read. Raises OSError, also for FIFOs and devices, which could block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def open_uncached(path: Path) -> int:
    """A descriptor of a regular file whose bytes are kept by whoever reads them. Raises OSError.

    On macOS the system does not keep a second copy of what is read; Linux gives such a copy up when memory is
    wanted, and reads past it (O_DIRECT) would need buffers aligned as malloc does not align them.
    """
    with open_regular(path) as file:
        descriptor = os.dup(file.fileno())
    keep_uncached(descriptor)
    return descriptor


def keep_uncached(descriptor: int) -> None:
    """Let macOS keep no copy of what is read or written by this descriptor."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)


def open_past_cache(path: Path) -> int | None:
    """A second descriptor of a file, for writes that the system keeps no copy of. None where it always does.

    On Linux what is written lies on whole blocks, in memory as in the file: see BLOCK. Raises OSError.
    """
    if sys.platform == "linux":
        try:
            return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a file system that lives in memory, or in a process
                return None
            raise
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    return descriptor


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of a regular file. Raises OSError, also when there are more than `limit`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(limit + 1)
    if max(size, len(data)) > limit:
        raise OSError(errno.EFBIG, f"larger than the {limit:,} bytes expected", str(path))
    return data


def state_folder() -> Path:
    """Where logs and histories are kept: under XDG_STATE_HOME, or ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "mlx-gptoss"
