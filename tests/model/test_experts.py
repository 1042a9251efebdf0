"""The experts of a layer on a GPU: rows are sorted by expert where MLX then reads each expert once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.model.batch import Pairs
from mlx_gptoss.model.experts import ExpertWeights, ResidentExperts, grouped_rows
from mlx_gptoss.model.matrix import Matrix
from tests.model.test_streamed import as_on_a_gpu
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import SHAPES, Shape


@pytest.mark.parametrize(("name", "rows"), [("20b", 32), ("120b", 128)])
def test_the_published_models_are_grouped_from_so_many_rows(tmp_path: Path, name: str, rows: int) -> None:
    shape = Shape(layers=1, experts=SHAPES[name].experts, hidden=64, intermediate=64)
    config = Checkpoint(write_checkpoint(tmp_path, shape)).config
    assert grouped_rows(config) == rows


@pytest.mark.parametrize("experts", [8, 32])
def test_rows_are_sorted_from_four_pairs_an_expert_on_and_only_then(
    tmp_path: Path, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, Shape(layers=1, experts=experts)), "float32")
    layer = checkpoint.experts(0)
    assert isinstance(layer, ResidentExperts)
    sorted_by_expert: list[bool] = []
    gather = Matrix.gather

    def noting(self: Matrix, *args: Any, in_order: bool = False, **more: Any) -> mx.array:
        sorted_by_expert.append(in_order)
        return gather(self, *args, in_order=in_order, **more)

    monkeypatch.setattr(Matrix, "gather", noting)
    k, least = 4, grouped_rows(checkpoint.config)
    for rows, sorts in [(1, False), (least - 1, False), (least, True), (2 * least, True)]:
        x = mx.random.normal((rows, 192), key=mx.random.key(rows))
        picks = np.random.default_rng(rows).permuted(np.tile(np.arange(experts), (rows, 1)), axis=1)[:, :k]
        sorted_by_expert.clear()
        y = layer.way(x, chosen := mx.array(picks.astype(np.uint32)))(x, chosen, Pairs(rows, k))
        assert sorted_by_expert == [sorts, sorts]
        assert np.allclose(y, by_hand(layer.weights, np.array(x), picks), atol=1e-4)


def by_hand(weights: ExpertWeights, x: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Each pair by itself, in float32 of dense matrices."""
    gate_up, down, bias = (
        np.array(a) for a in (weights.gate_up.dense(mx.float32), weights.down.dense(mx.float32), weights.bias)
    )
    out = np.empty((*picks.shape, x.shape[1]), np.float32)
    for row, slot in np.ndindex(picks.shape):
        e = picks[row, slot]
        h = mx.array(gate_up[e] @ x[row])[None]
        h = np.array(weights.activate(h, mx.array(bias[e])[None]))[0]
        out[row, slot] = down[e] @ h + bias[e, gate_up.shape[1] :]
    return out
