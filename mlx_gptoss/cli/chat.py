"""`mlx-gptoss chat`: talk to a model in the terminal; piped, one answer to what comes in."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from mlx_gptoss.cli.mcp import McpSources, mcp_options
from mlx_gptoss.cli.options import (
    ChatOptions,
    ModelSource,
    chat_options,
    model_options,
    read_standard_input,
    sampling_options,
)
from mlx_gptoss.cli.prefill import shown_reading
from mlx_gptoss.errors import RequestError
from mlx_gptoss.tools import BUILTIN, builtin_tools

if TYPE_CHECKING:
    from mlx_gptoss.cli.terminal.talk import Settings
    from mlx_gptoss.llm import LLM
    from mlx_gptoss.sampling import SamplingParams
    from mlx_gptoss.tools.call import ToolLike


@click.command()
@chat_options
@click.option(
    "--tool",
    "tools",
    type=click.Choice(list(BUILTIN)),
    multiple=True,
    help="Enable a built-in tool. May be given repeatedly.",
)
@click.option("--pages", type=click.Path(path_type=Path), help="Folder that the browser reads.")
@click.option("--resume", is_flag=True, help="Go on with the last chat.")
@click.option("--unsafe-python", is_flag=True, help="Run the model's Python without isolation.")
@mcp_options
@sampling_options()
@model_options
def chat(
    source: ModelSource,
    talk: ChatOptions,
    tools: tuple[str, ...],
    pages: Path | None,
    resume: bool,
    unsafe_python: bool,
    servers: McpSources,
    sampling: SamplingParams,
) -> None:
    """Chat with MODEL. In a pipe: answer what comes in, print the answer only.

    Type /help in the chat for its commands.
    """
    from mlx_gptoss.cli.terminal.once import answer_once
    from mlx_gptoss.cli.terminal.talk import Settings
    from mlx_gptoss.cli.terminal.transcript import last_chat

    if pages is not None and "browser" not in tools:
        raise click.UsageError("--pages is for the browser: add --tool browser")
    if unsafe_python and "python" not in tools:
        raise click.UsageError("--unsafe-python is for the tool: add --tool python")
    piped = not (sys.stdin.isatty() and sys.stdout.isatty())
    if resume and piped:
        raise click.UsageError("--resume is for a chat in a terminal: leave it out in a pipe")
    if resume and not last_chat().is_file():
        raise RequestError("there is no chat to resume yet: start one without --resume", "resume")
    with ExitStack() as stack:
        builtin = [
            stack.enter_context(closing(tool))
            for tool in builtin_tools(tools, folder=pages, unsafe_python=unsafe_python)
        ]
        console = Console(highlight=False)
        enabled: list[ToolLike] = [*builtin, *servers.open(stack, None if piped else console)]
        settings = Settings(talk.system, talk.effort, talk.show_reasoning, enabled, sampling)
        source = source.local()
        if piped:
            if sys.stdin.isatty():
                click.echo("type a message; Ctrl-D on a line of its own ends it", err=True)
            message = read_standard_input()
            if not message.strip():
                raise RequestError("there is nothing to answer: type or pipe in a message", "prompt")
            llm = stack.enter_context(source.load())
            events = shown_reading(settings.session(llm).stream(message))
            answer_once(events, show_reasoning=settings.show_reasoning)
        else:
            run_chat(stack.enter_context(source.load()), settings, console, resume=resume)


def run_chat(llm: LLM, settings: Settings, console: Console | None = None, *, resume: bool = False) -> None:
    """Chat at the terminal until the user leaves."""
    from mlx_gptoss.cli.terminal.chat import Chat
    from mlx_gptoss.cli.terminal.prompt import Prompt
    from mlx_gptoss.cli.terminal.transcript import last_chat

    chat = Chat(llm, settings, console or Console(highlight=False))
    if resume:
        chat.go_on(str(last_chat()))
    chat.run(Prompt({name: text for name, (_, text) in chat.commands.items()}, chat.talk.status))
