"""Trying to get out of a sandbox on this machine: `python -m mlx_gptoss.tools.sandbox.selftest`.

Each attempt of `probes.py` is made inside a real one, against things that are put up outside for it.
"""

from __future__ import annotations

import _posixshmem
import ctypes
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools.sandbox import host, probes
from mlx_gptoss.tools.sandbox.paths import PACKAGE

MEMORY = 256 << 20
SECONDS = 20.0
SECRET = "secret\n"


class Check(NamedTuple):
    """An attempt to get out."""

    name: str
    held: bool
    detail: str
    crucial: bool


@contextmanager
def outside() -> Iterator[probes.Outside]:
    """A file, sockets and IPC of the tester's own, to be reached for."""
    libc = ctypes.CDLL(None, use_errno=True)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gptoss-selftest-"))
        secret = Path(folder, "secret")
        secret.write_text(SECRET)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        path = f"{folder}/socket"
        for kind, address in ((socket.SOCK_STREAM, path), (socket.SOCK_DGRAM, f"{path}-2")):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen()
        segment = libc.shmget(0, ctypes.c_size_t(4096), 0o1600)
        stack.callback(libc.shmctl, segment, 0, None)
        queue = libc.msgget(0, 0o1600)
        stack.callback(libc.msgctl, queue, 0, None)
        semaphore = libc.semget(0, 1, 0o1600)
        stack.callback(libc.semctl, semaphore, 0, 0)
        shared = f"/mlx-gptoss-{os.getpid()}"
        os.close(_posixshmem.shm_open(shared, os.O_RDWR | os.O_CREAT, 0o600))
        stack.callback(_posixshmem.shm_unlink, shared)
        yield probes.Outside(
            pid=os.getpid(),
            home=os.path.expanduser("~"),
            folder=folder,
            secret=str(secret),
            port=server.getsockname()[1],
            socket=path,
            shared_memory=shared,
            segment=segment,
            queue=queue,
            semaphore=semaphore,
            memory=MEMORY,
        )


def run(layers: tuple[str, ...] = host.LAYERS, fatal: bool = True) -> list[Check]:
    """Make every attempt inside a sandbox of these layers.

    fatal: also those that may cost the process. Raises ToolError where there can be no sandbox at all.
    """
    sandbox = host.Sandbox(host.Limits(seconds=SECONDS, memory=MEMORY, output=1 << 20), layers)
    try:
        with outside() as it:
            checks = _attempts(sandbox, it)
            unharmed = Path(it.secret).read_text() == SECRET
            names = set(os.listdir(it.folder)) - {"secret", "socket", "socket-2"}
            checks.append(
                Check("files outside are as before", unharmed and not names, str(names or ""), True)
            )
            checks += [_fatal(sandbox, it, name) for name in probes.FATAL if fatal]
    finally:
        sandbox.close()
    return checks


def _cell(expression: str) -> str:
    modules = "probes" if sys.platform == "darwin" else "probes, probes_linux"
    return f"""\
import json, sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
from mlx_gptoss.tools.sandbox import {modules}
sys.path.pop(0)
print(json.dumps({expression}))"""


def _attempts(sandbox: host.Sandbox, it: probes.Outside) -> list[Check]:
    result = sandbox.run(_cell(f"probes.run({asdict(it)!r})"))
    try:
        found = json.loads(result.text.splitlines()[-1])
    except (ValueError, IndexError):
        raise ToolError(f"its self-test failed: {result.text[-300:] or result.ended}", "python") from None
    return [Check(name, held, detail, name not in probes.NOT_CRUCIAL) for name, held, detail in found]


def _fatal(sandbox: host.Sandbox, it: probes.Outside, name: str) -> Check:
    attempt = f"{{'got': probes.FATAL[{name!r}](probes.Outside(**{asdict(it)!r}))}}"
    result = sandbox.run(_cell(attempt))
    held = not any(line.startswith('{"got"') for line in result.text.splitlines())
    last = (result.text.splitlines() or [""])[-1]
    return Check(name, held, last if result.ended == "done" else result.ended, True)


@cache
def holes(layers: tuple[str, ...]) -> tuple[Check, ...]:
    """What is not held back on this machine by these layers; found out once."""
    return tuple(check for check in run(layers, fatal=False) if not check.held)


def main() -> int:
    """Print a table; 1 if something crucial is open."""
    try:
        checks = run()
    except ToolError as error:
        print(f"no sandbox on this machine: {error}")
        return 1
    for check in checks:
        verdict = "held" if check.held else "OPEN" if check.crucial else "open (not crucial)"
        print(f"{verdict:18}  {check.name:38}  {check.detail[:100]}")
    open_doors = [check for check in checks if not check.held]
    print(f"{len(checks)} attempts, {len(open_doors)} not held back")
    return int(any(check.crucial for check in open_doors))


if __name__ == "__main__":
    sys.exit(main())
