"""The outermost layer: every request passes these checks before a route sees it, and is logged after.

The log has method, route, status and time; never a body, unless asked for, and never a key.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from functools import partial

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_gptoss import device
from mlx_gptoss.server.http.api import CALLER, ApiRouter
from mlx_gptoss.server.http.bodies import (
    SMALL,
    BodyBudget,
    BodyLease,
    check_structure,
    check_text,
    read_body,
)
from mlx_gptoss.server.http.errors import SHAPE, ApiError, error_response, openai_error
from mlx_gptoss.server.http.logs import visible
from mlx_gptoss.server.http.security import (
    allowed_origin,
    check_host,
    check_key,
    cors_headers,
    preflight_headers,
)
from mlx_gptoss.server.state import ServerState

logger = logging.getLogger("mlx_gptoss.server")

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
JSON_CONTENT = (b"content-type", b"application/json")
MAX_PATH = 100  # characters of an unknown path in the log
# Seconds without a request after which memory is returned, and after a large body beside other requests.
IDLE, SOON = 5.0, 0.5
CLIENT_GONE = 499  # nginx's status for the log; nobody receives it


class Gate:
    """ASGI middleware in front of the application. routes: all it has; apis: those with errors of a shape."""

    def __init__(
        self, app: ASGIApp, state: ServerState, routes: Sequence[Route], apis: Sequence[ApiRouter]
    ) -> None:
        self._app = app
        self._state = state
        self._routes = routes
        self._apis = apis
        self._budget = BodyBudget(state.settings)
        self._open = 0  # requests that are being answered
        self._tidying: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            path = scope["path"]
            api = next((api for api in self._apis if path.startswith(api.prefix)), None)
            headers = scope["headers"]
            if api is not None and api.always_json:
                headers = [*(pair for pair in headers if pair[0] != b"content-type"), JSON_CONTENT]
            shape = openai_error if api is None else api.error_shape
            self._open += 1
            try:
                await self._http({**scope, "headers": headers, SHAPE: shape}, receive, send)
            finally:
                self._open -= 1
                if self._open == 0:
                    self._tidy_after(IDLE)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        status = CLIENT_GONE
        lease = BodyLease(self._budget)
        unread = True  # whether some of the body may still come
        body: bytes | None = None
        extra = [*HEADERS, *_request_id()]
        settings = self._state.settings

        async def send_checked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *extra]
            elif scope["method"] == "HEAD":
                message["body"] = b""
            await send(message)

        try:
            headers = Headers(scope=scope)
            check_host(headers, settings)
            origin = allowed_origin(headers, settings)
            if origin is not None:
                extra += cors_headers(origin)
            preflight = origin is not None and scope["method"] == "OPTIONS"
            if not preflight:
                scope[CALLER] = check_key(headers, settings, scope["path"])
            body = await read_body(receive, headers, settings, lease)
            if body is None:
                return
            unread = False
            if preflight:
                start = {"type": "http.response.start", "status": 204, "headers": preflight_headers(headers)}
                await send_checked(start)
                await send_checked({"type": "http.response.body", "body": b""})
                return
            check_structure(body, settings)
            check_text(body)
            if settings.log_prompts and body:
                logger.info("body %s", visible(body.decode("utf-8", "replace")))
            inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(inner, _replay(body, receive, lease), send_checked)
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.error("failed to answer %s: %s", scope["method"], type(error).__name__, exc_info=error)
            if status == CLIENT_GONE:  # nothing was sent yet
                response = error_response(error, scope)
                if unread:  # or a client could keep the connection by sending a byte now and then
                    response.headers["connection"] = "close"
                await response(scope, receive, send_checked)
        finally:
            lease.release()
            self._note(scope, status, time.monotonic() - began)
            if body is not None and len(body) > SMALL and self._budget.idle:
                # A little later, when what was made of the body is gone as well.
                self._tidy_after(SOON)

    def _tidy_after(self, seconds: float) -> None:
        """Return memory then, or when it is to be returned anyway."""
        loop = asyncio.get_running_loop()
        if self._tidying is not None:
            if self._tidying.when() <= loop.time() + seconds:
                return
            self._tidying.cancel()

        def tidy() -> None:
            self._tidying = None
            # Generations go on with the buffers that MLX keeps.
            loop.run_in_executor(None, partial(device.release_memory, buffers=self._open == 0))

        self._tidying = loop.call_later(seconds, tidy)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        known = (route.path for route in self._routes if route.path_regex.match(scope["path"]))
        route = next(known, None)
        # What a caller makes up would fill the metrics.
        self._state.metrics.requests.labels(route or "other", str(status)).inc()
        path = route or visible(scope["path"][:MAX_PATH])
        logger.info("%s %s %d %.3fs", scope["method"], path, status, seconds)


def _request_id() -> list[tuple[bytes, bytes]]:
    """A name for the request, under which OpenAI's and Anthropic's SDKs tell of it."""
    name = f"req_{secrets.token_hex(12)}".encode()
    return [(b"request-id", name), (b"x-request-id", name)]


def _replay(body: bytes, receive: Receive, lease: BodyLease) -> Receive:
    """A receive that gives the body that was read, and then whatever comes (the client's going away).

    Who waits for that has done with the body, whose share of the budget is free then.
    """
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        if waiting:
            return waiting.pop()
        lease.release()
        return await receive()

    return replayed
