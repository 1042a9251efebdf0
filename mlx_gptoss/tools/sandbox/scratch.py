"""The temporary folder of a sandbox. Its owner holds a lock on it; one without an owner is cleared away."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import sys
import tempfile
from pathlib import Path

PREFIX = "gptoss-python-"
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Scratch:
    """A new folder with the empty `files` in it, and `root` to mount on. Clears away what others left."""

    def __init__(self) -> None:
        self.path = ""
        clear_abandoned()
        while not self.path:
            path = os.path.realpath(tempfile.mkdtemp(prefix=PREFIX))
            self._lock = os.open(path, FOLDER)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if _is_at(self._lock, path):
                self.path = path
            else:  # somebody cleared it away before it was locked
                os.close(self._lock)
        os.mkdir(self.files)
        os.mkdir(self.root)

    @property
    def files(self) -> str:
        """Where cells work."""
        return f"{self.path}/files"

    @property
    def root(self) -> str:
        """Becomes the root of the file system that cells see."""
        return f"{self.path}/root"

    def remove(self) -> None:
        """Delete it. Does nothing the second time."""
        if self.path:
            remove(self.path)
            os.close(self._lock)
            self.path = ""


def clear_abandoned() -> None:
    """Delete folders of this user that nobody holds a lock on: their owner was killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            handle = os.open(path, FOLDER)
        except OSError:  # a stranger's, or gone meanwhile
            continue
        try:
            if os.fstat(handle).st_uid == os.geteuid():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(str(path))
        except BlockingIOError:  # in use
            continue
        finally:
            os.close(handle)


def remove(folder: str) -> None:
    """Delete a folder, if nobody else does it; what cannot be deleted is left to the next start."""
    try:
        empty(folder)
        os.rmdir(folder)
    except OSError:
        pass


def empty(folder: str) -> None:
    """Delete what is in a folder: no modes keep it, and no depth exhausts the stack or the length of a path.

    Folders in folders are lifted to the top, level by level. Everything is reached from open folders, none
    through a link: a cell that still runs cannot point this elsewhere.
    """
    top = os.open(folder, FOLDER)
    try:
        while names := _delete_files(top):
            for name in names:
                handle = open_folder(name, top)
                try:
                    os.fchmod(handle, stat.S_IRWXU)
                    for inner in _delete_files(handle):
                        moved = open_folder(inner, handle)
                        os.fchmod(moved, stat.S_IRWXU)  # whatever is moved must be writable
                        os.close(moved)
                        os.rename(inner, secrets.token_hex(8), src_dir_fd=handle, dst_dir_fd=top)
                finally:
                    os.close(handle)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def open_folder(name: str, parent: int) -> int:
    """A handle for a folder in an open one, made accessible if it was not. Raises OSError for a link."""
    try:
        return os.open(name, FOLDER, dir_fd=parent)
    except PermissionError:
        if sys.platform == "darwin":
            os.chmod(name, stat.S_IRWXU, dir_fd=parent, follow_symlinks=False)
        else:
            path_only = os.open(name, FOLDER | os.O_PATH, dir_fd=parent)
            os.chmod(f"/proc/self/fd/{path_only}", stat.S_IRWXU)
            os.close(path_only)
        return os.open(name, FOLDER, dir_fd=parent)


def _delete_files(handle: int) -> list[str]:
    """Delete the files in an open folder; the names of the folders in it."""
    with os.scandir(handle) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if not is_folder:
            os.unlink(name, dir_fd=handle)
    return [name for name, is_folder in found if is_folder]


def _is_at(handle: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
