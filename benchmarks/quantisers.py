"""Squared error of the searched affine quantiser against `mx.quantize`, and of the MXFP4 exponent search.

python -m benchmarks.quantisers [--rows 256] [--bits 4 6 8] [--groups 32 64]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from mlx_gptoss.checkpoint.safetensors import bfloat16_to_float32
from mlx_gptoss.convert import affine, mxfp4
from mlx_gptoss.model.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES

COLUMNS = 2880


def draw(name: str, rows: int) -> np.ndarray:
    """float32 [rows, COLUMNS] of a named distribution, seeded."""
    random, shape = np.random.default_rng(7), (rows, COLUMNS)
    values = {
        "Gaussian": lambda: random.standard_normal(shape),
        "Student t, 4": lambda: random.standard_t(4, shape),
        "Laplace": lambda: random.laplace(size=shape),
        "outliers": lambda: random.standard_normal(shape) * np.where(random.random(shape) < 0.003, 10, 1),
    }[name]()
    return (values * 0.02).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--bits", type=int, nargs="+", default=[4], choices=AFFINE_BITS)
    parser.add_argument("--groups", type=int, nargs="+", default=[64], choices=AFFINE_GROUP_SIZES)
    args = parser.parse_args()
    for name in ("Gaussian", "Student t, 4", "Laplace", "outliers"):
        bits = affine.to_bfloat16(draw(name, args.rows))
        values = bfloat16_to_float32(bits)
        for width in args.bits:
            for group in args.groups:
                start = time.perf_counter()
                found = affine.search(values, width, group)
                speed = values.size / (time.perf_counter() - start) / 1e6
                theirs = affine.quantize(bits, width, group, measure=True)
                assert found.squared_error is not None and theirs.squared_error is not None
                ratio = found.squared_error / theirs.squared_error
                print(f"{name:<13} affine {width} bits, groups of {group:>3}: {ratio:.3f}  {speed:5.1f} M/s")
        ratio = mxfp4.quantize(values, search=True).squared_error / mxfp4.quantize(values).squared_error
        print(f"{name:<13} mxfp4, exponent search: {ratio:.3f}")


if __name__ == "__main__":
    main()
