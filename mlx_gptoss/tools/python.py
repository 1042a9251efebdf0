"""The `python` tool: the model's code, executed cell by cell in a process of its own that is shut in.

The process keeps its variables between calls, has no network, writes to one empty temporary folder only,
and is limited in time, memory and output. On Linux it shuts itself in (`jail.py`); on macOS it is started
under the system's sandbox. Each time, it first tries to get out: where it can, the tool refuses to work.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_gptoss.errors import RequestError, ToolError

if TYPE_CHECKING:
    from mlx_gptoss.harmony import ToolCall, ToolNamespace

KERNEL = Path(__file__).with_name("kernel.py")
START_SECONDS = 20.0  # for the process to come up, on a busy machine
FILE_SIZE = 256 << 20  # bytes a single file may have

# Last rule wins. Metadata stays readable everywhere: Python looks at every folder on the way to its own.
MACOS_PROFILE = """\
(version 1)
(allow default)
(deny network*)
(deny process-fork)
(deny signal (target others))
(deny appleevent-send)
(deny lsopen)
(deny mach-lookup (global-name-regex #"^com\\.apple\\.(pasteboard|coreservices|securityd|SecurityServer)"))
(deny file-write*)
(deny file-read-data (subpath "/Users") (subpath "/Volumes"))
(deny file-read-data (subpath "/private/var") (subpath "/private/tmp"))
(allow file-read* {readable})
(allow file-read* file-write* (subpath {folder}))
(allow file-write-data (literal "/dev/null") (literal "/dev/dtracehelper"))
"""


class PythonTool:
    """A notebook in a sealed process.

    seconds: of wall time for a cell. memory: bytes of address space. output: characters of a cell's output
    that the model gets to see. unsafe: run without isolation; the code can then do whatever the user can.

    Raises ToolError where this machine offers no isolation, unless `unsafe`.
    """

    def __init__(
        self, *, seconds: float = 120.0, memory: int = 2 << 30, output: int = 20_000, unsafe: bool = False
    ) -> None:
        for name, value in (("seconds", seconds), ("memory", memory), ("output", output)):
            if not value > 0:
                raise RequestError(f"{name} is {value!r}: expected a number above 0", name)
        self._seconds, self._memory, self._output = seconds, memory, output
        self._unsafe = unsafe
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None
        if not unsafe:  # find out now whether it can work
            self._start()

    @property
    def namespace(self) -> ToolNamespace:
        """As the model was taught it, with what holds here: the time, the folder, no network."""
        from mlx_gptoss.harmony import PYTHON, ToolNamespace

        text = (
            PYTHON.description.replace("120.0", f"{self._seconds:.1f}")
            .replace("The drive at '/mnt/data'", "The current working directory")
            .replace("is UNKNOWN. Depends on the cluster.", "is disabled.")
        )
        return ToolNamespace(PYTHON.name, text)

    def handle(self, call: ToolCall) -> str:
        """What the code printed, the value of its last expression, or its traceback."""
        return self.run(call.arguments)

    def run(self, code: str) -> str:
        """Execute a cell. Raises ToolError when the process cannot be started."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        marker = f"\0{secrets.token_hex(16)}\0"
        try:
            process.stdin.write(json.dumps({"code": code, "marker": marker}).encode() + b"\n")
            process.stdin.flush()
            text, ended = self._read_until(marker.encode(), self._seconds)
        except BrokenPipeError:
            text, ended = "", "exited"
        except BaseException:  # interrupted by the user: the cell must not run on
            self._stop()
            raise
        if ended == "marker":
            return text
        status = self._stop()
        if ended == "time":
            reason = f"TimeoutError: the code ran for more than {self._seconds:g} seconds and was stopped."
        elif ended == "memory":
            reason = f"MemoryError: the process used more than {self._memory >> 20} MiB and was stopped."
        else:
            reason = f"The Python process ended (exit status {status})."
        return (
            f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}{reason} All variables are lost."
        )

    def close(self) -> None:
        """End the process and delete its folder."""
        self._stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> PythonTool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()

    def _start(self) -> None:
        if self._folder is None:
            self._folder = os.path.realpath(tempfile.mkdtemp(prefix="gptoss-python-"))
        options = {
            "isolate": not self._unsafe,
            "folder": self._folder,
            "outside": os.path.dirname(self._folder),
            "memory": self._memory,
            "file_size": FILE_SIZE,
        }
        command = [sys.executable, "-I", "-u", str(KERNEL), json.dumps(options)]
        if not self._unsafe and sys.platform == "darwin":
            command = ["/usr/bin/sandbox-exec", "-p", macos_profile(self._folder), *command]
        # HOME stays, so that the process can check that it is shut.
        environment = {"HOME": os.path.expanduser("~"), "TMPDIR": self._folder, "LANG": "C.UTF-8"}
        # Each thread of a numerical library would reserve address space.
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self.close()
            raise ToolError(f"the python tool cannot start ({error}); {_CURE}", "python") from None
        text, ended = self._read_until(b"\n", START_SECONDS)
        try:
            problem = (
                json.loads(text)["problem"]
                if ended == "marker"
                else f"it did not start: {text.strip()[-300:]}"
            )
        except (ValueError, KeyError, TypeError):
            problem = f"it did not start: {text.strip()[-300:]}"
        if problem:
            self.close()
            raise ToolError(
                f"the python tool cannot be isolated on this machine ({problem}); {_CURE}", "python"
            )

    def _read_until(self, marker: bytes, seconds: float) -> tuple[str, str]:
        """Output up to the marker, cut to its limit, and what ended it: marker, time, memory or exited."""
        assert self._process is not None and self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        output, last = _Output(self._output), b""
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return output.text(last), "time"
                if not selector.select(min(left, 0.25)):
                    if self._too_large():
                        return output.text(last), "memory"
                    continue
                data = os.read(stdout, 65536)
                if not data:
                    return output.text(last), "exited"
                last += data
                at = last.find(marker)
                if at >= 0:
                    return output.text(last[:at]), "marker"
                # What may be the beginning of the marker stays behind.
                output.add(last[: -len(marker)])
                last = last[-len(marker) :]

    def _too_large(self) -> bool:
        """MacOS does not enforce a limit on the address space."""
        if sys.platform != "darwin" or self._process is None:
            return False
        done = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self._process.pid)], capture_output=True, text=True
        )
        return done.stdout.strip().isdigit() and int(done.stdout) * 1024 > self._memory

    def _stop(self) -> int | None:
        """End the process, and what it may have started; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:  # a cell that was never read; the pipe is closed all the same
                    continue
        return status


class _Output:
    """What a cell wrote: all of it up to `limit` characters, else its beginning and its end."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._room = 4 * limit  # bytes: a character has at most 4
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data: bytes) -> None:
        taken = data[: max(0, self._room - len(self._head))]
        self._head += taken
        self._tail += data[len(taken) :]
        del self._tail[: -self._room]

    def text(self, last: bytes) -> str:
        """With `last` as the last piece."""
        self.add(last)
        text = bytes(self._head + self._tail).decode("utf-8", errors="replace")
        if len(text) <= self._limit:
            return text
        half = self._limit // 2
        return (
            f"{text[:half]}\n[... cut here: more than {self._limit} characters]\n{text[len(text) - half :]}"
        )


_CURE = "leave it off, or run without isolation (unsafe=True, --unsafe-python) if you trust the code"


def macos_profile(folder: str) -> str:
    """The sandbox profile: Python to read, `folder` to write, no network, no other processes."""
    prefixes = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path) if p}
    readable = " ".join(f"(subpath {json.dumps(p)})" for p in sorted({*prefixes, str(KERNEL.parent)}))
    return MACOS_PROFILE.format(readable=readable, folder=json.dumps(folder))
