"""What a shut-in interpreter may read: Python, its packages and the system's libraries."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]  # mlx_gptoss
SYSTEM = {
    "linux": (
        *("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/timezone"),
        *("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"),
        *("/dev/null", "/dev/urandom", "/dev/random"),
    ),
    "darwin": (
        *("/System/Library", "/System/Cryptexes", "/System/Volumes/Preboot/Cryptexes", "/Library/Apple"),
        *("/usr/lib", "/usr/share", "/private/var/db/timezone", "/private/etc/localtime", "/Library/Fonts"),
        # The libraries that a Python of Homebrew or MacPorts is linked with.
        *("/opt/homebrew/opt", "/opt/homebrew/Cellar", "/opt/homebrew/lib"),
        *("/usr/local/opt", "/usr/local/Cellar", "/usr/local/lib", "/opt/local/lib"),
        *("/dev/null", "/dev/urandom", "/dev/random"),
    ),
}


def readable() -> list[str]:
    """Absolute paths, some of which may not exist; whatever is below them may be read, too."""
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, str(PACKAGE)]
    # A virtual environment may keep modules outside of its prefix.
    python += [path for path in sys.path if os.path.isabs(path) and os.path.exists(path)]
    return [*SYSTEM[sys.platform], *dict.fromkeys([*python, *map(os.path.realpath, python)])]
