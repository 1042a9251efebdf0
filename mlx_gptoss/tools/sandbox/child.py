"""The interpreter as the supervisor sees it: a process, the pipes to it, and what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any


class Output:
    """What a cell wrote: all of it up to `limit` characters, else its beginning and its end."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._room = 4 * limit  # bytes: a character has at most 4
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        taken = data[: max(0, self._room - len(self._head))]
        self._head += taken
        self._tail += data[len(taken) :]
        del self._tail[: -self._room]

    def text(self) -> str:
        """What is shown of it."""
        text = bytes(self._head + self._tail).decode("utf-8", errors="replace")
        if len(text) <= self._limit:
            return text
        half = self._limit // 2
        cut = f"\n[... cut here: more than {self._limit} characters]\n"
        return f"{text[:half]}{cut}{text[len(text) - half :]}"


class Child:
    """A running interpreter, in a session of its own. Raises OSError when it cannot be started."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.output, output = os.pipe()
        self.answers, answers = os.pipe()
        command = [sys.executable, "-I", "-u", "-c", options["start"]]
        self._process = subprocess.Popen(
            [*command, json.dumps({**options, "answers": answers, "supervisor": os.getpid()})],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=options["files"],
            env=options["environment"],
            start_new_session=True,
            pass_fds=(answers,),
        )
        os.close(output)
        os.close(answers)
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        self.pid, self.cells = self._process.pid, self._stdin.fileno()
        for handle in (self.cells, self.output, self.answers):
            os.set_blocking(handle, False)

    def signal(self, number: int) -> None:
        """Send it, and what it started, a signal; none if it has ended."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # what macOS says of a group that has ended
            return

    def drain(self, into: Output) -> None:
        """Read what is left of the output of a process that does not run any more."""
        try:
            while data := os.read(self.output, 65536):
                into.add(data)
        except BlockingIOError:
            return

    def end(self, rest: Output) -> int:
        """Kill it, and what it started; its exit status, which is its own if it was about to end."""
        self.signal(signal.SIGKILL)
        status = self._process.wait()
        self.drain(rest)
        for handle in (self.output, self.answers):
            os.close(handle)
        self._stdin.close()
        return status
