"""The engine against fresh computations and against itself: exactness, batching, waiting, quantised KV.

    python -m benchmarks.engine [--scripts 1000] [--model demo] [--rounds 5] [--json]

Exactness runs on small random checkpoints in float32; throughput on --model (default: the demo model).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.reader import load_model
from mlx_gptoss.device import describe
from mlx_gptoss.llm import LLM, load
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.sequence_cache import SequenceCache
from mlx_gptoss.sampling import SamplingParams
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

SHAPE = Shape(
    layers=4, hidden=64, intermediate=64, experts=4, top_k=2, heads=4, kv_heads=2, window=16, vocab=300
)


def forward(model: Model, tokens: list[int], cache: SequenceCache) -> np.ndarray:
    logits = model(mx.array(tokens), [Segment(len(tokens), cache)])
    assert logits is not None
    return np.array(logits)


def edit_scripts(model: Model, count: int) -> float:
    """The worst logit difference to a fresh computation over random edits of a timeline."""
    worst = 0.0
    for seed in range(count):
        rng = random.Random(seed)
        lines: list[dict[str, Any]] = [
            {"cache": model.make_cache(), "tokens": [], "states": []} for _ in range(2)
        ]
        at = lines[0]
        for _ in range(4):
            action = rng.choice(["append", "short", "deep", "branch", "swap"])
            if action == "swap":
                at = lines[rng.randrange(2)]
            length = len(at["tokens"])
            keep = {"short": max(0, length - rng.randrange(6)), "deep": rng.randrange(length + 1)}.get(
                action, length
            )
            states = [s for s in at["states"] if s.end <= keep]
            known = states if rng.random() < 0.5 else []
            if action == "branch":
                keep = rng.randrange(length + 1)
                states = [s for s in at["states"] if s.end <= keep]
                cache = model.make_cache()
                start = cache.load(at["cache"].export([(0, keep)]), states)
                at = {"cache": cache, "tokens": at["tokens"][:keep], "states": states}
                lines[rng.randrange(2)] = at
            else:
                start = at["cache"].rewind(keep, known)
            at["tokens"][keep:] = [rng.randrange(SHAPE.vocab) for _ in range(rng.randrange(1, 40))]
            at["states"] = states
            got = forward(model, at["tokens"][start:], at["cache"])[keep - start :]
            want = forward(model, at["tokens"], model.make_cache())[keep:]
            worst = max(worst, float(np.abs(got - want).max()))
            state = at["cache"].snapshot(history=rng.choice([None, 24]))
            at["states"] += [state] if state is not None else []
    return worst


def ragged_batches(model: Model) -> tuple[float, int]:
    """Batches of 1 to 16 sequences, prefill and decode mixed: worst difference, argmaxes that differ."""
    worst, differ = 0.0, 0
    for count in range(1, 17):
        rng = random.Random(count)
        lines = [[rng.randrange(SHAPE.vocab) for _ in range(rng.randrange(2, 60))] for _ in range(count)]
        parts = [rng.choice([1, min(8, len(t) - 1), len(t)]) for t in lines]
        caches = [model.make_cache() for _ in lines]
        for tokens, part, cache in zip(lines, parts, caches, strict=True):
            if len(tokens) > part:
                forward(model, tokens[:-part], cache)
        flat = [t for tokens, part in zip(lines, parts, strict=True) for t in tokens[-part:]]
        segments = [Segment(part, cache) for part, cache in zip(parts, caches, strict=True)]
        logits = model(mx.array(flat), segments)
        assert logits is not None
        got, start = np.array(logits), 0
        for tokens, part in zip(lines, parts, strict=True):
            want = forward(model, tokens, model.make_cache())[-part:]
            mine = got[start : start + part]
            worst = max(worst, float(np.abs(mine - want).max()))
            differ += int((mine.argmax(-1) != want.argmax(-1)).sum())
            start += part
    return worst, differ


def throughput(llm: LLM, count: int, tokens: int = 64) -> dict[str, float]:
    """Decoded tokens a second of `count` requests at once, and how evenly they came."""
    rng = np.random.default_rng(count)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, stop_token_ids=())
    counts = [0] * count
    snapshot: list[list[int]] = []

    def sink(index: int) -> Any:
        def take(item: Any) -> None:
            if hasattr(item, "token_id"):
                counts[index] += 1
                if max(counts) == tokens // 2 and not snapshot:
                    snapshot.append(list(counts))

        return take

    prompts = [rng.integers(0, llm.config.vocab_size, 32).tolist() for _ in range(count)]
    streams = [llm.submit(p, params, sink=sink(i)) for i, p in enumerate(prompts)]
    while any(s.finish_reason is None for s in streams):
        time.sleep(0.002)
    spent = max(s.decode_seconds or 0.0 for s in streams)
    return {"rate": count * (tokens - 1) / spent, "fairness": max(snapshot[0]) / max(1, min(snapshot[0]))}


def interrupted_prefill(llm: LLM, length: int) -> int:
    """Forwards from the arrival of a short request in the middle of a long prefill to its first token."""
    rng = np.random.default_rng(3)
    one = SamplingParams(temperature=0.0, max_tokens=1, stop_token_ids=())
    long = llm.submit(rng.integers(0, llm.config.vocab_size, length).tolist(), one)
    while llm.stats().forwards == 0 or long.computed_tokens < 2 * llm.engine.options.prefill_chunk:
        time.sleep(0.002)
    before = llm.stats().forwards
    seen: list[int] = []
    scheduler = llm.engine.scheduler
    short = llm.submit(
        rng.integers(0, llm.config.vocab_size, 20).tolist(),
        one,
        sink=lambda item: seen.append(scheduler.counters.forwards),
    )
    while short.finish_reason is None:
        time.sleep(0.002)
    long.cancel()
    return seen[0] - before


def quantised_kv(folder: Path) -> dict[str, tuple[float, float]]:
    """KV bits -> (mean logit difference over the mean logit, share of argmaxes kept) while decoding."""
    model = load_model(folder)
    tokens = np.random.default_rng(4).integers(0, model.config.vocab_size, 200).tolist()

    def decode(bits: tuple[int | None, int | None]) -> np.ndarray:
        cache = SequenceCache(model.config, model.dtype, bits)
        return np.concatenate([forward(model, [t], cache) for t in tokens])

    exact = decode((None, None))
    results = {}
    for bits in ((8, 8), (8, None), (None, 8), (4, 4)):
        got = decode(bits)
        kept = float((got.argmax(-1) == exact.argmax(-1)).mean())
        results[f"K {bits[0]} V {bits[1]}"] = (float(np.abs(got - exact).mean() / np.abs(exact).mean()), kept)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scripts", type=int, default=1000)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=5, help="of 1 and of 8 requests; medians are printed")
    parser.add_argument("--long", type=int, default=8000, help="length of the interrupted prefill, tokens")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": describe()}
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), SHAPE)
        model = load_model(folder)
        results["edit scripts, worst logit difference"] = edit_scripts(model, args.scripts)
        worst, differ = ragged_batches(model)
        results["ragged batches, worst logit difference"] = worst
        results["ragged batches, argmaxes that differ"] = differ
        results["quantised KV (logit error, argmaxes kept)"] = quantised_kv(folder)
        with load(folder, kv_budget=1 << 29, prefill_chunk=256) as llm:
            results["forwards a short request waits in a long prefill"] = interrupted_prefill(llm, args.long)
    with load(args.model, kv_budget=1 << 29) as llm:
        throughput(llm, 1)
        rounds = [(throughput(llm, 1), throughput(llm, 8)) for _ in range(args.rounds)]
    one, eight = (statistics.median(r[i]["rate"] for r in rounds) for i in (0, 1))
    results["tokens a second of 1 request"], results["tokens a second of 8 requests"] = one, eight
    results["decode rate of 8 requests over 1"] = eight / one
    results["most over fewest tokens of 8 requests"] = max(r[1]["fairness"] for r in rounds)
    if args.json:
        print(json.dumps(results, indent=1))
        return
    for title, value in results.items():
        print(f"{title}: {value}")


if __name__ == "__main__":
    main()
