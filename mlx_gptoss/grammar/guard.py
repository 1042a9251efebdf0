"""Trying a grammar in another process first: what crashes its compiler, or never ends, ends one request.

llguidance is native code: a long chain of references overflows its stack, and some expressions compile for
minutes. So a grammar that came from outside is compiled by a worker process with a limit on time, memory and
stack, over a vocabulary of bytes. Only what passes there is compiled here. The worker is kept warm.
"""

from __future__ import annotations

import atexit
import json
import select
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path

from mlx_gptoss.grammar import guard_worker

WORKER = Path(guard_worker.__file__)
# Seconds that starting a worker may take, and that it may wait for a processor.
PATIENCE = 10.0
MAX_BYTES = 4 * 2**20  # of a grammar
KEPT_VERDICTS = 4096


class Guard:
    """Asks a worker process, one grammar at a time, and remembers what it said. Usable from any thread."""

    def __init__(self, seconds: float = guard_worker.SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()

    @property
    def pid(self) -> int | None:
        """The worker's process id; None before the first grammar."""
        return None if self._worker is None else self._worker.pid

    def check(self, grammar: str) -> None:
        """Raise ValueError for a grammar that is not to be compiled, with the reason."""
        text = grammar.encode("utf-8", "surrogatepass")
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has {len(text):,} bytes and at most {MAX_BYTES:,} are compiled")
        key = sha256(text).digest()
        with self._lock:
            if key not in self._verdicts:
                self._verdicts[key] = self._ask(grammar)
                if len(self._verdicts) > KEPT_VERDICTS:
                    self._verdicts.popitem(last=False)
            self._verdicts.move_to_end(key)
            verdict = self._verdicts[key]
        if verdict:
            raise ValueError(verdict)

    def _ask(self, grammar: str) -> str:
        question = json.dumps([grammar, self._seconds]).encode() + b"\n"
        for worker in (self._worker or self._start(), None):
            worker = worker or self._start()
            assert worker.stdin is not None and worker.stdout is not None
            try:
                worker.stdin.write(question)
                worker.stdin.flush()
            except OSError:
                continue  # it ended while it was idle
            ready, _, _ = select.select([worker.stdout], [], [], self._seconds + PATIENCE)
            answer = worker.stdout.readline() if ready else b""
            if answer:
                verdict: str = json.loads(answer)
                return verdict
            worker.kill() if not ready else None
            status = worker.wait()
            if status == guard_worker.TIMED_OUT or not ready:
                self.close()
                return f"compiling it takes longer than {self._seconds:g} s: make it simpler"
            if status != -signal.SIGKILL:
                self.close()
                return "compiling it needs more memory or nesting than is given to it: make it simpler"
            # Somebody killed it; the system does so, too, when memory runs out.
        self.close()
        return "the process that tries it was killed twice: make it simpler, or free some memory"

    def _start(self) -> subprocess.Popen[bytes]:
        self.close()
        command = [sys.executable, "-I", str(WORKER)]
        pipe = subprocess.PIPE
        self._worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        return self._worker

    def close(self) -> None:
        """End the worker, if there is one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


GUARD = Guard()
atexit.register(GUARD.close)
