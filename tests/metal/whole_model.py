"""A model whose decoded tokens go through the kernels, run by the emulator, beside the same model without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint import reader
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.cache import KVBits, SlidingCache
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.kernels import kernel as kernels
from mlx_gptoss.model.kernels.decode import DecodeKernels
from mlx_gptoss.model.kernels.layer import NONE
from mlx_gptoss.model.kernels.record import Record
from mlx_gptoss.model.sequence_cache import SequenceCache
from tests.metal.emulator import Emulator


@dataclass(frozen=True)
class Decoded:
    """Greedy tokens and the logits that each was chosen from, float32 [tokens, vocab]."""

    tokens: list[int]
    logits: np.ndarray


@dataclass(frozen=True)
class Compared:
    """The same prompt without kernels and with all of them. launches: by program, how many."""

    plain: Decoded
    emulated: Decoded
    launches: dict[str, int]

    @property
    def difference(self) -> float:
        """Of the logits, as long as the tokens are the same."""
        return float(np.abs(self.plain.logits - self.emulated.logits).max())


def as_on_metal(folder: Path, dtype: str = "float32") -> Model:
    """The model with its experts as a GPU has them."""
    with patch.object(reader, "on_gpu", lambda: True):
        return read_model(Checkpoint(folder, dtype))


def remembering(model: Model, kv_bits: KVBits, history: int) -> SequenceCache:
    """A cache of so many tokens with random keys and values: a prompt of true width takes a CPU minutes."""
    made = SequenceCache(model.config, model.dtype, kv_bits)
    shape = (2, 1, model.config.num_kv_heads, history, model.config.head_dim)
    for i, layer in enumerate(made.layers if history else ()):
        keys, values = mx.random.normal(shape, key=mx.random.key(i)).astype(model.dtype)
        if isinstance(layer, SlidingCache):
            start = max(0, history - made.window_history)
            layer.restart(start, keys[:, :, start:], values[:, :, start:])
        else:
            layer.update_and_fetch(keys, values)
    made.advance(history)
    return made


def decode(model: Model, prompt: Sequence[int], count: int, kv_bits: KVBits, history: int) -> Decoded:
    """The prompt in one forward, then `count` tokens one by one."""
    cache, fed = remembering(model, kv_bits, history), list(prompt)
    tokens: list[int] = []
    rows = []
    while len(tokens) < count:
        logits = model(mx.array(fed, mx.int32), [Segment(len(fed), cache)], [len(fed) - 1])
        assert logits is not None
        rows.append(np.array(logits[0].astype(mx.float32)))
        tokens.append(int(rows[-1].argmax()))
        fed = tokens[-1:]
    return Decoded(tokens, np.stack(rows))


def compare(
    model: Model,
    prompt: Sequence[int],
    count: int,
    record: Path,
    *,
    kv_bits: KVBits = (None, None),
    history: int = 0,
) -> Compared:
    """record: a file for verdicts, of which there are none. history: random tokens before the prompt."""
    plain = decode(model, prompt, count, kv_bits, history)
    emulator = Emulator(seed=len(prompt))
    with patch.object(kernels, "run", emulator.run):
        DecodeKernels(model, "on", Record("emulated", record), kv_bits=kv_bits)
        emulated = decode(model, prompt, count, kv_bits, history)
        for layer in model.layers:
            layer.use(NONE)
    launches: dict[str, int] = {}
    for report in emulator.reports:
        launches[report.program] = launches.get(report.program, 0) + 1
    return Compared(plain, emulated, launches)
