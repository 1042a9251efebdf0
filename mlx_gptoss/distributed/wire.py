"""Arrays as bytes, and back: bit for bit, whatever their dtype."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.distributed.channel import Buffer, ProtocolError

# What arrays may be of, and numbers of the same size that the buffer protocol knows.
_PLAIN = {
    **dict.fromkeys(("bfloat16", "float16"), (mx.uint16, np.uint16)),
    **dict.fromkeys(("float32", "uint32"), (mx.uint32, np.uint32)),
}


def to_bytes(array: mx.array) -> memoryview:
    """The bytes of an array, which is evaluated; they are valid as long as it is not written to."""
    plain = array.view(_PLAIN[_name(array.dtype)][0]) if array.size else array
    plain = mx.contiguous(plain)
    mx.eval(plain)  # before numpy asks for it: evaluating lets other threads run meanwhile
    return np.asarray(plain).data.cast("B") if array.size else memoryview(b"")


def from_bytes(data: Buffer, dtype: mx.Dtype, shape: Sequence[int]) -> mx.array:
    """The array of these bytes. Raises ProtocolError when they are not as many as it takes."""
    if len(data) != prod(shape) * dtype.size:
        raise ProtocolError(f"sent {len(data)} bytes for {list(shape)} of {_name(dtype)}")
    if not len(data):
        return mx.zeros(tuple(shape), dtype)
    plain = np.frombuffer(data, _PLAIN[_name(dtype)][1]).reshape(tuple(shape))
    return mx.array(plain).view(dtype)


def describe(array: mx.array) -> list[Any]:
    """What `read` wants to know beside the bytes, ready for JSON."""
    return [_name(array.dtype), list(array.shape)]


def read(data: Buffer, described: Any) -> mx.array:
    """The array of `to_bytes` and `describe`. Raises ProtocolError for what is none."""
    try:
        name, shape = described
        dtype = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32, "uint32": mx.uint32}[
            name
        ]
        sizes = [int(n) for n in shape]
        if min(sizes, default=0) < 0:
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise ProtocolError(f"sent an array described as {described!r:.80}") from None
    return from_bytes(data, dtype, sizes)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
