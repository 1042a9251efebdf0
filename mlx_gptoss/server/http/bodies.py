"""What may be sent: a body's bytes, its text and its structure, each bounded before anything parses it."""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque

from starlette.datastructures import Headers
from starlette.types import Receive

from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.settings import ServerSettings

SMALL = 64 * 1024  # bytes of a body that waits for nobody


class BodyBudget:
    """Bytes of the large bodies that are read or translated at a time. Who finds no room waits in line."""

    def __init__(self, settings: ServerSettings) -> None:
        self._free = self._total = max(settings.max_bodies_bytes, settings.max_body_bytes)
        self._patience = settings.body_timeout
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def idle(self) -> bool:
        """True while no large body is held."""
        return self._free == self._total

    async def take(self, size: int) -> None:
        """Have `size` bytes. Raises ApiError 503 when there is no room in time."""
        turn = asyncio.get_running_loop().create_future()
        self._line.append((size, turn))
        self._serve()
        try:
            async with asyncio.timeout(self._patience):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.give_back(size)
            elif (size, turn) in self._line:
                self._line.remove((size, turn))
                self._serve()
            if not isinstance(error, TimeoutError):
                raise
            raise ApiError(
                503,
                "The server reads as many large bodies as it can hold: try again.",
                code="busy",
                headers={"Retry-After": "2"},
            ) from None

    def give_back(self, size: int) -> None:
        """Return what was taken."""
        self._free += size
        self._serve()

    def _serve(self) -> None:
        while self._line and self._line[0][0] <= self._free:
            size, turn = self._line.popleft()
            if not turn.done():
                self._free -= size
                turn.set_result(None)


class BodyLease:
    """One request's share of the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._held = 0

    async def take(self, size: int) -> None:
        """See BodyBudget.take."""
        await self._budget.take(size)
        self._held = size

    def shrink(self, size: int) -> None:
        """Return all but `size` bytes."""
        if self._held > size:
            self._budget.give_back(self._held - size)
            self._held = size

    def release(self) -> None:
        """Return everything. Safe to call again."""
        self.shrink(0)


async def read_body(
    receive: Receive, headers: Headers, settings: ServerSettings, lease: BodyLease
) -> bytes | None:
    """The whole body, bounded in bytes and in seconds; None when the client went away."""
    limit = settings.max_body_bytes
    too_large = ApiError(413, f"The body is larger than {limit:,} bytes.", code="body_too_large")
    length = headers.get("content-length")
    size = int(length) if length is not None and length.isdigit() else limit
    if size > limit:
        raise too_large
    body, waited = bytearray(), False
    try:
        async with asyncio.timeout(settings.body_timeout) as clock:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                more = message.get("more_body", False)
                if len(body) > SMALL and not waited:
                    waited = True
                    clock.reschedule(None)
                    await lease.take(max(size, len(body)))
                    clock.reschedule(asyncio.get_running_loop().time() + settings.body_timeout)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {settings.body_timeout:g} s.", code="body_timeout"
        ) from None
    lease.shrink(len(body))
    return bytes(body)


_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_PAIR = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..", re.DOTALL)


def check_text(body: bytes | bytearray) -> None:
    """Refuse what is not UTF-8, and escapes of half a character, which no tokenizer takes."""
    broken = ApiError(400, "The body is not valid UTF-8 JSON text.", code="invalid_json")
    if 0 in body:
        raise broken
    try:
        body.decode()
        # Nearly always pairs, so only what looks suspicious is parsed to find out.
        if (b"\\ud" in body or b"\\uD" in body) and (rb"\\u" in body or _HALF.search(_PAIR.sub(b"", body))):
            json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeError:
        raise broken from None
    except (ValueError, RecursionError):
        return  # not JSON at all: the parser behind this check says so better


# A string, or one that never ends: matching the latter too keeps the scan linear.
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def check_structure(body: bytes | bytearray, settings: ServerSettings) -> None:
    """Refuse JSON of too many values or nested too deep, before it is parsed, by what is outside strings."""
    depth_limit, count_limit, value_limit = (
        settings.max_json_depth,
        settings.max_json_containers,
        settings.max_json_values,
    )
    containers, values = body.count(b"[") + body.count(b"{"), body.count(b",")
    if containers <= min(depth_limit, count_limit) and values <= value_limit:
        return
    rest = _JSON_STRING.sub(b"", body)
    for count, limit, what in (
        (rest.count(b"[") + rest.count(b"{"), count_limit, "lists and objects"),
        (rest.count(b","), value_limit, "values"),
    ):
        if count > limit:
            raise ApiError(
                400,
                f"The JSON body has {count:,} {what}, and at most {limit:,} are read.",
                code="json_too_large",
            )
    depth = 0
    for bracket in _BRACKET.finditer(rest):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > depth_limit:
            raise ApiError(
                400, f"The JSON body is nested deeper than {depth_limit} levels.", code="json_too_deep"
            )
