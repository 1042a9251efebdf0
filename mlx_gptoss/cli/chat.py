"""`mlx-gptoss chat`: talk to a model in the terminal; piped, one answer to what comes in."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from mlx_gptoss.cli.options import (
    ChatOptions,
    ModelSource,
    chat_options,
    model_options,
    read_standard_input,
    sampling_options,
)
from mlx_gptoss.errors import RequestError
from mlx_gptoss.tools import BUILTIN, builtin_tools

if TYPE_CHECKING:
    from mlx_gptoss.cli.terminal.chat import Settings
    from mlx_gptoss.llm import LLM
    from mlx_gptoss.sampling import SamplingParams


@click.command()
@model_options
@chat_options
@click.option(
    "--tool",
    "tools",
    type=click.Choice(list(BUILTIN)),
    multiple=True,
    help="Enable a built-in tool. May be given repeatedly.",
)
@click.option("--pages", type=click.Path(path_type=Path), help="Folder that the browser reads.")
@click.option("--unsafe-python", is_flag=True, help="Run the model's Python without isolation.")
@sampling_options()
def chat(
    source: ModelSource,
    talk: ChatOptions,
    tools: tuple[str, ...],
    pages: Path | None,
    unsafe_python: bool,
    sampling: SamplingParams,
) -> None:
    """Chat with MODEL. In a pipe: answer what comes in, print the answer only."""
    from mlx_gptoss.cli.terminal.chat import Settings
    from mlx_gptoss.cli.terminal.once import answer_once

    with ExitStack() as stack:
        enabled = [
            stack.enter_context(closing(tool))
            for tool in builtin_tools(tools, folder=pages, unsafe_python=unsafe_python)
        ]
        settings = Settings(talk.system, talk.effort, talk.show_reasoning, enabled, sampling)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            message = read_standard_input()
            if not message.strip():
                raise RequestError("there is nothing to answer: type or pipe in a message", "prompt")
            events = settings.session(stack.enter_context(source.load())).stream(message)
            answer_once(events, show_reasoning=settings.show_reasoning)
        else:
            run_chat(stack.enter_context(source.load()), settings)


def run_chat(llm: LLM, settings: Settings) -> None:
    """Chat at the terminal until the user leaves."""
    from mlx_gptoss.cli.terminal.chat import Chat
    from mlx_gptoss.cli.terminal.prompt import Prompt

    talk = Chat(llm, settings, Console(highlight=False))
    talk.run(Prompt(talk.commands, talk.status))
