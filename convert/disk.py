"""Durable writes: disk errors as one line, data on the disk when a call returns."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_gptoss.errors import ConversionError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a one-line ConversionError about `path`, with the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = "free some space and run the same command again, it goes on where it stopped"
            told = f"the disk is full; {cure}"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            told = f"cannot be written ({error.strerror}); choose another target"
        else:
            told = f"cannot be written ({error.strerror}); what is done is kept, run the same command again"
        raise ConversionError(f"{path}: {told}") from error


def write_file(path: Path, data: bytes) -> None:
    """A small file, on the disk when this returns. Raises ConversionError."""
    with writing(path), open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, where the system can. Raises ConversionError."""
    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)
