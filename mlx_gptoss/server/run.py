"""Running the application with uvicorn: load beside the open port, stop without cutting answers off."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from mlx_gptoss import device
from mlx_gptoss.server.app import create_app
from mlx_gptoss.server.http.slow_clients import protocol_class
from mlx_gptoss.server.settings import ServerSettings
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.tools.toolbox import Toolbox

if TYPE_CHECKING:
    from socket import socket

    from fastapi import FastAPI

    from mlx_gptoss.llm import LLM

logger = logging.getLogger("mlx_gptoss.server")


class _Server(uvicorn.Server):
    """uvicorn, letting generations finish for a while after a signal, and then ending them in order."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, on_listening: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._state = state
        self._on_listening = on_listening
        self._watcher: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            if self._state.settings.idle_unload is not None:
                self._watcher = asyncio.create_task(self._state.residence.watch())
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_listening(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self._state.jobs.drain()
        timer = asyncio.get_running_loop().call_later(
            self._state.settings.shutdown_grace, self._state.jobs.stop_all
        )
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            if self._watcher is not None:
                self._watcher.cancel()


def make_server(app: FastAPI, on_listening: Callable[[str], None] = logger.info) -> uvicorn.Server:
    """Uvicorn for an application of create_app; `run()` serves until a signal or `should_exit`."""
    state: ServerState = app.state.server
    settings = state.settings
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol_class(settings.header_timeout),
        ws="none",
        lifespan="off",
        access_log=False,  # the gate logs, without query strings
        log_config=None,
        server_header=False,
        timeout_keep_alive=10,
        # The grace ends the generations; this is for connections that then still do not close.
        timeout_graceful_shutdown=int(settings.shutdown_grace) + 5,
    )
    return _Server(config, state, on_listening)


def serve(
    load: Callable[[], LLM],
    settings: ServerSettings,
    on_listening: Callable[[str], None] = logger.info,
    toolbox: Toolbox | None = None,
) -> None:
    """Serve until a signal. The port opens at once; until `load` returns, /health says "loading" and all else
    is answered 503. Raises what `load` raises. The LLM is closed at the end.

    `on_listening` is told the server's address when the port is open. toolbox: see create_app.
    """
    device.share_arenas()
    app = create_app(None, settings, toolbox)
    state: ServerState = app.state.server
    server = make_server(app, on_listening)
    failure: list[BaseException] = []

    def load_beside() -> None:
        try:
            state.attach(load(), load)
            logger.info("the model is ready")
        except BaseException as error:  # given to the caller below
            failure.append(error)
            server.should_exit = True

    loader = threading.Thread(target=load_beside, name="model loader", daemon=True)
    loader.start()
    # uvicorn raises the signal again when it has stopped; stopping a server is no failure.
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: None) if in_main else None
    try:
        server.run()
    except KeyboardInterrupt:
        logger.info("stopped")
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
        if not loader.is_alive() and state.llm is not None:
            state.llm.close()
    if failure:
        raise failure[0]
