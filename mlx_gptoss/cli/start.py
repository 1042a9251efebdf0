"""`mlx-gptoss` alone in a terminal: the models on this machine, what fits it, and the next command."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from rich.console import Console
from rich.text import Text

from mlx_gptoss.checkpoint.installed import Installed, installed
from mlx_gptoss.checkpoint.memory import gigabytes
from mlx_gptoss.cli.models import describe
from mlx_gptoss.cli.tables import show_table
from mlx_gptoss.device import available_memory, on_gpu, total_memory


@dataclass(frozen=True)
class Choice:
    """One way to have OpenAI's checkpoints: bytes of the weights, with all experts in memory and with those
    of one token, and the command that gets them.
    """

    name: str
    weights: int
    least: int
    command: str


# What `inspect` tells of the published files, and of what `convert` makes of them.
CHOICES = (
    Choice("20b", 13_761_264_768, 3_721_354_368, "mlx-gptoss pull 20b"),
    Choice("20b in 4 bits", 11_193_000_000, 2_300_000_000, "mlx-gptoss convert 20b"),
    Choice("120b", 65_248_815_744, 5_082_528_384, "mlx-gptoss pull 120b"),
    Choice("120b in 4 bits", 62_200_000_000, 3_200_000_000, "mlx-gptoss convert 120b"),
)
BESIDE = 600_000_000  # bytes that a conversation of 4,096 tokens and the runtime take beside the weights


def start() -> None:
    """Print the page."""
    console = Console(highlight=False)
    free = available_memory()
    console.print(
        Text.assemble(("mlx-gptoss", "bold"), f" {version('gptoss-mlx')}: gpt-oss on Apple Silicon")
    )
    share = f"{gigabytes(free)} of it {'for the GPU' if on_gpu() else 'free'}"
    console.print(f"This machine has {gigabytes(total_memory())} of memory, {share}.\n")
    here = list(installed())
    _print_here(console, here, free)
    _print_choices(console, here, free)
    console.print(Text("\nNext", "bold"))
    show_next(console, here, free)


def _print_here(console: Console, here: list[Installed], free: int) -> None:
    console.print(Text("On this machine", "bold"))
    rows = []
    for item in here:
        told = describe(item, free)
        fits = item.problem or _memory(told["memory"], told["fits"], told["streams"])
        rows.append((told["name"], gigabytes(item.nbytes), _tell(fits)))
    show_table(("model", "on disk", "memory"), rows)


def _print_choices(console: Console, here: list[Installed], free: int) -> None:
    """What could be had beside what is here already."""
    names = {item.name for item in here}
    choices = [choice for choice in CHOICES if choice.name not in names]
    if not choices:
        return
    console.print(Text("To download", "bold"))
    rows = []
    for choice in choices:
        needed = choice.weights + BESIDE
        fits = _memory(needed, needed <= free, choice.least + BESIDE <= free)
        rows.append((choice.name, choice.command, gigabytes(choice.weights), _tell(fits)))
    show_table(("model", "command", "weights", "memory"), rows, left=2)


def _memory(needed: int, fits: bool, streams: bool) -> str:
    """Whether a model fits, or runs with experts on the disk."""
    if fits:
        return "fits"
    return "experts from the SSD" if streams else f"needs {gigabytes(needed)}"


def _tell(fits: str) -> Text:
    return Text(fits, "green" if fits == "fits" else "yellow")


def show_next(console: Console, here: list[Installed], free: int) -> None:
    """The commands that make sense now: with the largest real model that fits, else with one to be had."""
    usable = [item for item in here if item.origin != "built in" and describe(item, free)["fits"]]
    fitting = [choice for choice in CHOICES if choice.weights + BESIDE <= free]
    if usable:
        best = max(usable, key=lambda item: item.nbytes).name
        lines = {
            f"mlx-gptoss chat {best}": "talk to it",
            f"mlx-gptoss serve {best}": "for OpenAI's and Anthropic's clients, with a chat page",
        }
    else:
        lines = {"mlx-gptoss chat demo": "talk to a toy of 3 million parameters, no download"}
        if fitting:
            lines |= {fitting[0].command: f"get {fitting[0].name}"}
    lines |= {"mlx-gptoss --help": "all commands"}
    width = max(map(len, lines))
    for command, why in lines.items():
        console.print(Text.assemble("  ", (f"{command:<{width}}", "cyan"), f"  {why}"), soft_wrap=True)
