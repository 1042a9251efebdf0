"""What HTTP, event streams and JSON cost over the bare LLM, on this machine.

    python -m benchmarks.server [--model demo] [--tokens 256] [--rounds 5]

Throughput: tokens a second of one greedy stream, by `LLM.start` and over HTTP (a client in a process of
its own), in turns. First byte: from the request's last byte to the stream's first event with generated
text, less the same for the bare LLM; the prompt is in the prefix store either way.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import queue
import statistics
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import mlx_gptoss
from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.harmony import Conversation, Done, Message
from mlx_gptoss.llm import LLM
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.server.run import make_server

PROMPT = "What is 358 + 267?"


def bare(llm: LLM, tokens: int, today: str) -> tuple[float, float]:
    """(seconds to the first event, tokens a second after it) of the LLM alone."""
    conversation = Conversation([Message.user(PROMPT)], current_date=today, reasoning_effort="high")
    began = time.perf_counter()
    first = 0.0
    count = 0
    for event in llm.start(conversation, TurnOptions(_params(tokens))):
        first = first or time.perf_counter()
        if isinstance(event, Done):
            count = event.usage.completion_tokens
    return first - began, (count - 1) / (time.perf_counter() - first)


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens)


def over_http(netloc: str, tokens: int) -> tuple[float, float]:
    """The same as a client sees it."""
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": tokens, "temperature": 0}
    chat |= {"reasoning_effort": "high", "stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection(netloc)
    connection.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(chat), {"Content-Type": "application/json"})
    began = time.perf_counter()
    response = connection.getresponse()
    first, count = 0.0, 0
    while line := response.readline():
        if not first and b'"reasoning":' in line:
            first = time.perf_counter()
        if b'"usage":{' in line:
            count = json.loads(line[6:])["usage"]["completion_tokens"]
    ended = time.perf_counter()
    connection.close()
    return first - began, (count - 1) / (ended - first)


def _client(netloc: str, tokens: int, rounds: Any, results: Any) -> None:
    while rounds.get():
        results.put(over_http(netloc, tokens))


def measure(model: str, tokens: int, rounds: int) -> dict[str, float]:
    """Medians over the rounds, and what the server costs."""
    with mlx_gptoss.load(model, max_context=4096) as llm:
        app = create_app(llm, ServerSettings(port=0))
        urls: queue.Queue[str] = queue.Queue()
        server = make_server(app, urls.put)
        thread = threading.Thread(target=server.run)
        thread.start()
        netloc = urlsplit(urls.get()).netloc
        context = multiprocessing.get_context("spawn")
        go, results = context.Queue(), context.Queue()
        client = context.Process(target=_client, args=(netloc, tokens, go, results))
        client.start()
        today = app.state.server.today()
        alone, served = [], []
        for _ in range(rounds + 1):
            alone.append(bare(llm, tokens, today))
            go.put(True)
            served.append(results.get())
        go.put(False)
        client.join()
        server.should_exit = True
        thread.join()
    first_bare, speed_bare = (statistics.median(values) for values in zip(*alone[1:], strict=True))
    first_http, speed_http = (statistics.median(values) for values in zip(*served[1:], strict=True))
    return {
        "bare_tokens_per_second": speed_bare,
        "http_tokens_per_second": speed_http,
        "throughput_cost": 1 - speed_http / speed_bare,
        "bare_first_event_ms": first_bare * 1e3,
        "http_first_event_ms": first_http * 1e3,
        "first_event_cost_ms": (first_http - first_bare) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for name, value in measure(options.model, options.tokens, options.rounds).items():
        print(f"{name:>24} {value:10.3f}")


if __name__ == "__main__":
    main()
