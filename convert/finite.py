"""Watching a tensor's bytes go by: their hash, and values that no checkpoint may hold."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from mlx_gptoss.errors import CheckpointError


class Watch:
    """Is shown a tensor's bytes, in runs of any length; `found` is set when NaN or infinity was among them.

    Only bfloat16 and MXFP4 scales (byte 255 is NaN) are checked; in the rest every bit pattern is a number.
    """

    def __init__(self, name: str, dtype: str) -> None:
        self.found = False
        self._digest = hashlib.sha256()
        self._bfloat16, self._scales = dtype == "BF16", dtype == "U8" and name.endswith("_scales")
        self._half = b""  # a value's first byte, where a run ended inside it

    @property
    def sha256(self) -> str:
        """Of the bytes seen so far, in hex."""
        return self._digest.hexdigest()

    def see(self, data: memoryview | bytes) -> None:
        """The next bytes."""
        self._digest.update(data)
        if self._scales:
            self.found |= bool((np.frombuffer(data, np.uint8) == 255).any())
        elif self._bfloat16:
            if self._half or len(data) % 2:
                joined = self._half + bytes(data)
                whole = len(joined) // 2 * 2
                data, self._half = joined[:whole], joined[whole:]
            bits = np.frombuffer(data, "<u2")
            self.found |= bool(((bits & 0x7F80) == 0x7F80).any())


def not_finite(sources: Sequence[str]) -> CheckpointError:
    """The error for a tensor made from these source tensors."""
    return CheckpointError(
        f"{' and '.join(sources)}: holds NaN or infinity; the checkpoint is broken, download it again"
    )
