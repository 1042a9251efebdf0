"""The terminal chat with a toy MCP server, as a program of its own: the model notes down whatever it is told.

python -m tests.support.asking_app
"""

from __future__ import annotations

import json
from contextlib import ExitStack

from rich.console import Console

from mlx_gptoss.cli.chat import run_chat
from mlx_gptoss.cli.terminal.approve import approved, ask_in_terminal
from mlx_gptoss.cli.terminal.talk import Settings
from mlx_gptoss.mcp.tools import mcp_tools
from tests.support.scripted_model import scripted_engine
from tests.support.toy_mcp import make_server


def script(context: str) -> str:
    """What the model says next."""
    said, _, since = context.rsplit("<|start|>user<|message|>", 1)[1].partition("<|end|>")
    if "functions.note to=assistant" in since:
        result = since.rsplit("<|message|>", 1)[1].split("<|end|>")[0]
        return f"<|channel|>final<|message|>The tool says: {result}<|return|>"
    call = "<|channel|>commentary to=functions.note <|constrain|>json<|message|>"
    return f"{call}{json.dumps({'text': said})}<|call|>"


def main() -> None:
    console = Console(highlight=False)
    engine, _ = scripted_engine(script)
    with ExitStack() as stack:
        tools = stack.enter_context(mcp_tools(make_server()))
        stack.enter_context(engine)
        run_chat(engine, Settings(tools=approved(tools, ask_in_terminal(console))), console)


if __name__ == "__main__":
    main()
