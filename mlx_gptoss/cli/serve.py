"""`mlx-gptoss serve`: the HTTP server."""

from __future__ import annotations

import errno
import logging
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from mlx_gptoss.checkpoint.names import expand
from mlx_gptoss.cli.mcp import ServedOptions, served_options
from mlx_gptoss.cli.options import ModelSource, model_options
from mlx_gptoss.errors import RequestError


def _seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A time as a number of seconds."""
    from mlx_gptoss.server.settings import seconds_of

    if value is None:
        return None
    try:
        seconds = seconds_of(value, "--idle-unload")
    except RequestError as error:
        raise click.BadParameter(str(error)) from None
    if seconds <= 0:
        raise click.BadParameter(f"{value} is no time to wait: expected more than 0, such as 5m")
    return seconds


@click.command()
@click.option(
    "--name", "model_name", help="What clients are told the model is called.  [default: MODEL's last part]"
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0: a free one.",
)
@click.option(
    "--api-key",
    envvar="GPTOSS_API_KEY",
    show_envvar=True,
    help="Key that callers must send. The variable keeps it out of the list of processes.",
)
@click.option("--no-auth", is_flag=True, help="Allow an address that others can reach without a key.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Another name of this server. May be repeated.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Web origin that may call this server, e.g. http://localhost:3000; '*' for all. May be repeated.",
)
@click.option("--max-active", type=int, default=64, show_default=True, help="Requests running or waiting.")
@click.option(
    "--request-timeout", type=float, default=3600, show_default=True, help="Seconds a request may take."
)
@click.option("--max-body", type=float, default=4, show_default=True, help="MiB that a request may have.")
@click.option(
    "--idle-unload",
    metavar="TIME",
    callback=_seconds,
    help="Unload the model after this time without requests, e.g. 5m, and load it again at the next. "
    "With --prefix-cache, what was read of conversations is kept.",
)
@click.option("--open", "open_page", is_flag=True, help="Open the chat page in the browser.")
@served_options
@click.option("--log-prompts", is_flag=True, help="Log the bodies of requests.")
@model_options
def serve(
    source: ModelSource,
    model_name: str | None,
    max_body: float,
    open_page: bool,
    served: ServedOptions,
    **settings: Any,
) -> None:
    """Serve MODEL to OpenAI's, Anthropic's and Ollama's clients, with a chat page at /.

    The APIs are at http://HOST:PORT/v1: chat/completions, responses, completions, messages, models; Ollama's
    is at http://HOST:PORT/api.
    """
    from mlx_gptoss.cli.invitation import announce
    from mlx_gptoss.server.http.logs import LogFormatter
    from mlx_gptoss.server.run import serve as run_server
    from mlx_gptoss.server.settings import ServerSettings

    settings |= {
        "max_body_bytes": int(max_body * 2**20),
        "model_name": model_name or Path(expand(source.model)).name,
    }
    chosen = ServerSettings(**settings)
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    check_port(chosen.host, chosen.port)
    source = source.local()  # before the port opens
    with ExitStack() as stack:
        toolbox = served.open(stack)
        run_server(
            source.load, chosen, lambda url: announce(url, chosen.api_key, open_page=open_page), toolbox
        )


def check_port(host: str, port: int) -> None:
    """Raise RequestError where another program listens there: better now than after the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RequestError(
            f"--host is {host!r}: {error.strerror}; expected an address of this machine", "host"
        ) from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise RequestError(f"{host}:{port} cannot be used: {error.strerror}", "port") from None
            raise RequestError(
                f"port {port} of {host} is taken by another program: choose another one with --port, "
                "or --port 0 for a free one",
                "port",
            ) from None
