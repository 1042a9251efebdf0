"""Arguments and options that several commands share, so that each is declared once.

`@model_options` hands a command `source: ModelSource`, `@sampling_options()` `sampling: SamplingOptions`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mlx_gptoss.harmony import ReasoningEffort
    from mlx_gptoss.llm import LLM
    from mlx_gptoss.sampling import SamplingParams

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ByteSize(click.ParamType):
    """A number of bytes: 4GB, 512MiB, 1.5gb or plain 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", str(value), re.IGNORECASE)
        if not found:
            self.fail(f"{value!r}: expected a size such as 4GB, 512MiB or a number of bytes", param, ctx)
        return int(float(found[1]) * _UNITS[(found[2] or "").upper()])


@dataclass(frozen=True)
class ModelSource:
    """Which model to load and how: MODEL and the loading options."""

    model: str
    dtype: str | None
    revision: str | None
    offline: bool
    max_context: int | None
    kv_budget: int | None
    kv_bits: str | None
    prefix_cache: Path | None
    draft: str | None

    def folder(self) -> Path:
        """The local folder of the model, downloaded if need be."""
        from mlx_gptoss.checkpoint.hub import resolve

        return resolve(self.model, revision=self.revision, offline=self.offline)

    def load(self) -> LLM:
        """The loaded engine; close it, or use it in a with statement."""
        from mlx_gptoss.cli.progress import loading_bar
        from mlx_gptoss.llm import load

        with loading_bar() as progress:
            return load(
                self.model,
                dtype=self.dtype,
                revision=self.revision,
                offline=self.offline,
                max_context=self.max_context,
                kv_budget=self.kv_budget,
                kv_bits=None if self.kv_bits is None else int(self.kv_bits),
                prefix_cache=self.prefix_cache,
                draft=self.draft,
                progress=progress,
                announce=_tell if sys.stderr.isatty() else None,
            )


@dataclass(frozen=True)
class SamplingOptions:
    """What the sampling options were set to; the values are checked when `params` builds SamplingParams."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]

    def params(self, **more: Any) -> SamplingParams:
        """SamplingParams of these values and `more`. Raises RequestError."""
        from mlx_gptoss.sampling import SamplingParams

        return SamplingParams(**{f.name: getattr(self, f.name) for f in fields(self)} | more)


@dataclass(frozen=True)
class ChatOptions:
    """How the model is addressed in the chat format."""

    system: str | None
    effort: ReasoningEffort
    show_reasoning: bool


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _bundle(command: Command, name: str, kind: type[Any], options: Sequence[Callable[[Any], Any]]) -> Command:
    """Declare `options` on a command and pass their values as one `kind` under `name`."""
    members = [f.name for f in fields(kind)]

    @wraps(command)
    def gathered(*args: Any, **values: Any) -> Any:
        bundle = kind(**{m: values.pop(m) for m in members})
        return command(*args, **{name: bundle}, **values)

    wrapped: Any = gathered
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


model_argument = click.argument("model", metavar="MODEL")
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of activations and dense weights.  [default: bfloat16 on a GPU, float32 on the CPU]",
)
revision_option = click.option("--revision", help="Branch, tag or commit of a Hub repository.")
offline_option = click.option("--offline", is_flag=True, help="Use what is already downloaded; no network.")
max_context_option = click.option(
    "--max-context", type=int, metavar="TOKENS", help="Longest context to allow.  [default: the model's]"
)
kv_budget_option = click.option(
    "--kv-budget", type=ByteSize(), help="Memory for KV caches, e.g. 4GB.  [default: what is left]"
)
kv_bits_option = click.option(
    "--kv-bits",
    type=click.Choice(["8", "4"]),
    help="Quantise the KV cache of the full layers; 4 costs quality.  [default: off]",
)
prefix_cache_option = click.option(
    "--prefix-cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps computed prompts from one run to the next; holds what users wrote.",
)
draft_option = click.option(
    "--draft",
    metavar="MODEL|lookup",
    help="Guess tokens with a smaller model, or from the text so far, and verify them.  [default: off]",
)


def model_options(command: Command) -> Command:
    """MODEL and the loading options, handed over as `source`."""
    options = [
        model_argument,
        dtype_option,
        revision_option,
        offline_option,
        max_context_option,
        kv_budget_option,
        kv_bits_option,
        prefix_cache_option,
        draft_option,
    ]
    return _bundle(command, "source", ModelSource, options)


def sampling_options(*, max_tokens: int | None = None) -> Callable[[Command], Command]:
    """The sampling options, handed over as `sampling`; `max_tokens` is the default of --max-tokens."""
    options = [
        click.option(
            "--max-tokens",
            type=int,
            default=max_tokens,
            show_default=max_tokens is not None,
            help="Most tokens to generate." + ("" if max_tokens else "  [default: what the context holds]"),
        ),
        click.option(
            "--temperature", type=float, default=1.0, show_default=True, help="0 takes the likeliest token."
        ),
        click.option(
            "--top-p",
            type=float,
            default=1.0,
            show_default=True,
            help="Keep the likeliest tokens up to this sum.",
        ),
        click.option(
            "--top-k", type=int, default=0, show_default=True, help="Keep this many tokens; 0 keeps all."
        ),
        click.option(
            "--min-p",
            type=float,
            default=0.0,
            show_default=True,
            help="Drop tokens below this share of the best.",
        ),
        click.option(
            "--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: repeat less."
        ),
        click.option("--seed", type=int, help="Same seed, same text."),
        click.option(
            "--stop", multiple=True, metavar="TEXT", help="End before this text. May be given repeatedly."
        ),
    ]

    def decorate(command: Command) -> Command:
        return _bundle(command, "sampling", SamplingOptions, options)

    return decorate


def chat_options(command: Command) -> Command:
    """--system, --effort and --show-reasoning, handed over as `talk`."""
    options = [
        click.option("--system", metavar="TEXT", help="Instructions to the model."),
        click.option(
            "--effort",
            type=click.Choice(["low", "medium", "high"]),
            default="medium",
            show_default=True,
            help="How long the model reasons.",
        ),
        click.option("--show-reasoning", is_flag=True, help="Show the reasoning as well."),
    ]
    return _bundle(command, "talk", ChatOptions, options)
