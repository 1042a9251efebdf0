"""A trace is what was chosen, and its replay misses what the run did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.experts import check, demo, hits, optimum, synthetic
from mlx_gptoss.cli.bench import traced
from mlx_gptoss.llm import LLM, load
from mlx_gptoss.model.slots import Slots, replay
from mlx_gptoss.model.trace import read_trace
from mlx_gptoss.sampling import SamplingParams
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape
from tests.support.scheduling import prompt

SHAPE = Shape(layers=3, hidden=64, intermediate=64, experts=16, heads=4, window=16, vocab=300)
PARAMS = SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=())


def use(llm: LLM) -> list[list[int]]:
    """A long prompt, which goes through in waves, decodes, and several requests together."""
    found = [[o.token_id for o in llm.submit(prompt(seed, 5 + 60 * seed), PARAMS)] for seed in range(3)]
    streams = [llm.submit(prompt(seed, 9), PARAMS) for seed in range(3, 7)]
    return found + [[o.token_id for o in stream] for stream in streams]


@pytest.mark.parametrize("slots", [5, 9, 16])
def test_a_replay_counts_the_misses_of_the_run(tmp_path: Path, slots: int) -> None:
    folder = write_checkpoint(tmp_path / "model", SHAPE)
    options = {"expert_memory": slots * 3 * 7296 if slots < 16 else "all"}
    file = tmp_path / "trace.jsonl"
    with load(folder, prefill_chunk=32, **options) as llm:  # type: ignore[arg-type]
        with traced(llm, file):
            told = use(llm)
        misses = [c.misses for c in llm.stats().expert_layers]
    trace = read_trace(file)
    assert (trace.experts, trace.k, len(trace.steps)) == (16, 4, 3)
    if slots < 16:
        assert trace.slots == slots and trace.misses == misses
        assert [sum(replay(Slots(slots, 16), layer)) for layer in trace.steps] == misses
        assert "as in the run" in check(trace)
    else:
        assert trace.misses is None
    with load(folder, prefill_chunk=32, expert_memory="all") as llm:
        assert use(llm) == told


def test_tracing_ends(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", SHAPE)
    with load(folder) as llm:
        with traced(llm, tmp_path / "trace"):
            use(llm)
        size = (tmp_path / "trace").stat().st_size
        use(llm)
        assert (tmp_path / "trace").stat().st_size == size


@pytest.mark.parametrize("experts", [32, 128])
def test_our_policy_lies_between_plain_recency_and_the_optimum(experts: int) -> None:
    trace = synthetic(experts, layers=1, tokens=500)
    for slots in (experts // 8, experts // 4, experts // 2):
        found = hits(trace, slots)
        assert found["recency"] * 0.97 <= found["ours"] <= found["optimum"]


def test_our_policy_is_better_than_plain_recency_on_what_the_demo_model_chooses() -> None:
    """And what a run with three slots missed is what the replay counts."""
    streamed = demo(slots=3)
    assert streamed.misses and "as in the run" in check(streamed)
    for slots in (2, 3):
        found = hits(streamed, slots)
        assert found["recency"] * 0.97 <= found["ours"] <= found["optimum"]
    assert found["recency"] < found["ours"]


def test_the_optimum_is_what_trying_everything_finds() -> None:
    """Choices of one expert a step on two slots, against a search over every eviction."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        steps = [np.array([[e]]) for e in rng.integers(0, 4, 9)]

        def fewest(at: int, held: frozenset[int], steps: list[np.ndarray] = steps) -> int:
            if at == len(steps):
                return 0
            e = int(steps[at][0, 0])
            if e in held:
                return fewest(at + 1, held)
            if len(held) < 2:
                return 1 + fewest(at + 1, held | {e})
            return 1 + min(fewest(at + 1, held - {out} | {e}) for out in held)

        assert optimum(steps, 2) == fewest(0, frozenset())
