"""POST /tokenize and /detokenize, GET /tokenizer_info: vLLM's names, by which lm-eval counts tokens."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import Field

from mlx_gptoss.errors import RequestError
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.markup import encode_markup
from mlx_gptoss.server.translate.request import Items, RequestModel
from mlx_gptoss.tokenizer import SPECIAL_TOKENS


class TokenizeRequest(RequestModel):
    """A text; special tokens that it spells are themselves."""

    prompt: str
    messages: list[Any] | None = None

    unsupported: ClassVar = {"messages": "POST /v1/responses/input_tokens counts a conversation"}


class DetokenizeRequest(RequestModel):
    """Token ids."""

    tokens: Items[Annotated[int, Field(ge=0, lt=2**31)]]


def router(state: ServerState) -> APIRouter:
    """The routes, bound to a server."""
    routes = APIRouter(tags=["Server"])

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text."""
        body.refuse_unsupported()
        llm = await state.ready()
        tokens = await asyncio.to_thread(encode_markup, body.prompt, llm.tokenizer)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": llm.max_context}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens, special ones spelled out."""
        tokenizer = (await state.ready()).tokenizer
        wrong = next((token for token in body.tokens if token >= tokenizer.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"tokens holds {wrong}: ids go to {tokenizer.vocab_size - 1}", "tokens")
        return {"prompt": tokenizer.decode(body.tokens)}

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """The special tokens that other tokenizers have as well, by their names there."""
        return {
            "bos_token": SPECIAL_TOKENS["startoftext"],
            "eos_token": SPECIAL_TOKENS["return_"],
            "pad_token": SPECIAL_TOKENS["endoftext"],
            "model_max_length": state.facts().max_context,
        }

    return routes
