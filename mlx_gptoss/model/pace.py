"""How much of a forward is handed to Metal at a time.

MLX encodes a graph into command buffers while it is evaluated. The GPU starts on a buffer when it is full or
the evaluation ends, and what the buffer's kernels made is freed when it is done. With buffers as large as
`command_buffers.py` allows, that would be late, so a forward is cut between layers:

- Decode in a pipeline: not at all. The GPU is busy with the last step while this one is built.
- A step whose result is waited for: every few layers, so that the GPU does not wait for all of it.
- A prompt: after every layer, and never more than a few layers ahead of the GPU. Launching does not wait
  (MLX counts only the buffers that it ends itself), so the arrays of all layers would be there at once.

What suits a machine better than these numbers, `tuning.py` measures.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import mlx.core as mx

from mlx_gptoss.device import on_metal
from mlx_gptoss.model.batch import Batch

# Forwards of more rows are prompts: their intermediate arrays are what takes memory.
FEW_ROWS = 64
# Layers of a prompt that are launched and not known to be done.
LAYERS_AHEAD = 2


@dataclass(frozen=True)
class Paces:
    """Layers between two launches, 0 for one launch: of a step of decoding in a pipeline, of a step that is
    waited for, of a prompt.
    """

    decode: int = 0
    awaited: int = 4
    prompt: int = 1


USUAL = Paces()


class Pace:
    """Told each layer's output, in order. awaited: nothing is done until the forward's result is read."""

    def __init__(self, batch: Batch, paces: Paces, *, awaited: bool) -> None:
        self._batch = batch
        self._prompt = batch.tokens > FEW_ROWS
        every = paces.prompt if self._prompt else paces.awaited if awaited else paces.decode
        self._every = every if on_metal() else 0
        self._built = 0
        self._launched: deque[mx.array] = deque()

    def built(self, x: mx.array) -> None:
        """The graph of one layer more is built; x [T, D] is what comes out of it."""
        self._built += 1
        # Where experts are streamed, each layer is launched by the one after it, once its experts are there.
        if not self._every or self._built % self._every or self._batch.unsettled:
            return
        mx.async_eval(x)
        if self._prompt:
            self._launched.append(x)
            if len(self._launched) > LAYERS_AHEAD:
                mx.eval(self._launched.popleft())
