"""How a request is sampled: its fields, made from what SamplingParams says of its own, and their reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model

from mlx_gptoss.errors import RequestError
from mlx_gptoss.sampling import SamplingParams, about
from mlx_gptoss.server.translate.request import RequestModel, naming

MAX_STOPS = 16


def bounded(name: str, *default: None) -> Any:
    """A request's field with the bounds of a sampling field; required unless its default is given."""
    bounds: dict[str, Any] = dict(about(name).bounds)
    return Field(*default, description=about(name).help or None, **bounds)


# Offered by every API under their own names; max_tokens has another in each.
OFFERED = tuple(f.name for f in fields(SamplingParams) if about(f.name).kind and f.name != "max_tokens")

if TYPE_CHECKING:

    class SamplingFields(RequestModel):
        """Base of a request with the sampling fields that all APIs take."""

else:
    _types = {name: (about(name).kind | None, bounded(name, None)) for name in OFFERED}
    SamplingFields = create_model("SamplingFields", __base__=RequestModel, **_types)


def sampling_params(
    request: SamplingFields,
    names: Mapping[str, str],
    *,
    stop: str | Sequence[str] | None = None,
    logit_bias: Mapping[str, float] | None = None,
    **own: int | None,
) -> SamplingParams:
    """SamplingParams of a request's fields, and of those that its API calls by names of its own.

    logit_bias: by token ids as JSON's keys. Raises RequestError; names: a sampling field -> the API's field.
    """
    values = {name: getattr(request, name) for name in OFFERED} | own
    if values["top_p"] == 0:  # how OpenAI's clients ask for the likeliest token
        values |= {"top_p": None, "temperature": 0.0}
    with naming(names):
        values |= {"stop": _stop_texts(stop), "logit_bias": _token_bias(logit_bias or {})}
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})


def _stop_texts(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """One or several stop texts; empty ones say nothing and are left out."""
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(texts) > MAX_STOPS:
        raise RequestError(f"stop has {len(texts)} texts: expected at most {MAX_STOPS}", "stop")
    return tuple(text for text in texts if text)


def _token_bias(bias: Mapping[str, float]) -> dict[int, float]:
    for key, value in bias.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9 or not -100 <= value <= 100:
            raise RequestError(
                f"logit_bias: {key[:40]!r}: {value} is not a token id with a bias from -100 to 100",
                "logit_bias",
            )
    return {int(key): value for key, value in bias.items()}


def of_choices(params: SamplingParams, count: int) -> list[SamplingParams]:
    """The params of several choices: each has a seed of its own, counted up from the request's."""
    if params.seed is None:
        return [params] * count
    return [replace(params, seed=params.seed + index) for index in range(count)]
