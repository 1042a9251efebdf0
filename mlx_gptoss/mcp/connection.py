"""Connections to MCP servers: one thread with an event loop holds them all; calls block, with a deadline.

A connection lives in one task from its beginning to its end, as its cancel scopes have to be left where they
were entered. One that was lost is made anew at the next call.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import shutil
import sys
import threading
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from mlx_gptoss.errors import ToolError
from mlx_gptoss.files import state_folder
from mlx_gptoss.mcp.config import Server
from mlx_gptoss.mcp.results import one_line, result_text

if TYPE_CHECKING:
    from mcp import Client

logger = logging.getLogger("mlx_gptoss.mcp")

Result = TypeVar("Result")
GUARD = str(Path(__file__).with_name("guard.py"))
MAX_TOOLS = 512  # of one server
MAX_PAGES = 100  # of its list of tools
MAX_DESCRIPTION = 8_000  # characters shown of a tool or of a server's instructions
MAX_LOG = 1 << 20  # bytes after which a server's log begins anew
CLOSING = 8.0  # seconds in which servers may end; the package kills processes after 4


@dataclass(frozen=True)
class ListedTool:
    """A tool as its server lists it."""

    name: str
    description: str
    schema: dict[str, Any]
    read_only: bool


class _Link:
    """The connection to one server, which lives on the loop's thread."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.client: Client | None = None
        self.tools: list[ListedTool] = []
        self.instructions = ""
        self.opening: asyncio.Task[None] | None = None
        self.life: asyncio.Task[None] | None = None
        self.over = asyncio.Event()
        self.scope: Any = None  # anyio's: ends the connection wherever it is

    async def open(self, seconds: float) -> Client:
        """The client, connected if it was not. Raises ToolError."""
        if self.client is None or self.over.is_set():
            if self.opening is None or self.opening.done():
                self.opening = asyncio.create_task(self._open(seconds))
            await asyncio.shield(self.opening)
        assert self.client is not None
        return self.client

    async def _open(self, seconds: float) -> None:
        if self.life is not None:
            await asyncio.wait([self.life])
        self.over.clear()
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()
        self.life = loop.create_task(self._live(started))

        def give_up() -> None:
            if not started.done():
                started.set_exception(ToolError(f"it did not answer within {seconds:g} seconds"))
            self.end()

        alarm = loop.call_later(seconds, give_up)
        try:
            await asyncio.shield(started)
        except Exception as error:
            why = f"the MCP server {self.server.name!r} is not there: {one_line(error)}"
            raise ToolError(why, "mcp") from None
        finally:
            alarm.cancel()

    async def _live(self, started: asyncio.Future[None]) -> None:
        import anyio

        log = _open_log(self.server.name)
        begin = log.tell()
        try:
            with anyio.CancelScope() as self.scope:
                async with AsyncExitStack() as stack:
                    client = await _connect(self.server, log, stack)
                    self.tools = await _list_tools(client, self.server)
                    self.instructions = (client.instructions or "")[:MAX_DESCRIPTION]
                    self.client = client
                    if not started.done():
                        started.set_result(None)
                    await self.over.wait()
        except Exception as error:
            if not started.done():
                said = _last_line(log, begin) if self.server.command else ""
                started.set_exception(ToolError(f"{one_line(error)}{said and f' ({said})'}"))
            else:
                logger.info("MCP server %s: %s", self.server.name, one_line(error))
        finally:
            self.client = None
            log.close()
            if not started.done():
                started.set_exception(ToolError("the connection was ended"))

    def end(self) -> None:
        """End the connection wherever it is."""
        if self.scope is not None:
            self.scope.cancel()


class Connections:
    """Connections to some servers. `close` them; those that are forgotten close themselves.

    timeout: seconds in which a server has to connect, and to answer a call. Raises ToolError when the `mcp`
    package is missing.
    """

    def __init__(self, servers: Sequence[Server], *, timeout: float = 60.0) -> None:
        if find_spec("mcp") is None:
            raise ToolError("MCP servers need the mcp package: pip install 'gptoss-mlx[mcp]'", "mcp")
        self.timeout = timeout
        self.names = [server.name for server in servers]
        loop = asyncio.new_event_loop()
        self._loop = loop
        self._links = {server.name: _Link(server) for server in servers}
        self._thread = threading.Thread(target=loop.run_forever, name="mcp", daemon=True)
        self._thread.start()
        # What is forgotten is told to end; nobody waits for it while garbage is collected.
        self._shut = shut = _Shut(loop, list(self._links.values()), self._thread)
        weakref.finalize(self, shut.begin).atexit = False
        atexit.register(shut.wait)

    def connect(self) -> None:
        """Begin to connect to every server, and return at once. What fails is logged."""
        for name in self.names:
            self._submit(self._links[name].open(self.timeout)).add_done_callback(_log_failure)

    def tools(self, name: str) -> tuple[list[ListedTool], str]:
        """The tools that a server lists, and its instructions. Raises ToolError when it is not there."""
        link = self._links[name]
        self._wait(link.open(self.timeout), 2 * self.timeout)
        return link.tools, link.instructions

    def call(self, name: str, tool: str, arguments: dict[str, Any]) -> str:
        """The result of a call as text. Raises ToolError in one line when there is none."""
        try:
            return result_text(self._wait(self._call(name, tool, arguments), 2 * self.timeout + 1))
        except TimeoutError:
            raise ToolError(f"{tool} did not answer within {self.timeout:g} seconds", "mcp") from None
        except CancelledError:
            raise _closed() from None

    async def _call(self, name: str, tool: str, arguments: dict[str, Any]) -> Any:
        from mcp import MCPError

        link = self._links[name]
        client = await link.open(self.timeout)
        try:
            return await asyncio.wait_for(client.call_tool(tool, arguments), self.timeout)
        except TimeoutError:
            raise
        except Exception as error:
            if not isinstance(error, MCPError) or error.code in _lost():
                link.over.set()  # and is made anew by the next call
            raise ToolError(f"the MCP server {name!r}: {one_line(error)}", "mcp") from None

    def close(self) -> None:
        """End all connections and the servers that were started. Safe to call again."""
        atexit.unregister(self._shut.wait)
        self._shut.wait()

    def _submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        if self._shut.begun:
            work.close()
            raise _closed()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._shut.waiting.add(future)
        future.add_done_callback(self._shut.waiting.discard)
        return future

    def _wait(self, work: Coroutine[Any, Any, Result], seconds: float) -> Result:
        future = self._submit(work)
        try:
            return future.result(seconds)
        finally:
            future.cancel()


class _Shut:
    """Ends the connections of a loop; knows nothing of who uses them, so that they can be forgotten."""

    def __init__(self, loop: asyncio.AbstractEventLoop, links: Sequence[_Link], thread: threading.Thread):
        self.begun = False
        self.waiting: set[Future[Any]] = set()
        self._loop, self._links, self._thread = loop, links, thread

    def begin(self) -> None:
        """Tell them to end."""
        if not self.begun:
            self.begun = True
            asyncio.run_coroutine_threadsafe(self._end(), self._loop)

    def wait(self) -> None:
        """Tell them to end, and wait until they have."""
        self.begin()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSING + 4)

    async def _end(self) -> None:
        for future in list(self.waiting):
            future.cancel()
        lives = [link.life for link in self._links if link.life is not None]
        for link in self._links:
            link.over.set()
            if link.client is None:
                link.end()
        if lives:
            _, hanging = await asyncio.wait(lives, timeout=CLOSING)
            for link in self._links:
                link.end()
            if hanging:
                await asyncio.wait(hanging, timeout=2)
        self._loop.stop()


async def _connect(server: Server, log: IO[str], stack: AsyncExitStack) -> Client:
    """A connected client, with all it needs entered on the stack."""
    import httpx2
    from mcp import Client, StdioServerParameters, stdio_client
    from mcp.client.sse import sse_client
    from mcp.client.streamable_http import streamable_http_client

    target: Any = server.program
    if server.command:
        _find_program(server)
        guarded = ["-I", "-S", GUARD, str(os.getpid()), *server.command]
        start = StdioServerParameters(
            command=sys.executable, args=guarded, env=dict(server.env) or None, cwd=server.cwd
        )
        target = stdio_client(start, errlog=log)  # type: ignore[arg-type]
    elif server.url is not None and server.sse:
        target = sse_client(server.url, dict(server.headers) or None)
    elif server.url is not None:
        patience = httpx2.Timeout(30, read=300)  # the deadlines of connecting and calling are shorter
        http = httpx2.AsyncClient(headers=dict(server.headers), timeout=patience)
        target = streamable_http_client(server.url, http_client=await stack.enter_async_context(http))
    return await stack.enter_async_context(Client(target))


def _find_program(server: Server) -> None:
    program = server.command[0]
    if os.sep in program:
        found = os.access(Path(server.cwd or ".", program).expanduser(), os.X_OK)
    else:
        found = shutil.which(program, path=server.env.get("PATH")) is not None
    if not found:
        raise ToolError(f"there is no program {program!r} to run")


async def _list_tools(client: Client, server: Server) -> list[ListedTool]:
    """The tools that may be used."""
    listed: list[ListedTool] = []
    cursor = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            hints = tool.annotations
            read_only = bool(hints and hints.read_only_hint)
            text = (tool.description or "").strip()[:MAX_DESCRIPTION]
            listed.append(ListedTool(tool.name, text, tool.input_schema, read_only))
        cursor = page.next_cursor
        if not cursor or len(listed) > MAX_TOOLS:
            break
    if len(listed) > MAX_TOOLS:
        raise ToolError(f"it lists more than {MAX_TOOLS} tools")
    for unknown in sorted((server.allowed or set()) - {tool.name for tool in listed}):
        logger.warning("MCP server %s has no tool %r to allow", server.name, unknown)
    allowed = [tool for tool in listed if server.allowed is None or tool.name in server.allowed]
    return [tool for tool in allowed if tool.name not in server.denied]


def _closed() -> ToolError:
    return ToolError("the MCP servers were closed", "mcp")


def _lost() -> tuple[int, ...]:
    """Codes of errors after which a connection is of no use."""
    from mcp.types import CONNECTION_CLOSED, INVALID_REQUEST

    return CONNECTION_CLOSED, INVALID_REQUEST  # the second for a session that the server has forgotten


def _log_failure(future: Future[Any]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.warning("%s", one_line(error))


def log_file(name: str) -> Path:
    """Where a server's standard error goes."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:100]
    return state_folder() / "mcp" / f"{safe}.log"


def _open_log(name: str) -> IO[str]:
    """The log, readable by its owner only; nowhere where it cannot be written."""
    path = log_file(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_CREAT | os.O_RDWR | os.O_APPEND
        if path.exists() and path.stat().st_size > MAX_LOG:
            flags |= os.O_TRUNC
        file = os.fdopen(os.open(path, flags, 0o600), "r+", encoding="utf-8", errors="replace")
        file.seek(0, os.SEEK_END)
        return file
    except OSError:
        return open(os.devnull, "r+", encoding="utf-8")


def _last_line(log: IO[str], begin: int) -> str:
    """The last thing that a server said before it ended."""
    try:
        log.seek(max(begin, log.seek(0, os.SEEK_END) - 4096))
        lines = [line for line in log.read().splitlines() if line.strip()]
    except OSError:
        return ""
    return one_line(lines[-1]) if lines else ""
