"""What the requests of all APIs are made of, and how an error from beneath gets the client's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mlx_gptoss.errors import RequestError

Entry = TypeVar("Entry")
MAX_ENTRIES = 65_536  # of an object whose keys are the client's own


def _few(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise ValueError(f"has {len(value):,} entries, and at most {MAX_ENTRIES:,} are read")
    return value


# Lists are read up to their first wrong entry: to collect the errors of a million entries takes minutes.
Items = Annotated[list[Entry], Field(fail_fast=True)]
Table = Annotated[dict[str, Entry], BeforeValidator(_few)]


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


class ContentPart(RequestModel):
    """A part of a message's content. Parts other than text are refused, but where an API knows more types."""

    type: str
    text: str | None = None
    refusal: str | None = None


def text_of(content: str | Sequence[ContentPart] | None, where: str) -> str:
    """The text of a message's content; images, audio and files are refused by name."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part_text(part, f"{where}[{index}]") for index, part in enumerate(content))


def part_text(part: ContentPart, where: str) -> str:
    """The text of one part of a content."""
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "input_text", "output_text", "refusal"):
        raise RequestError(f"{where} is of type {part.type[:40]!r}: gpt-oss reads text only", f"{where}.type")
    if text is None:
        raise RequestError(f"{where} has no text", f"{where}.text")
    return text


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
