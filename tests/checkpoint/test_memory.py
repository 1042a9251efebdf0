"""The plan reproduces the published models' sizes, from headers alone."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.expert_file import ExpertFiles
from mlx_gptoss.checkpoint.memory import (
    GPU_RUNTIME_BYTES,
    RUNTIME_BYTES,
    TOKEN_BYTES,
    MemoryPlan,
    gigabytes,
    plan,
    plan_checkpoint,
    plan_experts,
)
from mlx_gptoss.checkpoint.reader import Checkpoint, load_model, read_model
from mlx_gptoss.device import kept_buffers, on_gpu
from mlx_gptoss.errors import MemoryLimitError
from mlx_gptoss.model.sequence_cache import SequenceCache
from tests.model.test_parity import feed
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import SHAPES, MlxRecipe, Shape
from tests.support.sparse_checkpoint import write_sparse

LAYERS, EXPERTS_READ = {"20b": 24, "120b": 36}, {"20b": 1.269e9, "120b": 1.904e9}


def the(made: MemoryPlan, name: str) -> dict[str, float]:
    """Sums over a part's formats."""
    chosen = [p for p in made.parts if p.name == name]
    return {
        field: sum(getattr(p, field) for p in chosen) for field in ("stored", "loaded", "read", "tensors")
    }


@pytest.mark.parametrize(
    ("layout", "name", "tensors", "stored", "read"),
    [
        ("hf", "20b", 459, 13_761_264_768, 3.71e9),
        ("hf", "120b", 687, 65_248_815_744, 5.00e9),
        ("original", "20b", 363, 13_761_264_768, 3.71e9),
        ("original", "120b", 543, 65_248_815_744, 5.00e9),
    ],
)
def test_published_sizes(
    tmp_path: Path, layout: str, name: str, tensors: int, stored: float, read: float
) -> None:
    made = plan(write_sparse(tmp_path, SHAPES[name], layout), "bfloat16")
    assert made.layout == layout
    assert sum(p.tensors for p in made.parts) == tensors
    assert made.stored == stored == made.weights
    assert made.read_per_token == pytest.approx(read, abs=0.01e9)
    assert the(made, "experts")["read"] == pytest.approx(EXPERTS_READ[name], rel=1e-2)
    assert made.kv_per_token == 24_576 * LAYERS[name] / 24
    assert made.transient == 0


@pytest.mark.parametrize(("bits", "read", "stored"), [(8, 2.57e9, 12.08e9), (4, 1.96e9, 11.18e9)])
def test_quantised_dense_parts_read_and_store_less(
    tmp_path: Path, bits: int, read: float, stored: float
) -> None:
    made = plan(write_sparse(tmp_path, SHAPES["20b"], "mlx", MlxRecipe(bits)), "bfloat16")
    assert made.read_per_token == pytest.approx(read, rel=0.005)
    assert made.stored == pytest.approx(stored, rel=0.001)


def test_float32_widens_dense_parts_and_nothing_else(tmp_path: Path) -> None:
    folder = write_sparse(tmp_path, SHAPES["20b"])
    narrow, wide = plan(folder, "bfloat16"), plan(folder, "float32")
    assert the(wide, "embedding")["loaded"] == the(wide, "embedding")["stored"]
    for part in ("attention", "head", "router", "norms"):
        assert the(wide, part)["loaded"] == 2 * the(narrow, part)["loaded"]
    biases = 2 * sum(p.loaded for p in narrow.parts if p.name == "experts" and p.format == "bfloat16")
    blocks = sum(p.loaded for p in narrow.parts if p.format == "mxfp4")
    assert the(wide, "experts")["loaded"] == biases + blocks
    assert wide.kv_per_token == 2 * narrow.kv_per_token
    assert wide.transient == 201088 * 2880 * 2  # the head, read as bfloat16 and cast


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [("hf", None), ("original", None), ("bf16", None), ("mlx", MlxRecipe(8)), ("mlx", MlxRecipe(4, 4))],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_weights_are_what_loading_allocates(
    tmp_path: Path, layout: str, recipe: MlxRecipe | None, dtype: str
) -> None:
    folder = write_checkpoint(tmp_path, Shape(), layout=layout, recipe=recipe)
    made, model = plan(folder, dtype), load_model(folder, dtype)
    assert made.weights == sum(a.nbytes for a in model.arrays())


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [("hf", None), ("bf16", None), ("mlx", MlxRecipe(8)), ("mlx", MlxRecipe(4, 4)), ("streaming", None)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_slots_are_what_streaming_allocates(
    tmp_path: Path, layout: str, recipe: MlxRecipe | None, dtype: str
) -> None:
    folder = write_checkpoint(tmp_path, Shape(), layout=layout, recipe=recipe)
    checkpoint = Checkpoint(folder, dtype)
    made = plan_checkpoint(checkpoint, 5)
    checkpoint.streaming = ExpertFiles(checkpoint, made.slots or 0)
    assert made.weights == sum(a.nbytes for a in read_model(checkpoint).arrays())
    assert plan_checkpoint(checkpoint, 6).weights - made.weights == made.slot


GB = 10**9


def test_experts_are_all_in_memory_where_they_fit(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_sparse(tmp_path, SHAPES["20b"]), "bfloat16")
    for wanted in ("auto", "all", 12 * GB):
        assert plan_experts(checkpoint, wanted, 17 * GB, beside=GB).slots is None
    with pytest.raises(MemoryLimitError, match=r"the model needs 14\.\d+ GB"):
        plan_experts(checkpoint, "all", 12 * GB, beside=GB)


@pytest.mark.parametrize(("name", "free", "slots"), [("20b", 12, 27), ("20b", 6, 8), ("120b", 24, 40)])
def test_as_many_experts_as_fit_are_in_memory(tmp_path: Path, name: str, free: int, slots: int) -> None:
    checkpoint = Checkpoint(write_sparse(tmp_path, SHAPES[name]), "bfloat16")
    made = plan_experts(checkpoint, "auto", free * GB, beside=GB)
    assert made.slots is not None and abs(made.slots - slots) <= 2
    assert made.total() + GB <= free * GB < made.total() + GB + made.slot
    assert f"{made.slots} of {checkpoint.config.num_experts} experts a layer in memory" in made.streamed


def test_what_else_there_is_gives_way_before_a_tokens_own_experts(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_sparse(tmp_path, SHAPES["20b"]), "bfloat16")
    assert plan_experts(checkpoint, "auto", 5 * GB, beside=3 * GB).slots == 4


def test_experts_that_are_asked_for_are_what_there_is(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_sparse(tmp_path, SHAPES["20b"]), "bfloat16")
    made = plan_experts(checkpoint, 4 * GB, 14 * GB, beside=GB)
    assert made.slots is not None
    assert made.slots * made.slot <= 4 * GB < (made.slots + 1) * made.slot
    with pytest.raises(MemoryLimitError, match=r"expert_memory is 1.00 GB: a token needs 4 experts"):
        plan_experts(checkpoint, GB, 14 * GB, beside=GB)


def test_less_than_a_token_needs_is_refused_with_numbers(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_sparse(tmp_path, SHAPES["120b"]), "bfloat16")
    with pytest.raises(
        MemoryLimitError, match=r"needs 5\.\d+ GB .*4 experts a layer\) and 4\.00 GB"
    ) as error:
        plan_experts(checkpoint, "auto", 4 * GB, beside=GB)
    assert error.value.needed and error.value.needed > 4 * GB == error.value.available


@pytest.mark.skipif(on_gpu(), reason="the CPU backend's own plan")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_parts_are_unpacked_where_memory_allows(tmp_path: Path, bits: int) -> None:
    folder = write_checkpoint(tmp_path, Shape(), layout="mlx", recipe=MlxRecipe(bits))
    packed, tight = (
        plan(folder, "float32"),
        plan_checkpoint(Checkpoint(folder, "float32"), None, ("attention",)),
    )
    assert tight.weights > packed.weights
    rooms = {packed.total(): (), tight.total(): ("attention",), 10**10: ("attention", "head")}
    logits = []
    for room, unpacked in rooms.items():
        checkpoint = Checkpoint(folder, "float32")
        made = plan_experts(checkpoint, "auto", room, beside=0)
        assert made.unpacked == unpacked and made.slots is None
        checkpoint.unpacked = made.unpacked
        model = read_model(checkpoint)
        assert made.weights == sum(a.nbytes for a in model.arrays())
        logits.append(feed(model, np.arange(30), [20] + [1] * 10))
    assert all(np.abs(found - logits[0]).max() < 1e-4 for found in logits)
    assert plan_experts(Checkpoint(folder, "bfloat16"), "auto", 10**10, beside=0).unpacked == ()


def test_the_cache_of_one_sequence_is_what_is_planned(tmp_path: Path) -> None:
    made = plan(write_checkpoint(tmp_path, Shape(layers=4)), "float32")
    cache = SequenceCache(made.config, mx.float32)
    keys = mx.zeros((1, made.config.num_kv_heads, 256, made.config.head_dim))
    for _ in range(4):
        for layer in cache.layers:
            layer.update_and_fetch(keys, keys)
        cache.advance(256)
    full_room = cache.full[0].capacity
    held = sum(a.nbytes for a in cache.arrays())
    assert held <= made.kv(full_room)
    assert made.kv(full_room) - held <= made.kv_window


def test_too_little_memory_is_said_with_numbers(tmp_path: Path) -> None:
    made = plan(write_sparse(tmp_path, SHAPES["20b"]), "bfloat16")
    with pytest.raises(MemoryLimitError, match=r"needs 14\.\d+ GB .* 8\.00 GB are free") as caught:
        made.require(8_000_000_000)
    assert caught.value.needed == made.total()
    assert caught.value.available == 8_000_000_000
    made.require(16_000_000_000)


def test_a_context_adds_its_caches_beyond_what_reading_takes(tmp_path: Path) -> None:
    narrow, wide = (plan(write_sparse(tmp_path, SHAPES["20b"]), d) for d in ("bfloat16", "float32"))
    assert narrow.transient == 0 and narrow.total(4096) - narrow.total() == narrow.kv(4096)
    assert wide.total(1) == wide.total() and wide.kv(1) < wide.transient
    assert wide.total(131_072) - wide.total() == wide.kv(131_072) - wide.transient


def test_the_runtime_is_counted_with_the_buffers_that_mlx_keeps_and_the_tokenizer(tmp_path: Path) -> None:
    folder = write_sparse(tmp_path, SHAPES["20b"])
    made = plan(folder, "bfloat16")
    kept = 0 if on_gpu() else kept_buffers(made.weights)
    assert made.total() - made.weights == (GPU_RUNTIME_BYTES if on_gpu() else RUNTIME_BYTES + kept)
    (folder / "tokenizer.json").write_text("{}")
    more = plan(folder, "bfloat16").total() - made.total()
    assert more == (0 if on_gpu() else TOKEN_BYTES * 201_088)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (800, "0.8 kB"),
        (99_900, "99.9 kB"),
        (100_000, "0.1 MB"),
        (4_400_000, "4.4 MB"),
        (99_900_000, "99.9 MB"),
        (99_999_999, "100.0 MB"),
        (100_000_000, "0.10 GB"),
        (1_269_000_000, "1.27 GB"),
    ],
)
def test_sizes_are_shown_in_decimal_units(count: int, shown: str) -> None:
    assert gigabytes(count) == shown


def test_memory_grows_with_the_context(tmp_path: Path) -> None:
    made = plan(write_sparse(tmp_path, SHAPES["120b"]), "bfloat16")
    assert made.kv(131_072) - made.kv(4096) == (131_072 - 4096) * made.kv_per_token
    assert made.kv_per_token * 131_072 == 4.5 * 2**30
