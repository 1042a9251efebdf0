"""MXFP4 (OCP Microscaling Formats 1.0): 32 values share a power of two, each is one of sixteen 4-bit floats.

Bytes are laid out as in OpenAI's checkpoints: value i of a block sits in byte i // 2, low nibble first;
value = TABLE[nibble] * 2**(scale - 127).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlx_gptoss.model.quantization import FP4_VALUES

GROUP = 32
TABLE = np.array(FP4_VALUES, np.float32)
MAX_SCALE = 254  # 255 is NaN

BLOCK = 2048  # groups worked on at a time: what they need stays in a core's cache

# Added to the standard's exponent in the search: one lower clips the largest values for finer steps, one
# higher spares values between 6 and 8 times the scale from clipping.
SEARCH_STEPS = (0, -1, 1)


class Quantized(NamedTuple):
    """Blocks uint8 [rows, columns / 32, 16], scales uint8 [rows, columns / 32], summed squared error."""

    blocks: np.ndarray
    scales: np.ndarray
    squared_error: float


def quantize(weights: np.ndarray, *, search: bool = False) -> Quantized:
    """float32 [rows, columns] (columns divisible by 32, all finite) -> MXFP4.

    The shared exponent is the standard's, floor(log2(largest magnitude)) - 2 (OCP MX 1.0, section 6.3), and
    values round to nearest with ties to the even code, saturating at 6.  With `search` the exponent of least
    squared error among it and its neighbours is taken, the standard's where they are equal.  Either way,
    values that MXFP4 can hold come back exactly.
    """
    rows, columns = weights.shape
    flat = weights.reshape(-1, GROUP)
    blocks = np.empty((flat.shape[0], GROUP // 2), np.uint8)
    scales = np.empty(flat.shape[0], np.uint8)
    error = 0.0
    for first in range(0, flat.shape[0], BLOCK):
        part = slice(first, first + BLOCK)
        # Groups lie across: operations run along contiguous memory, and per-group values broadcast.
        values = np.ascontiguousarray(flat[part].T, np.float32)
        codes, scales[part], block_error = _quantize_block(
            values, SEARCH_STEPS if search else SEARCH_STEPS[:1]
        )
        np.bitwise_or(codes[0::2], codes[1::2] << np.uint8(4), out=blocks[part].T)
        error += block_error
    return Quantized(
        blocks.reshape(rows, columns // GROUP, GROUP // 2), scales.reshape(rows, columns // GROUP), error
    )


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks uint8 [.., groups, 16] and scales uint8 [.., groups] -> float32 [.., groups * 32]."""
    codes = np.empty((*blocks.shape[:-1], GROUP), np.uint8)
    codes[..., 0::2] = blocks & 15
    codes[..., 1::2] = blocks >> 4
    values = np.ldexp(TABLE[codes], scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*scales.shape[:-1], -1)


def _quantize_block(values: np.ndarray, steps: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, float]:
    """float32 [32, groups] -> codes uint8 [32, groups], scale bytes [groups], squared error."""
    _, exponent = np.frexp(
        np.maximum(values.max(0), -values.min(0))
    )  # largest = m * 2**exponent, 0.5 <= m < 1
    standard = np.clip(exponent.astype(np.int32) - 3 + 127, 0, MAX_SCALE)
    best, best_error, best_scale = *_encode(values, standard), standard
    for step in steps[1:]:
        scale = np.clip(standard + step, 0, MAX_SCALE)
        codes, error = _encode(values, scale)
        better = error < best_error
        np.copyto(best, codes, where=better)
        best_scale = np.where(better, scale, best_scale)
        best_error = np.where(better, error, best_error)
    return best, best_scale.astype(np.uint8), float(best_error.sum())


def _encode(values: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [32, groups] under the scale bytes [groups], and the squared error (float64) per group."""
    power = scale - 127
    magnitude = np.abs(values * np.ldexp(np.float32(1), -power))
    # Codes 0..7 stand for 0 .5 1 1.5 2 3 4 6, a line of three slopes: rounding its inverse to even rounds to
    # the even code.
    line = np.minimum(magnitude * np.float32(2), magnitude + np.float32(2))
    np.minimum(line, magnitude * np.float32(0.5) + np.float32(4), out=line)
    np.rint(np.minimum(line, np.float32(7), out=line), out=line)
    codes = line.astype(np.uint8)
    codes |= np.signbit(values).view(np.uint8) << np.uint8(3)
    difference = np.maximum(line * np.float32(0.5), line - np.float32(2))
    np.maximum(difference, line * np.float32(2) - np.float32(8), out=difference)
    difference -= magnitude
    error = np.einsum("ij,ij->j", difference, difference).astype(np.float64)
    return codes, np.ldexp(error, 2 * power)
