"""Properties of speculation: the output is what it is without, whatever is guessed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_gptoss.checkpoint.reader import load_model
from mlx_gptoss.engine.runner import LocalRunner
from mlx_gptoss.engine.speculate import AFTER, PLAIN_EVERY, ModelDrafter, PromptLookup, Speculation
from mlx_gptoss.errors import RequestError
from mlx_gptoss.llm import LLM, load
from mlx_gptoss.sampling import SamplingParams
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

SHAPE = Shape(layers=3, hidden=64, intermediate=64, experts=4, top_k=2, window=16, vocab=300)
OPEN_END = SamplingParams(temperature=0.0, max_tokens=28, stop_token_ids=())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("speculate")
    return write_checkpoint(root / "target", SHAPE), write_checkpoint(root / "draft", SHAPE, seed=3)


@pytest.fixture(scope="module")
def plain(folders: tuple[Path, Path]) -> Iterator[LLM]:
    with load(folders[0], kv_budget=32 * 2**20) as llm:
        yield llm


def prompts() -> list[list[int]]:
    """Prompts that repeat themselves, and one that does not."""
    rng = random.Random(0)
    phrase = [rng.randrange(299) for _ in range(12)]
    return [phrase * 3, [*phrase, 7, *phrase[:9]], [rng.randrange(299) for _ in range(40)]]


@pytest.mark.parametrize("draft", ["lookup", "other model", "same model"])
def test_greedy_output_is_identical(folders: tuple[Path, Path], plain: LLM, draft: str) -> None:
    drafts: dict[str, str | Path] = {"other model": folders[1], "same model": folders[0]}
    chosen = drafts.get(draft, draft)
    with load(folders[0], kv_budget=32 * 2**20, draft=chosen, draft_tokens=5) as llm:
        for tokens in prompts():
            assert list(llm.generate(tokens, OPEN_END)) == list(plain.generate(tokens, OPEN_END))
        streams = [llm.submit(tokens, OPEN_END) for tokens in prompts()]
        for tokens, stream in zip(prompts(), streams, strict=True):
            assert [o.token_id for o in stream] == list(plain.generate(tokens, OPEN_END))
        stats = llm.stats()
    if draft == "same model":
        assert stats.accepted_tokens == stats.drafted_tokens > 0
    else:
        assert stats.accepted_tokens <= stats.drafted_tokens


def test_sampled_output_is_identical_with_a_seed(folders: tuple[Path, Path], plain: LLM) -> None:
    """The draws of a seed do not depend on the guesses: the distribution is the target's by construction."""
    params = SamplingParams(
        temperature=0.8,
        top_p=0.95,
        repetition_penalty=1.1,
        seed=5,
        max_tokens=24,
        stop_token_ids=(),
        logprobs=1,
    )
    for chosen in ("lookup", folders[0]):
        with load(folders[0], kv_budget=32 * 2**20, draft=chosen) as llm:
            for tokens in prompts():
                got, want = list(llm.submit(tokens, params)), list(plain.submit(tokens, params))
                assert [o.token_id for o in got] == [o.token_id for o in want]
                for a, b in zip(got, want, strict=True):
                    assert a.logprobs and b.logprobs
                    assert abs(a.logprobs.logprob - b.logprobs.logprob) < 1e-4


def test_stop_tokens_and_limits_hold_in_the_middle_of_a_draft(folders: tuple[Path, Path], plain: LLM) -> None:
    tokens = prompts()[0]
    free = list(plain.generate(tokens, OPEN_END))
    with load(folders[0], kv_budget=32 * 2**20, draft=folders[0], draft_tokens=6) as llm:
        for n in range(1, 9):
            params = SamplingParams(temperature=0.0, max_tokens=n, stop_token_ids=())
            assert list(llm.generate(tokens, params)) == free[:n]
        stop = free[4]
        params = SamplingParams(temperature=0.0, max_tokens=28, stop_token_ids=(stop,))
        assert list(llm.generate(tokens, params)) == free[: free.index(stop) + 1]
        # What was kept of that timeline is exact.
        assert list(llm.generate(tokens, OPEN_END)) == free


def test_lookup_continues_the_longest_run_seen_before() -> None:
    lookup = PromptLookup()
    assert lookup.propose([1, 2, 3, 4, 5, 1, 2], 3) == [3, 4, 5]
    assert lookup.propose([1, 2, 3, 4, 5, 1, 2, 9], 3) == []
    assert lookup.propose([1, 2, 3, 4, 5, 1, 2, 9, 3, 4], 2) == [5, 1]
    assert PromptLookup().propose([1], 3) == []


def test_guessing_ends_when_it_is_wrong() -> None:
    class Wrong:
        nbytes = 0
        behind = False

        def propose(self, tokens: list[int], limit: int) -> list[int]:
            return [0] * limit

    speculation = Speculation(Wrong(), 4)
    assert speculation.propose([1, 2], 2) == [0, 0]
    ended = [speculation.record(4, 0, 0.01) for _ in range(AFTER // 4 + 3)]
    assert ended.count(True) == 1 and not speculation.on
    assert speculation.propose([1, 2], 2) == []


def test_guessing_ends_when_it_costs_time() -> None:
    speculation = Speculation(PromptLookup(), 4)
    for _ in range(10):
        speculation.record(0, 0, 0.01)
    assert not any(speculation.record(4, 3, 0.03) for _ in range(10)) and speculation.on
    assert any(speculation.record(4, 1, 0.2) for _ in range(10)) and not speculation.on


def test_a_draft_model_reads_one_chunk_at_a_time(folders: tuple[Path, Path]) -> None:
    model = load_model(folders[0])
    lengths: list[int] = []

    class Counting(LocalRunner):
        def forward(self, tokens: mx.array, *rest: Any, awaited: bool = False) -> mx.array | None:
            lengths.append(tokens.size)
            return super().forward(tokens, *rest, awaited=awaited)

    drafter = ModelDrafter(Counting(model), 32)
    speculation = Speculation(drafter, 4)
    tokens = prompts()[2] * 4
    for _ in range(PLAIN_EVERY - 1):
        lengths.clear()
        guesses = speculation.propose(tokens, 9)
        assert sum(lengths) <= 32 + 3
        speculation.record(len(guesses), len(guesses), 1.0)
        if guesses:
            break
        tokens.append(7)
    # A round in which the draft model was still reading tells nothing of what a token costs.
    assert speculation.plain_rounds == 0
    assert len(tokens) == 160 + 5
    fresh = ModelDrafter(LocalRunner(model), 512)
    assert guesses == fresh.propose(tokens, 4)
    # It goes on from there, also after guesses that were all wrong.
    tokens += [8, 9]
    assert drafter.propose(tokens, 4) == fresh.propose(tokens, 4) != []


def test_a_draft_model_reads_again_what_its_window_lost(folders: tuple[Path, Path]) -> None:
    """More wrong guesses than its caches can go back by, and a chunk shorter than the replay."""
    model = load_model(folders[0])
    drafter, tokens = ModelDrafter(LocalRunner(model), 16), prompts()[2] * 8
    guesses: list[int] = []
    for limit in (300, 4):
        tokens = [*tokens, 5]
        for _ in range(2 * PLAIN_EVERY):
            guesses = guesses or drafter.propose(tokens, limit)
        assert guesses == ModelDrafter(LocalRunner(model), 512).propose(tokens, limit)
        guesses = []


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    other = write_checkpoint(tmp_path, Shape(layers=2, hidden=64, intermediate=64, vocab=320))
    with pytest.raises(RequestError, match="320 tokens") as caught:
        load(folders[0], kv_budget=32 * 2**20, draft=other)
    assert caught.value.field == "draft"
