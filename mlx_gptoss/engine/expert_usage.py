"""How often each expert was chosen, kept from one process to the next: what to have in memory at the start.

It tells a little of what users wrote, and lies in the same private folder as their prefixes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_gptoss.files import read_limited
from mlx_gptoss.model.streamed import StreamedExperts

logger = logging.getLogger("mlx_gptoss.engine")

# What earlier processes counted weighs as so many pairs in each layer at most, so that habits may change.
MEMORY = 100_000


class ExpertUsage:
    """The counts of one model, int64 [layers, experts], in the private folder of its prefixes."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "experts.npy"

    def warm(self, layers: Sequence[StreamedExperts]) -> None:
        """Read the experts that were chosen most. A file that cannot be used is passed over."""
        try:
            raw = read_limited(self._path, 16 << 20)
            counts = np.load(io.BytesIO(raw), allow_pickle=False)
        except FileNotFoundError:
            return
        except (OSError, ValueError, EOFError) as error:
            logger.warning("%s is passed over: %s", self._path, error)
            return
        shape = (len(layers), len(layers[0].slots.uses))
        if counts.dtype != np.int64 or counts.shape != shape or counts.min() < 0:
            logger.warning("%s is passed over: it is not of this model", self._path)
            return
        for experts, uses in zip(layers, counts, strict=True):
            total = max(1, int(uses.sum()))
            earlier = uses * min(total, MEMORY) // total
            experts.slots.uses = (experts.slots.uses + earlier).tolist()
            experts.prepare([e for e in experts.slots.favourites() if uses[e]])

    def save(self, layers: Sequence[StreamedExperts]) -> None:
        """Write what was counted; a full disk costs the next process its warm start, and nothing else."""
        counts = np.array([experts.slots.uses for experts in layers], np.int64)
        if not counts.any():
            return
        unfinished = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                np.save(file, counts, allow_pickle=False)
            os.replace(unfinished, self._path)
        except OSError as error:
            logger.warning("%s is not written: %s", self._path, error)
            with contextlib.suppress(OSError):
                unfinished.unlink()
