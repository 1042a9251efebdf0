"""Errors as HTTP: each GptOssError's status, and bodies in the shape that the callers' SDKs read.

The body is OpenAI's `{"error": {"message", "type", "param", "code"}}` unless the API that was called has
another shape (see api.ApiRouter): the gate finds out which, and notes it in the request's scope.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mlx_gptoss.errors import (
    BusyError,
    ContextLengthError,
    GptOssError,
    HostError,
    MemoryLimitError,
    RequestError,
    SchemaError,
    TokenizerError,
    ToolError,
)


@dataclass(eq=False)
class ApiError(Exception):
    """A request that is answered with an HTTP error. `param` names the field at fault.

    details: more for programs to read, where the API's errors have a place for it.
    """

    status: int
    message: str
    _: KW_ONLY
    code: str | None = None
    param: str | None = None
    details: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


# The first class that matches decides: (error class, status, code).
STATUS_OF: tuple[tuple[type[GptOssError], int, str | None], ...] = (
    (ContextLengthError, 400, "context_length_exceeded"),
    (SchemaError, 400, "invalid_schema"),
    (ToolError, 400, "invalid_tool"),
    (RequestError, 400, "invalid_value"),
    (BusyError, 429, "rate_limit_exceeded"),
    (HostError, 503, "host_lost"),
    (MemoryLimitError, 503, "insufficient_memory"),
    (TokenizerError, 503, "no_tokenizer"),
    (GptOssError, 500, "engine_error"),
)

ErrorShape = Callable[[ApiError], dict[str, Any]]
SHAPE = "gptoss.error_shape"  # the key of a scope under which the gate puts it

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def openai_error(error: ApiError, kind: str | None = None) -> dict[str, Any]:
    """The JSON body of an error as OpenAI's APIs have it; kind: another name of its type."""
    if kind is None:
        other = "server_error" if error.status >= 500 else "invalid_request_error"
        kind = _OPENAI_TYPES.get(error.status, other)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def as_api_error(error: BaseException) -> ApiError:
    """The HTTP form of any exception. What was not raised on purpose says nothing about its cause."""
    if isinstance(error, ApiError):
        return error
    for cls, status, code in STATUS_OF:
        if isinstance(error, cls):
            api = ApiError(status, str(error), code=code, param=getattr(error, "field", None))
            if isinstance(error, BusyError) or (isinstance(error, HostError) and error.retry_after):
                api.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or 1)))
            return api
    return ApiError(
        500, "The server failed to answer this request; its log has the cause.", code="internal_error"
    )


def error_response(error: BaseException, scope: MutableMapping[str, Any]) -> JSONResponse:
    """Any exception as the response to a request."""
    api = as_api_error(error)
    shape: ErrorShape = scope[SHAPE]
    return JSONResponse(shape(api), api.status, headers=api.headers)


_UNION_TAG = re.compile(r"^(str|int|float|bool|none|dict|list|function-.*|.*\[.*|[A-Z]\w*)$")


def field_path(loc: tuple[int | str, ...]) -> str | None:
    """("body", "messages", 2, "content", "str") -> "messages[2].content"."""
    path = ""
    for part in loc[1:] if loc and loc[0] in ("body", "query", "path", "header") else loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not _UNION_TAG.match(part):
            path += f".{part}" if path else part
    return path or None


def _validation_error(error: RequestValidationError) -> ApiError:
    """The problem found deepest in the body: of a union's members, the one that fits best."""
    worst = max(error.errors(), key=lambda problem: len(problem["loc"]))
    if worst["type"] == "json_invalid":
        reason = worst.get("ctx", {}).get("error", "not JSON")
        return ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json")
    param = field_path(worst["loc"])
    if param is None:
        return ApiError(400, "The body must be a JSON object, sent as application/json.", code="invalid_type")
    code = "missing_required_parameter" if worst["type"] == "missing" else "invalid_value"
    given = worst["input"]
    value = f", not {given!r:.60}" if isinstance(given, str | int | float) else ""
    return ApiError(400, f"{param}: {worst['msg']}{value}.", code=code, param=param)


def _http_error(error: HTTPException, request: Request, paths: Sequence[str]) -> ApiError:
    """What FastAPI itself finds wrong. paths: all that the server has."""
    if error.status_code == 400 and "parsing the body" in str(error.detail):
        return ApiError(400, "The body cannot be read as JSON.", code="invalid_json")
    headers = dict(error.headers or {})
    message = str(error.detail)
    if error.status_code == 404:
        message = _no_such_path(request.url.path, paths)
    elif error.status_code == 405:
        takes = next((value for name, value in headers.items() if name.lower() == "allow"), "another method")
        message = f"{request.method} is not allowed here: {request.url.path[:100]} takes {takes}."
    return ApiError(error.status_code, message, headers=headers)


def _no_such_path(path: str, paths: Sequence[str]) -> str:
    asked = path[:100]
    near = difflib.get_close_matches(asked, paths, n=1, cutoff=0.75)
    cure = f"did you mean {near[0]}? " if near else ""
    return f"There is no {asked} here: {cure}This server has {', '.join(paths)}."


def install_handlers(app: FastAPI, paths: Sequence[str]) -> None:
    """Answer every exception of a route in the shape of its API. paths: what to tell those who miss them."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            error = _validation_error(error)
        elif isinstance(error, HTTPException):
            error = _http_error(error, request, paths)
        return error_response(error, request.scope)

    for kind in (RequestValidationError, HTTPException, ApiError, GptOssError):
        app.add_exception_handler(kind, handle)
