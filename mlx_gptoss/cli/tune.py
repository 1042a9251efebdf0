"""`mlx-gptoss tune`: train an adapter, with the losses as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mlx_gptoss.cli.options import dtype_option, offline_option, revision_option
from mlx_gptoss.errors import TuneError

if TYPE_CHECKING:
    from mlx_gptoss.tune.run import Check, Event, Finished, Started, Step

REPORTERS = ("wandb", "trackio", "swanlab")


@click.command()
@click.argument("model", metavar="MODEL", required=False)
@click.argument("data", metavar="DATA", required=False)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the run and its adapter."
)
@click.option(
    "-c",
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML of settings, ours or mlx-lm's.",
)
@click.option("--rank", type=int, help="Rank of the low-rank parts.  [default: 16]")
@click.option("--scale", type=float, help="What the parts add is multiplied by this.  [default: 2]")
@click.option(
    "--parts",
    metavar="NAMES",
    help="attention, attention+router, all, or names such as q_proj,v_proj.  [default: attention]",
)
@click.option("--layers", metavar="WHICH", help="all, last:12, or numbers such as 4,5,8-11.  [default: all]")
@click.option("--tokens", type=int, help="Tokens in one forward and backward, at most.  [default: 2048]")
@click.option("--accumulate", type=int, help="Forwards a step.  [default: 1]")
@click.option("--lr", type=float, help="Highest learning rate.  [default: 2e-4]")
@click.option("--epochs", type=float, help="Times through the data.  [default: 2]")
@click.option("--steps", type=int, help="Steps, instead of epochs.")
@click.option("--optimizer", type=click.Choice(["adamw", "muon"]), help="[default: adamw]")
@click.option(
    "--valid", metavar="FILE|5%|none", help="What to validate on.  [default: DATA's valid.jsonl, or 5%]"
)
@click.option("--every", type=int, help="Steps between validations.  [default: a tenth of all, at least 5]")
@click.option(
    "--patience", type=int, help="Validations without gain before it stops; 0: never.  [default: 3]"
)
@click.option("--keep", metavar="FILE", help="Examples that must not be forgotten.")
@click.option(
    "--method", type=click.Choice(["sft", "dpo"]), help="Learn answers, or preferences.  [default: sft]"
)
@click.option(
    "--beta", type=float, help="Of dpo: how much preferences weigh against the base.  [default: 0.1]"
)
@click.option(
    "--anchor", type=float, help="Of dpo: how much the preferred answer's likelihood counts.  [default: 0.2]"
)
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--stream", is_flag=True, default=None, help="Read each layer from disk when it is needed.")
@click.option("--skip-long", is_flag=True, default=None, help="Leave out examples longer than --tokens.")
@click.option("--samples", type=int, help="Answers to write at each validation.  [default: 2]")
@click.option("--restart", is_flag=True, help="Throw away the run that lies in the folder.")
@click.option(
    "--report-to", type=click.Choice(REPORTERS), help="Also log to this tracker, which must be installed."
)
@dtype_option
@revision_option
@offline_option
def tune(
    model: str | None,
    data: str | None,
    out: Path | None,
    config: Path | None,
    restart: bool,
    report_to: str | None,
    dtype: str | None,
    revision: str | None,
    offline: bool,
    **given: Any,
) -> None:
    """Train an adapter (LoRA) of MODEL on DATA, into a folder.

    DATA is a .jsonl file, a folder with train.jsonl and valid.jsonl, or the id of a data set on the Hub.
    MODEL's weights stay as they are. A run that was stopped goes on when the same command is run again.
    """
    from mlx_gptoss.tune import TuneOptions
    from mlx_gptoss.tune import tune as run
    from mlx_gptoss.tune.options import read_settings

    settings, places = read_settings(config) if config is not None else ({}, {})
    settings |= {name: value for name, value in given.items() if value is not None}
    model, data = model or places.get("model"), data or places.get("data")
    folder = out or (Path(places["adapter_path"]) if "adapter_path" in places else None)
    if model is None or data is None or folder is None:
        missing = "MODEL" if model is None else "DATA" if data is None else "--out"
        raise click.UsageError(f"missing {missing}")
    options = TuneOptions(**settings)
    tracker = _tracker(report_to, folder, settings)
    with _view() as show:

        def listen(event: Event) -> None:
            show(event)
            tracker(event)

        run(
            *(model, data, folder, options),
            dtype=dtype,
            revision=revision,
            offline=offline,
            restart=restart,
            on_event=listen,
        )


def _tracker(name: str | None, folder: Path, settings: dict[str, Any]) -> Callable[[Event], None]:
    """What logs events to wandb or one with the same calls. Raises TuneError when it is not installed."""
    if name is None:
        return lambda event: None
    try:
        module = import_module(name)
    except ImportError:
        raise TuneError(f"--report-to {name}: not installed; pip install {name}") from None
    module.init(project="mlx-gptoss", name=folder.name, config=settings)

    def log(event: Event) -> None:
        values = {"Step": ("loss", "lr", "tokens", "seconds"), "Check": ("valid", "keep", "won")}
        kind = type(event).__name__
        found = {key: getattr(event, key) for key in values.get(kind, ())}
        if logged := {f"{kind.lower()}/{k}": v for k, v in found.items() if v is not None}:
            module.log(logged, step=event.step)  # type: ignore[union-attr]
        if kind == "Finished":
            module.finish()

    return log


@contextmanager
def _view() -> Iterator[Callable[[Event], None]]:
    """A live view where a person watches, else a line for each validation; the summary goes to stdout."""
    console = Console(stderr=True)
    view = View()
    if not console.is_terminal:
        yield lambda event: view.take(event, plain=True)
    else:
        with Live(console=console, get_renderable=view.render, refresh_per_second=4, transient=True):
            yield view.take
    view.summary()


class View:
    """The run as it is shown."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns)
        self._task = self._bar.add_task("reading the model", total=None)
        self._losses: list[tuple[float, float]] = []
        self._checks: list[Check] = []
        self._started: Started | None = None
        self._finished: Finished | None = None
        self._tokens, self._learned, self._seconds = 0, 0, 0.0

    def take(self, event: Event, plain: bool = False) -> None:
        """Note an event."""
        from mlx_gptoss.tune.run import Check, Finished, Started, Step

        if isinstance(event, Started):
            self._started = event
            self._bar.update(self._task, description="training", total=event.total, completed=event.step)
        elif isinstance(event, Step):
            self._step(event)
        elif isinstance(event, Check):
            self._checks.append(event)
        elif isinstance(event, Finished):
            self._finished = event
        if plain:
            self._say(event)

    def _step(self, event: Step) -> None:
        self._losses.append((event.step, event.loss))
        self._tokens += event.tokens
        self._learned += event.learned
        self._seconds += event.seconds
        self._bar.update(self._task, completed=event.step, description=f"loss {event.loss:.3f}")

    def _say(self, event: Event) -> None:
        from mlx_gptoss.tune.run import Check, Started

        if isinstance(event, Started):
            click.echo(self._head(event), err=True)
        elif isinstance(event, Check):
            values = (("valid", event.valid), ("keep", event.keep), ("preferred", event.won))
            said = ", ".join(f"{name} {value:.4f}" for name, value in values if value is not None)
            rate = f", {self._tokens / self._seconds:,.0f} tokens/s" if self._seconds else ""
            best = ", best" if event.best else ""
            click.echo(f"step {event.step}: {said or 'no validation'}{rate}{best}", err=True)

    @staticmethod
    def _head(event: Started) -> str:
        from mlx_gptoss.checkpoint.memory import gigabytes

        begun = f"going on from step {event.step} of {event.total}" if event.step else f"{event.total} steps"
        left = f", {event.left_out} too long" if event.left_out else ""
        return (
            f"{begun}: {event.examples:,} examples{left}, {event.validating:,} to validate on; "
            f"{event.parameters:,} parameters, about {gigabytes(event.memory.total)} of memory"
        )

    def render(self) -> RenderableType:
        """The view at this moment."""
        from mlx_gptoss.cli.terminal.chart import line_chart
        from mlx_gptoss.device import peak_memory

        if self._started is None:
            return self._bar
        speed = f"{self._tokens / self._seconds:,.0f} tokens/s" if self._seconds else ""
        memory = f"peak memory {peak_memory() / 1e9:.1f} GB"
        return Group(self._head(self._started), line_chart(self._curves()), self._bar, f"{speed}  {memory}")

    def _curves(self) -> dict[str, list[tuple[float, float]]]:
        curves = {"training": self._losses}
        for label, key in (("validation", "valid"), ("kept", "keep")):
            curves[label] = [(c.step, getattr(c, key)) for c in self._checks if getattr(c, key) is not None]
        return {label: points for label, points in curves.items() if points}

    def summary(self) -> None:
        """A chart and a table, at the end."""
        from mlx_gptoss.cli.terminal.chart import line_chart

        finished = self._finished
        if finished is None:
            return
        console = Console()
        console.print(line_chart(self._curves()))
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("step", "validation", "kept", "preferred", ""):
            table.add_column(name, justify="right")
        for c in self._checks:
            losses = ("" if v is None else f"{v:.4f}" for v in (c.valid, c.keep))
            table.add_row(
                str(c.step), *losses, "" if c.won is None else f"{c.won:.0%}",
                "best" if c.step == finished.best_step else "",
            )  # fmt: skip
        console.print(table)
        if samples := (self._checks[-1].samples if self._checks else ()):
            for prompt, said in samples:
                console.print(Text(f"> {prompt}".replace("\n", " "), "dim"))
                console.print(Text(said))
        rate = f", {self._learned / self._seconds:,.0f} learned tokens/s" if self._seconds else ""
        click.echo(f"{finished.folder}: adapter of step {finished.best_step} ({finished.why}{rate})")
