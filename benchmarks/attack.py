"""Hostile requests against a server over the demo model, while a normal stream runs.

    python -m benchmarks.attack [--bodies 200] [--schemas 200] [--senders 4] [--seed 0]

Prints the longest wait between two tokens of that stream (quiet, and under attack), how often each status was
answered, and the server's memory before and after. Exits 1 when the server died or did not answer, when a
wait reached a second, or when 50 MB stayed. The context is small: to read long prompts, which anybody may
send, takes its share of a processor from other streams, and is no attack.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.tokenizer import Tokenizer

PATHS = (
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/completions",
    "/v1/messages/count_tokens",
)
MIB = 2**20
MAX_GAP = 1.0  # seconds
MAX_GAIN = 50e6  # bytes
PATIENCE = 120.0  # seconds in which everything has to be answered

Payload = tuple[str, bytes]  # a path and a body


# --- what is sent


def prompt(path: str, text: Any = "hi", /, **fields: Any) -> dict[str, Any]:
    """A small request of an API, with a text or a list of parts, and any other fields."""
    if path == "/v1/responses":
        return {"input": text, "max_output_tokens": 16, "store": False} | fields
    if path == "/v1/completions":
        return {"prompt": text, "max_tokens": 2} | fields
    limit = {} if path.endswith("count_tokens") else {"max_tokens": 2}
    return {"messages": [{"role": "user", "content": text}]} | limit | fields


def _many(path: str, entry: Any, count: int) -> dict[str, Any]:
    name = {"/v1/responses": "input", "/v1/completions": "prompt"}.get(path, "messages")
    return prompt(path) | {name: [entry] * count}


# Each makes a body for a path; the number says how large, from 0 to 1.
BODIES: dict[str, Callable[[str, random.Random, float], Any]] = {
    "long text": lambda path, rng, size: prompt(path, "What is 17 + 25? " * int(230_000 * size)),
    "one letter": lambda path, rng, size: prompt(path, rng.choice("a \n1") * int(3.9 * MIB * size)),
    "random text": lambda path, rng, size: prompt(
        path, "".join(rng.choices("aAbB 1\n.,é漢", k=int(600_000 * size)))
    ),
    "many messages": lambda path, rng, size: _many(
        path, {"role": "user", "content": ""}, int(120_000 * size)
    ),
    "wrong messages": lambda path, rng, size: _many(path, rng.choice([0.5, None, []]), int(900_000 * size)),
    "many parts": lambda path, rng, size: prompt(path, [{"type": "text", "text": "a"}] * int(100_000 * size)),
    "ignored objects": lambda path, rng, size: prompt(path, x=[{}] * int(49_000 * size)),
    "ignored numbers": lambda path, rng, size: prompt(path, x=[rng.random()] * int(200_000 * size)),
    "ignored texts": lambda path, rng, size: prompt(
        path, x={str(i): "y" for i in range(int(250_000 * size))}
    ),
    "nested": lambda path, rng, size: (
        '{"x":' + '[{"a":' * int(300_000 * size) + "1" + "}]" * int(300_000 * size) + "}"
    ),
    "open brackets": lambda path, rng, size: rng.choice("[{") * int(3 * MIB * size),
    "open quote": lambda path, rng, size: '{"x":"' + '\\"' * int(1.5 * MIB * size),
    "large numbers": lambda path, rng, size: (
        '{"x":[' + ",".join(["9" * rng.randint(1, 6000)] * int(600 * size + 1)) + "]}"
    ),
    "halves of pairs": lambda path, rng, size: (
        '{"x":"' + "\\\\ud800\\ud83d\\ude00" * int(180_000 * size) + '"}'
    ),
    "bias": lambda path, rng, size: prompt(
        path, logit_bias={str(i): rng.choice(["x", 1]) for i in range(int(200_000 * size))}
    ),
    "metadata": lambda path, rng, size: prompt(path, metadata={"a": "x" * int(3.5 * MIB * size)}),
    "stop texts": lambda path, rng, size: prompt(path, stop=["x" * 9] * int(300_000 * size)),
    "many tools": lambda path, rng, size: prompt(
        path, tools=[{"type": "function", "name": "f", "function": {"name": "f"}}] * int(20_000 * size)
    ),
    "not utf-8": lambda path, rng, size: b'{"x":"' + rng.randbytes(int(MIB * size)),
}


def body(number: int, rng: random.Random) -> Payload:
    """A hostile body, of one family after the other."""
    family = list(BODIES)[number % len(BODIES)]
    path = PATHS[number // len(BODIES) % len(PATHS)]
    made = BODIES[family](path, rng, rng.uniform(0.2, 1.0))
    if isinstance(made, dict):
        made = json.dumps(made)
    return path, made.encode() if isinstance(made, str) else made


def _links(count: int) -> dict[str, Any]:
    chain: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": chain | {f"a{count}": {}}}


def _objects(count: int) -> dict[str, Any]:
    def link(to: int) -> dict[str, Any]:
        return {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{to}"}}}

    return {**link(0), "$defs": {f"a{i}": link(i + 1) for i in range(count)} | {f"a{count}": {}}}


def _nested(count: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(count):
        schema = {"type": "array", "items": schema}
    return schema


def _text(pattern: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}}


SCHEMAS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "links": lambda rng: _links(rng.randint(200, 2500)),
    "objects": lambda rng: _objects(rng.randint(100, 930)),
    "nested": lambda rng: _nested(rng.randint(20, 60)),
    "optional letters": lambda rng: _text("a?" * rng.randint(1000, 30_000)),
    "repeated groups": lambda rng: _text(f"(a{{1,{rng.randint(50, 1000)}}}){{1,{rng.randint(50, 1000)}}}"),
    "nested groups": lambda rng: _text("(" * (n := rng.randint(100, 3000)) + "a" + ")*" * n),
    "alternatives": lambda rng: _text("|".join(f"a{i}b*" for i in range(rng.randint(100, 20_000)))),
    "many values": lambda rng: {"enum": [f"v{i}" for i in range(rng.randint(1000, 24_000))]},
    "many choices": lambda rng: {"anyOf": [{"const": i} for i in range(rng.randint(100, 10_000))]},
    "many properties": lambda rng: {
        "type": "object",
        "properties": {f"p{i}": {"type": "integer"} for i in range(rng.randint(100, 6000))},
    },
    "long bounds": lambda rng: {"type": "string", "minLength": rng.randint(10**3, 10**9)},
    "many items": lambda rng: {
        "type": "array",
        "items": {"enum": [1, 2]},
        "minItems": rng.randint(10, 10**8),
    },
    "bounds": lambda rng: {
        "type": "number",
        "minimum": -rng.random() * 10**300,
        "maximum": rng.random() / 10**9,
    },
    "all of": lambda rng: {"allOf": [_text(f"{c}*") for c in "abcdefgh" * rng.randint(1, 40)]},
}


def schema(number: int, rng: random.Random) -> Payload:
    """A hostile schema, of one family after the other, in one place after the other."""
    made = SCHEMAS[list(SCHEMAS)[number % len(SCHEMAS)]](rng)
    strict = bool(number // len(SCHEMAS) % 2)
    place = number // len(SCHEMAS) // 2 % 6
    path = PATHS[place % 3]
    fields: dict[str, dict[str, Any]]
    if place < 3:
        named = {"name": "n", "schema": made, "strict": strict}
        fields = {
            "/v1/chat/completions": {"response_format": {"type": "json_schema", "json_schema": named}},
            "/v1/responses": {"text": {"format": {"type": "json_schema", **named}}},
            "/v1/messages": {"output_config": {"format": {"type": "json_schema", "schema": made}}},
        }
    else:
        function = {"name": "f", "parameters": made, "strict": strict}
        fields = {
            "/v1/chat/completions": {
                "tools": [{"type": "function", "function": function}],
                "tool_choice": "required",
            },
            "/v1/responses": {"tools": [{"type": "function", **function}], "tool_choice": "required"},
            "/v1/messages": {"tools": [{"name": "f", "input_schema": made}], "tool_choice": {"type": "any"}},
        }
    return path, json.dumps(prompt(path, **fields[path])).encode()


# --- sending it


@dataclass
class Server:
    """A server in a process of its own."""

    address: tuple[str, int]
    pid: int

    def resident(self) -> int:
        """Bytes of memory it has now."""
        command = ["ps", "-o", "rss=", "-p", str(self.pid)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024

    def connect(self) -> socket.socket:
        """A new connection."""
        return socket.create_connection(self.address, timeout=PATIENCE)


@contextmanager
def demo_server() -> Iterator[Server]:
    """The demo model, served as from the command line."""
    # Kept prefixes are memory that is given on purpose; with little of it the rest can be seen.
    limits = ["--max-context", "1024", "--kv-budget", "16MB"]
    command = [sys.executable, "-m", "mlx_gptoss", "serve", "demo", "--port", "0", *limits]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found = None
        while found is None:
            line = process.stderr.readline()
            if not line:
                raise RuntimeError("the server did not start")
            found = re.search(r"listening on http://(.*):(\d+)", line)
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        server = Server((found[1], int(found[2])), process.pid)
        while status(server, "/v1/models", b"", "GET") != 200:
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def _head(path: str, length: int, method: str = "POST") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def status(server: Server, path: str, data: bytes, method: str = "POST") -> int | str:
    """What a request is answered with, or what became of its connection."""
    try:
        with server.connect() as connection:
            # Refused before it was read, the answer may still be there.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(_head(path, len(data), method) + data)
            answer = b""
            while chunk := connection.recv(65536):
                answer = answer or chunk
            return int(answer.split()[1]) if answer else "closed"
    except TimeoutError:
        return "no answer"
    except ConnectionResetError:
        return "closed"
    except OSError as error:
        return type(error).__name__


def broken(server: Server, path: str, data: bytes, rng: random.Random) -> str:
    """Send part of a request, or all of it a little at a time, and go away."""
    # The server may have had enough before.
    with server.connect() as connection, suppress(BrokenPipeError, ConnectionResetError):
        cut = rng.randrange(len(data) + 1)
        connection.sendall(_head(path, len(data) + rng.choice([0, 1, 10**6])) + data[:cut])
        for byte in data[cut : cut + 20]:
            connection.sendall(bytes([byte]))
            time.sleep(0.01)
    return "left"


@dataclass
class Stream:
    """A normal stream, asked for again when it ends, and the longest wait between two of its events."""

    server: Server
    worst: float = 0.0
    tokens: int = 0
    failure: str | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Stream:
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _read(self) -> None:
        never_end = {str(token): -100 for token in Tokenizer.from_folder(DEMO_FOLDER).stop_ids}
        asked = prompt("/v1/completions", max_tokens=1000, stream=True, logit_bias=never_end)
        data = json.dumps(asked).encode()
        try:
            while not self._over.is_set():
                with self.server.connect() as connection:
                    connection.sendall(_head("/v1/completions", len(data)) + data)
                    last = None
                    while not self._over.is_set() and (chunk := connection.recv(65536)):
                        now = time.monotonic()
                        if (count := chunk.count(b'"text"')) and last is not None:
                            self.worst = max(self.worst, now - last)
                        if count:
                            self.tokens += count
                            last = now
        except OSError as error:
            self.failure = type(error).__name__


@dataclass
class Outcome:
    """What an attack came to. Gaps are seconds, memory is bytes."""

    statuses: Counter[int | str]
    quiet_gap: float
    worst_gap: float
    tokens: int
    before: int
    after: int
    alive: bool
    failure: str | None

    def complaints(self, max_gap: float = MAX_GAP) -> list[str]:
        """What should not have happened."""
        wrong = unanswered(self.statuses)
        found = [] if self.alive else ["the server died"]
        found += [f"answered {wrong}"] if wrong else []
        found += [f"the stream failed: {self.failure}"] if self.failure else []
        found += [f"{self.worst_gap:.2f} s without a token"] if self.worst_gap >= max_gap else []
        gained = self.after - self.before
        return found + ([f"{gained / 1e6:.0f} MB stayed"] if gained >= MAX_GAIN else [])


def unanswered(statuses: Counter[int | str]) -> dict[int | str, int]:
    """Those that are no answer which a hostile request may have."""
    known = {200, 400, 404, 413, 429, 503, "left", "closed"}
    return {name: count for name, count in statuses.items() if name not in known}


def attack(server: Server, bodies: int, schemas: int, senders: int, seed: int) -> Counter[int | str]:
    """Send everything, several at a time."""
    rng = random.Random(seed)
    numbers = [("body", n) for n in range(bodies)] + [("schema", n) for n in range(schemas)]
    rng.shuffle(numbers)
    work: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for item in numbers:
        work.put(item)
    statuses: Counter[int | str] = Counter()

    def send() -> None:
        while True:
            try:
                kind, number = work.get_nowait()
            except queue.Empty:
                return
            own = random.Random(f"{seed} {kind} {number}")  # whichever thread sends it
            path, data = (body if kind == "body" else schema)(number, own)
            if kind == "body" and own.random() < 0.15:
                statuses[broken(server, path, data, own)] += 1
            else:
                statuses[status(server, path, data)] += 1

    threads = [threading.Thread(target=send) for _ in range(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def settled(server: Server, goal: int, seconds: float) -> int:
    """The memory of a server once it stays, or has come to the goal."""
    deadline = time.monotonic() + seconds
    while (now := server.resident()) > goal and time.monotonic() < deadline:
        time.sleep(0.25)
    return now


def run(bodies: int, schemas: int, senders: int = 4, seed: int = 0, quiet: float = 3.0) -> Outcome:
    """Attack a new server. A few of each kind go before, so that caches and pools have their working size.

    quiet: seconds of a stream before; five times as many are waited for memory to come back.
    """
    with demo_server() as server:
        attack(server, len(BODIES), len(SCHEMAS), senders, seed + 1000)
        with Stream(server) as stream:
            time.sleep(quiet)
        quiet_gap = stream.worst
        before = settled(server, 0, 5 * quiet)
        # From another process: making bodies must not delay the clock.
        with ProcessPoolExecutor(1, get_context("spawn")) as other, Stream(server) as stream:
            statuses = other.submit(attack, server, bodies, schemas, senders, seed).result()
        alive = status(server, "/health", b"", "GET") == 200
        after = settled(server, before, 5 * quiet) if alive else 0
        return Outcome(statuses, quiet_gap, stream.worst, stream.tokens, before, after, alive, stream.failure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bodies", type=int, default=200)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--senders", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcome = run(options.bodies, options.schemas, options.senders, options.seed)
    for name, count in sorted(outcome.statuses.items(), key=str):
        print(f"{count:8} {name}")
    print(f"{outcome.tokens:8} tokens of the normal stream")
    print(f"{outcome.quiet_gap:8.2f} s the longest wait between two of them before")
    print(f"{outcome.worst_gap:8.2f} s and under attack")
    print(f"{outcome.before / 1e6:8.0f} MB before, {outcome.after / 1e6:.0f} MB after")
    for complaint in outcome.complaints():
        print(complaint)
    return 1 if outcome.complaints() else 0


if __name__ == "__main__":
    sys.exit(main())
