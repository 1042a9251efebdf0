"""What is computed again: traces of requests, and what a second request costs, against mlx_lm's prompt cache.

    python -m benchmarks.prefix [--json]

The traces run on a small random checkpoint (window 128); the counts depend on the tokens alone. "New" tokens
are those whose whole prefix was never computed before, in a prompt or in an answer. mlx_lm.server's column
drives mlx_lm's own LRUPromptCache as its server does (an entry at the end of the system message, of the
user's message, of the prompt and of the answer; caches past their window cannot be trimmed).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.device import describe
from mlx_gptoss.engine.prefix_store import PrefixStore, common_prefix
from mlx_gptoss.engine.states import STATE_SLACK
from mlx_gptoss.llm import LLM, load
from mlx_gptoss.model.sequence_cache import SequenceCache
from mlx_gptoss.sampling import SamplingParams
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import SHAPES, Shape

SHAPE = Shape(
    layers=4, hidden=64, intermediate=64, experts=4, top_k=2, heads=4, kv_heads=1, window=128, vocab=320
)
ANSWER = 40  # tokens
TURN = 30

# A trace asks `generate` for answers to prompts, one after the other.
Generate = Callable[[list[int]], list[int]]
Trace = Callable[[Generate, "Words"], None]


class Words:
    """Messages of random words in the format's markup."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.special = llm.tokenizer.special
        self._role = {r: llm.tokenizer.encode(r) for r in ("system", "user", "assistant", "tool", "final")}

    def text(self, n: int) -> list[int]:
        return [int(token) for token in self._rng.integers(0, 256, n)]

    def message(self, role: str, content: Sequence[int]) -> list[int]:
        s = self.special
        return [s.start, *self._role[role], s.message, *content, s.end]

    def answer(self, content: Sequence[int]) -> list[int]:
        """An answer as a later prompt renders it: without the analysis that came before it."""
        s = self.special
        head = [s.start, *self._role["assistant"], s.channel, *self._role["final"], s.message]
        return [*head, *content, s.end]

    def turn(self) -> list[int]:
        return [self.special.start, *self._role["assistant"]]


def chat(generate: Generate, words: Words) -> None:
    """12 turns after a system prompt of 1,500 tokens; the analysis of each answer is dropped afterwards."""
    history = words.message("system", words.text(1500))
    for _ in range(12):
        history += words.message("user", words.text(TURN))
        out = generate(history + words.turn())
        history += words.answer(out[ANSWER // 2 :])


def document(generate: Generate, words: Words) -> None:
    """10 questions about one document of 4,000 tokens, document and question in one message."""
    system, text = words.message("system", words.text(80)), words.text(4000)
    for _ in range(10):
        generate(system + words.message("user", text + words.text(TURN)) + words.turn())


def edit(generate: Generate, words: Words) -> None:
    """A conversation of 12 messages, then the second one edited in its middle and all asked again."""
    system = words.message("system", words.text(300))
    messages = [words.text(150) for _ in range(12)]
    for edited in (False, True):
        if edited:
            messages[1] = [*messages[1][:75], *words.text(75)]
        roles = ["user", "assistant"] * 6
        history = sum((words.message(r, m) for r, m in zip(roles, messages, strict=True)), system)
        generate(history + words.turn())


def tools(generate: Generate, words: Words) -> None:
    """A loop of 20 tool calls: every answer is kept as it was sampled, a result follows."""
    history = words.message("system", words.text(500)) + words.message("user", words.text(TURN))
    for _ in range(20):
        history += words.turn()
        history += generate(history)
        history += words.message("tool", words.text(40))


TRACES: dict[str, Trace] = {
    "12-turn chat": chat,
    "10 questions, one document": document,
    "edit of the 2nd of 12 messages": edit,
    "20-step tool loop": tools,
}


def run_trace(llm: LLM, trace: Trace) -> dict[str, float]:
    """New, computed by us, and computed by mlx_lm.server's cache, in tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, stop_token_ids=())
    seen: list[np.ndarray] = []
    new = 0
    other = _MlxLmCache()
    before = llm.stats().computed_tokens

    def generate(prompt: list[int]) -> list[int]:
        nonlocal new
        out = [o.token_id for o in llm.submit(prompt, params)]
        tokens = np.array([*prompt, *out], np.int32)
        known = max((common_prefix(tokens[: len(prompt)], s) for s in seen), default=0)
        new += len(tokens) - 1 - known
        seen.append(tokens)
        other.request(prompt, out, words.special.end)
        return out

    words = Words(llm, 1)
    trace(generate, words)
    return {"new": new, "computed": llm.stats().computed_tokens - before, "mlx_lm": other.computed}


class _MlxLmCache:
    """mlx_lm.server's way with prompts: which tokens it would compute."""

    class _Layer:
        nbytes = 1

        @staticmethod
        def is_trimmable() -> bool:
            return False

    def __init__(self) -> None:
        from mlx_lm.models.cache import LRUPromptCache

        self._cache = LRUPromptCache(max_size=10)
        self.computed = 0

    def request(self, prompt: list[int], out: list[int], end: int) -> None:
        _, rest = self._cache.fetch_nearest_cache("model", prompt)
        rest = rest or prompt[-1:]
        self.computed += len(rest) + len(out) - 1
        start = len(prompt) - len(rest)
        places = {"system": prompt.index(end) + 1, "user": len(prompt) - 2, "assistant": len(prompt)}
        for kind, place in places.items():
            if place > start:
                self._cache.insert_cache("model", prompt[:place], [self._Layer()], cache_type=kind)
        self._cache.insert_cache("model", [*prompt, *out], [self._Layer()], cache_type="assistant")


def first_token_times(llm: LLM, words: Words) -> dict[str, float]:
    """Seconds to the first token after 4,000 tokens: cold, and with a new question about them."""
    text = words.text(4000)
    one = SamplingParams(temperature=0.0, max_tokens=4, stop_token_ids=())

    def ask() -> float:
        stream = llm.submit(words.message("user", text + words.text(TURN)) + words.turn(), one)
        list(stream)
        assert stream.time_to_first_token is not None
        return stream.time_to_first_token

    cold = ask()
    second = ask()
    warm = sorted(ask() for _ in range(5))[2]
    return {"cold": cold, "second": second, "warm": warm}


def _fill(cache: SequenceCache, tokens: int) -> None:
    config_heads = cache.full[0].arrays()[0].shape
    k = mx.random.normal((1, config_heads[1], tokens, config_heads[3])).astype(mx.bfloat16)
    for layer in cache.layers:
        layer.update_and_fetch(k, k)
    cache.advance(tokens)
    mx.eval(cache.arrays())


def twenty_b_costs() -> dict[str, float]:
    """A window state of 20b's shape, bytes and seconds; the bytes of 10 branches of 8k tokens over one."""
    from mlx_gptoss.model.config import ModelConfig
    from tests.support.checkpoints import hf_config

    config = ModelConfig.from_hf(hf_config(SHAPES["20b"]))
    cache = SequenceCache(config, mx.bfloat16)
    _fill(cache, 600)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        state = cache.snapshot(history=cache.window_history + STATE_SLACK)
        assert state is not None
        mx.eval(state.data)
        times.append(time.perf_counter() - start)
    assert state is not None
    return {"bytes": state.nbytes, "seconds": sorted(times)[4], "branches": _branch_ratio(config)}


def _branch_ratio(config: Any) -> float:
    from dataclasses import replace

    small = replace(
        config, num_layers=4, layer_types=config.layer_types[:4]
    )  # a layer costs what a layer costs
    rng = np.random.default_rng(0)
    base = rng.integers(0, 200000, 8000).astype(np.int32)
    held = []
    mx.synchronize()
    start = mx.get_active_memory()
    store = PrefixStore(1 << 40)
    for _ in range(10):
        tokens = np.concatenate([base, rng.integers(0, 200000, 100).astype(np.int32)])
        match = store.match(tokens)
        cache = SequenceCache(small, mx.bfloat16)
        _fill(cache, len(tokens))
        state = cache.snapshot(history=cache.window_history + STATE_SLACK)
        store.insert(tokens, cache, [s for s in (*match.states, state) if s is not None])
        del cache, match, state
        held.append(mx.get_active_memory() - start)
    return held[-1] / held[0]


def measure() -> Iterator[tuple[str, Any]]:
    """Every figure, by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), SHAPE)
        write_byte_tokenizer(folder)
        for title, trace in TRACES.items():
            with load(folder, kv_budget=1 << 30, prefill_chunk=512) as llm:
                yield title, run_trace(llm, trace)
        with load(folder, kv_budget=1 << 30, prefill_chunk=512) as llm:
            yield "first token after 4,000 tokens", first_token_times(llm, Words(llm, 2))
    yield "20b shape", twenty_b_costs()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = dict(measure())
    if args.json:
        print(json.dumps({"machine": describe(), "results": results}, indent=1))
        return
    print(f"{'trace':34}{'new':>8}{'computed':>10}{'ratio':>8}{'mlx_lm':>9}{'ratio':>8}")
    for title in TRACES:
        r = results[title]
        mine, theirs = r["computed"] / r["new"], r["mlx_lm"] / r["new"]
        print(f"{title:34}{r['new']:8}{r['computed']:10}{mine:8.2f}{r['mlx_lm']:9}{theirs:8.2f}")
    t = results["first token after 4,000 tokens"]
    print(
        f"first token after 4,000 tokens: cold {t['cold'] * 1e3:.0f} ms, "
        f"second question {t['second'] * 1e3:.0f} ms,"
    )
    print(f"  later ones {t['warm'] * 1e3:.1f} ms = {t['warm'] / t['cold']:.3f} of cold")
    c = results["20b shape"]
    print(f"a window state of 20b: {c['bytes'] / 1e6:.2f} MB, {c['seconds'] * 1e3:.2f} ms")
    print(f"10 branches of one 8k-token document: {c['branches']:.2f} x the memory of one")


if __name__ == "__main__":
    main()
