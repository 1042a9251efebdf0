"""The server's series for Prometheus: requests, generations, tokens, and the engine's own numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from mlx_gptoss.engine.stats import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The series of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        seconds = partial(Histogram, buckets=SECONDS, registry=self._registry)
        self.requests = counter("gptoss_requests", "Requests answered.", ["path", "status"])
        self.generations = counter("gptoss_generations", "Generations ended.", ["finish_reason"])
        self.prompt_tokens = counter("gptoss_prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("gptoss_cached_tokens", "Prompt tokens found in the KV cache.")
        self.completion_tokens = counter("gptoss_completion_tokens", "Tokens generated.")
        self.reasoning_tokens = counter("gptoss_reasoning_tokens", "Generated tokens that were reasoning.")
        self.rejected = counter("gptoss_rejected", "Generations refused because the queue was full.")
        self.first_event = seconds(
            "gptoss_time_to_first_token_seconds", "From a generation's start to its first event."
        )
        self.duration = seconds("gptoss_generation_seconds", "From a generation's start to its end.")

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Add a number that is read at each scrape."""
        Gauge(name, help_text, registry=self._registry).set_function(read)

    def text(self, engine: EngineStats | None = None) -> bytes:
        """All series in Prometheus' text format, and a gauge for each number of the engine's own."""
        now = CollectorRegistry()
        for item in dataclasses.fields(engine) if engine is not None else ():
            name, value = f"gptoss_engine_{item.name}", getattr(engine, item.name)
            title = f"The engine's {item.name.replace('_', ' ')}"
            if not isinstance(value, tuple):
                Gauge(name, f"{title}.", registry=now).set(value)
                continue
            for part in dataclasses.fields(value[0]) if value else ():
                of = "rank" if item.name == "ranks" else "layer"
                gauge = Gauge(f"{name}_{part.name}", f"{title}: {part.name}.", [of], registry=now)
                for number, counts in enumerate(value):
                    gauge.labels(str(number)).set(getattr(counts, part.name))
        return generate_latest(self._registry) + generate_latest(now)
