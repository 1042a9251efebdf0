"""Who gets which part of a model is decided from the headers, fits, and covers the model once."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from mlx_gptoss.checkpoint.memory import plan_checkpoint, runtime_bytes
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.distributed.plan import (
    Machine,
    Share,
    column_unit,
    in_proportion,
    parse_split,
    plan_pipeline,
    plan_tensor,
)
from mlx_gptoss.errors import MemoryLimitError, RequestError
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import SHAPES, MlxRecipe, Shape
from tests.support.sparse_checkpoint import write_sparse

GB = 10**9


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The headers of gpt-oss-120b: 65.2 GB."""
    return Checkpoint(write_sparse(tmp_path_factory.mktemp("large"), SHAPES["120b"], "hf"), "bfloat16")


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return Checkpoint(Path(__file__).parents[2] / "mlx_gptoss" / "demo_model")


def machines(*rooms: float) -> list[Machine]:
    return [Machine(f"mac{i + 1}", int(room * GB)) for i, room in enumerate(rooms)]


def cover(shares: list[Share], field: str) -> list[int]:
    return [i for share in shares for i in getattr(share, field)]


@pytest.mark.parametrize("rooms", [(36, 36), (36, 72), (26, 26, 26), (90, 12), (60, 40, 20, 10)])
def test_a_pipeline_holds_every_layer_once_and_all_the_bytes(
    large: Checkpoint, rooms: tuple[float, ...]
) -> None:
    shares = plan_pipeline(large, machines(*rooms), GB, GB // 2)
    assert cover(shares, "layers") == list(range(36))
    assert all(share.slots is None for share in shares)
    assert sum(share.weights for share in shares) == plan_checkpoint(large).weights
    assert sum(share.kv for share in shares) == pytest.approx(GB, rel=1e-6)
    for share in shares:
        assert share.needed == share.weights + share.kv + GB // 2 + runtime_bytes() <= share.machine.room


def test_layers_come_in_proportion_to_room_and_the_head_counts(large: Checkpoint) -> None:
    counts = [len(share.layers) for share in plan_pipeline(large, machines(36, 36), GB, GB // 2)]
    assert counts == [17, 19]  # embedding and head are as large as 1.3 layers
    counts = [len(share.layers) for share in plan_pipeline(large, machines(72, 36), GB, GB // 2)]
    assert counts[0] == pytest.approx(2 * counts[1], abs=2)


@pytest.mark.parametrize("free", [*product((3, 10, 24), repeat=3)])
def test_a_division_that_fits_is_found_whenever_there_is_one(free: tuple[int, ...]) -> None:
    for count in range(3, sum(free) + 1):
        counts = in_proportion(count, free)
        assert sum(counts) == count and all(0 < n <= room for n, room in zip(counts, free, strict=True))


def test_a_split_by_hand_is_kept(large: Checkpoint) -> None:
    shares = plan_pipeline(large, machines(60, 60), GB, GB // 2, (26, 10))
    assert [share.layers for share in shares] == [range(26), range(26, 36)]


@pytest.mark.parametrize("text", ["", "14,", "14;10", "0,24", "-1,25", "a,b", "1.5,2"])
def test_a_split_that_is_no_list_of_counts_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="expected a count for each machine"):
        parse_split(text)


@pytest.mark.parametrize("split", [(36,), (20, 20), (12, 12, 12), (36, 0)])
def test_a_split_that_the_model_does_not_have_is_refused(large: Checkpoint, split: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="expected 2 counts above 0, .* 36 in all, the model's layers"):
        plan_pipeline(large, machines(60, 60), GB, GB // 2, split)


def test_more_machines_than_layers_are_refused(demo: Checkpoint) -> None:
    with pytest.raises(RequestError, match="5 machines: the model has 4 layers"):
        plan_pipeline(demo, machines(*[1] * 5), 0, 0)


def test_a_machine_that_is_short_streams_experts(large: Checkpoint) -> None:
    shares = plan_pipeline(large, machines(36, 20), GB, GB // 2, (18, 18))
    assert shares[0].slots is None
    slots = shares[1].slots
    assert slots is not None and 4 <= slots < 128
    one_more = shares[1].needed + plan_checkpoint(large).expert.loaded * 18
    assert shares[1].needed <= shares[1].machine.room < one_more


def test_a_machine_without_room_for_one_tokens_experts_is_named(large: Checkpoint) -> None:
    with pytest.raises(MemoryLimitError, match=r"mac2: 18 layers need .* and 2\.00 GB are free") as caught:
        plan_pipeline(large, machines(60, 2), GB, GB // 2, (18, 18))
    assert caught.value.needed is not None and caught.value.needed > 2 * GB == caught.value.available


@pytest.mark.parametrize("count", [2, 3, 4])
def test_tensor_parallelism_holds_every_head_and_column_once(large: Checkpoint, count: int) -> None:
    shares = plan_tensor(large, machines(*[60] * count), GB, GB // 2)
    assert cover(shares, "heads") == list(range(8)) and cover(shares, "channels") == list(range(2880))
    assert all(share.layers == range(36) for share in shares)
    assert all(len(share.channels) % 32 == 0 for share in shares)
    whole = plan_checkpoint(large)
    replicated = sum(part.loaded for part in whole.parts if part.name in ("router", "norms"))
    assert sum(share.weights for share in shares) == pytest.approx(
        whole.weights + (count - 1) * replicated, rel=1e-6
    )


def test_tensor_parallelism_reads_evenly_where_there_is_room(large: Checkpoint) -> None:
    # Rank 0 reads the head as well (1.16 of the 5 GB that a token reads), and so has fewer columns.
    first, second = plan_tensor(large, machines(90, 90), GB, GB // 2)
    assert len(first.channels) < 0.4 * 2880 < len(second.channels)
    # Where that would not fit, columns go to where there is room.
    first, second = plan_tensor(large, machines(90, 30), GB, GB // 2)
    assert second.needed <= 30 * GB and len(first.channels) > len(second.channels)


def test_ranks_beyond_the_kv_heads_have_none(demo: Checkpoint) -> None:
    shares = plan_tensor(demo, machines(2, 2, 2, 2), 0, 0)
    assert [len(share.heads) for share in shares] == [0, 0, 1, 1]
    assert cover(shares, "channels") == list(range(192))


def test_columns_that_share_a_scale_stay_together(tmp_path: Path) -> None:
    shape = Shape(vocab=64, intermediate=256)
    folder = write_checkpoint(tmp_path, shape, layout="mlx", recipe=MlxRecipe(expert_bits=4, group=64))
    checkpoint = Checkpoint(folder)
    assert column_unit(checkpoint) == 64
    assert [len(s.channels) for s in plan_tensor(checkpoint, machines(2, 2), 0, 0, (1, 3))] == [64, 192]


def test_a_model_that_fits_nowhere_is_refused_for_tensor_parallelism(large: Checkpoint) -> None:
    with pytest.raises(MemoryLimitError, match="groups of the experts' columns need"):
        plan_tensor(large, machines(20, 20), GB, GB // 2)
