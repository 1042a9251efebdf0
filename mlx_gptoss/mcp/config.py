"""Which MCP servers there are: mcp.json as other programs write it, a URL, or a command line."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from mlx_gptoss.errors import ToolError
from mlx_gptoss.files import read_limited
from mlx_gptoss.harmony import BROWSER, PYTHON

MAX_FILE = 1 << 20  # bytes of mcp.json
NAMESPACES = (PYTHON.name, BROWSER.name)  # servers of these names speak for the tools the model was taught
# Programs that run another one, which says more about the server.
_RUNNERS = {"uvx", "uv", "npx", "bunx", "node", "deno", "docker", "python", "python3"}
_VARIABLE = re.compile(r"\$\{(?:env:)?(\w+)(?::-([^}]*))?\}")

# A file's path, its content, a URL, a command line, or an MCPServer of the `mcp` package in this process.
Source: TypeAlias = str | Path | Mapping[str, Any] | Any


@dataclass(frozen=True)
class Server:
    """One server: a command (spoken to over its standard input and output), a URL, or an object.

    allowed: the tools that may be used, None for all; denied: those that may not.
    """

    name: str
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    sse: bool = False  # the transport before streamable HTTP
    allowed: frozenset[str] | None = None
    denied: frozenset[str] = frozenset()
    program: Any = None


class _Entry(BaseModel):
    """A server in mcp.json. Fields that other programs have besides are left to them."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str | None = None
    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = {}
    allowed: list[str] | None = Field(None, validation_alias=AliasChoices("allowed_tools", "includeTools"))
    denied: list[str] = Field([], validation_alias=AliasChoices("excludeTools", "disabledTools"))
    disabled: bool = False


def read_servers(sources: Sequence[Source]) -> list[Server]:
    """The servers of all sources, each with a name of its own. Raises ToolError in one line."""
    servers: list[Server] = []
    for source in sources:
        for server in _servers_of(source):
            taken = {other.name for other in servers}
            names = (server.name, *(f"{server.name}_{n}" for n in range(2, len(taken) + 3)))
            servers.append(replace(server, name=next(name for name in names if name not in taken)))
    return servers


def _servers_of(source: Source) -> list[Server]:
    if isinstance(source, Mapping):
        return _entries(source, "the MCP servers")
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith(".json")):
        return _read_file(Path(source).expanduser())
    if not isinstance(source, str):
        return [Server(str(getattr(source, "name", "local")), program=source)]
    if source.startswith(("http://", "https://")):
        server = Server("", url=source, sse=is_sse(source))
        check_url(source, source)
        return [replace(server, name=_plain_name(urlsplit(source).hostname or "server"))]
    try:
        words = tuple(shlex.split(source))
    except ValueError as error:
        raise _wrong(repr(source), f"not a command line ({error})") from None
    if not words:
        raise _wrong(repr(source), "expected mcp.json, a URL or a command")
    program = Path(words[0]).stem
    if program in _RUNNERS:
        program = Path(next((word for word in words[1:] if not word.startswith("-")), program)).stem
    return [Server(_plain_name(program), words)]


def _plain_name(text: str) -> str:
    """A name for a server that has none: what is only called `python` is not the model's own tool."""
    name = re.sub(r"[^\w-]", "_", text, flags=re.ASCII)
    return f"{name}_server" if name in NAMESPACES else name


def _read_file(path: Path) -> list[Server]:
    try:
        content = json.loads(read_limited(path, MAX_FILE))
    except OSError as error:
        raise _wrong(path, error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise _wrong(path, f"not JSON ({error})") from None
    if not isinstance(content, dict):
        raise _wrong(path, 'expected an object, {"mcpServers": {…}}')
    return _entries(content, str(path))


def _entries(content: Mapping[str, Any], where: str) -> list[Server]:
    found = content.get("mcpServers", content.get("servers"))
    if not isinstance(found, Mapping):
        raise _wrong(where, 'expected {"mcpServers": {NAME: {"command": …} or {"url": …}}} (or "servers")')
    servers = []
    for name, entry in found.items():
        at = f"{where}: server {str(name)!r}"
        try:
            read = _Entry.model_validate(entry)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            place = ".".join(map(str, problem["loc"])) or "entry"
            raise _wrong(at, f"{place}: {problem['msg'].replace('Input', 'it', 1)}") from None
        if not read.disabled:
            servers.append(_server(str(name), read, at))
    return servers


def _server(name: str, entry: _Entry, where: str) -> Server:
    if (entry.command is None) == (entry.url is None):
        raise _wrong(where, 'expected either "command" or "url"')

    def expand(text: str) -> str:
        return _VARIABLE.sub(lambda found: _variable(found, where), text)

    allowed = None if entry.allowed is None else frozenset(entry.allowed)
    chosen = Server(name, allowed=allowed, denied=frozenset(entry.denied))
    if entry.command is not None:
        if not entry.command.strip():
            raise _wrong(where, "command is empty: expected a program")
        return replace(
            chosen,
            command=tuple(map(expand, (entry.command, *entry.args))),
            env={key: expand(value) for key, value in entry.env.items()},
            cwd=None if entry.cwd is None else str(Path(expand(entry.cwd)).expanduser()),
        )
    url = expand(entry.url or "")
    check_url(url, where)
    headers = {key: expand(value) for key, value in entry.headers.items()}
    return replace(chosen, url=url, headers=headers, sse=entry.type == "sse" or is_sse(url))


def is_sse(url: str) -> bool:
    """Whether a URL is one of the older transport."""
    return urlsplit(url).path.endswith("/sse")


def check_url(url: str, where: str) -> None:
    """Raise ToolError unless a URL leads to some host by HTTP."""
    try:
        parts = urlsplit(url)
        port = parts.port  # raises for one that is none
    except ValueError as error:
        raise _wrong(where, f"url is {url!r:.200}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise _wrong(where, f"url is {url!r:.200}: expected http:// or https:// and a host")


def _variable(found: re.Match[str], where: str) -> str:
    value = os.environ.get(found[1], found[2])
    if value is None:
        raise _wrong(where, f"{found[0]}: there is no environment variable {found[1]}: set it")
    return value


def _wrong(where: object, problem: str) -> ToolError:
    return ToolError(f"{where}: {problem}", "mcp")
