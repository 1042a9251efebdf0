"""`mlx-gptoss demo`: the newcomer's first minute, on the model that is shipped in the package.

Everything shown is the real thing: the converter, the engine, the chat format, a tool run as a Python
function, and an answer held to a JSON schema. Only the model is a toy.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

if TYPE_CHECKING:
    from mlx_gptoss.harmony import ReasoningEffort
    from mlx_gptoss.llm import LLM

PROMPTS: tuple[tuple[str, ReasoningEffort], ...] = (
    ("What is 358 + 267?", "high"),
    ("How many r's are in strawberry?", "medium"),
    ("Why is the sky blue?", "low"),
)
TOOL_PROMPT = "What is the weather in Oslo?"
JSON_PROMPT = "Anna is 31 years old and lives in Rome."
JSON_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
}
NEXT = (
    "mlx-gptoss chat demo                        talk to this toy",
    "mlx-gptoss chat openai/gpt-oss-20b          download 13.8 GB and talk to the real one",
    "mlx-gptoss convert openai/gpt-oss-20b 20b   make it smaller and faster first",
    "mlx-gptoss serve 20b                        an OpenAI-compatible server",
)


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"{7 + len(city)} degrees and cloudy"


@click.command()
def demo() -> None:
    """Convert, inspect and talk to the built-in demo model: sums, a tool, a JSON answer. No download."""
    from mlx_gptoss.llm import load

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        "The demo model has the architecture and the chat format of gpt-oss-20b and about 3 million\n"
        "parameters. It was trained from scratch on sums, letters, lists, capitals and tool calls:\n"
        "a toy that shows how everything works, not a language model to rely on."
    )
    with tempfile.TemporaryDirectory(prefix="mlx-gptoss-demo-") as folder:
        target = Path(folder) / "demo-mxfp4-q4"
        _convert(console, target)
        began = time.perf_counter()
        with load(target, max_context=4096) as llm:
            console.print(f"Loaded in {time.perf_counter() - began:.2f} s.")
            began = time.perf_counter()
            tokens = _prompts(console, llm) + _tool(console, llm) + _structured(console, llm)
            seconds = time.perf_counter() - began
    _heading(console, "Speed")
    console.print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s in all.")
    _heading(console, "Next")
    for line in NEXT:
        console.print(line, markup=False)


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def _convert(console: Console, target: Path) -> None:
    from mlx_gptoss.checkpoint.hub import resolve
    from mlx_gptoss.cli.inspect import inspect
    from mlx_gptoss.convert.convert import convert
    from mlx_gptoss.convert.recipes import make_recipe

    source = resolve("demo")
    before = (source / "model.safetensors").stat().st_size
    began = time.perf_counter()
    done = convert(source, target, make_recipe("mxfp4-q4"))
    _heading(console, "Convert (recipe mxfp4-q4) and inspect")
    console.print(
        f"{before / 1e6:.1f} MB of weights became {done.nbytes / 1e6:.1f} MB in all "
        f"in {time.perf_counter() - began:.2f} s; experts are copied bit for bit."
    )
    click.get_current_context().invoke(
        inspect, model=str(target), dtype=None, revision=None, offline=True, as_json=False
    )


def _prompts(console: Console, llm: LLM) -> int:
    """Each part returns how many tokens it generated."""
    _heading(console, "Three prompts, with the reasoning")
    tokens = 0
    for prompt, effort in PROMPTS:
        console.print(f"> {prompt}  [dim](reasoning effort: {effort})[/dim]")
        reply = llm.respond(prompt, reasoning_effort=effort, temperature=0.0, max_tokens=400)
        tokens += reply.usage.completion_tokens
        console.print(f"  {reply.reasoning}", style="dim", markup=False)
        console.print(f"  {reply.text}", markup=False)
    return tokens


def _tool(console: Console, llm: LLM) -> int:
    from mlx_gptoss.harmony import Done, MessageDone, ToolCall

    _heading(console, "A tool: the Python function get_weather(city)")
    console.print(f"> {TOOL_PROMPT}")
    session = llm.chat(tools=[get_weather], max_steps=4, temperature=0.0, max_tokens=400)
    for event in session.stream(TOOL_PROMPT):
        if isinstance(event, ToolCall):
            console.print(f"  call    {event.name}({event.arguments})", markup=False)
        elif isinstance(event, MessageDone) and event.message.role == "tool":
            console.print(f"  result  {event.message.content}", markup=False)
        elif isinstance(event, Done):
            console.print(f"  {event.reply.text}", markup=False)
    return session.usage.completion_tokens


def _structured(console: Console, llm: LLM) -> int:
    _heading(console, "An answer that must be JSON with name, age and city")
    console.print(f"> {JSON_PROMPT}")
    reply = llm.respond(JSON_PROMPT, schema=JSON_SCHEMA, temperature=0.0, max_tokens=400)
    console.print(f"  {json.dumps(reply.parsed)}", markup=False)
    return reply.usage.completion_tokens
