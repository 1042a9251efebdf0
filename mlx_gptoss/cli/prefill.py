"""How much of a prompt is read, told while it is being read: a long one takes minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_gptoss.cli.progress import progress_bar
from mlx_gptoss.harmony import Event
from mlx_gptoss.sampling import PromptProgress

LONG = 500  # tokens; shorter prompts are read before anybody could look


def to_read(progress: PromptProgress) -> tuple[int, int] | None:
    """(tokens read, tokens to read), of those that are computed; None where these are few."""
    cached = progress.cached_tokens
    read, total = progress.read_tokens - cached, progress.prompt_tokens - cached
    return (read, total) if total >= LONG else None


@contextmanager
def reading_bar() -> Iterator[Callable[[PromptProgress], None]]:
    """Yields the function that shows a PromptProgress as a bar on stderr."""
    with progress_bar("reading the prompt", counts=True) as tell:

        def show(progress: PromptProgress) -> None:
            if (counts := to_read(progress)) is not None:
                tell(*counts)

        yield show


def shown_reading(events: Iterator[Event]) -> Iterator[Event]:
    """The events without PromptProgress, which a bar on stderr shows."""
    with reading_bar() as show:
        for event in events:
            if not isinstance(event, PromptProgress):
                break
            show(event)
        else:
            return
    yield event
    for event in events:
        if not isinstance(event, PromptProgress):
            yield event
