"""How much of a prompt is read, told while it is being read: a long one takes minutes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from mlx_gptoss.cli.progress import progress_bar

if TYPE_CHECKING:
    from mlx_gptoss.engine.stats import EngineStats

T = TypeVar("T")
PATIENCE = 0.5  # seconds before anything is told: most prompts are read by then
PERIOD = 0.2  # seconds between two looks


class PrefillWatch:
    """Calls tell(tokens read, tokens to read) from a thread of its own, as long as a prompt is being read.

    stats: of an engine that runs nothing else. before: its stats when the prompt was not queued yet.
    """

    def __init__(
        self, stats: Callable[[], EngineStats], before: EngineStats, tell: Callable[[int, int], None]
    ) -> None:
        self._stats = stats
        self._before = before
        self._tell = tell
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefill watch", daemon=True)

    def __enter__(self) -> PrefillWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        wait = PATIENCE
        while not self._over.wait(wait):
            wait = PERIOD
            self._look(self._stats())

    def _look(self, now: EngineStats) -> None:
        before = self._before
        total = now.prompt_tokens - before.prompt_tokens - (now.cached_tokens - before.cached_tokens)
        if total <= 0 or now.generated_tokens > before.generated_tokens:
            self._before = now  # it is read; another may follow, when a tool has answered
            return
        read = now.computed_tokens - before.computed_tokens
        if not self._over.is_set():
            self._tell(min(read, total), total)


def shown_reading(stats: Callable[[], EngineStats], items: Iterator[T]) -> Iterator[T]:
    """The items; until the first comes, a bar on stderr tells how much of the prompt is read.

    stats: of a model that was loaded for this prompt alone.
    """
    from mlx_gptoss.engine.stats import EngineStats

    with (
        progress_bar("reading the prompt", counts=True) as tell,
        PrefillWatch(stats, EngineStats(), tell),
    ):
        first = list(next_of(items))
    yield from first
    yield from items


def next_of(items: Iterator[T]) -> Iterator[T]:
    """The next item alone, where there is one."""
    for item in items:
        yield item
        return
