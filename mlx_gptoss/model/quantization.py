"""The number formats of quantised matrices. Plain data: importing this loads nothing."""

from __future__ import annotations

from dataclasses import dataclass

# MLX's affine mode: bits of a value, and values that share a scale and a bias.
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Quantization:
    """How a quantised matrix is packed: MLX's mode ("affine" or "mxfp4"), bits a value, values a group.

    The fields are the keywords of MLX's quantised operations.
    """

    mode: str
    bits: int
    group_size: int


MXFP4 = Quantization("mxfp4", 4, 32)
# What the sixteen codes of MXFP4 stand for, before their group's power of two (OCP Microscaling Formats 1.0).
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
