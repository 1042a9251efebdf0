"""What a running server may be told: where it listens, who may come in, and how much they may send."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from mlx_gptoss.errors import RequestError

MAX_DURATION = 40  # characters
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(-?)((?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+|\d+(?:\.\d+)?)", re.ASCII)
_PIECE = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", re.ASCII)


def seconds_of(duration: str, name: str) -> float:
    """The seconds of 90, 90s, 5m, 1h30m. Raises RequestError naming the field."""
    found = _DURATION.fullmatch(duration)
    if found is None or len(duration) > MAX_DURATION:
        raise RequestError(f"{name} is {duration!r:.40}: expected a time such as 90s, 5m or 1h30m", name)
    total = sum(float(count) * _UNITS[unit or "s"] for count, unit in _PIECE.findall(found[2]))
    return -total if found[1] else total


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server. Sizes are bytes, times are seconds. Raises RequestError naming the field.

    model_name: what clients are told the model is called. api_key: asked of every caller of the API when
    given. no_auth: allows an address other than loopback without a key. allowed_hosts: names beside the
    server's own that a Host header may carry. cors_origins: web origins other than the server's own page
    that may call the API; "*" for any.
    max_body_bytes: of one body; max_bodies_bytes: of the large ones that are read or translated at a time;
    max_json_containers: lists and objects in a body; max_json_values: what commas part in it.
    max_active: generations running or waiting; one more is answered 429. shutdown_grace: how long running
    generations may go on after a signal to stop. max_stored_responses: of /v1/responses; max_turns: sampled
    assistant turns kept to reuse their tokens. idle_unload: seconds without requests after which the model is
    unloaded, to be loaded again at the next; None keeps it. log_prompts: bodies of requests are logged.
    """

    model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    no_auth: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_bodies_bytes: int = 64 * 2**20
    max_json_depth: int = 64
    max_json_containers: int = 50_000
    max_json_values: int = 500_000
    max_messages: int = 10_000
    max_tools: int = 512
    max_schema_bytes: int = 256 * 1024
    max_choices: int = 16
    max_active: int = 64
    request_timeout: float = 3600.0
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    shutdown_grace: float = 10.0
    heartbeat: float = 15.0
    max_stored_responses: int = 256
    max_turns: int = 1024
    idle_unload: float | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise RequestError(f"port is {self.port}: expected 0 to 65535 (0 takes a free one)", "port")
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.strip()):
            raise RequestError("the API key is empty or not ASCII: give one of visible characters", "api_key")
        for name in (
            "request_timeout",
            "header_timeout",
            "body_timeout",
            "heartbeat",
            "max_active",
            "max_body_bytes",
        ):
            if getattr(self, name) <= 0:
                raise RequestError(f"{name} is {getattr(self, name)}: expected more than 0", name)
        if self.idle_unload is not None and not self.idle_unload > 0:
            raise RequestError(
                f"idle_unload is {self.idle_unload}: expected more than 0 seconds, or None", "idle_unload"
            )
        if not self.loopback and self.api_key is None and not self.no_auth:
            raise RequestError(
                f"host is {self.host}, which other machines can reach, and there is no API key: give "
                "--api-key or GPTOSS_API_KEY, or say --no-auth if everyone may use this model",
                "host",
            )

    @property
    def loopback(self) -> bool:
        """True when only this machine can reach the address listened on."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
