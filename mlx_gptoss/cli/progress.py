"""Progress bars on stderr, drawn where a person watches: of bytes, and of a model's parts while it loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import DownloadColumn, Progress, ProgressColumn, TransferSpeedColumn


@contextmanager
def byte_bar(label: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields the function to call with each number of bytes done. Nothing is drawn when `quiet`."""
    label_column, bar_column, _, remaining = Progress.get_default_columns()
    columns = (label_column, bar_column, DownloadColumn(), TransferSpeedColumn(), remaining)
    with _bar(*columns, quiet=quiet) as bar:
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
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
