"""What both completion APIs share: requests for several choices, and answers made of them."""

from __future__ import annotations

import time
import uuid
from abc import abstractmethod
from collections.abc import Iterable
from importlib.metadata import version
from typing import Annotated, Any

from pydantic import Field

from mlx_gptoss.server.http.errors import ApiError, openai_error
from mlx_gptoss.server.running import sse
from mlx_gptoss.server.running.answer import Json, Writer
from mlx_gptoss.server.translate.request import Items, RequestModel, Table
from mlx_gptoss.server.translate.sampling_fields import SamplingFields, bounded

FINGERPRINT = f"mlx_gptoss-{version('gptoss-mlx')}"


class StreamOptions(RequestModel):
    include_usage: bool | None = None


class ChoicesRequest(SamplingFields):
    stop: str | Items[str] | None = None
    logit_bias: Table[float] | None = None
    max_tokens: int | None = bounded("max_tokens", None)
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    model: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream's last chunk is to have the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChoicesWriter(Writer):
    """An answer of several choices. prefix: of its id; kind: the body's `object`."""

    end = sse.DONE

    def __init__(self, prefix: str, kind: str, model: str, request: ChoicesRequest) -> None:
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._include_usage = request.include_usage

    @staticmethod
    def frame(event: Json) -> bytes:
        """An event on the wire: unnamed."""
        return sse.data(event)

    def chunk(self, *choices: Any, usage: Json | None = None) -> Json:
        """A piece of the stream."""
        chunk = self._head | {"choices": choices}
        return chunk | {"usage": usage} if self._include_usage else chunk

    def closing(self) -> Iterable[Json]:
        """The usage, when it was asked for."""
        return [self.chunk(usage=self.usage())] if self._include_usage else []

    def failure(self, error: ApiError) -> Iterable[Json]:
        """The error's body in place of a chunk."""
        return [openai_error(error)]

    @abstractmethod
    def usage(self) -> Json:
        """Counts of tokens; a prompt that several choices share is counted once."""


def usage_body(prompt: int, cached: int, completion: int) -> Json:
    """Counts of tokens; `cached` is a part of `prompt`."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
