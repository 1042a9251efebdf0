"""Which experts were chosen, step by step and layer by layer, for a replay on other numbers of slots.

A trace is a file of JSON lines: the model's shape; then for each step of each layer
{"layer": l, "ids": [[k expert ids of a row], ..]}; and last, if the run streamed, a layer's slots and each
layer's misses.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.batch import Batch
from mlx_gptoss.model.config import ModelConfig
from mlx_gptoss.model.experts import Experts
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.streamed import StreamedExperts

Write = Callable[[int, np.ndarray], None]


class Traced:
    """Experts in memory, whose choices are told."""

    def __init__(self, inner: Experts, told: Callable[[np.ndarray], None]) -> None:
        self.inner, self._told = inner, told

    def __call__(self, x: mx.array, chosen: mx.array, batch: Batch) -> mx.array:
        self._told(np.asarray(chosen))
        return self.inner(x, chosen, batch)

    def arrays(self) -> list[mx.array]:
        return self.inner.arrays()


def tell_choices(model: Model, write: Write | None) -> None:
    """From now on every layer tells (its number, what was chosen, int [T, k]); None: no more."""
    for i, layer in enumerate(model.layers):
        told, experts = None if write is None else partial(write, i), layer.moe.experts
        if isinstance(experts, StreamedExperts):
            experts.trace = told
            continue
        inner = experts.inner if isinstance(experts, Traced) else experts
        layer.moe.experts = inner if told is None else Traced(inner, told)


class TraceWriter:
    """Writes a trace."""

    def __init__(self, file: TextIO, config: ModelConfig) -> None:
        self._file = file
        shape: dict[str, object] = {
            "layers": config.num_layers,
            "experts": config.num_experts,
            "k": config.experts_per_token,
        }
        self._line(shape)

    def step(self, layer: int, chosen: np.ndarray) -> None:
        self._line({"layer": layer, "ids": chosen.tolist()})

    def end(self, slots: int, misses: list[int]) -> None:
        """What the run that wrote it had, and missed in each layer."""
        self._line({"slots": slots, "misses": misses})

    def _line(self, entry: dict[str, object]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")


@dataclass(frozen=True)
class Trace:
    """steps: of each layer, what was chosen, int [T, k] a step. slots, misses: the run's, if it streamed."""

    experts: int
    k: int
    steps: list[list[np.ndarray]]
    slots: int | None
    misses: list[int] | None


def read_trace(path: Path) -> Trace:
    """A trace from its file. Raises OSError, ValueError, KeyError or IndexError for anything else."""
    with path.open(encoding="utf-8") as file:
        shape = json.loads(next(file))
        steps: list[list[np.ndarray]] = [[] for _ in range(shape["layers"])]
        end: dict[str, object] = {}
        for line in file:
            entry = json.loads(line)
            if "layer" in entry:
                steps[entry["layer"]].append(np.array(entry["ids"], np.int64))
            else:
                end = entry
    slots, misses = end.get("slots"), end.get("misses")
    return Trace(
        shape["experts"],
        shape["k"],
        steps,
        slots if isinstance(slots, int) else None,
        misses if isinstance(misses, list) else None,
    )
