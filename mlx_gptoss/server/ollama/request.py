"""What Ollama's chat and generate requests share: options, thinking, the answer's format, keep_alive."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from mlx_gptoss.errors import RequestError
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server.settings import seconds_of
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.options import EFFORTS, Effort
from mlx_gptoss.server.translate.request import Items, RequestModel
from mlx_gptoss.server.translate.sampling_fields import SamplingFields, bounded, sampling_params
from mlx_gptoss.server.translate.turn import TurnBuilder

if TYPE_CHECKING:
    from mlx_gptoss.llm import LLM

NAMES = {"max_tokens": "options.num_predict", "stop": "options.stop", "logprobs": "top_logprobs"}


class Options(SamplingFields):
    """Runtime options. What Ollama has of them beside these says how a model is run, which is set here."""

    model_config = ConfigDict(strict=False)  # clients write 128.0 for 128

    num_predict: int | None = None
    repeat_penalty: float | None = bounded("repetition_penalty", None)
    stop: str | Items[str] | None = None


class GenerationRequest(RequestModel):
    """The fields of both requests."""

    model: str = ""
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | Effort | None = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def shows_thinking(self) -> bool:
        """Whether the reasoning is told: it is unless refused, as by Ollama for models that always think."""
        return self.think not in (False, "none")

    @property
    def stays(self) -> float | None:
        """Seconds that the model is to stay loaded; negative for ever, None where nothing is said."""
        if isinstance(self.keep_alive, str):
            return seconds_of(self.keep_alive, "keep_alive")
        return self.keep_alive

    def params(self) -> SamplingParams:
        """How to sample. Raises RequestError naming the field at fault."""
        options = self.options or Options()
        if options.repetition_penalty is None:  # type: ignore[attr-defined]
            options = options.model_copy(update={"repetition_penalty": options.repeat_penalty})
        limit = options.num_predict if options.num_predict is not None and options.num_predict > 0 else None
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise RequestError(
                f"top_logprobs is {self.top_logprobs}: expected a whole number from 0 to 20", "top_logprobs"
            )
        scored = (self.top_logprobs or 0) if self.logprobs else None
        return sampling_params(options, NAMES, max_tokens=limit, stop=options.stop, logprobs=scored)

    def shape(self, builder: TurnBuilder) -> None:
        """Tell a turn's builder the effort and the format."""
        effort = self.think if isinstance(self.think, str) else "low" if self.think is False else "medium"
        builder.effort = EFFORTS[effort]
        if self.format == "json":
            builder.answer_format("json_object", "format")
        elif isinstance(self.format, dict):
            builder.answer_format("json_schema", "format", self.format, strict=False, nested=False)


async def settle(request: GenerationRequest, state: ServerState, *, asks: bool) -> tuple[LLM | None, float]:
    """Have the model loaded for as long as the request says.

    Returns it with the seconds that took. A request that asks for no answer may be to unload it: None then.
    """
    began = time.monotonic()
    state.residence.keep(request.stays)
    if not asks and request.stays == 0:
        await state.residence.check()
        return state.llm, 0.0
    return await state.ready(), time.monotonic() - began


def refuse_images(images: object, where: str) -> None:
    """Raise RequestError where a client sends pictures."""
    if images:
        raise RequestError(f"{where} is not empty: gpt-oss reads text only", where)
