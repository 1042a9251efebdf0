"""The outermost layer: every request passes these checks before a route sees it, and is logged after.

The log has method, route, status and time; never a body, unless asked for, and never a key.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from starlette.types import ASGIApp

from mlx_gptoss.server.http.errors import ApiError, error_response
from mlx_gptoss.server.http.security import (
    Headers,
    Message,
    Receive,
    Scope,
    Send,
    allowed_origin,
    check_depth,
    check_host,
    check_key,
    check_text,
    cors_headers,
    preflight_headers,
    read_body,
)
from mlx_gptoss.server.state import ServerState

logger = logging.getLogger("mlx_gptoss.server")

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
CLIENT_GONE = 499  # nginx's status for the log; nobody receives it


class Gate:
    """ASGI middleware in front of the application."""

    def __init__(self, app: ASGIApp, state: ServerState, paths: Iterable[str]) -> None:
        self._app = app
        self._state = state
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        status = CLIENT_GONE
        unread = True  # whether some of the body may still come
        extra = list(HEADERS)

        async def send_checked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *extra]
            elif scope["method"] == "HEAD":
                message["body"] = b""
            await send(message)

        try:
            headers = Headers(scope)
            origin = self._admit(scope, headers)
            if origin is not None:
                extra += cors_headers(origin)
            asking = origin if scope["method"] == "OPTIONS" else None  # the origin of a preflight
            if asking is None:
                check_key(headers, self._state.settings, scope["path"])
            body = await read_body(receive, headers, self._state.settings)
            if body is None:
                return
            unread = False
            if asking is not None:
                await _preflight(headers, asking, send_checked)
                return
            check_text(body)
            check_depth(body, self._state.settings.max_json_depth)
            self._log_body(body)
            inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(inner, _replay(body, receive), send_checked)
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.error("failed to answer %s: %s", scope["method"], type(error).__name__, exc_info=error)
            if status == CLIENT_GONE:  # nothing was sent yet
                response = error_response(error, scope["path"])
                if unread:  # or a client could keep the connection by sending a byte now and then
                    response.headers["connection"] = "close"
                await response(scope, receive, send_checked)
        finally:
            self._note(scope, status, time.monotonic() - began)

    def _admit(self, scope: Scope, headers: Headers) -> str | None:
        """Host and Origin; the origin to answer with CORS headers."""
        check_host(headers, self._state.settings)
        return allowed_origin(headers, self._state.settings)

    def _log_body(self, body: bytes) -> None:
        if self._state.settings.log_prompts and body:
            logger.info("body %s", body.decode("utf-8", "replace"))

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        # Only known paths are named: what a caller makes up would fill the metrics and could forge log lines.
        path = scope["path"]
        if path not in self._paths:
            path = max((known for known in self._paths if _matches(known, path)), key=len, default="other")
        self._state.metrics.requests.labels(path, str(status)).inc()
        logger.info("%s %s %d %.3fs", scope["method"], path, status, seconds)


def _matches(pattern: str, path: str) -> bool:
    """Whether a path fits a route with a parameter, such as /v1/models/{model}."""
    head, brace, rest = pattern.partition("{")
    tail = rest.partition("}")[2]
    return bool(brace) and path.startswith(head) and path[len(head) :].endswith(tail)


async def _preflight(headers: Headers, origin: str, send: Send) -> None:
    # The CORS headers of the origin are added to every response already.
    own = [pair for pair in preflight_headers(headers, origin) if pair not in cors_headers(origin)]
    await send({"type": "http.response.start", "status": 204, "headers": own})
    await send({"type": "http.response.body", "body": b""})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body that was read, and then whatever comes (the client's going away)."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
