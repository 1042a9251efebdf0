"""Many streams at a time, a quarter of them abandoned half-way: what breaks, and what stays behind.

    python -m benchmarks.server_soak [--model demo] [--streams 32] [--seconds 120]

Every stream asks one of a few questions greedily. Those read to their end must equal the answer computed
alone before; a refusal must be the queue's 429; afterwards nothing may run, and memory must be back at its
start. Exits 1 when any of that fails.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import queue
import random
import sys
import threading
import time
from collections import Counter
from typing import Any

import httpx

import mlx_gptoss
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.server.run import make_server
from tests.support.server_help import read_events, values_of

QUESTIONS = [f"What is {a} + {a + 3}?" for a in range(2, 10)]
CHAT = "/v1/chat/completions"


def body(question: str, tokens: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "temperature": 0,
        "max_tokens": tokens,
        "reasoning_effort": "low",
    }


def text_of(stream: str) -> str:
    """Reasoning and answer of a whole stream. Raises RuntimeError when it ended with an error."""
    parts = []
    for _, data in read_events(stream):
        if data != "[DONE]":
            if "error" in data:
                raise RuntimeError(data["error"]["message"])
            delta = data["choices"][0]["delta"]
            parts.append(delta.get("reasoning") or delta.get("content") or "")
    return "".join(parts)


async def one(client: httpx.AsyncClient, expected: dict[str, str], tokens: int, rng: random.Random) -> str:
    """Ask once; what became of it."""
    question = rng.choice(QUESTIONS)
    leave_after = rng.uniform(0, 1.0) if rng.random() < 0.25 else None
    try:
        async with (
            asyncio.timeout(leave_after),
            client.stream("POST", CHAT, json=body(question, tokens)) as reply,
        ):
            if reply.status_code == 429:
                await asyncio.sleep(0.2)
                return "refused"
            if reply.status_code != 200:
                return f"status {reply.status_code}"
            received = "".join([piece async for piece in reply.aiter_text()])
    except TimeoutError:
        return "left"
    except httpx.HTTPError as error:
        return f"connection: {type(error).__name__}"
    try:
        return "same" if text_of(received) == expected[question] else "different"
    except RuntimeError as error:
        return f"error: {error}"


async def soak(url: str, streams: int, seconds: float, tokens: int) -> tuple[Counter[str], int]:
    """Outcomes of all requests, and the bytes of memory that were gained."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        expected = {}
        for question in QUESTIONS:
            expected[question] = text_of((await client.post(CHAT, json=body(question, tokens))).text)
        outcomes: Counter[str] = Counter()
        rng = random.Random(0)

        async def stream_after_stream(end: float) -> None:
            while time.monotonic() < end:
                outcomes[await one(client, expected, tokens, rng)] += 1

        async def run(duration: float) -> None:
            end = time.monotonic() + duration
            await asyncio.gather(*(stream_after_stream(end) for _ in range(streams)))

        # The prefix store and the allocators grow to their working size first.
        await run(min(20.0, seconds / 4))
        before = await _settled(client)
        await run(seconds)
        after = await _settled(client)
    return outcomes, after - before


async def _settled(client: httpx.AsyncClient) -> int:
    """Bytes of this process once nothing runs any more."""
    for _ in range(600):
        values = values_of((await client.get("/metrics")).text)
        if not values["gptoss_active_generations"] and not values["gptoss_engine_running"]:
            break
        await asyncio.sleep(0.1)
    else:
        raise RuntimeError("generations still run after their clients have gone")
    gc.collect()
    return resident_bytes()


def resident_bytes() -> int:
    """Memory of this process now (on Linux), else its peak."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with mlx_gptoss.load(options.model, max_context=1024) as llm:
        urls: queue.Queue[str] = queue.Queue()
        server = make_server(create_app(llm, ServerSettings(port=0)), urls.put)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            work = soak(urls.get(), options.streams, options.seconds, options.tokens)
            outcomes, gained = asyncio.run(work)
        finally:
            server.should_exit = True
            thread.join()
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8} {outcome}")
    print(f"{gained / 2**20:8.1f} MiB gained")
    bad = set(outcomes) - {"same", "left", "refused"}
    return 1 if bad or gained > 64 * 2**20 else 0


if __name__ == "__main__":
    sys.exit(main())
