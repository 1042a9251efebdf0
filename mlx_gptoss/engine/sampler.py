"""How logits become a token: bias, penalties, filters, one draw.

The order is: constraint mask, logit bias, repetition / presence / frequency penalties, temperature,
top-k, top-p, min-p, then one draw. Temperature 0 takes the largest logit. Filters keep at least one token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_gptoss.sampling import SamplingParams, TokenLogprobs

# Rows scored at a time: each is as long as the vocabulary, several times over.
SCORED_ROWS = 64


class Sampler:
    """Draws the tokens of one sequence: its random state and the counts its penalties need.

    `sample` builds a lazy graph: the token it returns can go straight into the next forward.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: np.ndarray) -> None:
        self.params = params
        self._vocab_size = vocab_size
        self._key: mx.array | None = None
        if params.temperature > 0:
            # A request without a seed takes one from the system, never from a global state that others share.
            seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
            self._key = mx.random.key(seed % 2**63)
        self._bias: mx.array | None = None
        if params.logit_bias:
            dense = np.zeros(vocab_size, np.float32)
            dense[list(params.logit_bias.keys())] = list(params.logit_bias.values())
            self._bias = mx.array(dense)
        self._counts: mx.array | None = None  # of generated tokens, int32 [vocab]
        self._seen: mx.array | None = None  # prompt or output, bool [vocab]
        # Only what every draw reads: the lazy graph of anything else would grow with each token.
        if params.repetition_penalty != 1.0:
            seen = np.zeros(vocab_size, bool)
            seen[prompt] = True
            self._seen = mx.array(seen)
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            self._counts = mx.zeros(vocab_size, mx.float32)

    def process(self, logits: mx.array, allowed: np.ndarray | None = None) -> mx.array:
        """Logits [vocab] float32 with the constraint, the bias and the penalties applied."""
        if allowed is not None:
            logits = mx.where(unpack_bits(allowed, self._vocab_size), logits, -mx.inf)
        if self._bias is not None:
            logits = logits + self._bias
        p = self.params
        if self._seen is not None:
            r = p.repetition_penalty
            logits = mx.where(self._seen, mx.where(logits > 0, logits / r, logits * r), logits)
        if self._counts is not None:
            if p.presence_penalty != 0.0:
                logits = logits - p.presence_penalty * (self._counts > 0)
            if p.frequency_penalty != 0.0:
                logits = logits - p.frequency_penalty * self._counts
        return logits

    def sample(self, logits: mx.array, allowed: np.ndarray | None = None) -> mx.array:
        """Logits [vocab] -> token, int32 of shape [1]. Advances the random state and the counts."""
        logits = self.process(logits.astype(mx.float32), allowed)
        if self._key is None:
            token = mx.argmax(logits, axis=-1, keepdims=True)
        else:
            self._key, key = mx.random.split(self._key)
            token = mx.random.categorical(filter_logits(logits, self.params), shape=[1], key=key)
        self.record(token)
        return token.astype(mx.int32)

    @property
    def state(self) -> tuple[mx.array | None, ...]:
        """All that sampling changes, to come back to after tokens that were drawn in vain."""
        return self._key, self._counts, self._seen

    @state.setter
    def state(self, state: tuple[mx.array | None, ...]) -> None:
        self._key, self._counts, self._seen = state

    def record(self, token: mx.array) -> None:
        """Count a token, int [1], that was appended to the sequence (sampled, or accepted from a draft)."""
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, token, mx.array(True), axis=0)
        if self._counts is not None:
            self._counts = self._counts.at[token].add(1.0)


def filter_logits(logits: mx.array, params: SamplingParams) -> mx.array:
    """Logits [..., vocab] -> log-weights with temperature, top-k, top-p and min-p applied (-inf where cut).

    top-p keeps the smallest set of tokens whose probabilities reach p (Holtzman et al. 2020); min-p keeps
    tokens of at least min_p times the largest probability (Nguyen et al. 2024). Both look at the
    distribution after the temperature.
    """
    logits = logits / params.temperature if params.temperature > 0 else logits
    vocab = logits.shape[-1]
    if 0 < params.top_k < vocab:
        kth = mx.sort(mx.topk(logits, params.top_k, axis=-1), axis=-1)[..., :1]
        logits = mx.where(logits < kth, -mx.inf, logits)
    if params.top_p < 1.0:
        order = mx.argsort(-logits, axis=-1)
        probs = mx.softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1, precise=True)
        before = mx.cumsum(probs, axis=-1) - probs
        keep_sorted = before < params.top_p
        keep = mx.put_along_axis(mx.zeros(logits.shape, mx.bool_), order, keep_sorted, axis=-1)
        logits = mx.where(keep, logits, -mx.inf)
    if params.min_p > 0.0:
        floor = mx.max(logits, axis=-1, keepdims=True) + math.log(params.min_p)
        logits = mx.where(logits < floor, -mx.inf, logits)
    return logits


def unpack_bits(mask: np.ndarray, vocab_size: int) -> mx.array:
    """uint32 bitmask [ceil(vocab / 32)] -> bool [vocab]."""
    bits = np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little", count=vocab_size)
    return mx.array(bits.view(bool))


def logprob_arrays(logits: mx.array, token: mx.array, top: int) -> tuple[mx.array, mx.array, mx.array]:
    """Logits [vocab], token [1] -> (logprob [1], top ids [n], top logprobs [n]), lazily; n may be 0."""
    logprobs = logits.astype(mx.float32) - mx.logsumexp(logits.astype(mx.float32), axis=-1, keepdims=True)
    chosen = mx.take(logprobs, token, axis=-1)
    if top == 0:
        return chosen, mx.zeros(0, mx.int32), mx.zeros(0, mx.float32)
    ids = mx.argsort(-logprobs, axis=-1)[:top]
    return chosen, ids, mx.take(logprobs, ids, axis=-1)


def read_logprobs(arrays: tuple[mx.array, mx.array, mx.array]) -> TokenLogprobs:
    """The evaluated arrays of `logprob_arrays` as numbers."""
    chosen, ids, values = arrays
    pairs = zip(np.array(ids).tolist(), np.array(values).tolist(), strict=True)
    return TokenLogprobs(float(np.asarray(chosen)[0]), tuple((int(i), float(v)) for i, v in pairs))


def read_scores(logits: mx.array, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Logits [n, vocab] and the token that followed each row, [n] -> their log-probabilities, as numbers."""
    scores: list[TokenLogprobs] = []
    for start in range(0, len(tokens), SCORED_ROWS):
        following = mx.array(list(tokens[start : start + SCORED_ROWS]), mx.int32)[:, None]
        rows = logits[start : start + SCORED_ROWS].astype(mx.float32)
        logprobs = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
        ids = (
            mx.argpartition(-logprobs, top - 1, axis=-1)[:, :top]
            if top
            else mx.zeros((len(rows), 0), mx.int32)
        )
        places = mx.concatenate([following, ids.astype(mx.int32)], axis=-1)
        values = np.array(mx.take_along_axis(logprobs, places, axis=-1))
        for row, found in zip(values.tolist(), np.array(ids).tolist(), strict=True):
            best = sorted(zip(found, row[1:], strict=True), key=lambda pair: -pair[1])
            scores.append(TokenLogprobs(row[0], tuple(best)))
    return scores
