"""Progress bars on stderr, drawn where a person watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import DownloadColumn, MofNCompleteColumn, Progress, ProgressColumn, TransferSpeedColumn


@contextmanager
def progress_bar(
    label: str, *, in_bytes: bool = False, counts: bool = False, quiet: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """Yields the function to call with what is done and the total.

    Drawn from the first call on, and never when `quiet` or when stderr is not a terminal. What is done is
    told `in_bytes` with their speed, or as `counts`, else in percent.
    """
    text, bar, percentage, remaining = Progress.get_default_columns()
    measures: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),) if counts else (percentage,)
    if in_bytes:
        measures = (DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    progress = Progress(text, bar, *measures, remaining, console=console, transient=True, disable=hidden)
    task = progress.add_task(label, total=None)

    def tell(done: int, total: int) -> None:
        progress.start()
        progress.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        progress.stop()


@contextmanager
def byte_bar(label: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields the function to call, on one thread at a time, with each number of bytes done."""
    done = 0
    with progress_bar(label, in_bytes=True, quiet=quiet) as tell:

        def add(count: int) -> None:
            nonlocal done
            done += count
            tell(done, total)

        yield add
