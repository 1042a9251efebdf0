"""What the requests of both completion APIs share: sampling, the number of choices, and their stream."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mlx_gptoss.server.translate.request import RequestModel
from mlx_gptoss.server.translate.sampling_fields import SamplingFields, bounded


class StreamOptions(RequestModel):
    include_usage: bool | None = None


class ChoicesRequest(SamplingFields):
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = bounded("max_tokens", None)
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    model: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream's last chunk is to have the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)
