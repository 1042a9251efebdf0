"""Faults, injected at random moments into a model over several ranks that answers all the time.

    python -m benchmarks.faults [--count 100] [--ranks 3] [--parallel tensor] [--seed 0]

A rank is killed or stopped; sockets stay half open at rank 0's port, bring garbage, another token or another
version of the protocol; and, before all that, groups are started with damaged weights on a rank. Every
answer must be what it is alone; a request that a loss ends must end within LIMIT seconds of it, with a typed
error; after a loss the group must be complete again within RESTART seconds; and no process may be left at the
end. Exits 1 when any of that fails.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

import mlx_gptoss
from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.distributed.channel import MAGIC, NONCE, PROTOCOL, dial
from mlx_gptoss.distributed.group import Group, Patience
from mlx_gptoss.distributed.hosts import Host
from mlx_gptoss.distributed.launch import Source, load_spread, spread
from mlx_gptoss.errors import GptOssError, HostError
from mlx_gptoss.sampling import SamplingParams

LIMIT, RESTART = 5.0, 10.0
CLIENTS = 4
PROMPTS = [list(range(100 + 7 * i, 130 + 9 * i)) for i in range(8)]
RANK = b"mlx_gptoss.distributed.rank"
LOSSES = ("kill", "stop")
STRANGERS = ("half-open", "garbage", "token", "version")


def params(index: int) -> SamplingParams:
    """What the request of a prompt asks for: every second one is sampled."""
    temperature, seed = (0.8, index) if index % 2 else (0.0, None)
    return SamplingParams(max_tokens=24 + 8 * index, stop_token_ids=(), temperature=temperature, seed=seed)


class Clients:
    """Threads that ask one after the other, and note what became of it."""

    def __init__(self, llm: mlx_gptoss.LLM, expected: list[list[int]], seed: int) -> None:
        self._llm, self._expected = llm, expected
        self._ended = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest = 0.0  # seconds from a loss to the end of a request that it ended
        self.fault = self.loss = 0.0  # when the last ones were
        self.answered = 0.0  # when an answer last came that was asked for after the last fault
        self._threads = [
            threading.Thread(target=self._ask, args=(random.Random(f"{seed} {i}"),), daemon=True)
            for i in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, rng: random.Random) -> None:
        while not self._ended.is_set():
            index, asked = rng.randrange(len(PROMPTS)), time.monotonic()
            try:
                tokens = list(self._llm.generate(PROMPTS[index], params(index)))
                self.outcomes["answers"] += 1
                if tokens != self._expected[index]:
                    self.wrong.append(f"prompt {index}: {tokens}")
                if asked > self.fault:
                    self.answered = time.monotonic()
            except GptOssError as error:
                self.outcomes[type(error).__name__] += 1
                if asked < self.loss:
                    self.longest = max(self.longest, time.monotonic() - self.loss)
                time.sleep(0.05)
            except Exception as error:
                self.wrong.append(f"prompt {index}: {error!r}")

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)
            if thread.is_alive():
                self.wrong.append("a request hangs")


def inject(kind: str, rng: random.Random) -> None:
    """One fault. Raises OSError or IndexError where a group just starts and nothing can be harmed."""
    ranks = running()
    port = ranks[max(ranks)] if ranks else 0  # the last group's; of the one before, a rank may still end
    if kind in LOSSES:
        pid = rng.choice([pid for pid, its in ranks.items() if its == port])
        os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        return
    address = ("127.0.0.1", port)
    if kind == "token":
        with suppress(HostError):
            dial(address, rng.randbytes(32))
        return
    stranger = socket.create_connection(address)
    if kind == "half-open":
        threading.Timer(8.0, stranger.close).start()
        return
    with closing(stranger), suppress(BrokenPipeError, ConnectionResetError):
        version = MAGIC + bytes([PROTOCOL + 1]) + bytes(NONCE)
        stranger.sendall(version if kind == "version" else rng.randbytes(rng.randrange(1, 5000)))


def damaged(ranks: int, rng: random.Random) -> str:
    """Start a group one of whose ranks reads damaged weights: how it was refused."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(shutil.copytree(resolve("demo"), Path(made) / "copy"))
        weights = folder / "model.safetensors"
        os.truncate(weights, rng.randrange(1, weights.stat().st_size))
        checkpoint = Checkpoint(resolve("demo"))
        with closing(Group([Host("localhost")] * ranks)) as group:
            plan = spread(checkpoint, group.gather(), 1 << 26, 0, None)
            source = Source(str(folder), None, True)
            try:
                load_spread(lambda job: job(), group, checkpoint, plan, source, (None, None))
            except HostError as error:
                return str(error)
    return ""


def running() -> dict[int, int]:
    """The ranks' processes that are there, each with rank 0's port (Linux)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            arguments = path.read_bytes().split(b"\0")
            if RANK in arguments:
                status = (path.parent / "status").read_text(encoding="utf-8")
                if f"PPid:\t{os.getpid()}\n" in status and "State:\tZ" not in status:
                    found[int(path.parent.name)] = int(arguments[arguments.index(RANK) + 2])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--parallel", choices=["pipeline", "tensor"], default="pipeline")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with mlx_gptoss.load("demo", max_context=512) as one:
        expected = [list(one.generate(p, params(i))) for i, p in enumerate(PROMPTS)]
    refused = [damaged(args.ranks, rng) for _ in range(max(1, args.count // 20))]
    print(
        f"damaged weights: {sum('failed: CheckpointError' in r for r in refused)} of {len(refused)} refused"
    )
    problems = [f"damaged weights were taken: {r}" for r in refused if "failed: " not in r]
    kinds: Counter[str] = Counter()
    restarts: list[float] = []
    patience = Patience(restarts=args.count)
    with mlx_gptoss.load(
        "demo",
        max_context=512,
        hosts=["localhost"] * args.ranks,
        parallel=args.parallel,
        force=True,
        patience=patience,
    ) as llm:
        clients = Clients(llm, expected, args.seed)
        for _ in range(args.count - len(refused)):
            time.sleep(rng.uniform(0.05, 1.0))
            kind = rng.choice(LOSSES + STRANGERS)
            kinds[kind] += 1
            while True:
                clients.fault = started = time.monotonic()
                if kind in LOSSES:
                    clients.loss = started
                with suppress(OSError, IndexError):
                    inject(kind, rng)
                    break
                time.sleep(0.05)
            while clients.answered < started and time.monotonic() - started < 60:
                time.sleep(0.01)
            if kind in LOSSES:
                restarts.append(clients.answered - started)
        clients.end()
        kept = llm.stats().running
    time.sleep(1.0)
    restarts.sort()
    print(f"faults: {dict(kinds)}; requests: {dict(clients.outcomes)}")
    print(
        f"a request that a loss ended did so after {clients.longest:.2f} s at the latest; after a loss an "
        f"answer was there again after {restarts[len(restarts) // 2]:.2f} s (median), "
        f"{restarts[-1]:.2f} s (longest)"
    )
    problems += clients.wrong
    problems += [f"a request took {clients.longest:.2f} s to end"] * (clients.longest > LIMIT)
    problems += [f"a restart took {restarts[-1]:.2f} s"] * (restarts[-1] > RESTART)
    problems += [f"rank {pid} is left behind" for pid in running()]
    problems += [f"{kept} requests still run"] * bool(kept)
    print("\n".join(problems) or "nothing wrong, nothing left behind")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
