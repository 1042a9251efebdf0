"""Whether weights that were read are numbers: one NaN would poison every logit without a word."""

from __future__ import annotations

import math
from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from mlx_gptoss.device import on_gpu

# Exponents of NaN and infinity in bfloat16, as int16 of either sign and as uint16 of negative ones.
_POSITIVE, _NEGATIVE = 0x7F80, 0xFF80


def not_finite(tensors: Iterable[tuple[str, mx.array]]) -> str | None:
    """The name of the first evaluated tensor that holds NaN or infinity, or None. One pass over each."""
    found = list(tensors)
    if on_gpu():
        ends = mx.array([0.0])
        if found:
            ends = mx.stack([(mx.max(a) + mx.min(a)).astype(mx.float32) for _, a in found])
        sums = np.asarray(ends)
        return next((name for (name, _), s in zip(found, sums, strict=False) if not math.isfinite(s)), None)
    return next((name for name, array in found if not _finite_here(array)), None)


def _finite_here(array: mx.array) -> bool:
    if array.dtype == mx.bfloat16:
        bits = np.asarray(array.view(mx.uint16))
        return bool(bits.view(np.int16).max(initial=0) < _POSITIVE and bits.max(initial=0) < _NEGATIVE)
    values = np.asarray(array).reshape(-1)
    # A sum of squares is the fastest pass there is; only one that overflowed is looked at again.
    return math.isfinite(float(np.dot(values, values))) or bool(np.isfinite(values).all())
