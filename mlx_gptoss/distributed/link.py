"""Measure a link: `python -m mlx_gptoss.distributed.link` does what a JSON object on standard input says.

It prints JSON objects, and ends when its input does or after LIMIT seconds.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import mlx.core as mx

from mlx_gptoss.distributed.channel import Channel, Listener, ProtocolError, dial
from mlx_gptoss.distributed.collective import join
from mlx_gptoss.errors import GptOssError

LIMIT = 60.0  # seconds
ROUNDS = 50
PIECE = 4 << 20  # bytes that are sent at a time
SENDING = 0.5  # seconds of sending, at least one piece
# A hidden state of gpt-oss in bfloat16, which an all_sum adds up in decoding; and a long one.
SMALL, LARGE = 2880, 4 << 20


def listen(asked: dict[str, Any]) -> None:
    """Take in one machine after the other, and answer what `measure` sends."""
    listener = Listener(str(asked["host"]), bytes.fromhex(asked["token"]), _answer)
    print(json.dumps({"port": listener.port}), flush=True)
    threading.Event().wait()  # until the input ends


def _answer(channel: Channel) -> None:
    with suppress(OSError):  # the other side has measured enough
        while True:
            for _ in range(int(channel.hear())):
                channel.take()
            channel.tell(True)


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a round trip, and bytes a second, to a machine that listens."""
    channel = dial((str(asked["host"]), int(asked["port"])), bytes.fromhex(asked["token"]))

    def round_trip(pieces: int, data: bytes) -> float:
        start = time.perf_counter()
        channel.tell(pieces, [data] * pieces)
        channel.hear()
        return time.perf_counter() - start

    round_trip(0, b"")
    latency = statistics.median(round_trip(0, b"") for _ in range(ROUNDS))
    data = secrets.token_bytes(PIECE)
    taken = round_trip(1, data)
    pieces = max(1, min(256, int(SENDING / taken)))
    bandwidth = pieces * PIECE / round_trip(pieces, data)
    channel.close()
    return {"latency": latency, "bandwidth": bandwidth}


def all_sums(asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds that an all_sum of one hidden state takes, and bytes a second that a long one adds up."""
    group = join(asked)

    def once(count: int, dtype: mx.Dtype) -> float:
        x = mx.ones(count, dtype)
        mx.eval(x)
        start = time.perf_counter()
        mx.eval(mx.distributed.all_sum(x, group=group))
        return time.perf_counter() - start

    once(SMALL, mx.bfloat16)
    latency = statistics.median(once(SMALL, mx.bfloat16) for _ in range(ROUNDS))
    once(LARGE, mx.float32)
    return {"latency": latency, "bandwidth": 4 * LARGE / min(once(LARGE, mx.float32) for _ in range(3))}


WAYS: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
    "listen": listen,
    "measure": measure,
    "all_sums": all_sums,
}


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Do what is asked. Whatever hangs is ended: nothing here is worth keeping."""
    timer = threading.Timer(LIMIT, os._exit, (1,))
    timer.daemon = True
    timer.start()
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    found: dict[str, Any] | None
    try:
        found = WAYS[asked["way"]](asked)
    except (GptOssError, OSError, ProtocolError, RuntimeError) as error:
        found = {"problem": str(error)}
    print(json.dumps(found), flush=True)
    os._exit(0)  # MLX waits for the other ranks when a process ends as usual


if __name__ == "__main__":
    main()
