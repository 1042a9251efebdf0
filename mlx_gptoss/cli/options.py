"""Arguments and options that several commands share, so that each is declared once.

`@model_options` hands a command `source: ModelSource`, `@sampling_options()` `sampling: SamplingParams`,
`@chat_options` `talk: ChatOptions`.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from mlx_gptoss.checkpoint.names import DEMO, SHORT_NAMES, expand
from mlx_gptoss.errors import RequestError
from mlx_gptoss.sampling import SamplingParams, about
from mlx_gptoss.sizes import parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from mlx_gptoss.distributed.launch import Parallel
    from mlx_gptoss.engine.options import EngineKeywords
    from mlx_gptoss.harmony import ReasoningEffort
    from mlx_gptoss.llm import LLM

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]


def size(text: str) -> int:
    """A number of bytes. Raises BadParameter."""
    found = parse_size(text)
    if found is None:
        raise click.BadParameter(f"{text!r}: expected a size such as 4GB, 512MiB or a number of bytes")
    return found


def size_or_word(*words: str) -> Callable[[str], int | str]:
    """Reads a number of bytes, or one of some words."""

    def read(text: str) -> int | str:
        return text if text in words else size(text)

    return read


def whole(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """For a choice between whole numbers: the chosen one as a number."""
    return None if value is None else int(value)


class NewFile(click.Path):
    """A file that a command writes at its end: that its folder is there is known at the beginning."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = cast(Path, super().convert(value, param, ctx))
        if not path.parent.is_dir():
            self.fail(f"{str(path)!r}: there is no folder {str(path.parent)!r}", param, ctx)
        return path


@dataclass(frozen=True)
class ModelSource:
    """Which model to load and how: MODEL and the loading options. `name`: MODEL where it became a folder."""

    model: str
    dtype: str | None
    revision: str | None
    offline: bool
    engine: EngineKeywords
    name: str = ""
    adapters: tuple[tuple[str | None, str], ...] = ()  # name (None: answers whatever names no other), place
    hosts: str | None = None
    split: str | None = None
    parallel: str = "pipeline"
    force: bool = False

    def local(self) -> ModelSource:
        """The same model as a local folder: downloaded, or found missing, before anything else is done."""
        from mlx_gptoss.checkpoint.hub import resolve

        folder = resolve(
            self.model,
            revision=self.revision,
            offline=self.offline,
            announce=partial(click.echo, err=True),
        )
        return replace(self, model=str(folder), revision=None, name=expand(self.model))

    def load(self) -> LLM:
        """The loaded model; close it, or use it in a with statement."""
        from mlx_gptoss.cli.progress import progress_bar
        from mlx_gptoss.llm import load

        name = self.name or expand(self.model)
        split = None
        if self.split is not None:
            from mlx_gptoss.distributed.plan import parse_split

            split = parse_split(self.split)

        def announce(line: str) -> None:
            _, _, facts = line.partition(": ")  # what comes first is a commit's hash in the Hub's cache
            click.echo(f"{name}: {facts}", err=True)

        with progress_bar("loading") as progress:
            llm = load(
                self.model,
                dtype=self.dtype,
                revision=self.revision,
                offline=self.offline,
                progress=progress,
                announce=announce if sys.stderr.isatty() else None,
                adapter=next((place for name, place in self.adapters if name is None), None),
                adapters={name: place for name, place in self.adapters if name is not None},
                hosts=self.hosts,
                split=split,
                parallel=cast("Parallel", self.parallel),
                force=self.force,
                **self.engine,
            )
        llm.name = name
        return llm


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


class ModelName(click.ParamType[str]):
    """What a model goes by, and what the Tab key offers for it: `names()`, and folders where `folders`."""

    name = "model"

    def __init__(self, names: Callable[[], Iterable[str]], expected: str, *, folders: bool = True) -> None:
        self._names = names
        self._expected = expected
        self._folders = folders

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return f"Give {self._expected}"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        places = sorted(Path().glob(f"{glob.escape(incomplete)}*/")) if self._folders else []
        offered = [*self._names(), *(f"{place}/" for place in places)]
        return [CompletionItem(name) for name in offered if name.startswith(incomplete)]


def downloaded_names() -> list[str]:
    """The models in the Hub's cache, without looking into them."""
    from mlx_gptoss.checkpoint.hub import downloaded

    return downloaded()


def names_here() -> list[str]:
    """The names of the models on this machine, likewise."""
    from mlx_gptoss.checkpoint import registry

    return [*(folder.name for folder in registry.remembered()), *downloaded_names()]


_any_model = ModelName(
    lambda: [DEMO, *SHORT_NAMES, *names_here()],
    "a folder, a Hub id, 20b, 120b or demo; `mlx-gptoss models` lists what is here",
)
model_argument = click.argument("model", metavar="MODEL", type=_any_model)
optional_model_argument = click.argument("model", metavar="[MODEL]", type=_any_model, required=False)
source_argument = click.argument(
    "source",
    metavar="SOURCE",
    type=ModelName(
        lambda: [DEMO, *SHORT_NAMES, *downloaded_names()], "a folder, a .gguf file, 20b, 120b or a Hub id"
    ),
)
hub_argument = click.argument(
    "model", metavar="MODEL", type=ModelName(lambda: SHORT_NAMES, "20b, 120b or a Hub id", folders=False)
)
installed_argument = click.argument(
    "model", metavar="MODEL", type=ModelName(names_here, "a name that `mlx-gptoss models` lists")
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of activations and dense weights.  [default: bfloat16 on a GPU, float32 on the CPU]",
)
revision_option = click.option("--revision", help="Branch, tag or commit of a Hub repository.")
offline_option = click.option("--offline", is_flag=True, help="Use what is already downloaded; no network.")


def _source(
    model: str,
    dtype: str | None,
    revision: str | None,
    offline: bool,
    adapter: tuple[tuple[str | None, str], ...],
    hosts: str | None,
    split: str | None,
    parallel: str,
    force: bool,
    **engine: Any,
) -> ModelSource:
    keywords = cast("EngineKeywords", engine)
    return ModelSource(
        model,
        dtype,
        revision,
        offline,
        keywords,
        adapters=adapter,
        hosts=hosts,
        split=split,
        parallel=parallel,
        force=force,
    )


def _adapters(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str | None, str], ...]:
    """NAME=PLACE or PLACE, each."""
    split = [value.partition("=") for value in values]
    found = tuple((name, place) if mark else (None, name) for name, mark, place in split)
    if sum(name is None for name, _ in found) > 1:
        raise click.BadParameter("several without a name: give NAME=FOLDER")
    return found


# MODEL and how to load it. From --max-context on, the options are named as the fields of EngineOptions.
model_options = bundle(
    "source",
    _source,
    model_argument,
    dtype_option,
    revision_option,
    offline_option,
    click.option(
        "--adapter",
        multiple=True,
        callback=_adapters,
        metavar="[NAME=]FOLDER|HUB_ID",
        help="Adapter beside the weights; with a name, for requests that name it. May be repeated.",
    ),
    click.option(
        "--hosts",
        metavar="NAME,NAME|FILE",
        help="Machines that share the layers, this one first, or the hostfile of mlx.launch.",
    ),
    click.option("--split", metavar="N,N", help="How many layers each host has.  [default: by its memory]"),
    click.option(
        "--parallel",
        type=click.Choice(["pipeline", "tensor"]),
        default="pipeline",
        show_default=True,
        help="With --hosts: whole layers on each, or a part of every layer, for links of microseconds.",
    ),
    click.option("--force", is_flag=True, help="Use --parallel tensor where it is measured not to pay."),
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
        "--expert-memory",
        type=size_or_word("auto", "all"),
        default="auto",
        show_default=True,
        metavar="auto|all|SIZE",
        help="Memory for experts, e.g. 12GB; the others are read from the disk when a token needs them.",
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


def sampling_options(*, unset: str = "by effort") -> Decorator:
    """The fields of SamplingParams that have a help text; `unset`: what is told of no --max-tokens.

    A wrong value is a RequestError when the command runs.
    """
    options: list[Decorator] = []
    for item in fields(SamplingParams):
        said = about(item.name)
        if said.help:
            default = item.default
            told = f"{said.help}  [default: {unset}]" if item.name == "max_tokens" else said.help
            flag = f"--{item.name.replace('_', '-')}"
            options.append(click.option(flag, type=said.kind, default=default, show_default=True, help=told))
    stop_help = "End before this text. May be given repeatedly."
    stop = click.option("--stop", multiple=True, metavar="TEXT", help=stop_help)
    return bundle("sampling", SamplingParams, *options, stop)
