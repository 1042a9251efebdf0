"""Progress bars on stderr, drawn where a person watches: of bytes, and of a model's parts while it loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


@contextmanager
def byte_bar(label: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields the function to call with each number of bytes done. Nothing is drawn when `quiet`."""
    from rich import progress as rich

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn())
    with _bar(*columns, rich.TransferSpeedColumn(), rich.TimeRemainingColumn(), quiet=quiet) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def loading_bar() -> Iterator[Callable[[int, int], None]]:
    """Yields what `load` takes as `progress`.

    Drawn from the first part on: a download that comes before has a bar of its own.
    """
    bar = _bar()
    task = bar.add_task("loading", total=None)

    def tell(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        bar.stop()


def _bar(*columns: ProgressColumn, quiet: bool = False) -> Progress:
    """A bar that leaves nothing behind, and is invisible unless stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
