"""Metal kernels of our own: each examined here and now, on some layers of a model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from mlx_gptoss import device
from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.reader import Checkpoint, Portion, read_layers
from mlx_gptoss.doctor.finding import Finding
from mlx_gptoss.doctor.finding import Verdict as Mark
from mlx_gptoss.model.config import read_config
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.kernels.candidates import STEP_LAYERS
from mlx_gptoss.model.kernels.decode import DecodeKernels
from mlx_gptoss.model.kernels.record import Record
from mlx_gptoss.model.kernels.verified import UNFINISHED, Clock, Verdict


def findings(folder: Path | None = None) -> Iterator[Finding]:
    """A verdict for each, also kept for the next time that a model of these shapes is loaded.

    folder: of the model whose layers they are tried on; without one, the demo model.
    """
    if not device.on_metal():
        yield Finding("kernels", "own kernels", "none", "they need Metal")
    elif device.kernel_mode() == "off":
        yield Finding("kernels", "own kernels", "none", "GPTOSS_KERNELS is off")
    else:
        model = some_layers(resolve("demo") if folder is None else folder)
        yield from examine(model, Record(device.identity()))


def some_layers(folder: Path, dtype: str | None = None) -> Model:
    """A model with its first layers alone in memory: what a kernel's step takes. Raises CheckpointError."""
    config, _ = read_config(folder)
    portion = Portion(range(min(STEP_LAYERS, config.num_layers)), ends=True)
    read = Checkpoint(folder, dtype, portion)
    # What is not evaluated is not read: the embedding and the head.
    return Model(
        read.config, embedding=read.embedding(), layers=read_layers(read), norm=read.norm(), head=read.head()
    )


def examine(model: Model, record: Record, clock: Clock = time.perf_counter) -> Iterator[Finding]:
    """The verdicts on the kernels that suit a model."""
    kernels = DecodeKernels(model, "verify", record, clock=clock)
    if not kernels.verdicts:
        yield Finding("kernels", "own kernels", "none", "none suits this model")
    for name, known in list(kernels.verdicts.items()):
        # One that took its process down is not tried again.
        verdict = known if known == UNFINISHED else kernels.examine(name)
        figures = {} if verdict.gain is None else {"gain": verdict.gain}
        yield Finding("kernels", name, _mark(verdict), verdict.why, figures)


def _mark(verdict: Verdict) -> Mark:
    if verdict.on:
        return "ok"
    if verdict.gain is not None:  # right, and not faster
        return "info"
    return "failed" if verdict == UNFINISHED or verdict.why.startswith(("wrong", "fails")) else "warning"
