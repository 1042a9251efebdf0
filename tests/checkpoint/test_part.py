"""Parts of every layer add up to the model, whatever the layout, and each reads its own bytes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.part import PartOfCheckpoint
from mlx_gptoss.checkpoint.reader import Checkpoint, load_model
from mlx_gptoss.checkpoint.safetensors import read_folder, read_part, read_rows
from mlx_gptoss.errors import RequestError
from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.sequence_cache import SequenceCache
from tests.model.test_parity import step
from tests.support.checkpoints import write_checkpoint
from tests.support.parts import Cuts, run_parts
from tests.support.random_weights import MlxRecipe, Shape

SHAPE = Shape(layers=3, hidden=128, intermediate=160, experts=6, heads=8, kv_heads=4, window=16, vocab=160)
LAYOUTS: dict[str, tuple[str, MlxRecipe | None]] = {
    "hf": ("hf", None),
    "original": ("original", None),
    "streaming": ("streaming", None),
    "bf16": ("bf16", None),
    "mlx, mxfp4 experts": ("mlx", MlxRecipe(8)),
    "mlx, affine experts": ("mlx", MlxRecipe(4, 8, group=32)),
}
PIECES = (40, 1, 3, 1, 1)


def cuts(heads: tuple[int, ...], groups: tuple[int, ...]) -> Cuts:
    """Parts of so many KV heads and groups of 32 columns."""
    bounds = [np.cumsum([0, *counts]).tolist() for counts in (heads, groups)]
    kv, columns = ([range(a, b) for a, b in pairwise(one)] for one in bounds)
    return list(zip(kv, [range(32 * c.start, 32 * c.stop) for c in columns], strict=True))


def difference(folder: Path, parts: Cuts, kv_bits: KVBits = (None, None)) -> float:
    """The largest difference of the parts' logits from the whole model's, relative to their scale."""
    model = load_model(folder, "float32")
    tokens = np.random.default_rng(7).integers(0, model.config.vocab_size, sum(PIECES))
    bounds = list(pairwise(np.cumsum([0, *PIECES]).tolist()))
    embedded = np.array(model.embedding(mx.array(tokens)))
    hidden = run_parts(folder, parts, [embedded[a:b] for a, b in bounds], kv_bits)
    assert all(np.array_equal(one, hidden[0]) for one in hidden)  # all have the same residual stream
    logits = model.logits(mx.array(hidden[0]))
    assert logits is not None
    cache = SequenceCache(model.config, mx.float32, kv_bits)
    wanted = np.concatenate([step(model, [(tokens[a:b], cache)]) for a, b in bounds])
    return float(np.abs(np.array(logits) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uneven_parts_add_up_in_every_layout(tmp_path: Path, layout: str) -> None:
    name, recipe = LAYOUTS[layout]
    folder = write_checkpoint(tmp_path, SHAPE, layout=name, recipe=recipe or MlxRecipe())
    assert difference(folder, cuts((1, 3), (3, 2))) <= 1e-5


@pytest.mark.parametrize(
    ("heads", "groups"), [((2, 2), (2, 3)), ((1, 2, 1), (2, 1, 2)), ((1, 1, 1, 1), (1, 1, 1, 2))]
)
def test_two_three_and_four_parts_add_up(
    tmp_path: Path, heads: tuple[int, ...], groups: tuple[int, ...]
) -> None:
    assert difference(write_checkpoint(tmp_path, SHAPE), cuts(heads, groups)) <= 1e-5


def test_parts_without_heads_add_up(tmp_path: Path) -> None:
    assert difference(write_checkpoint(tmp_path, SHAPE), cuts((0, 4, 0), (1, 1, 3))) <= 1e-5


@pytest.mark.parametrize("heads", [(1, 3), (0, 4)])
def test_quantised_caches_are_divided_by_heads(tmp_path: Path, heads: tuple[int, ...]) -> None:
    # Another order of additions moves some keys over the edge between two of the 255 steps.
    folder = write_checkpoint(tmp_path, SHAPE)
    assert difference(folder, cuts(heads, (2, 3)), (8, 8)) <= 2e-3


def test_a_part_holds_its_share_of_the_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, SHAPE)
    whole = Checkpoint(folder, "float32").layer(0)
    sizes = {
        heads: sum(a.nbytes for a in PartOfCheckpoint(folder, "float32", *cut, lambda x: x).layer(0).arrays())
        for heads, cut in zip((1, 3), cuts((1, 3), (1, 4)), strict=True)
    }
    alike = sum(
        a.nbytes
        for a in (whole.attention.norm, whole.moe.norm, whole.attention.out_bias, *whole.moe.router.arrays())
    )
    down_bias = SHAPE.experts * SHAPE.hidden * 4
    assert sum(sizes.values()) == sum(a.nbytes for a in whole.arrays()) + alike + down_bias
    assert sizes[1] < sizes[3] / 2


def test_only_a_parts_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, SHAPE)
    read: list[int] = []
    from_file = np.fromfile

    def counted(path: Path, dtype: object, count: int, offset: int) -> np.ndarray:
        read.append(count)
        return from_file(path, np.uint8, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", counted)
    infos = read_folder(folder)
    info = infos["model.layers.0.mlp.experts.gate_up_proj_blocks"]
    part = read_part(info, 1, 64, 128)
    assert sum(read) == part.nbytes == info.nbytes * 64 // 320
    assert np.array_equal(part, read_rows(info)[:, 64:128])
    read.clear()
    info = infos["model.layers.0.self_attn.q_proj.weight"]
    part = read_part(info, 0, 64, 192)
    assert sum(read) == part.nbytes and np.array_equal(part, read_rows(info)[64:192])


@pytest.mark.parametrize(
    ("name", "axis"), [("self_attn.o_proj.weight", 1), ("mlp.experts.down_proj_blocks", 2)]
)
def test_columns_are_cut_out_of_what_is_read(tmp_path: Path, name: str, axis: int) -> None:
    info = read_folder(write_checkpoint(tmp_path, SHAPE))[f"model.layers.0.{name}"]
    whole = read_rows(info)
    assert np.array_equal(read_part(info, axis, 1, 3), np.take(whole, [1, 2], axis))


def test_a_part_that_cuts_through_a_group_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, SHAPE)
    part = PartOfCheckpoint(folder, "float32", range(4), range(16, 160), lambda x: x)
    with pytest.raises(RequestError, match="down_proj.* has groups of 32 values, which 16 to 160 cuts"):
        part.layer(0)
