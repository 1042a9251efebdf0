"""Runs a server's command, and ends it with its descendants when the program that asked for it has died.

    python guard.py HOST_PID COMMAND [ARGUMENT ...]

The command has this process's standard input, output and process group. A program that is killed cannot tell
its servers to stop, and one that hangs does not notice that its input has ended. Only the standard library
is used, and nothing of this package: it starts in some 20 ms.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

LOOK = 0.5  # seconds between two looks at who the parent is
GRACE = 2.0  # seconds between asking the group to end and ending it


def _end_group() -> None:
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def _watch(host: int) -> None:
    while os.getppid() == host:
        time.sleep(LOOK)
    _end_group()


def main() -> int:
    """The command's exit status. What it left running in its group is ended as well."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # killpg must reach nobody else
    threading.Thread(target=_watch, args=(int(sys.argv[1]),), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: None)  # for the command; this goes when it has gone
    try:
        command = subprocess.Popen(sys.argv[2:])
    except OSError as error:
        print(f"{sys.argv[2]}: {error.strerror}", file=sys.stderr)
        return 127
    status = command.wait()
    os.killpg(0, signal.SIGTERM)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
