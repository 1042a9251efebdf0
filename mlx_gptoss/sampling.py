"""How one sequence is sampled: plain data, from which the command line and the APIs make their options.

A field of SamplingParams carries an About: what it may hold, in code and in words, and how it is offered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from mlx_gptoss.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

# Below this, logits / temperature could overflow float32, and any lead of a logit decides the draw anyway.
MIN_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class About:
    """What a sampling field may hold: `check` in code, `expected` in words.

    kind: the type of its command-line option and API field; None has to be offered by hand. help: of the
    option; without it there is none. bounds: what the APIs take, in pydantic's words (ge, gt, le, lt).
    """

    check: Callable[[Any], bool]
    expected: str
    kind: type | None = None
    help: str = ""
    bounds: Mapping[str, float] = field(default_factory=dict)


def about(sampling_field: str) -> About:
    """What is said of a field of SamplingParams."""
    found: About = SamplingParams.__dataclass_fields__[sampling_field].metadata["about"]
    return found


def _sampled(
    default: Any,
    check: Callable[[Any], bool],
    expected: str,
    kind: type | None = None,
    help: str = "",
    **bounds: float,
) -> Any:
    return field(default=default, metadata={"about": About(check, expected, kind, help, bounds)})


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _tokens(value: Any) -> bool:
    return isinstance(value, tuple) and all(_whole(token, 0) for token in value)


def _bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _whole(token, 0) and isinstance(amount, (int, float)) and not math.isnan(amount)
        for token, amount in value.items()
    )


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

    temperature: float = _sampled(
        1.0,
        lambda v: _number(v) and v >= 0,
        "a number >= 0 (0 is greedy)",
        float,
        "0 takes the likeliest token.",
        ge=0,
        le=2,
    )
    top_p: float = _sampled(
        1.0,
        lambda v: _number(v) and 0 < v <= 1,
        "a number above 0 and at most 1",
        float,
        "Keep the likeliest tokens up to this sum.",
        ge=0,  # OpenAI's clients send 0 for the likeliest token
        le=1,
    )
    top_k: int = _sampled(
        0,
        lambda v: _whole(v, 0),
        "a whole number >= 0 (0 keeps all tokens)",
        int,
        "Keep this many tokens; 0 keeps all.",
        ge=0,
        le=2**31,
    )
    min_p: float = _sampled(
        0.0,
        lambda v: _number(v) and 0 <= v <= 1,
        "a number from 0 to 1",
        float,
        "Drop tokens below this share of the best.",
        ge=0,
        le=1,
    )
    repetition_penalty: float = _sampled(
        1.0,
        lambda v: _number(v) and v > 0,
        "a number above 0 (1 is none)",
        float,
        "Above 1: repeat less.",
        gt=0,
        le=10,
    )
    presence_penalty: float = _sampled(
        0.0,
        lambda v: _number(v) and -2 <= v <= 2,
        "a number from -2 to 2",
        float,
        "Above 0: lower every token that was generated.",
        ge=-2,
        le=2,
    )
    frequency_penalty: float = _sampled(
        0.0,
        lambda v: _number(v) and -2 <= v <= 2,
        "a number from -2 to 2",
        float,
        "Above 0: lower tokens as often as they were generated.",
        ge=-2,
        le=2,
    )
    seed: int | None = _sampled(
        None,
        lambda v: v is None or _whole(v, -(2**63)),
        "a whole number",
        int,
        "Same seed, same text.",
        ge=-(2**63),
        lt=2**63,
    )
    max_tokens: int | None = _sampled(
        None,
        lambda v: v is None or _whole(v, 1),
        "a whole number >= 1",
        int,
        "Most tokens to generate.",
        ge=1,
        le=2**31,
    )
    stop: tuple[str, ...] = _sampled(
        (),
        lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
        "a non-empty text, or several",
    )
    stop_token_ids: tuple[int, ...] | None = _sampled(
        None, lambda v: v is None or _tokens(v), "None or token ids"
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=lambda: MappingProxyType({}),
        metadata={"about": About(_bias, "a mapping of token ids to numbers")},
    )
    logprobs: int | None = _sampled(None, lambda v: v is None or _whole(v, 0), "None or a whole number >= 0")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            if isinstance(value := getattr(self, name), Iterable):
                object.__setattr__(self, name, tuple(value))
        for item in fields(self):
            rule, value = about(item.name), getattr(self, item.name)
            if not rule.check(value):
                raise RequestError(f"{item.name} is {value!r}: expected {rule.expected}", item.name)
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)

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

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise RequestError for a token or a count of tokens that a vocabulary does not have."""
        for token in self.logit_bias:
            if token >= vocab_size:
                raise RequestError(
                    f"logit_bias names token {token}: the vocabulary has ids 0 to {vocab_size - 1}",
                    "logit_bias",
                )
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise RequestError(
                f"logprobs is {self.logprobs}: the vocabulary has {vocab_size} tokens", "logprobs"
            )


class SamplingKeywords(TypedDict, total=False):
    """The fields of SamplingParams as keyword arguments, for editors and type checkers."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int] | None
    logit_bias: Mapping[int, float]
    logprobs: int | None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities under the model (before temperature and filters, after constraints).

    logprob: of the chosen token. top: the asked-for number of (token id, logprob), best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class PromptProgress:
    """How much of a prompt has been read, in tokens; `cached_tokens` of them were not computed."""

    read_tokens: int
    cached_tokens: int
    prompt_tokens: int


class TokenConstraint(Protocol):
    """What may be sampled next, for one request. Stateful, used by one thread."""

    def allowed(self) -> np.ndarray | None:
        """None when every token may follow, else uint32 [ceil(vocab / 32)]: bit i%32 of word i//32 for i."""
        ...

    def accept(self, token_id: int) -> None:
        """Tell the constraint which token was sampled."""
        ...
