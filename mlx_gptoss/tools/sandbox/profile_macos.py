"""The macOS sandbox (Seatbelt) profile, and putting this process under it.

Everything is denied that is not allowed by name. The interpreter takes the profile on itself once it runs
(`sandbox_init`, what sandbox-exec(1) does before it starts a program), so that nothing needs to be allowed
for the start: no program, no dynamic loader.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from pathlib import PurePosixPath

# sysctl: hardware and versions, as numpy, platform and os ask for them. Not kern.proc, which tells about the
# processes of others. Shared memory: where the C library learns that the time zone changed.
PROFILE = """\
(version 1)
(deny default)
(allow signal (target self))
(allow process-info* (target self))
(allow sysctl-read
  (sysctl-name-prefix "hw.")
  (sysctl-name-prefix "machdep.cpu.")
  (sysctl-name "kern.argmax")
  (sysctl-name "kern.hostname")
  (sysctl-name "kern.maxfilesperproc")
  (sysctl-name "kern.osproductversion")
  (sysctl-name "kern.osrelease")
  (sysctl-name "kern.ostype")
  (sysctl-name "kern.osversion")
  (sysctl-name "kern.secure_kernel")
  (sysctl-name "kern.usrstack64")
  (sysctl-name "kern.version")
  (sysctl-name "sysctl.proc_cputype")
  (sysctl-name "vm.loadavg"))
(allow ipc-posix-shm-read-data (ipc-posix-name "apple.shm.notification_center"))
(allow file-read* (literal "/"))
(allow file-read-metadata {ancestors})
(allow file-read* file-map-executable {readable})
(allow file-write-data (literal "/dev/null"))
(allow file-read* file-write-create file-write-data file-write-flags file-write-mode file-write-times
  file-write-unlink (subpath {folder}))
"""


def profile(folder: str, readable: Iterable[str]) -> str:
    """The text: `readable` to read, `folder` to write. Paths are as the kernel sees them, without links."""
    real = sorted({os.path.realpath(path) for path in readable})
    # Links on the way to a path are looked up by name.
    ancestors = {str(parent) for path in [folder, *real, *readable] for parent in PurePosixPath(path).parents}
    ancestors |= set(readable)
    return PROFILE.format(
        ancestors=" ".join(f"(literal {_quoted(path)})" for path in sorted(ancestors)),
        readable=" ".join(f"(subpath {_quoted(path)})" for path in real),
        folder=_quoted(folder),
    )


def _quoted(path: str) -> str:
    """A string of the profile language. Raises OSError for a path that cannot be written as one."""
    if any(ord(character) < 32 for character in path):
        raise OSError(errno.EINVAL, "control characters in a path", path)
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def apply(folder: str, readable: Iterable[str]) -> None:
    """Put this process under the profile. For good. Raises OSError where the system refuses it."""
    error = ctypes.c_char_p()
    text = profile(folder, list(readable)).encode()
    if ctypes.CDLL(None).sandbox_init(text, ctypes.c_uint64(0), ctypes.byref(error)) != 0:
        raise OSError(errno.EPERM, f"sandbox_init: {(error.value or b'').decode(errors='replace')}")
