"""Helpers for the server's tests: a live server on a free port, and a reader of event streams."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from mlx_gptoss.server.run import make_server


@contextlib.contextmanager
def live(app: FastAPI) -> Iterator[str]:
    """Serve an application in a thread; its URL. Its settings should have port 0."""
    ready = threading.Event()
    urls: list[str] = []

    def listening(url: str) -> None:
        urls.append(url)
        ready.set()

    server = make_server(app, listening)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(60), "the server did not open its port"
    try:
        yield urls[0]
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


def read_events(text: str) -> list[tuple[str | None, Any]]:
    """(event name, data) of a text/event-stream; data is parsed but for [DONE]."""
    result = []
    for block in text.split("\n\n"):
        name, data = None, []
        for line in block.splitlines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data.append(line.removeprefix("data: "))
        if data:
            joined = "\n".join(data)
            result.append((name, joined if joined == "[DONE]" else json.loads(joined)))
    return result


def values_of(metrics: str) -> dict[str, float]:
    """The series of a text in Prometheus' format, by name and labels."""
    lines = (line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def wait_until(true: Any, seconds: float = 60.0) -> None:
    """Wait for something that happens on another thread; the limit only ends a test that would fail."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
