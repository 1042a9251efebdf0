"""Who may come in: Host, Origin, key and body checks, in front of every route.

A model on this machine can be reached by every web page that the user opens. So the Host header must be one
of the server's own (against DNS rebinding), an Origin must be its own page (against other sites), and what
is sent is bounded in size, depth and time before anything parses it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import socket

from starlette.datastructures import Headers
from starlette.types import Receive

from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.settings import ServerSettings

OPEN_PATHS = frozenset({"/", "/health", "/favicon.ico"})  # served without a key
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,2000}")


# A name or an IPv4 address, or an IPv6 address in brackets, and perhaps a port (RFC 9110, section 7.2).
_HOST = re.compile(
    r"(?:\[([0-9a-f:.]+(?:%[\w.~%-]+)?)\]|([\w-]+(?:\.[\w-]+)*)\.?)(?::([0-9]{0,5}))?", re.ASCII | re.I
)


def _host_name(value: str) -> str | None:
    """The name in a Host header without its port, lower case; None when it is not one."""
    parts = _HOST.fullmatch(value)
    if parts is None or int(parts[3] or 0) > 65535:
        return None
    return str(parts[1] or parts[2]).lower()


def check_host(headers: Headers, settings: ServerSettings) -> None:
    """Refuse a Host that is not the server's. An address cannot be rebound; a name must be known."""
    values = headers.getlist("host")
    name = _host_name(values[0]) if len(values) == 1 else None
    if name is None:
        raise ApiError(400, "Send exactly one valid Host header.", code="invalid_host")
    if name in _own_names(settings):
        return
    if not settings.loopback and _is_address(name):
        return
    raise ApiError(
        403,
        f"Host {name[:100]!r} is not a name of this server: use its address, or start with --allowed-host.",
        code="host_not_allowed",
    )


def _own_names(settings: ServerSettings) -> set[str]:
    names = {name.lower() for name in settings.allowed_hosts} | {settings.host.lower()}
    if settings.loopback:
        return names | {"localhost", "127.0.0.1", "::1"}
    own = socket.gethostname().lower()
    return names | {"localhost", own, own.split(".")[0] + ".local"}


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def allowed_origin(headers: Headers, settings: ServerSettings) -> str | None:
    """The Origin to answer with CORS headers, or None when there is none or it is the server's own.

    Raises ApiError 403 for any other origin.
    """
    origins = headers.getlist("origin")
    if not origins:
        followed = headers.getlist("sec-fetch-mode") == ["navigate"]
        if "cross-site" in headers.getlist("sec-fetch-site") and not followed:
            raise ApiError(403, "Requests from other sites are refused.", code="origin_not_allowed")
        return None
    origin = origins[0] if len(origins) == 1 else ""  # no browser sends two
    if origin and (origin in settings.cors_origins or "*" in settings.cors_origins):
        return origin
    host = headers.get("host") or ""
    if origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower()):
        return None
    raise ApiError(
        403,
        "This web origin may not call the server: start it with --cors-origin to allow that.",
        code="origin_not_allowed",
    )


def check_key(headers: Headers, settings: ServerSettings, path: str) -> None:
    """Compare the caller's key (Authorization: Bearer, or x-api-key) in constant time."""
    if settings.api_key is None or path in OPEN_PATHS:
        return
    scheme, _, token = (headers.get("authorization") or "").partition(" ")
    # Some SDKs send a bearer token of their own beside the key.
    given = [headers.get("x-api-key") or "", token.strip() if scheme.lower() == "bearer" else ""]

    def digest(key: str) -> bytes:
        return hashlib.sha256(key.encode("latin-1", "replace")).digest()

    right = digest(settings.api_key)
    if not any([hmac.compare_digest(digest(key), right) for key in given]):  # noqa: C419 (a list: both are compared)
        raise ApiError(
            401,
            "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def preflight_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """What the answer to a CORS preflight has beside the origin's `cors_headers`."""
    asked = headers.get("access-control-request-headers") or ""
    names = asked if _HEADER_NAMES.fullmatch(asked) else "authorization, content-type"
    result = [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", names.encode("ascii")),
        (b"access-control-max-age", b"600"),
    ]
    if headers.get("access-control-request-private-network") == "true":
        result.append((b"access-control-allow-private-network", b"true"))
    return result


def cors_headers(origin: str) -> list[tuple[bytes, bytes]]:
    """Let the page of an allowed origin read the response."""
    return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]


async def read_body(receive: Receive, headers: Headers, settings: ServerSettings) -> bytes | None:
    """The whole body, bounded in bytes and in seconds; None when the client went away."""
    limit = settings.max_body_bytes
    too_large = ApiError(413, f"The body is larger than {limit:,} bytes.", code="body_too_large")
    length = headers.get("content-length")
    if length is not None and length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {settings.body_timeout:g} s.", code="body_timeout"
        ) from None
    return bytes(body)


# Escapes or bytes of surrogates: nearly always pairs, so only what looks suspicious is decoded to find out.
_SURROGATE = re.compile(rb"\\u[dD][89aAbB](?!..\\u[dD][c-fC-F])|(?<!\\u[dD][89aAbB]..)\\u[dD][c-fC-F]")


def check_text(body: bytes | bytearray) -> None:
    """Refuse what is not UTF-8, and escapes of half a character, which no tokenizer takes."""
    broken = ApiError(400, "The body is not valid UTF-8 JSON text.", code="invalid_json")
    if 0 in body:
        raise broken
    try:
        body.decode()
        if _SURROGATE.search(body):
            json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeError:
        raise broken from None
    except (ValueError, RecursionError):
        return  # not JSON at all: the parser behind this check says so better


# A string, or one that never ends: matching the latter too keeps the scan linear.
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def check_depth(body: bytes | bytearray, limit: int) -> None:
    """Refuse JSON nested deeper than `limit`, by counting brackets outside strings, before it is parsed."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    depth = 0
    for bracket in _BRACKET.finditer(_JSON_STRING.sub(b"", body)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > limit:
            raise ApiError(400, f"The JSON body is nested deeper than {limit} levels.", code="json_too_deep")
