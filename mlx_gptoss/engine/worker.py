"""The one thread that owns all MLX work of an engine.

MLX's lazy arrays and streams belong to the thread that made them, so weights are loaded, forwards are run
and caches are freed here, and nowhere else. Jobs run between the steps of the scheduler.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mlx_gptoss.errors import GptOssError

logger = logging.getLogger("mlx_gptoss.engine")

T = TypeVar("T")
# How long closing waits for the step that is running, seconds.
PATIENCE = 30.0


class Worker:
    """A thread that runs jobs in order, and `step` as long as it returns True. Usable from any thread."""

    def __init__(self, name: str) -> None:
        # Set once the model is there: runs a step, tells whether there is more to do.
        self.step: Callable[[], bool] | None = None
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._closed = False
        self._pid = os.getpid()
        self._lock = threading.Lock()  # no job is put behind the end
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def inside(self) -> bool:
        """True on the worker's own thread."""
        return threading.current_thread() is self._thread

    def post(self, job: Callable[[], object]) -> None:
        """Run a job soon, without waiting for it. Raises GptOssError when the worker is closed."""
        if os.getpid() != self._pid:
            raise GptOssError(
                "the model was loaded before fork(), and its thread is not in this process: load it here, or "
                "start processes with the method 'spawn'"
            )
        with self._lock:
            if self._closed:
                raise GptOssError("the engine is closed: load the model again")
            self._jobs.put(job)

    def call(self, job: Callable[[], T]) -> T:
        """Run a job soon and return what it returns, or raise what it raises."""
        if self.inside:
            return job()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self.post(run)
        return future.result()

    def wake(self) -> None:
        """Look for work again; does nothing on a closed worker."""
        self._jobs.put(lambda: None)

    def close(self, last: Callable[[], object] | None = None) -> None:
        """Run a last job and end the thread. Safe to call again; in a forked process there is none."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if last is not None:
                self._jobs.put(last)
            self._jobs.put(None)
        if not self.inside:
            self._thread.join(PATIENCE)

    def _run(self) -> None:
        busy = False
        while True:
            try:
                job = self._jobs.get(block=not busy)
            except queue.Empty:
                job = self._step
            if job is None:
                return
            try:
                more = job()
            except BaseException:  # nothing else would ever answer those who wait
                logger.exception("a job of the engine failed")
                more = True
            # After a job there may be new requests; after a step it says itself whether there is more.
            busy = bool(more) if job == self._step else self.step is not None

    def _step(self) -> bool:
        return self.step is not None and self.step()
