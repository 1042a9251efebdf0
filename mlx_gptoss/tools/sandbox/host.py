"""The caller's side of the sandbox: cells in, what they wrote out."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools.sandbox.paths import PACKAGE
from mlx_gptoss.tools.sandbox.scratch import Scratch
from mlx_gptoss.tools.sandbox.supervisor import START_SECONDS, SYNC_SECONDS

# What shuts the interpreter in. On Linux two of the three would do; "seatbelt" is macOS's.
LAYERS = ("seatbelt",) if sys.platform == "darwin" else ("namespaces", "landlock", "seccomp")
FILE_SIZE = 256 << 20  # bytes a single file may have
DISK_SHARE = 4  # a quarter of the memory may be files
CLOSE_SECONDS = 5.0
# Cells of full length on all processors, after which the interpreter is ended: it may have lost its
# supervisor.
PROCESSOR_CELLS = 50
START = "import sys; sys.path.insert(0, {root!r}); from mlx_gptoss.tools.sandbox.{module} import main; "
START += "sys.path.remove({root!r}); main()"
"""How both processes find this package, wherever it is imported from."""


@dataclass(frozen=True)
class Limits:
    """seconds: of wall time for a cell. memory: bytes, files included. output: characters that are shown."""

    seconds: float = 120.0
    memory: int = 2 << 30
    output: int = 20_000


@dataclass(frozen=True)
class Result:
    """What a cell wrote and how it ended.

    ended: "done", "exited" (with `status`), "stopped", "forged" (it said it was done, and went on), or the
    limit it passed: "time", "memory", "threads", "files".
    """

    text: str
    ended: str
    status: int = 0


class Sandbox:
    """A supervised interpreter and its folder. Without `layers` it is not shut in.

    Raises ToolError when it cannot be started as asked for. Not for several threads at a time.
    """

    def __init__(self, limits: Limits, layers: tuple[str, ...]) -> None:
        self._limits = limits
        self._control = b""
        self._scratch = Scratch()
        self.files = self._scratch.files
        self._supervisor: subprocess.Popen[bytes] | None = None
        try:
            self._start(layers)
        except BaseException:
            self.close()
            raise

    def _start(self, layers: tuple[str, ...]) -> None:
        home = self.files if layers else os.path.expanduser("~")
        environment = {"HOME": home, "TMPDIR": self.files, "LANG": "C.UTF-8", "MPLBACKEND": "Agg"}
        # Each thread of a numerical library would reserve address space.
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        limits = self._limits
        root = str(PACKAGE.parent)
        options = {
            "layers": list(layers),
            "files": self.files,
            "root": self._scratch.root,
            "seconds": limits.seconds,
            "memory": limits.memory,
            "output": limits.output,
            "disk": limits.memory // DISK_SHARE,
            "file_size": min(FILE_SIZE, limits.memory // DISK_SHARE),
            "processor_seconds": int(PROCESSOR_CELLS * limits.seconds * (os.cpu_count() or 1)) + 1,
            "environment": environment,
            "start": START.format(root=root, module="interpreter"),
        }
        start = START.format(root=root, module="supervisor")
        try:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-c", start, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise ToolError(f"{sys.executable} cannot be started ({error})", "python") from None
        reply = self._read(2 * START_SECONDS)
        if reply is None:
            raise ToolError(f"its supervisor did not start: {self._last_words()}", "python")
        if reply["problem"]:
            raise ToolError(str(reply["problem"]), "python")
        self.layers = tuple(reply["layers"])

    def run(self, code: str) -> Result:
        """Execute a cell. Raises ToolError when the interpreter cannot be started again."""
        limit = self._limits.seconds + START_SECONDS + SYNC_SECONDS + CLOSE_SECONDS
        try:
            reply = self._read(limit) if self._write({"cell": code}, limit) else None
        except BaseException:  # interrupted by the user: the cell must not run on
            if not self._write({"stop": True}, CLOSE_SECONDS) or self._read(CLOSE_SECONDS) is None:
                self._end()
            raise
        if reply is None:
            self._end()
            return Result("", "exited", -1)
        if reply["ended"] == "problem":
            raise ToolError(reply["detail"], "python")
        return Result(reply["text"], reply["ended"], reply.get("status", 0))

    @property
    def alive(self) -> bool:
        """Whether cells can be run: False once it is closed, or after its supervisor was killed."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def close(self) -> None:
        """End it and delete its folder. Does nothing the second time."""
        self._end()
        self._scratch.remove()

    def _end(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        assert supervisor.stdin and supervisor.stdout and supervisor.stderr
        supervisor.stdin.close()  # it ends the interpreter, and then itself
        try:
            supervisor.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.wait()
        supervisor.stdout.close()
        supervisor.stderr.close()
        self._control = b""

    def _write(self, message: dict[str, object], seconds: float) -> bool:
        """Whether the supervisor took the message in time."""
        if self._supervisor is None or self._supervisor.stdin is None:
            return False
        handle, deadline = self._supervisor.stdin.fileno(), time.monotonic() + seconds
        os.set_blocking(handle, False)
        data = json.dumps(message).encode() + b"\n"
        while data:
            if not select.select([], [handle], [], max(0.0, deadline - time.monotonic()))[1]:
                return False
            try:
                data = data[os.write(handle, data) :]
            except BrokenPipeError:
                return False
        return True

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The supervisor's next message; None when none comes in time."""
        assert self._supervisor is not None and self._supervisor.stdout is not None
        handle, deadline = self._supervisor.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._control:
            if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            data = os.read(handle, 65536)
            if not data:
                return None
            self._control += data
        line, _, self._control = self._control.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _last_words(self) -> str:
        assert self._supervisor is not None and self._supervisor.stderr is not None
        self._supervisor.kill()
        return self._supervisor.stderr.read().decode(errors="replace").strip()[-300:]
