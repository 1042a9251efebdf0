"""The graph computes what the published reference computes, in float32, however the tokens are fed to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.reader import load_model
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.sequence_cache import SequenceCache
from tests.support.checkpoints import write_checkpoint
from tests.support.golden_cases import NAMES, load_golden
from tests.support.oracle import forward
from tests.support.random_weights import MlxRecipe, Shape, truth

LAYOUTS = {
    "hf": ("hf", None),
    "original": ("original", None),
    "bf16": ("bf16", None),
    "mlx mxfp4 experts, dense parts in 8 bits": ("mlx", MlxRecipe(8)),
    "mlx mxfp4 experts, dense parts in bfloat16": ("mlx", MlxRecipe(None)),
    "mlx 4-bit experts, dense parts in 4 bits": ("mlx", MlxRecipe(4, 4)),
    "mlx 8-bit experts, dense parts in 8 bits": ("mlx", MlxRecipe(8, 8)),
}
ODD = Shape(layers=3, hidden=128, intermediate=64, experts=6, heads=4, window=16, vocab=160)


def feed(model: Model, tokens: Sequence[int] | np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Logits [T, vocab] of a sequence fed in pieces of the given sizes through one cache."""
    cache, rows, start = model.make_cache(), [], 0
    for size in sizes:
        rows.append(step(model, [(tokens[start : start + size], cache)]))
        start += size
    assert start == len(tokens)
    return np.concatenate(rows)


def step(model: Model, parts: Sequence[tuple[Sequence[int] | np.ndarray, SequenceCache]]) -> np.ndarray:
    """One ragged forward over the next tokens of several sequences; the logits of all rows."""
    flat = np.concatenate([np.asarray(t) for t, _ in parts])
    logits = model(mx.array(flat.astype(np.int32)), [Segment(len(t), c) for t, c in parts])
    assert logits is not None
    return np.array(logits.astype(mx.float32))


def pieces(prompt: int, total: int) -> list[int]:
    """A prompt at once, then token by token."""
    return [prompt] + [1] * (total - prompt)


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(write_checkpoint(tmp_path_factory.mktemp("odd"), ODD), "float32")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(11).integers(0, ODD.vocab, 96)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "long_context"])
def test_prefill_and_decode_equal_transformers(tmp_path: Path, name: str) -> None:
    golden = load_golden(name)
    model = load_model(write_checkpoint(tmp_path, golden.shape, seed=golden.seed), "float32")
    logits = feed(model, golden.tokens, pieces(golden.prompt, len(golden.tokens)))
    assert np.abs(logits - golden.logits).max() <= 1e-4


def test_three_thousand_tokens_equal_transformers(tmp_path: Path) -> None:
    golden = load_golden("long_context")
    model = load_model(write_checkpoint(tmp_path, golden.shape, seed=golden.seed), "float32")
    sizes = [512] * 5 + [golden.prompt - 5 * 512] + [1] * (len(golden.tokens) - golden.prompt)
    logits = feed(model, golden.tokens, sizes)[-len(golden.logits) :]
    assert np.abs(logits - golden.logits).max() <= 1e-3


# original/config.json cannot say truncate: true.
@pytest.mark.parametrize(
    ("layout", "truncate"), [(k, t) for k in LAYOUTS for t in (False, True) if (k, t) != ("original", True)]
)
def test_every_layout_equals_the_oracle(
    tmp_path: Path, tokens: np.ndarray, layout: str, truncate: bool
) -> None:
    kind, recipe = LAYOUTS[layout]
    shape = replace(ODD, truncate=truncate, initial_context=512)
    seed = 1  # no router decides by so little that rounding could flip it
    expected = forward(shape, truth(shape, seed, kind, recipe), tokens)
    assert expected.router_margin.min() > 5e-4
    folder = write_checkpoint(tmp_path, shape, seed=seed, layout=kind, recipe=recipe)
    logits = feed(load_model(folder, "float32"), tokens, pieces(70, len(tokens)))
    assert np.abs(logits - expected.logits).max() <= 1e-4


def test_both_spellings_of_rope_and_both_numbers_of_shards_load_the_same(
    tmp_path: Path, tokens: np.ndarray
) -> None:
    one = write_checkpoint(tmp_path / "one", ODD, rope_parameters=True, shards=1)
    many = write_checkpoint(tmp_path / "many", ODD, shards=5)
    assert len(list(one.glob("*.safetensors"))) == 1 and len(list(many.glob("*.safetensors"))) == 5
    results = [feed(load_model(folder, "float32"), tokens, [len(tokens)]) for folder in (one, many)]
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize(
    "sizes",
    [[1] * 96, [7] * 13 + [5], [95, 1], [16, 1, 15, 17, 47]],
    ids=["ones", "sevens", "all but one", "mixed"],
)
def test_chunks_of_any_size_give_the_same_logits(
    odd_model: Model, tokens: np.ndarray, sizes: list[int]
) -> None:
    whole = feed(odd_model, tokens, [len(tokens)])
    assert np.abs(feed(odd_model, tokens, sizes) - whole).max() <= 2e-5


def test_a_ragged_batch_equals_each_sequence_alone(odd_model: Model, tokens: np.ndarray) -> None:
    others = [tokens[:40], tokens[30:31], tokens[20:90], tokens[50:67]]
    alone = [feed(odd_model, part, [len(part)]) for part in others]
    together = step(odd_model, [(part, odd_model.make_cache()) for part in others])
    assert np.abs(together - np.concatenate(alone)).max() <= 2e-5


def test_decodes_beside_a_prompt_equal_each_alone(odd_model: Model, tokens: np.ndarray) -> None:
    first, second = odd_model.make_cache(), odd_model.make_cache()
    got = [step(odd_model, [(tokens[:33], first)])]
    for i in range(33, 43):  # one sequence decodes while the other reads its prompt in threes
        both = step(odd_model, [(tokens[i : i + 1], first), (tokens[3 * (i - 33) :][:3], second)])
        got.append(both[:1])
        expected_second = both[1:]
    assert np.abs(np.concatenate(got) - feed(odd_model, tokens[:43], [43])).max() <= 2e-5
    assert np.abs(expected_second - feed(odd_model, tokens[:30], [30])[-3:]).max() <= 2e-5


@pytest.mark.parametrize("length", [127, 128, 129, 130])
def test_the_window_of_128_counts_the_token_itself(tmp_path: Path, length: int) -> None:
    shape = Shape(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, window=128, vocab=96)
    model = load_model(write_checkpoint(tmp_path, shape), "float32")
    tokens = np.random.default_rng(5).integers(0, shape.vocab, length)
    expected = forward(shape, truth(shape), tokens)
    assert expected.router_margin.min() > 1e-5
    for sizes in ([length], [120] + [1] * (length - 120)):
        assert np.abs(feed(model, tokens, sizes) - expected.logits).max() <= 1e-4


def test_only_the_rows_asked_for_are_computed(odd_model: Model, tokens: np.ndarray) -> None:
    cache = odd_model.make_cache()
    segment = Segment(96, cache)
    ids = mx.array(tokens.astype(np.int32))
    whole = feed(odd_model, tokens, [96])
    some = odd_model(ids, [segment], rows=[3, 95])
    assert some is not None
    assert some.shape == (2, ODD.vocab)
    assert np.abs(np.array(some) - whole[[3, 95]]).max() <= 2e-5
    assert odd_model(ids[:1], [Segment(1, cache)], rows=[]) is None
    assert cache.offset == 97


def test_bfloat16_stays_near_float32(tmp_path: Path, tokens: np.ndarray) -> None:
    folder = write_checkpoint(tmp_path, replace(ODD, layers=1))
    exact, rounded = (feed(load_model(folder, d), tokens, [96]) for d in ("float32", "bfloat16"))
    # A near-tie of routes may flip in a token or two; the rest stays within bfloat16's noise.
    assert np.median(np.abs(exact - rounded).max(-1)) <= 0.25
