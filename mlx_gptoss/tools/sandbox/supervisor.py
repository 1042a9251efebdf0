"""The process between the caller and the interpreter. Cells have no way to it, its messages or its limits.

The caller sends cells as lines of JSON on stdin and gets one line for each on stdout; when stdin ends, the
caller is gone, and everything here ends, too. The interpreter runs only while a cell does: in between, it
stands still (SIGSTOP), with whatever threads a cell left.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import shutil
import signal
import sys
import time
from typing import Any

from mlx_gptoss.tools.sandbox import scratch, usage
from mlx_gptoss.tools.sandbox.child import Child, Output

START_SECONDS = 20.0  # for the interpreter to come up, on a busy machine
SYNC_SECONDS = 5.0  # for a cell that says it is done to be done; less where cells are short
MIN_SYNC_SECONDS = 2.0
WATCH_SECONDS = 0.05
MAX_THREADS = 256
MIN_FREE = 1 << 30  # bytes of disk that are left to others
CONTROL = 0


class CallerGone(Exception):
    """The caller closed its end, or was killed."""


class Supervisor:
    """One interpreter at a time, restarted when it ended; the files stay."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options, self._files = options, str(options["files"])
        self._caller = os.getppid()
        self._child: Child | None = None
        self._control = bytearray()
        self._layers: list[str] = []
        self._own_file_system = self._mount()
        self._min_free = min(MIN_FREE, shutil.disk_usage(self._files).free // 2)
        self._next_watch = self._next_count = 0.0

    def serve(self) -> None:
        """Start the interpreter, tell how that went, and run cells until the caller is gone."""
        try:
            problem = self._start()
            self._tell({"problem": problem, "layers": self._layers})
            while not problem:
                message = json.loads(self._next_line())
                if "cell" in message:  # a "stop" that came too late is ignored
                    self._tell(self._run(message))
        except (CallerGone, BrokenPipeError):
            pass
        finally:
            if self._child is not None:
                self._end()
            self._clear()

    def _mount(self) -> bool:
        """Whether the folder is a file system of its own, in memory; without, there is no other namespace."""
        if "namespaces" not in self._options["layers"]:
            return False
        from mlx_gptoss.tools.sandbox import namespaces

        try:
            namespaces.private_folder(self._files, self._options["disk"])
        except OSError:  # not for this user, on this system
            self._options["layers"].remove("namespaces")
            return False
        return True

    def _clear(self) -> None:
        if self._own_file_system:
            from mlx_gptoss.tools.sandbox import namespaces

            namespaces.unmount(self._files)
        scratch.remove(os.path.dirname(self._files))

    def _start(self) -> str:
        """What went wrong, or ""."""
        try:
            self._child = Child(self._options)
        except OSError as error:
            return str(error)
        output, answer = Output(1000), bytearray()
        ended = self._exchange(self._child, b"", None, START_SECONDS, output, answer)
        if ended != "answered":
            self._end(output)
            return f"it did not start: {output.text().strip()[-300:] or ended}"
        told = json.loads(answer)
        if told["problem"]:
            self._end()
        else:
            self._layers = told["layers"]
            self._freeze(self._child)
        return str(told["problem"])

    def _run(self, message: dict[str, Any]) -> dict[str, Any]:
        """Execute a cell: what it wrote, and how it ended."""
        if self._child is None and (problem := self._start()):
            return {"ended": "problem", "detail": problem}
        assert self._child is not None
        child, output = self._child, Output(self._options["output"])
        child.signal(signal.SIGCONT)
        line = json.dumps(message).encode() + b"\n"
        ended = self._exchange(child, line, b"done\n", self._options["seconds"], output)
        if ended == "answered":
            nonce = secrets.token_hex(8)
            line = json.dumps({"sync": nonce}).encode() + b"\n"
            patience = min(SYNC_SECONDS, max(MIN_SYNC_SECONDS, self._options["seconds"]))
            ended = self._exchange(child, line, f"{nonce}\n".encode(), patience, output)
            ended = "forged" if ended == "time" else ended
        if ended == "answered":
            self._freeze(child)
            child.drain(output)
            return {"ended": "done", "text": output.text()}
        status = self._end(output)
        if ended == "files" and not self._own_file_system:
            scratch.empty(self._files)
        return {"ended": ended, "text": output.text(), "status": status}

    def _freeze(self, child: Child) -> None:
        if self._options["layers"]:  # else it may have started what is meant to go on
            child.signal(signal.SIGSTOP)

    def _end(self, rest: Output | None = None) -> int:
        assert self._child is not None
        child, self._child = self._child, None
        return child.end(rest or Output(0))

    def _exchange(
        self,
        child: Child,
        message: bytes,
        expected: bytes | None,
        seconds: float,
        output: Output,
        answer: bytearray | None = None,
    ) -> str:
        """Send a message and wait for its answer, with `expected` None for any line.

        Returns "answered", or what came before: "time", "exited", "forged" (another answer), "stopped" (by
        the caller), or a limit that was passed. Raises CallerGone.
        """
        deadline = time.monotonic() + seconds
        answer = bytearray() if answer is None else answer
        with selectors.DefaultSelector() as ready:
            for handle in (CONTROL, child.output, child.answers):
                ready.register(handle, selectors.EVENT_READ)
            if message:
                ready.register(child.cells, selectors.EVENT_WRITE)
            while (now := time.monotonic()) < deadline:
                if passed := self._watch(child.pid, now):
                    return passed
                for key, _ in ready.select(max(0.0, min(deadline, self._next_watch) - now)):
                    if key.fd == CONTROL:
                        self._read_control()
                        if b"\n" in self._control:
                            self._next_line()  # the only message while a cell runs: stop
                            return "stopped"
                    elif key.fd == child.cells:
                        try:
                            message = message[os.write(child.cells, message) :]
                        except BrokenPipeError:
                            return "exited"
                        if not message:
                            ready.unregister(child.cells)
                    elif data := os.read(key.fd, 65536):
                        if key.fd == child.output:
                            output.add(data)
                            continue
                        answer += data
                        if bytes(answer) == expected or (expected is None and answer.endswith(b"\n")):
                            return "answered"
                        if expected is not None and not expected.startswith(answer):
                            return "forged"
                    elif key.fd == child.output:
                        ready.unregister(child.output)  # closed by the cell
                    else:
                        return "exited"
        return "time"

    def _watch(self, pid: int, now: float) -> str:
        """The limit that was passed: memory, threads or files; "" for none. Looks from time to time only."""
        if now < self._next_watch:
            return ""
        self._next_watch = now + WATCH_SECONDS
        if os.getppid() != self._caller:  # its end of the pipe may live on in a process that it forked
            raise CallerGone
        try:
            used = usage.of_process(pid)
        except (FileNotFoundError, ProcessLookupError):  # it has ended: the pipes will tell
            return ""
        if used.threads > MAX_THREADS:
            return "threads"
        stored = 0
        if self._own_file_system:
            system = os.statvfs(self._files)
            stored = (system.f_blocks - system.f_bfree) * system.f_frsize
        elif self._options["layers"] and now >= self._next_count:
            stored, count = usage.of_folder(self._files, pid)
            self._next_count = now + max(2 * WATCH_SECONDS, 20 * (time.monotonic() - now))
            free = shutil.disk_usage(self._files).free
            if stored > self._options["disk"] or count > usage.MAX_FILES or free < self._min_free:
                return "files"
        return "memory" if used.memory + stored > self._options["memory"] else ""

    def _next_line(self) -> bytes:
        while b"\n" not in self._control:
            self._read_control()
        line, _, rest = self._control.partition(b"\n")
        self._control = rest
        return bytes(line)

    def _read_control(self) -> None:
        data = os.read(CONTROL, 65536)
        if not data:
            raise CallerGone
        self._control += data

    def _tell(self, reply: dict[str, Any]) -> None:
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def main() -> None:
    """Serve one caller, as the first argument says."""
    Supervisor(json.loads(sys.argv[1])).serve()
