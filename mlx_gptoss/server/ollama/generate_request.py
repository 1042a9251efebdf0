"""The request of /api/generate (Ollama's API): one prompt, in the chat format or raw."""

from __future__ import annotations

from typing import Any, ClassVar

from mlx_gptoss.errors import ContextLengthError, RequestError
from mlx_gptoss.server.ollama.request import NAMES, GenerationRequest, refuse_images
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.markup import encode_markup
from mlx_gptoss.server.translate.turn import TurnRequest
from mlx_gptoss.tokenizer import Tokenizer


class GenerateRequest(GenerationRequest):
    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    images: list[Any] | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[Any] | None = None

    unsupported: ClassVar = {
        "suffix": "gpt-oss does not fill in the middle",
        "template": "the chat format is the model's own; use raw to write all of a prompt yourself",
        "context": "send the conversation to /api/chat",
    }

    def check(self) -> None:
        """Raise RequestError for what is asked and cannot be done."""
        refuse_images(self.images, "images")
        if self.raw and self.format:
            raise RequestError("format is not supported with raw: leave one of them out", "format")
        said = {name: getattr(self, name) or None for name in self.unsupported}  # empty says nothing
        self.model_copy(update=said).refuse_unsupported()


def translate(request: GenerateRequest, state: ServerState, caller: str) -> TurnRequest:
    """The turn that is asked for. Raises RequestError naming the field at fault."""
    builder = state.new_turn(caller)
    builder.model = request.model
    builder.instructions(request.system or "")
    builder.user(request.prompt)
    request.shape(builder)
    return builder.build(request.params(), NAMES | {"messages": "prompt"})


def raw_tokens(prompt: str, tokenizer: Tokenizer, max_context: int) -> list[int]:
    """The tokens of a raw prompt; special tokens that it spells are themselves.

    Raises ContextLengthError before a text that is surely longer than the context has been read to its end.
    """
    if beyond := tokenizer.count_beyond(prompt, max_context):
        raise ContextLengthError(beyond, max_context, "prompt", at_least=True)
    return encode_markup(prompt, tokenizer)
