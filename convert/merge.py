"""An adapter merged into the weights it was trained beside: a source like any other, for the converter.

Attention and router take it at any number of bits that keeps it: the recipe decides. Experts take it where
the recipe stores them in bfloat16. MXFP4's rounding is of the size of what an adapter adds, or larger: that
is refused, with the figures.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.adapter import Adapter, read_adapter
from mlx_gptoss.checkpoint.layouts import HF
from mlx_gptoss.convert import mxfp4
from mlx_gptoss.convert.recipes import BFLOAT16, Recipe
from mlx_gptoss.convert.sources import Source
from mlx_gptoss.convert.tensors import SourceTensor, to_float32
from mlx_gptoss.errors import ConversionError
from mlx_gptoss.model.low_rank import EXPERTS, Pair

_KEYS = {
    "q_proj": "attention.q",
    "k_proj": "attention.k",
    "v_proj": "attention.v",
    "o_proj": "attention.out",
    "router": "router",
    "gate_up_proj": "experts.gate_up",
    "down_proj": "experts.down",
}


def merged(source: Source, folder: Path, recipe: Recipe) -> Source:
    """The source with the adapter in a folder added to its weights, to be stored by a recipe.

    Raises AdapterError for what is no adapter of this model, ConversionError for experts that stay MXFP4.
    """
    adapter = read_adapter(folder, source.config)
    if recipe.experts == "mxfp4":
        _refuse_experts(source, adapter, folder)
    tensors = dict(source.tensors)
    for layer, name, pair in adapter.pairs():
        tensor = tensors[HF.path(_KEYS[name], layer) + ("" if name in EXPERTS else ".weight")]
        tensors[tensor.name] = _added(tensor, pair, adapter.scale)
    return replace(source, tensors=tensors)


def _added(tensor: SourceTensor, pair: Pair, scale: float) -> SourceTensor:
    """A matrix [outputs, inputs], or those of all experts [E, ..], plus scale * b @ a, in float32."""
    a, b = (np.array(array.astype(mx.float32)) for array in (pair.a, pair.b))
    read = tensor.read

    def rows(first: int, last: int) -> np.ndarray:
        inner = a[first:last] if a.ndim == 3 else a
        values: np.ndarray = to_float32(read(first, last)) + np.float32(scale) * (b[first:last] @ inner)
        return values

    return replace(tensor, dtype="F32", read=rows, extent=None, quantization=None, pieces=())


def _refuse_experts(source: Source, adapter: Adapter, folder: Path) -> None:
    """Raise ConversionError for an adapter of the experts: with how its change compares with the rounding."""
    found = next(((layer, name, pair) for layer, name, pair in adapter.pairs() if name in EXPERTS), None)
    if found is None:
        return
    layer, name, pair = found
    weights = to_float32(source.tensors[HF.path(_KEYS[name], layer)].read(0, 1)[0])
    a, b = (np.array(array[0].astype(mx.float32)) for array in (pair.a, pair.b))
    delta = np.float32(adapter.scale) * (b @ a)
    blocks, scales, _ = mxfp4.quantize(weights + delta, search=True)
    error = mxfp4.dequantize(blocks, scales) - weights - delta
    change, lost = (float(np.sqrt(np.mean(np.square(x)))) for x in (delta, error))
    raise ConversionError(
        f"{folder}: adapts the experts ({name}), which stay MXFP4: its change there is {change:.2g}, and "
        f"rounding would add an error of {lost:.2g} ({lost / max(change, 1e-30):.1f} times as much); keep "
        f"the adapter apart (--adapter), merge it with --recipe {BFLOAT16.name}, or train the attention alone"
    )
