"""Counters, gauges and histograms, and their text in Prometheus' exposition format (version 0.0.4).

Written here because the server needs some ten series and no registry, process collector or push gateway.
All of it is used on the event loop's thread only.
"""

from __future__ import annotations

import bisect
import dataclasses
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_gptoss.engine.stats import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def _labels(names: Iterable[str], values: Iterable[str]) -> str:
    def escape(text: str) -> str:
        return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

    pairs = ",".join(f'{n}="{escape(v)}"' for n, v in zip(names, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""


class Counter:
    """A number that only grows, one for each combination of label values."""

    kind = "counter"

    def __init__(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> None:
        self.name, self.help_text, self._names = name, help_text, labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, amount: float = 1.0, *labels: str) -> None:
        self._values[labels] = self._values.get(labels, 0.0) + amount

    def lines(self) -> list[str]:
        return [f"{self.name}{_labels(self._names, key)} {value:.17g}" for key, value in self._values.items()]


class Gauge:
    """A number read when the metrics are asked for."""

    kind = "gauge"

    def __init__(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        self.name, self.help_text, self._read = name, help_text, read

    def lines(self) -> list[str]:
        return [f"{self.name} {self._read():.17g}"]


class Histogram:
    """Counts of observations up to each bound, and their sum."""

    kind = "histogram"

    def __init__(self, name: str, help_text: str, bounds: tuple[float, ...] = SECONDS) -> None:
        self.name, self.help_text, self._bounds = name, help_text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self) -> list[str]:
        lines, total = [], 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            lines.append(f'{self.name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{self.name}_sum {self._sum:.17g}", f"{self.name}_count {total}"]


class Metrics:
    """The server's series. `text()` is what /metrics answers."""

    def __init__(self) -> None:
        self.started = time.time()
        self.requests = Counter("gptoss_requests_total", "Requests answered.", ("path", "status"))
        self.generations = Counter("gptoss_generations_total", "Generations ended.", ("finish_reason",))
        self.prompt_tokens = Counter("gptoss_prompt_tokens_total", "Tokens of prompts.")
        self.cached_tokens = Counter("gptoss_cached_tokens_total", "Prompt tokens found in the KV cache.")
        self.completion_tokens = Counter("gptoss_completion_tokens_total", "Tokens generated.")
        self.reasoning_tokens = Counter(
            "gptoss_reasoning_tokens_total", "Generated tokens that were reasoning."
        )
        self.rejected = Counter("gptoss_rejected_total", "Generations refused because the queue was full.")
        self.first_event = Histogram(
            "gptoss_time_to_first_token_seconds", "From a generation's start to its first event."
        )
        self.duration = Histogram("gptoss_generation_seconds", "From a generation's start to its end.")
        self._gauges: list[Gauge] = []

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Add a number that is read at each scrape."""
        self._gauges.append(Gauge(name, help_text, read))

    def text(self, engine: EngineStats | None = None) -> str:
        """All series, and a gauge for each number of the engine's own."""
        series = [value for value in vars(self).values() if isinstance(value, (Counter, Histogram))]
        gauges = list(self._gauges)
        for item in dataclasses.fields(engine) if engine is not None else ():
            value = getattr(engine, item.name)
            title = f"The engine's {item.name.replace('_', ' ')}."
            gauges.append(Gauge(f"gptoss_engine_{item.name}", title, partial(float, value)))
        lines: list[str] = []
        for one in [*series, *gauges]:
            lines += [f"# HELP {one.name} {one.help_text}", f"# TYPE {one.name} {one.kind}", *one.lines()]
        return "\n".join(lines) + "\n"
