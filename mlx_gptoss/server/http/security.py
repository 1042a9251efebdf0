"""Who may come in: Host, Origin and key checks, in front of every route.

A model on this machine can be reached by every web page that the user opens. So the Host header must be one
of the server's own (against DNS rebinding), an Origin must be its own page (against other sites).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import socket

from starlette.datastructures import Headers

from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.settings import ServerSettings

OPEN_PATHS = ("/health", "/favicon.ico", "/static/")  # served without a key, as is the page itself
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


def check_key(headers: Headers, settings: ServerSettings, path: str) -> str:
    """Compare the caller's key (Authorization: Bearer, or x-api-key) in constant time.

    Returns who calls: a digest of the key, "" where none is asked for.
    """
    if settings.api_key is None or path == "/" or path.startswith(OPEN_PATHS):
        return ""
    scheme, _, token = (headers.get("authorization") or "").partition(" ")
    # Some SDKs send a bearer token of their own beside the key.
    given = [headers.get("x-api-key") or "", token.strip() if scheme.lower() == "bearer" else ""]

    def digest(key: str) -> bytes:
        return hashlib.sha256(key.encode("latin-1", "replace")).digest()

    right = digest(settings.api_key)
    matches = [hmac.compare_digest(digest(key), right) for key in given]  # a list: both are compared
    if not any(matches):
        raise ApiError(
            401,
            "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return right.hex()


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
