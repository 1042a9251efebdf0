"""Sampling: what a request may ask of it, and how logits become a token.

The order is: constraint mask, logit bias, repetition / presence / frequency penalties, temperature,
top-k, top-p, min-p, then one draw. Temperature 0 takes the largest logit. Filters keep at least one token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_gptoss.errors import RequestError

# Below this, logits / temperature could overflow float32, and any lead of a logit decides the draw anyway.
LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one sequence. Every field is checked; a wrong one raises RequestError naming it.

    temperature: 0 for greedy, else > 0 (below 1e-30 it is taken for 0). top_p in (0, 1]. top_k: 0 for all.
    min_p in [0, 1].
    seed: makes the draws of this request repeatable, whatever else runs beside it.
    max_tokens: tokens to generate at most; None for as many as the context holds.
    repetition_penalty: > 0, divides positive and multiplies negative logits of tokens already seen (prompt
    and output; Keskar et al. 2019). presence_penalty, frequency_penalty: subtracted, for generated tokens.
    logit_bias: token id to an amount added to its logit. stop: texts that end the output.
    stop_token_ids: None for the model's own. logprobs: None, or how many alternatives to report (0: none
    but the chosen token).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise RequestError(f"{name} is {getattr(self, name)!r}: expected {expected}", name)

        def number(name: str) -> bool:
            value = getattr(self, name)
            return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

        def whole(name: str, least: int) -> bool:
            value = getattr(self, name)
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        require(number("temperature") and self.temperature >= 0, "temperature", "a number >= 0 (0 is greedy)")
        if self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        require(number("top_p") and 0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1")
        require(whole("top_k", 0), "top_k", "a whole number >= 0 (0 keeps all tokens)")
        require(number("min_p") and 0 <= self.min_p <= 1, "min_p", "a number from 0 to 1")
        require(self.seed is None or whole("seed", -(2**63)), "seed", "a whole number")
        require(self.max_tokens is None or whole("max_tokens", 1), "max_tokens", "a whole number >= 1")
        require(
            number("repetition_penalty") and self.repetition_penalty > 0,
            "repetition_penalty",
            "a number above 0 (1 is none)",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            require(number(name) and -2 <= getattr(self, name) <= 2, name, "a number from -2 to 2")
        require(
            isinstance(self.logit_bias, Mapping)
            and all(
                isinstance(k, int) and k >= 0 and isinstance(v, (int, float)) and not math.isnan(v)
                for k, v in self.logit_bias.items()
            ),
            "logit_bias",
            "a mapping of token ids to numbers",
        )
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        require(isinstance(self.stop, Iterable), "stop", "a text or several")
        object.__setattr__(self, "stop", tuple(self.stop))
        require(all(isinstance(s, str) and s for s in self.stop), "stop", "non-empty texts")
        require(self.logprobs is None or whole("logprobs", 0), "logprobs", "None or a whole number >= 0")
        if self.stop_token_ids is not None:
            require(isinstance(self.stop_token_ids, Iterable), "stop_token_ids", "None or token ids")
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
            require(
                all(isinstance(t, int) and t >= 0 for t in self.stop_token_ids or ()),
                "stop_token_ids",
                "token ids",
            )

    @property
    def plain_greedy(self) -> bool:
        """True when the next token is the argmax of the untouched logits."""
        return (
            self.temperature == 0
            and not self.logit_bias
            and self.repetition_penalty == 1.0
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
        )


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities under the model (before temperature and filters, after constraints).

    logprob: of the chosen token. top: the asked-for number of (token id, logprob), best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenConstraint(Protocol):
    """What may be sampled next, for one request. Stateful, used by one thread."""

    def allowed(self) -> np.ndarray | None:
        """None when every token may follow, else uint32 [ceil(vocab / 32)]: bit i%32 of word i//32 for i."""
        ...

    def accept(self, token_id: int) -> None:
        """Tell the constraint which token was sampled."""
        ...


class Sampler:
    """Draws the tokens of one sequence: its random state and the counts its penalties need.

    `sample` builds a lazy graph: the token it returns can go straight into the next forward.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: np.ndarray) -> None:
        for token in params.logit_bias:
            if token >= vocab_size:
                raise RequestError(
                    f"logit_bias names token {token}: the vocabulary has ids 0 to {vocab_size - 1}",
                    "logit_bias",
                )
        if params.logprobs is not None and params.logprobs > vocab_size:
            raise RequestError(
                f"logprobs is {params.logprobs}: the vocabulary has {vocab_size} tokens", "logprobs"
            )
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
        """logits [vocab] -> token, int32 of shape [1]. Advances the random state and the counts."""
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
