"""How the other ranks' processes come to run. Starter is the seam: here on this machine, elsewhere by ssh."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

# The working folder's modules are not the standard library's.
SAFE_PATH = "-P"


class Handle(Protocol):
    """A rank's process, as far as whoever started it can reach it."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has one. Raises subprocess.TimeoutExpired."""
        ...

    def kill(self) -> None:
        """End it, however stuck it is, on its own machine as well. It may have ended already."""
        ...


class Starter(Protocol):
    """Starts processes of the package on a host."""

    def start(self, rank: int, arguments: Sequence[str], secret: bytes) -> Handle:
        """Run `python ARGUMENTS` with the package of this one's version, for a rank.

        secret: goes to its standard input as a line of hex digits, which then stays open: the process ends
        when that closes. What it writes to standard error is for the user. Raises HostError when the host
        cannot be reached or has no such Python.
        """
        ...


class LocalStarter:
    """Starts them on this machine. environment: variables that they are given beside this process's."""

    def __init__(self, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        self._environment = environment

    def start(self, rank: int, arguments: Sequence[str], secret: bytes) -> Handle:
        # A session of its own: Ctrl-C is for rank 0, which lets answers end first.
        process = subprocess.Popen(
            [sys.executable, SAFE_PATH, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | self._environment,
        )
        assert process.stdin is not None
        try:
            process.stdin.write(secret.hex().encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which `poll` tells
        return process
