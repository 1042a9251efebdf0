"""Arguments and options that several commands share, so that each is declared once.

`@model_options` hands a command `source: ModelSource`, `@sampling_options()` `sampling: SamplingParams`,
`@chat_options` `talk: ChatOptions`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from mlx_gptoss.errors import RequestError
from mlx_gptoss.sampling import SamplingParams, about

if TYPE_CHECKING:
    from mlx_gptoss.engine.options import EngineKeywords
    from mlx_gptoss.harmony import ReasoningEffort
    from mlx_gptoss.llm import LLM

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Said of a sampling option where it has no default of its own.
_UNSET = {"max_tokens": "  [default: what the context holds]"}


def size(text: str) -> int:
    """A number of bytes from 4GB, 512MiB, 1.5gb or plain 1000000. Raises BadParameter."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    if not found:
        raise click.BadParameter(f"{text!r}: expected a size such as 4GB, 512MiB or a number of bytes")
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()])


def whole(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """For a choice between whole numbers: the chosen one as a number."""
    return None if value is None else int(value)


@dataclass(frozen=True)
class ModelSource:
    """Which model to load and how: MODEL and the loading options."""

    model: str
    dtype: str | None
    revision: str | None
    offline: bool
    engine: EngineKeywords

    def local(self) -> ModelSource:
        """The same model as a local folder: downloaded, or found missing, before anything else is done."""
        from mlx_gptoss.checkpoint.hub import resolve

        return replace(self, model=str(resolve(self.model, revision=self.revision, offline=self.offline)))

    def load(self) -> LLM:
        """The loaded model; close it, or use it in a with statement."""
        from mlx_gptoss.cli.progress import progress_bar
        from mlx_gptoss.llm import load

        with progress_bar("loading") as progress:
            return load(
                self.model,
                dtype=self.dtype,
                revision=self.revision,
                offline=self.offline,
                progress=progress,
                announce=partial(click.echo, err=True) if sys.stderr.isatty() else None,
                **self.engine,
            )


def read_standard_input() -> str:
    """What is piped in. Raises RequestError when it is not text in the encoding of standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"standard input holds the byte {error.object[error.start]:#04x} at position {error.start}: "
            f"expected text in {error.encoding}",
            "prompt",
        ) from None


@dataclass(frozen=True)
class ChatOptions:
    """How the model is addressed in the chat format."""

    system: str | None
    effort: ReasoningEffort
    show_reasoning: bool


def bundle(name: str, make: Callable[..., Any], *options: Decorator) -> Decorator:
    """Declares `options` on a command; what `make` returns for their values is passed under `name`."""

    def declare(command: Command) -> Command:
        @wraps(command)
        def gathered(**values: Any) -> Any:
            return command(**{name: make(**{key: values.pop(key) for key in keys})}, **values)

        before = len(vars(gathered).get("__click_params__", ()))
        for option in reversed(options):
            option(gathered)
        keys = [param.name for param in vars(gathered)["__click_params__"][before:]]
        return cast(Command, gathered)

    return declare


model_argument = click.argument("model", metavar="MODEL")
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of activations and dense weights.  [default: bfloat16 on a GPU, float32 on the CPU]",
)
revision_option = click.option("--revision", help="Branch, tag or commit of a Hub repository.")
offline_option = click.option("--offline", is_flag=True, help="Use what is already downloaded; no network.")


def _source(model: str, dtype: str | None, revision: str | None, offline: bool, **engine: Any) -> ModelSource:
    return ModelSource(model, dtype, revision, offline, cast("EngineKeywords", engine))


# MODEL and how to load it. From --max-context on, the options are named as the fields of EngineOptions.
model_options = bundle(
    "source",
    _source,
    model_argument,
    dtype_option,
    revision_option,
    offline_option,
    click.option(
        "--max-context", type=int, metavar="TOKENS", help="Longest context to allow.  [default: the model's]"
    ),
    click.option("--kv-budget", type=size, help="Memory for KV caches, e.g. 4GB.  [default: what is left]"),
    click.option(
        "--kv-bits",
        type=click.Choice(["8", "4"]),
        callback=whole,
        help="Quantise the KV cache of the full layers; 4 costs quality.  [default: off]",
    ),
    click.option(
        "--prefix-cache",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder that keeps computed prompts from one run to the next; holds what users wrote.",
    ),
    click.option(
        "--draft",
        metavar="MODEL|lookup",
        help="Guess tokens with a smaller model, or from the text so far, and verify them.  [default: off]",
    ),
)

# How to address the model in the chat format.
chat_options = bundle(
    "talk",
    ChatOptions,
    click.option("--system", metavar="TEXT", help="Instructions to the model."),
    click.option(
        "--effort",
        type=click.Choice(["low", "medium", "high"]),
        default="medium",
        show_default=True,
        help="How long the model reasons.",
    ),
    click.option("--show-reasoning", is_flag=True, help="Show the reasoning as well."),
)


def sampling_options(*, max_tokens: int | None = None) -> Decorator:
    """The fields of SamplingParams that have a help text; `max_tokens` is the default of --max-tokens.

    A wrong value is a RequestError when the command runs.
    """
    options: list[Decorator] = []
    for item in fields(SamplingParams):
        said = about(item.name)
        if said.help:
            default = max_tokens if item.name == "max_tokens" else item.default
            told = said.help + (_UNSET.get(item.name, "") if default is None else "")
            flag = f"--{item.name.replace('_', '-')}"
            options.append(click.option(flag, type=said.kind, default=default, show_default=True, help=told))
    stop_help = "End before this text. May be given repeatedly."
    stop = click.option("--stop", multiple=True, metavar="TEXT", help=stop_help)
    return bundle("sampling", SamplingParams, *options, stop)
