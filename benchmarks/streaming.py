"""What streaming experts costs, and whether it keeps to its plan.

    python -m benchmarks.streaming same FOLDER           are the logits the same bits as with all in memory?
    python -m benchmarks.streaming layer FOLDER          one layer, streamed beside resident
    python -m benchmarks.streaming prefill FOLDER        a prompt of 2,000 tokens: reads, and time
    python -m benchmarks.streaming fit FOLDER --limit 4GB [--tokens 8] [--prompt 4]
                                     loads and decodes under a hard limit (a control group of Linux, as root)
    python -m benchmarks.streaming crowd FOLDER [--requests 2000]
                                     64 short requests at a time with six slots, tokens compared

FOLDER is a checkpoint; tests.support.checkpoints writes random ones of any size, and
tests.support.sparse_checkpoint ones of true sizes without their bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.disk_speed import read_rates
from mlx_gptoss.checkpoint.expert_file import ExpertFiles
from mlx_gptoss.checkpoint.memory import plan_checkpoint
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.device import limit_memory, peak_rss
from mlx_gptoss.engine.runner import streamed_experts
from mlx_gptoss.llm import load
from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.sequence_cache import SequenceCache
from mlx_gptoss.model.streamed import StreamedExperts
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.sizes import parse_size

GROUPS = Path("/sys/fs/cgroup/memory")


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def streamed_layer(folder: Path, slots: int, layer: int = 1) -> StreamedExperts:
    checkpoint = Checkpoint(folder)
    checkpoint.streaming = ExpertFiles(checkpoint, slots)
    experts = checkpoint.layer(layer).moe.experts
    assert isinstance(experts, StreamedExperts)
    mx.eval(experts.arrays())
    return experts


def book(experts: StreamedExperts, ids: np.ndarray) -> None:
    """What a step without misses does beside computing: count, look up, and upload the slots."""
    slots = experts.slots
    slots.claim(slots.waves(slots.note(ids), ids)[0])
    mx.eval(mx.array(slots.places(ids), mx.uint32))


class PlainReads:
    """An expert's bytes, read by one preadv after the other into plain memory."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        named = f".{layer}.mlp."
        wanted = [t for name, t in checkpoint.tensors.items() if named in name and t.dtype in ("U8", "U32")]
        wanted = [t for t in wanted if t.shape[0] == checkpoint.config.num_experts]
        self._spans = [(os.open(t.path, os.O_RDONLY), t.start, t.nbytes // t.shape[0]) for t in wanted]
        self._into = [np.zeros(size, np.uint8) for _, _, size in self._spans]

    def read(self, expert: int) -> None:
        for (descriptor, start, size), into in zip(self._spans, self._into, strict=True):
            assert os.preadv(descriptor, [into.data], start + expert * size) == size


def layer_costs(folder: Path, rounds: int) -> dict[str, float]:
    """Alternating on the same rows, so that what else the machine does falls on both."""
    checkpoint = Checkpoint(folder)
    config, rng = checkpoint.config, np.random.default_rng(0)
    layer = checkpoint.layer(1)
    mx.eval(layer.arrays())
    count, k = config.num_experts, config.experts_per_token
    whole, few = streamed_layer(folder, count), streamed_layer(folder, 2 * k)
    whole.prepare(range(count))
    cache = SequenceCache(config, checkpoint.dtype)
    batch = Batch([Segment(1, cache)], k)
    x = mx.random.normal((1, config.hidden_size)).astype(checkpoint.dtype)
    mx.eval(x)

    def timed(experts: Any, ids: np.ndarray) -> float:
        chosen = mx.array(ids[None].astype(np.uint32))
        mx.eval(chosen)
        return seconds(lambda: mx.eval(experts(x, chosen, batch)))

    def whole_layer() -> float:
        rows = layer.attention(x, Batch([Segment(1, SequenceCache(config, checkpoint.dtype))], k))
        return seconds(lambda: mx.eval(layer.moe(rows, batch)))

    resident, hit, missed, reads, layers, booked, warm = [], [], [], [], [], [], []
    plain = PlainReads(checkpoint, 1)
    for _ in range(rounds):
        ids = rng.choice(count, k, replace=False)
        resident.append(timed(layer.moe.experts, ids))
        hit.append(timed(whole, ids) - resident[-1])
        layers.append(whole_layer())
        booked.append(seconds(partial(book, whole, ids[None])))
        warm.append(min(seconds(partial(book, whole, ids[None])) for _ in range(9)))
        order = rng.permutation(count).tolist()
        absent = next(e for e in order if e not in few.slots.held)
        held = [e for e in few.slots.held if e != absent][-(k - 1) :] or order[: k - 1]
        before = few.counts.misses
        spent = timed(few, np.array([*held, absent]))
        if few.counts.misses == before + 1:
            missed.append(spent - resident[-1] - statistics.median(hit))
            reads.append(seconds(partial(plain.read, absent)))
    median = statistics.median
    return {
        "a layer, every expert resident, ms": median(layers) * 1e3,
        "more with every expert in a slot, ms": median(hit) * 1e3,
        "more, of the layer, %": median(hit) / median(layers) * 100,
        "slot map and upload, us": median(booked) * 1e6,
        "the same once more, with the code in the core's cache, us": median(warm) * 1e6,
        "a miss, ms": median(missed) * 1e3,
        "plain preadv of what a miss reads, ms": median(reads) * 1e3,
        "a miss, times plain preadv": median(missed) / median(reads),
    }


def disk_costs(folder: Path) -> dict[str, float]:
    """Reading absent experts by our readers against plain reads of the file, both past the page cache."""
    checkpoint = Checkpoint(folder)
    plan = plan_checkpoint(checkpoint)
    paths = sorted({t.path for t in checkpoint.tensors.values()}, key=lambda p: -p.stat().st_size)
    rates = read_rates(paths[0], plan.expert.stored)
    slots = checkpoint.config.num_experts
    found = []
    for layer in (0, 1, 2):
        experts = streamed_layer(folder, slots, min(layer, checkpoint.config.num_layers - 1))
        for path in paths:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        spent = seconds(lambda e=experts: e.prepare(range(slots)))  # type: ignore[misc]
        found.append(slots * plan.expert.stored / spent)
    return {
        **{f"the disk at {depth} reads at a time, GB/s": rate / 1e9 for depth, rate in rates.items()},
        "our readers, GB/s": statistics.median(found) / 1e9,
        "our readers, of the disk at 4": statistics.median(found) / rates[4],
    }


def prefill(folder: Path, tokens: int) -> dict[str, float]:
    """A prompt through few slots, against computing alone (every expert held) and reading alone.

    Each in a process of its own: what the one held is not there for the other.
    """
    context = multiprocessing.get_context("spawn")
    found: dict[str, float] = {}
    for slots in (None, 8):
        with context.Pool(1) as pool:
            found |= pool.apply(prefilled, (folder, tokens, slots))
    slower = max(found["resident, s"], found["reading alone, s"])
    found["streamed, times the slower of computing and reading"] = found["streamed, s"] / slower
    return found


def prefilled(folder: Path, tokens: int, slots: int | None) -> dict[str, float]:
    rng, checkpoint = np.random.default_rng(0), Checkpoint(folder)
    layers, count = checkpoint.config.num_layers, checkpoint.config.num_experts
    prompt = rng.integers(0, checkpoint.config.vocab_size, tokens).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=1, stop_token_ids=())
    memory = "all" if slots is None else (plan_checkpoint(checkpoint, slots).slot * slots)
    with load(folder, expert_memory=memory) as llm:
        list(llm.submit(prompt[:4], params))
        before = llm.stats()
        taken = seconds(lambda: list(llm.submit(prompt, params)))
        after = llm.stats()
    if slots is None:
        return {"resident, s": taken}
    most = max(
        -(-(a.misses - b.misses) // count)
        for a, b in zip(after.expert_layers, before.expert_layers, strict=True)
    )
    largest = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    rate = read_rates(largest, checkpoint_record(checkpoint), (4,))[4]
    return {
        "streamed, s": taken,
        "experts read, of all": (after.expert_misses - before.expert_misses) / (layers * count),
        "most reads of an expert": most,
        "waited for reads, s": after.expert_wait_seconds - before.expert_wait_seconds,
        "reading alone, s": (after.expert_read_bytes - before.expert_read_bytes) / rate,
    }


def checkpoint_record(checkpoint: Checkpoint) -> int:
    return plan_checkpoint(checkpoint).expert.stored


def logits(model: Model) -> list[np.ndarray]:
    """Of a prompt and decodes alone, of eight ragged sequences and their decodes, of a rewound one."""
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 64)
    found = []

    def step(parts: list[tuple[np.ndarray, SequenceCache]]) -> None:
        flat = mx.array(np.concatenate([t for t, _ in parts]).astype(np.int32))
        out = model(flat, [Segment(len(t), cache) for t, cache in parts])
        assert out is not None
        found.append(np.array(out.astype(mx.float32)))

    alone = model.make_cache()
    step([(tokens[:40], alone)])
    for i in range(40, 46):
        step([(tokens[i : i + 1], alone)])
    caches = [model.make_cache() for _ in range(8)]
    step([(tokens[i : 2 * i + 1], cache) for i, cache in enumerate(caches)])
    for n in range(3):
        step([(tokens[8 * n + i : 8 * n + i + 1], cache) for i, cache in enumerate(caches)])
    caches[5].rewind(4)
    step([(tokens[:5], caches[5])])
    return found


def same(folder: Path) -> dict[str, Any]:
    """Logits by slots against those with every expert in memory; ends with status 1 where a bit differs."""
    expected = logits(read_model(Checkpoint(folder)))
    config = Checkpoint(folder).config
    count, differ = config.num_experts, False
    for slots in sorted({count, 16, 8, config.experts_per_token}, reverse=True):
        checkpoint = Checkpoint(folder)
        checkpoint.streaming = ExpertFiles(checkpoint, slots)
        rows = logits(model := read_model(checkpoint))
        off = max(float(np.abs(a - b).max()) for a, b in zip(rows, expected, strict=True))
        equal = all(np.array_equal(a, b) for a, b in zip(rows, expected, strict=True))
        misses = sum(e.counts.misses for e in streamed_experts(model))
        told = "the same bits" if equal else f"off by {off}"
        print(f"{slots} of {count} slots, {config.num_layers} layers: {told} ({misses} reads)", flush=True)
        differ |= not equal
        del model, checkpoint
    if differ:
        raise SystemExit(1)
    return {}


@contextlib.contextmanager
def limited(limit: int) -> Iterator[Path]:
    """A control group with a hard limit on memory, page cache included."""
    group = GROUPS / f"streaming-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def fit(args: argparse.Namespace) -> dict[str, Any]:
    """Load and decode in a process of its own that the system ends above the limit."""
    limit = parse_size(args.limit)
    if limit is None:
        raise SystemExit(f"--limit is {args.limit!r}: expected a size such as 4GB")
    with limited(limit) as group:

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        command = [sys.executable, "-m", "benchmarks.streaming", "inside", str(args.folder)]
        command += ["--tokens", str(args.tokens), "--expert-memory", args.expert_memory]
        command += ["--prompt", str(args.prompt or 4)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        if done.returncode:
            raise SystemExit(f"it ended with {done.returncode}: out of memory, or the error above")
        found: dict[str, Any] = json.loads(done.stdout)
        found["limit, GB"] = limit / 1e9
        found["failures of the limit"] = int((group / "memory.failcnt").read_text())
        return found


def inside(folder: Path, tokens: int, prompt: int, memory: str) -> dict[str, Any]:
    lines: list[str] = []
    start = time.perf_counter()
    with load(folder, expert_memory=memory, max_context=256, announce=lines.append) as llm:
        loaded = time.perf_counter() - start
        params = SamplingParams(temperature=0.0, max_tokens=tokens, stop_token_ids=())
        stream = llm.submit(list(range(1, prompt + 1)), params)
        out = [output.token_id for output in stream]
        stats = llm.stats()
        slots = stats.expert_layers[0].slots if stats.expert_layers else None
        planned = plan_checkpoint(Checkpoint(folder), slots).total(256)
        return {
            "plan": lines[0],
            "loading, s": loaded,
            "first token, s": stream.time_to_first_token,
            "tokens": out,
            "tokens/s": (tokens - 1) / (stream.decode_seconds or 1.0),
            "hit rate": stats.expert_hit_rate,
            "planned, GB": planned / 1e9,
            "peak resident, GB": peak_rss() / 1e9,
            "peak of the plan": peak_rss() / planned,
        }


def crowd(folder: Path, requests: int) -> dict[str, Any]:
    """Requests, 64 of them at a time, on six slots and on all experts: the same tokens?"""
    checkpoint = Checkpoint(folder)
    slot = plan_checkpoint(checkpoint, 6).slot
    params = SamplingParams(temperature=0.0, max_tokens=4, stop_token_ids=())
    rng = np.random.default_rng(0)
    vocab = checkpoint.config.vocab_size
    prompts = [rng.integers(0, vocab, rng.integers(1, 20)).tolist() for _ in range(requests)]
    found: dict[str, Any] = {}
    outputs: list[list[list[int]]] = []
    for memory in ("all", 6 * slot):
        with load(folder, expert_memory=memory) as llm:
            start = time.perf_counter()
            done: list[list[int]] = []
            for first in range(0, requests, 64):
                streams = [llm.submit(p, params) for p in prompts[first : first + 64]]
                done += [[output.token_id for output in stream] for stream in streams]
            found[f"{'six slots' if outputs else 'all experts'}, s"] = time.perf_counter() - start
            outputs.append(done)
    found["requests with other tokens"] = sum(a != b for a, b in zip(*outputs, strict=True))
    if outputs[0] != outputs[1]:
        raise SystemExit(f"other tokens: {found}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["same", "layer", "prefill", "fit", "inside", "crowd"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", default="4GB")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--prompt", type=int, help="tokens of the prompt (default: 2000; of fit: 4)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--expert-memory", default="auto")
    args = parser.parse_args()
    limit_memory(0)
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "same": lambda: same(args.folder),
        "layer": lambda: layer_costs(args.folder, args.rounds) | disk_costs(args.folder),
        "prefill": lambda: prefill(args.folder, args.prompt or 2000),
        "fit": lambda: fit(args),
        "inside": lambda: inside(args.folder, args.tokens, args.prompt or 4, args.expert_memory),
        "crowd": lambda: crowd(args.folder, args.requests),
    }
    found = ways[args.what]()
    if args.what == "inside":
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    main()
