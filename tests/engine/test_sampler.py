"""Logits become tokens as the request says, repeatably, and bad requests are refused by field."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.engine.sampler import Sampler, filter_logits, logprob_arrays, read_logprobs, unpack_bits
from mlx_gptoss.errors import RequestError
from mlx_gptoss.sampling import SamplingParams

VOCAB = 97
LOGITS = np.random.default_rng(5).normal(0, 2, VOCAB).astype(np.float32)
NOTHING = np.array([], np.int64)


def draw(params: SamplingParams, times: int, prompt: np.ndarray = NOTHING) -> list[int]:
    sampler = Sampler(params, VOCAB, prompt)
    return [int(np.array(sampler.sample(mx.array(LOGITS)))[0]) for _ in range(times)]


def kept(params: SamplingParams) -> set[int]:
    return set(np.flatnonzero(np.isfinite(np.array(filter_logits(mx.array(LOGITS), params)))).tolist())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "warm"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("seed", 1.5),
        ("max_tokens", 0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {3: float("nan")}),
        ("stop", ("",)),
        ("stop", 5),
        ("stop", None),
        ("logprobs", -1),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", 5),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert repr(value) in str(caught.value)
    assert "expected" in str(caught.value)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match="logit_bias names token 97"):
        SamplingParams(logit_bias={VOCAB: 1.0}).check_vocabulary(VOCAB)


def test_temperature_zero_takes_the_largest_logit() -> None:
    assert draw(SamplingParams(temperature=0.0), 3) == [int(LOGITS.argmax())] * 3


@pytest.mark.parametrize("temperature", [1e-30, 1e-36, 1e-38, 1e-40, 5e-46, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_temperature_near_zero_takes_the_largest_logit(temperature: float, filters: dict[str, Any]) -> None:
    params = SamplingParams(temperature=temperature, seed=3, **filters)
    assert draw(params, 5) == [int(LOGITS.argmax())] * 5


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    first = draw(SamplingParams(seed=7), 40)
    assert draw(SamplingParams(seed=7), 40) == first
    assert draw(SamplingParams(seed=8), 40) != first


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    sampler = Sampler(SamplingParams(temperature=1.5, seed=1), VOCAB, NOTHING)
    counts = np.zeros(VOCAB)
    tokens = [sampler.sample(mx.array(LOGITS)) for _ in range(1500)]
    for t in tokens:
        counts[int(np.array(t)[0])] += 1
    expected = np.exp(LOGITS / 1.5) / np.exp(LOGITS / 1.5).sum()
    assert np.abs(counts / 1500 - expected).max() < 0.05


def test_top_k_keeps_the_k_largest() -> None:
    assert kept(SamplingParams(top_k=5)) == set(np.argsort(-LOGITS)[:5].tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    order = np.argsort(-LOGITS)
    probs = np.exp(LOGITS[order]) / np.exp(LOGITS).sum()
    need = int(np.searchsorted(np.cumsum(probs), 0.7)) + 1
    assert kept(SamplingParams(top_p=0.7)) == set(order[:need].tolist())


def test_min_p_keeps_what_is_near_the_best() -> None:
    probs = np.exp(LOGITS) / np.exp(LOGITS).sum()
    assert kept(SamplingParams(min_p=0.2)) == set(np.flatnonzero(probs >= 0.2 * probs.max()).tolist())


@pytest.mark.parametrize(
    "filters", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.6}]
)
def test_rows_are_filtered_each_by_itself(filters: dict[str, Any]) -> None:
    rows = mx.array(np.random.default_rng(8).normal(0, 2, (3, VOCAB)).astype(np.float32))
    params = SamplingParams(temperature=0.7, **filters)
    together = np.array(filter_logits(rows, params))
    assert np.array_equal(together, np.stack([np.array(filter_logits(row, params)) for row in rows]))


@pytest.mark.parametrize(
    "params", [SamplingParams(top_p=1e-9), SamplingParams(min_p=1.0), SamplingParams(top_k=1)]
)
def test_at_least_one_token_is_kept(params: SamplingParams) -> None:
    assert kept(params) == {int(LOGITS.argmax())}


def test_a_bias_moves_the_choice_and_minus_infinity_bans() -> None:
    best = int(LOGITS.argmax())
    assert draw(SamplingParams(temperature=0.0, logit_bias={3: 100.0}), 1) == [3]
    assert best not in draw(SamplingParams(logit_bias={best: float("-inf")}, seed=0), 60)


def test_penalties_follow_their_formulas() -> None:
    prompt = np.array([4])
    logits = mx.array(LOGITS)
    sampler = Sampler(
        SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25), VOCAB, prompt
    )
    for token in (9, 9, 2):
        sampler.record(mx.array([token]))
    expected = LOGITS.copy()
    for token in (4, 9, 2):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token, count in ((9, 2), (2, 1)):
        expected[token] -= 0.5 + 0.25 * count
    assert np.abs(np.array(sampler.process(logits)) - expected).max() < 1e-5


def test_a_mask_allows_what_it_allows() -> None:
    bits = np.zeros(-(-VOCAB // 32), np.uint32)
    for token in (0, 31, 32, 96):
        bits[token // 32] |= np.uint32(1) << np.uint32(token % 32)
    assert np.flatnonzero(np.array(unpack_bits(bits, VOCAB))).tolist() == [0, 31, 32, 96]
    sampler = Sampler(SamplingParams(temperature=3.0, seed=2), VOCAB, NOTHING)
    drawn = {int(np.array(sampler.sample(mx.array(LOGITS), bits))[0]) for _ in range(60)}
    assert drawn <= {0, 31, 32, 96}
    assert len(drawn) > 1


def test_logprobs_are_those_of_the_model() -> None:
    logits = mx.array(LOGITS)
    out = read_logprobs(logprob_arrays(logits, mx.array([11]), 3))
    reference = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert abs(out.logprob - reference[11]) < 1e-5
    assert [t for t, _ in out.top] == np.argsort(-LOGITS)[:3].tolist()
    assert read_logprobs(logprob_arrays(logits, mx.array([11]), 0)).top == ()
