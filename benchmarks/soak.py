"""A soak of the engine: random requests under a small KV budget, every answer checked against itself alone.

    python -m benchmarks.soak [--requests 2000] [--seed 0]

Lengths, shared prefixes, cancels, sinks that break, constraints, tool loops and oversized prompts are drawn
at random. It fails on a crash, on an answer that differs from the same request alone (greedy), on a budget
exceeded, or when memory does not return to within 5 % of where it was.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.engine.request import TokenStream
from mlx_gptoss.errors import BusyError, ContextLengthError
from mlx_gptoss.llm import LLM, load
from mlx_gptoss.sampling import SamplingParams
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

SHAPE = Shape(
    layers=2, hidden=64, intermediate=64, experts=4, top_k=2, heads=4, kv_heads=1, window=16, vocab=300
)
BUDGET = 1 << 20
CHECKED_ALONE = 2  # of so many finished requests one is run again alone


class EvenTokens:
    """A constraint: even ids only."""

    def __init__(self) -> None:
        self._mask = np.full(-(-SHAPE.vocab // 32), 0x55555555, np.uint32)

    def allowed(self) -> np.ndarray | None:
        return self._mask

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == 0


class Soak:
    """What was asked, and what came of it."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self.llm = llm
        self.rng = random.Random(seed)
        self.documents = [
            [self.rng.randrange(299) for _ in range(self.rng.randrange(50, 400))] for _ in range(6)
        ]
        self.finished: list[tuple[list[int], SamplingParams, bool, list[int]]] = []
        self.counts = {"finished": 0, "cancelled": 0, "broken sink": 0, "refused": 0, "busy": 0}
        self.lock = threading.Lock()

    def prompt(self) -> list[int]:
        base = self.rng.choice(self.documents)
        base = base[: self.rng.randrange(1, len(base))]
        return base + [self.rng.randrange(299) for _ in range(self.rng.randrange(1, 60))]

    def one(self, rng: random.Random) -> None:
        """One request, of one of the kinds."""
        kind = rng.choices(["plain", "even", "cancel", "sink", "huge", "loop"], [10, 3, 3, 1, 1, 2])[0]
        params = SamplingParams(temperature=0.0, max_tokens=rng.randrange(1, 40), stop_token_ids=())
        with self.lock:
            prompt = self.prompt()
        try:
            if kind == "huge":
                self.llm.submit([1] * self.llm.max_context, params)
            elif kind == "sink":
                stream = self.llm.submit(prompt, params, sink=self._broken)
                while stream.finish_reason is None:
                    time.sleep(0.005)
                self._count("broken sink")
            elif kind == "cancel":
                self._cancelled(self.llm.submit(prompt, params), rng)
            else:
                for _ in range(4 if kind == "loop" else 1):
                    prompt = self._whole(prompt, params, even=kind == "even")
                    prompt += [rng.randrange(299) for _ in range(10)]
        except ContextLengthError:
            self._count("refused")
        except BusyError:
            self._count("busy")

    def _whole(self, prompt: list[int], params: SamplingParams, *, even: bool) -> list[int]:
        out = [o.token_id for o in self.llm.submit(prompt, params, constraint=EvenTokens() if even else None)]
        with self.lock:
            self.counts["finished"] += 1
            self.finished.append((prompt, params, even, out))
        return prompt + out

    def _cancelled(self, stream: TokenStream, rng: random.Random) -> None:
        for _ in range(rng.randrange(5)):
            next(stream, None)
        stream.cancel()
        list(stream)
        self._count("cancelled")

    def _count(self, kind: str) -> None:
        with self.lock:
            self.counts[kind] += 1

    @staticmethod
    def _broken(item: Any) -> None:
        raise ConnectionError("the client is gone")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import logging

    logging.getLogger("mlx_gptoss.engine").setLevel(logging.CRITICAL)
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), SHAPE)
        with load(folder, kv_budget=BUDGET, prefill_chunk=64) as llm:
            list(llm.generate([1, 2, 3], SamplingParams(max_tokens=4)))
            llm.engine.worker.call(llm.engine.scheduler.store.clear)
            gc.collect()
            start = mx.get_active_memory()
            soak = Soak(llm, args.seed)
            left = list(range(args.requests))

            def client(number: int) -> None:
                rng = random.Random(f"{args.seed} {number}")
                while left:
                    try:
                        left.pop()
                    except IndexError:
                        return
                    soak.one(rng)
                    stats = llm.stats()
                    if stats.live_kv_bytes + stats.prefix_bytes > stats.kv_budget:
                        problems.append(f"the budget was exceeded: {stats}")

            threads = [threading.Thread(target=client, args=(i,)) for i in range(args.clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            stats = llm.stats()
            llm.engine.worker.call(llm.engine.scheduler.store.clear)
            gc.collect()
            grown = mx.get_active_memory() / start
        checked = soak.finished[::CHECKED_ALONE]
        with load(folder, kv_budget=64 << 20) as llm:
            for prompt, params, even, out in checked:
                llm.engine.worker.call(llm.engine.scheduler.store.clear)
                alone = list(llm.generate(prompt, params, constraint=EvenTokens() if even else None))
                if alone != out:
                    problems.append(f"an answer to {len(prompt)} tokens differs from the same request alone")
    if grown > 1.05:
        problems.append(f"memory grew to {grown:.2f} x its start")
    print(f"{soak.counts}; {len(checked)} answers checked alone; memory {grown:.3f} x its start")
    print(f"preempted {stats.preempted}, computed {stats.computed_tokens}, cached {stats.cached_tokens}")
    for problem in problems[:10]:
        print(f"PROBLEM: {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
