"""MLX's affine quantisation, w = scale * q + bias per group, with scale and bias searched instead of min/max.

The packed format is `mx.quantize`'s (mode "affine"): q in 0 .. 2**bits - 1, packed little-endian into uint32
words, scales and biases in bfloat16, groups along the last axis.  `mx.quantize` lets the smallest and the
largest weight of a group span the codes.  `search` minimises the squared error of what will be stored: from
four ranges whose ends are moved inwards by half a step or not, it alternates between assigning codes and
fitting scale and bias to them by least squares (closed form), keeps the best, and ends on values rounded to
bfloat16.  `quantize` gives what `mx.quantize` does, bit for bit.  Both are deterministic, and independent of
how rows are split into calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mlx_gptoss.checkpoint.safetensors import bfloat16_to_float32

# Measured on Gaussian and heavy-tailed weights: sixteen starts, with ends up to 1.5 steps inwards, take
# another 0.6 % off the error for four times the work.
END_STEPS = (0.0, 0.5)
REFINEMENTS = 2
ROUNDED_REFINEMENTS = 2
BLOCK = 65536  # values searched at a time: what they need stays in a core's cache
QUANTIZED_AT_ONCE = 1 << 17  # values of `quantize`, which does less with them: fewer calls of numpy


class Quantized(NamedTuple):
    """Packed codes uint32 [rows, columns * bits / 32]; scales, biases [rows, groups] bfloat16 bits.

    `squared_error` sums (weight - dequantised)**2 over all values, None where it was not measured.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    squared_error: float | None


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), nearest, ties to even; same shape.  NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded


def search(weights: np.ndarray, bits: int, group_size: int) -> Quantized:
    """float32 [rows, columns] (columns divisible by `group_size`) -> codes of searched scale and bias."""
    rows, columns = weights.shape
    groups = columns // group_size
    flat = weights.reshape(rows * groups, group_size)
    packed = np.empty((rows * groups, group_size * bits // 8), np.uint8)
    scales = np.empty(rows * groups, np.uint16)
    biases = np.empty(rows * groups, np.uint16)
    error = 0.0
    step = max(1, BLOCK // group_size)
    for first in range(0, rows * groups, step):
        part = slice(first, min(first + step, rows * groups))
        # Groups lie across: operations run along contiguous memory, and per-group values broadcast.
        block = _Search(np.ascontiguousarray(flat[part].T), bits)
        codes, scales[part], biases[part], block_error = block.run()
        packed[part] = _pack(codes, bits)
        error += block_error
    return Quantized(
        packed.view(np.uint32).reshape(rows, columns * bits // 32),
        scales.reshape(rows, groups),
        biases.reshape(rows, groups),
        error,
    )


def quantize(weights: np.ndarray, bits: int, group_size: int, *, measure: bool) -> Quantized:
    """`mx.quantize` of bfloat16 bits (uint16 [rows, columns]), the same bits, in half of its time on a CPU.

    A group that holds NaN or infinity gets a NaN as its scale.
    """
    rows, columns = weights.shape
    groups = weights.size // group_size
    flat = np.ascontiguousarray(weights).reshape(groups, group_size).view(np.uint64)
    packed = np.empty((groups, group_size * bits // 8), np.uint8)
    scales = np.empty(groups, np.uint16)
    biases = np.empty(groups, np.uint16)
    step = QUANTIZED_AT_ONCE // group_size
    for first in range(0, groups, step):
        part = slice(first, first + step)
        with np.errstate(invalid="ignore", over="ignore"):
            scales[part], biases[part] = _quantize_groups(flat[part], bits, packed[part])
    result = Quantized(
        packed.view(np.uint32).reshape(rows, columns * bits // 32),
        scales.reshape(rows, -1),
        biases.reshape(rows, -1),
        None,
    )
    if not measure:
        return result
    difference = bfloat16_to_float32(weights)
    difference -= dequantize(result.weight, result.scales, result.biases, bits, group_size)
    return result._replace(squared_error=float(np.sum(np.square(difference), dtype=np.float64)))


def _quantize_groups(quads: np.ndarray, bits: int, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of bfloat16 values, four to a word uint64 [groups, size / 4] -> scales and biases (their bits).

    `packed` takes the codes, uint8 [groups, size * bits / 8]. As MLX does it: the end of larger magnitude is
    the bias and a multiple of the scale, so that zero has a code; everything in float32.
    """
    # Groups lie across, four values of each side by side: this way the transposes move words.
    values = np.ascontiguousarray(quads.T).view(np.uint16)  # [size / 4, groups * 4]
    low, high = _ends(values.view(np.int16))
    top = np.float32(2**bits - 1)
    below = np.abs(low) > np.abs(high)
    edge = np.where(below, low, high)
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    scale = np.where(below, scale, -scale)
    steps = np.rint(edge / scale)
    nothing = steps == 0  # all values are
    scale = np.where(nothing, scale, edge / np.where(nothing, np.float32(1), steps))
    bias = np.where(nothing, np.float32(0), edge)
    floats = bfloat16_to_float32(values)
    floats -= np.repeat(bias, 4)
    floats /= np.repeat(scale, 4)
    np.rint(floats, out=floats)
    np.clip(floats, np.float32(0), top, out=floats)
    codes = floats.astype(np.uint8)
    if bits == 4:
        pairs = codes.view(np.uint16)
        pairs |= pairs >> 4
        packed.view(np.uint16)[:] = pairs.astype(np.uint8).view(np.uint16).T
    else:
        rows = codes.reshape(len(codes), -1, 4).swapaxes(1, 2)
        packed[:] = _pack(rows.reshape(-1, len(packed)), bits)
    return to_bfloat16(scale), to_bfloat16(bias)


def _ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest float32 [groups] of bfloat16 bits, int16 [size / 4, groups * 4]."""
    order = values >> 15
    order &= 0x7FFF
    order ^= values  # as integers they are in the order of the floats; the same again brings them back
    ends = []
    for end in (np.minimum, np.maximum):
        four = end.reduce(order, axis=0)
        found = end(end(four[0::4], four[1::4]), end(four[2::4], four[3::4]))
        ends.append(bfloat16_to_float32((found ^ ((found >> 15) & 0x7FFF)).view(np.uint16)))
    return ends[0], ends[1]


def dequantize(
    weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group_size: int
) -> np.ndarray:
    """Packed codes, scales and biases (bfloat16 bits as uint16, or float32) -> float32 [rows, columns]."""
    rows = weight.shape[0]
    scale, bias = (v if v.dtype == np.float32 else bfloat16_to_float32(v) for v in (scales, biases))
    values = _unpack(weight, bits).reshape(rows, -1, group_size).astype(np.float32)
    values *= scale[..., None]
    values += bias[..., None]
    return values.reshape(rows, -1)


class _Search:
    """The search over one block, float32 [group_size, groups]."""

    def __init__(self, values: np.ndarray, bits: int) -> None:
        self.values = values
        self.size = np.float32(values.shape[0])
        self.top = np.float32(2**bits - 1)
        self.codes = np.empty_like(values)
        self.scratch = np.empty_like(values)
        self.mean = np.add.reduce(values, 0) / self.size
        groups = values.shape[1]
        self.gain = np.full(groups, -1.0, np.float32)
        self.scale = np.zeros(groups, np.float32)
        self.bias = np.zeros(groups, np.float32)

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Codes uint8 [group_size, groups], scales and biases (bfloat16 bits), summed squared error."""
        low, high = self.values.min(0), self.values.max(0)
        step = (high - low) / self.top
        for below in END_STEPS:
            for above in END_STEPS:
                start = low + np.float32(below) * step
                self._consider((high - np.float32(above) * step - start) / self.top, start)
        return self._rounded()

    def _assign(self, scale: np.ndarray, bias: np.ndarray) -> None:
        """Set `codes` to the nearest code of every value."""
        inverse = np.float32(1) / np.where(scale == 0, np.float32(1), scale)
        np.multiply(self.values, inverse, out=self.codes)
        np.subtract(self.codes, bias * inverse, out=self.codes)
        np.rint(self.codes, out=self.codes)
        np.clip(self.codes, np.float32(0), self.top, out=self.codes)

    def _fit(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Least-squares scale and bias for `codes`, and how much of the variance they explain."""
        total = np.add.reduce(self.codes, 0)
        product = np.einsum("ij,ij->j", self.codes, self.values)
        square = np.einsum("ij,ij->j", self.codes, self.codes)
        covariance = product - total * self.mean
        variance = square - total * total / self.size
        variance[variance < 1e-3] = np.inf  # all codes equal: the bias alone carries the group
        scale = covariance / variance
        return covariance * scale, scale, self.mean - scale * total / self.size

    def _consider(self, scale: np.ndarray, bias: np.ndarray) -> None:
        """Alternate from this scale and bias, and keep the fit in the groups where it is the best so far."""
        for _ in range(1 + REFINEMENTS):
            self._assign(scale, bias)
            gain, scale, bias = self._fit()
        better = gain > self.gain
        np.copyto(self.gain, gain, where=better)
        np.copyto(self.scale, scale, where=better)
        np.copyto(self.bias, bias, where=better)

    def _error(self, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Squared error per group of `codes` under these values."""
        np.multiply(self.codes, scale, out=self.scratch)
        np.add(self.scratch, bias, out=self.scratch)
        np.subtract(self.scratch, self.values, out=self.scratch)
        error: np.ndarray = np.einsum("ij,ij->j", self.scratch, self.scratch)
        return error

    def _rounded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Round scale, then the bias that suits it, to bfloat16; keep the best of a few alternations."""
        scale_bits, bias_bits = to_bfloat16(self.scale), to_bfloat16(self.bias)
        scale, bias = bfloat16_to_float32(scale_bits), bfloat16_to_float32(bias_bits)
        self._assign(scale, bias)
        error = self._error(scale, bias)
        codes = self.codes.astype(np.uint8)
        for _ in range(ROUNDED_REFINEMENTS):
            new_scale_bits = to_bfloat16(self._fit()[1])
            scale = bfloat16_to_float32(new_scale_bits)
            new_bias_bits = to_bfloat16(self.mean - scale * (np.add.reduce(self.codes, 0) / self.size))
            bias = bfloat16_to_float32(new_bias_bits)
            self._assign(scale, bias)
            new_error = self._error(scale, bias)
            better = new_error < error
            np.copyto(error, new_error, where=better)
            np.copyto(scale_bits, new_scale_bits, where=better)
            np.copyto(bias_bits, new_bias_bits, where=better)
            np.copyto(codes, self.codes, where=better, casting="unsafe")
        return codes, scale_bits, bias_bits, float(np.sum(error, dtype=np.float64))


def _unit(bits: int) -> tuple[int, int]:
    """The smallest run of codes that fills whole bytes: (codes, bytes)."""
    return {2: (4, 1), 3: (8, 3), 4: (2, 1), 5: (8, 5), 6: (4, 3), 8: (1, 1)}[bits]


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 [group_size, groups] -> bytes [groups, group_size * bits / 8], first code lowest."""
    count, size = _unit(bits)
    dtype: Any = np.uint8 if size == 1 else np.uint64
    runs = codes.reshape(-1, count, codes.shape[1])
    word: np.ndarray = runs[:, 0].astype(dtype)
    for i in range(1, count):
        word |= runs[:, i].astype(dtype) << dtype(bits * i)
    if size == 1:
        return word.T
    octets = word.astype("<u8").view(np.uint8).reshape(*word.shape, 8)[..., :size]
    return octets.transpose(1, 0, 2).reshape(codes.shape[1], -1)


def _unpack(weight: np.ndarray, bits: int) -> np.ndarray:
    """Packed uint32 [rows, words] -> codes uint8 [rows, columns]."""
    count, size = _unit(bits)
    octets = np.ascontiguousarray(weight).view(np.uint8).reshape(weight.shape[0], -1, size)
    word: Any = octets[..., 0].astype(np.uint8 if size == 1 else np.uint64)
    for i in range(1, size):
        word |= octets[..., i].astype(np.uint64) << np.uint64(8 * i)
    codes = np.empty((*word.shape, count), np.uint8)
    mask = word.dtype.type(2**bits - 1)
    for i in range(count):
        codes[..., i] = (word >> word.dtype.type(bits * i)) & mask
    return codes.reshape(weight.shape[0], -1)
