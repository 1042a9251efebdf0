"""What the requests of all APIs have in common, and what a request for a turn is translated to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.errors import RequestError
from mlx_gptoss.harmony import Conversation


class RequestModel(BaseModel):
    """Base of requests and their parts: JSON types as they are, no coercion, no NaN.

    Unknown fields are ignored, as are known ones that change nothing here; what would change the answer and
    cannot be done is refused by name. `unsupported`: such fields, each with what to do instead.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, str]] = {}

    def refuse_unsupported(self) -> None:
        """Raise RequestError for what is asked and cannot be done."""
        for name, cure in self.unsupported.items():
            if getattr(self, name) is not None:
                raise RequestError(f"{name} is not supported: {cure}", name)


@dataclass(frozen=True)
class TurnRequest:
    """A request, translated: the turn that is asked for.

    names: what the model may find wrong, by its own name -> the field that the client sent. strict: False
    lets the answer be any JSON object where its schema cannot be enforced.
    """

    conversation: Conversation
    options: TurnOptions
    names: Mapping[str, str]
    strict: bool = True


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Have a RequestError from beneath name what the client sent. names: name there -> name here."""
    try:
        yield
    except RequestError as error:
        there = error.field or ""
        if here := names.get(there):
            message = str(error)
            if message.startswith(there):
                error.args = (here + message.removeprefix(there),)
            error.field = here
        raise
