"""Traces of chosen experts on any number of slots: our policy, plain recency, frequency, and the optimum.

    python -m benchmarks.experts [TRACE ..] [--slots 8,16,32] [--bandwidth GB/s] [--disk GB/s]

TRACE is a file of `mlx-gptoss bench --trace`; without one, what the demo model chooses while it answers is
replayed, and synthetic traces that were fitted to a published replay of gpt-oss-120b. A run that streamed
wrote its misses at the end: the replay must count the same. With --bandwidth and --disk (see `bench`) the
table predicts tokens a second: the bytes of a token over the memory's bandwidth, and those of its misses over
the disk's.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.memory import plan_checkpoint
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.cli.bench import traced
from mlx_gptoss.llm import load
from mlx_gptoss.model.slots import Slots, replay
from mlx_gptoss.model.trace import Trace, read_trace

RECORD = 13_219_200  # bytes of an expert of either model
# Bytes that a token reads of everything else, attention and head in 4 bits.
DENSE = {32: 0.70e9, 128: 0.90e9}


class Recent(Slots):
    """The longest unused leaves, however often it was used."""

    def _evict(self, stay: object) -> int:
        self._lately = [0.0] * self.experts
        return super()._evict(stay)  # type: ignore[arg-type]


class Frequent(Slots):
    """The least used of late leaves, whenever that was."""

    def _evict(self, stay: object) -> int:
        assert isinstance(stay, set)
        others = [e for e in self._held if e not in stay and e not in self._spared]
        return self._held.pop(min(others, key=lambda e: self._lately[e]))


def optimum(steps: Sequence[np.ndarray], slots: int) -> int:
    """The fewest misses there can be: whoever is wanted last leaves (Belady 1966), step by step."""
    uses: dict[int, list[int]] = {}
    for at, chosen in enumerate(steps):
        for expert in np.unique(chosen).tolist():
            uses.setdefault(expert, []).append(at)
    held: set[int] = set()
    misses = 0
    for chosen in steps:
        wanted = np.unique(chosen).tolist()
        for expert in wanted:
            uses[expert].pop(0)
        missing = [e for e in wanted if e not in held]
        misses += len(missing)
        held.update(wanted)
        while len(held) > slots:
            others = held.difference(wanted) or held
            held.remove(max(others, key=lambda e: uses[e][0] if uses[e] else len(steps)))
    return misses


ASKED = (
    "What is the capital of France?",
    "What is 12 + 30?",
    "How many days are in March?",
    "Is 17 a prime number?",
    "Sort 5, 3, 9.",
    "What is the opposite of hot?",
    "Spell cat backwards.",
    "Hello!",
    "Who are you?",
    "What colour is the sky?",
)


def demo(slots: int | None = None) -> Trace:
    """What the demo model chooses while it answers, with so many slots a layer (default: all in memory)."""
    slot = plan_checkpoint(Checkpoint(resolve("demo"), "float32"), slots).slot
    memory = "all" if slots is None else slots * slot
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.jsonl"
        with load("demo", dtype="float32", max_context=2048, expert_memory=memory) as llm, traced(llm, file):
            for question in ASKED:
                llm.respond(question, temperature=0.0)
        return read_trace(file)


def synthetic(experts: int, layers: int = 4, tokens: int = 1000, seed: int = 0) -> Trace:
    """Zipf favourites in each layer, repeats of the last eight tokens, and topics that change."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(layers):
        favourites = (1 / np.arange(1, experts + 1) ** 1.2)[rng.permutation(experts)]
        chosen: list[np.ndarray] = []
        for t in range(tokens):
            if t % 300 == 0:
                topic = favourites * rng.lognormal(0, 1.0, experts)
            recent = np.concatenate(chosen[-8:]).reshape(-1) if chosen else np.array([], int)
            ids: list[int] = []
            for _ in range(4):
                if len(recent) and rng.random() < 0.45 and (e := int(rng.choice(recent))) not in ids:
                    ids.append(e)
            rest = topic.copy()
            rest[ids] = 0
            ids += rng.choice(experts, 4 - len(ids), replace=False, p=rest / rest.sum()).tolist()
            chosen.append(np.array([ids]))
        steps.append(chosen)
    return Trace(experts, 4, steps, None, None)


def hits(trace: Trace, slots: int) -> dict[str, float]:
    """The share of chosen experts that were in memory, by policy."""
    chosen = sum(len(np.unique(step)) for layer in trace.steps for step in layer)
    misses = {
        "ours": sum(sum(replay(Slots(slots, trace.experts), layer)) for layer in trace.steps),
        "recency": sum(sum(replay(Recent(slots, trace.experts), layer)) for layer in trace.steps),
        "frequency": sum(sum(replay(Frequent(slots, trace.experts), layer)) for layer in trace.steps),
        "optimum": sum(optimum(layer, slots) for layer in trace.steps),
    }
    return {name: 1 - count / chosen for name, count in misses.items()}


def rows(trace: Trace, counts: Sequence[int], bandwidth: float | None, disk: float | None) -> Iterator[str]:
    """The table's lines."""
    predicted = bandwidth is not None and disk is not None and trace.experts in DENSE
    yield "| slots | ours | recency | frequency | optimum |" + (" tok/s |" if predicted else "")
    yield "|---:|---:|---:|---:|---:|" + ("---:|" if predicted else "")
    for slots in counts:
        found = hits(trace, slots)
        line = f"| {slots} of {trace.experts} | " + " | ".join(f"{h:.1%}" for h in found.values()) + " |"
        if predicted and bandwidth and disk:
            used = trace.k * len(trace.steps) * RECORD
            seconds = (DENSE[trace.experts] + used) / bandwidth + (1 - found["ours"]) * used / disk
            line += f" {1 / seconds:.1f} |"
        yield line


def check(trace: Trace) -> str:
    """Whether a replay misses what the run did that recorded the trace."""
    if trace.slots is None or trace.misses is None:
        return "every expert was in memory when it was recorded"
    slots = trace.slots
    counted = [sum(replay(Slots(slots, trace.experts), layer)) for layer in trace.steps]
    same = "as in the run" if counted == trace.misses else f"BUT the run had {sum(trace.misses)}"
    return f"{slots} slots: {sum(counted)} misses in the replay, {same}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", metavar="TRACE", nargs="*", type=Path)
    parser.add_argument("--slots", help="numbers of slots (default: an eighth to all of the experts)")
    parser.add_argument("--bandwidth", type=float, help="the memory's, GB/s")
    parser.add_argument("--disk", type=float, help="the disk's, GB/s")
    args = parser.parse_args()
    traces = {str(path): read_trace(path) for path in args.traces}
    if not traces:
        made = {f"synthetic, {n} experts": synthetic(n) for n in (32, 128)}
        traces = {"the demo model": demo(), "the demo model, streamed": demo(3), **made}
    for name, trace in traces.items():
        shares = [trace.experts * eighths // 8 for eighths in range(1, 8)]
        counts = [int(n) for n in args.slots.split(",")] if args.slots else shares
        print(f"{name}: {sum(map(len, trace.steps))} steps of {len(trace.steps)} layers; {check(trace)}")
        giga = [None if n is None else n * 1e9 for n in (args.bandwidth, args.disk)]
        print("\n".join(rows(trace, sorted({max(trace.k, n) for n in counts}), *giga)))


if __name__ == "__main__":
    main()
