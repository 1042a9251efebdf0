"""One API of the server: its routes, all under a prefix, and the shape of its errors."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from mlx_gptoss.server.http.errors import ErrorShape, openai_error

CALLER = "gptoss.caller"  # the key of a scope under which the gate puts who calls


def caller_of(request: Request) -> str:
    """Who sent a request, as check_key told them apart."""
    caller: str = request.scope[CALLER]
    return caller


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every error has this body."""

    error: ErrorDetail


_MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The Host or the web origin is not allowed.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full; see Retry-After.",
    503: "The model is loading, memory is short, or the server is stopping.",
    504: "The answer took too long.",
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _MEANINGS.items()
}


class ApiRouter(APIRouter):
    """The routes of one API. Every error of a path under its prefix, wherever it arises, has its shape.

    always_json: bodies are read as JSON whatever Content-Type says.
    """

    def __init__(
        self, prefix: str, tag: str, error_shape: ErrorShape = openai_error, *, always_json: bool = False
    ) -> None:
        super().__init__(prefix=prefix, tags=[tag], responses=_RESPONSES)
        self.error_shape = error_shape
        self.always_json = always_json
