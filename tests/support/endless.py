"""Ending what would never end: by the processor's time, which no other program takes, and by the clock."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

PROCESSOR = 30.0  # seconds, where what is tested takes one
CLOCK = 300.0


@contextmanager
def ends() -> Iterator[None]:
    """Raise TimeoutError in what goes on and on, or waits for ever. Only in the main thread."""

    def stop(*_: object) -> None:
        raise TimeoutError("this does not end")

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, PROCESSOR), (signal.ITIMER_REAL, signal.SIGALRM, CLOCK))
    before = [signal.signal(number, stop) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
