"""A layout is a row of a table: whatever reads a checkpoint goes by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint import layouts
from mlx_gptoss.checkpoint.layouts import HF, LAYOUTS, PARTS, Layout, detect_layout
from mlx_gptoss.checkpoint.memory import plan
from mlx_gptoss.checkpoint.reader import Checkpoint, load_model
from mlx_gptoss.checkpoint.safetensors import read_folder
from mlx_gptoss.convert.convert import convert
from mlx_gptoss.convert.recipes import make_recipe
from mlx_gptoss.model.batch import Segment
from tests.support.checkpoints import write_checkpoint
from tests.support.converted import part_of
from tests.support.random_weights import MlxRecipe, Shape

SHAPE = Shape(vocab=64)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_is_recognised_by_its_own_tensors(tmp_path: Path, layout: Layout) -> None:
    folder = write_checkpoint(tmp_path, SHAPE, layout=layout.name)
    assert detect_layout(read_folder(folder), folder) is layout
    assert sum(other.mark in read_folder(folder) for other in LAYOUTS.values()) == 1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_tensor_belongs_to_a_part_of_the_model(tmp_path: Path, layout: Layout) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path, SHAPE, layout=layout.name))
    assert {spec.part for spec in checkpoint.specs.values()} == set(PARTS)
    if layout.name != "original":
        assert all(spec.part == part_of(name) for name, spec in checkpoint.specs.items())


def logits(folder: Path) -> np.ndarray:
    model = load_model(folder, "float32")
    found = model(mx.arange(12), [Segment(12, model.make_cache())])
    assert found is not None
    return np.array(found)


@pytest.mark.parametrize("base", ["hf", "bf16", "mlx"])
def test_a_new_row_is_read_planned_and_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    folder = write_checkpoint(
        tmp_path / base, SHAPE, layout=base, recipe=MlxRecipe(dense_bits=None), shards=1
    )
    known = Checkpoint(folder)
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.json").write_text((folder / "config.json").read_text().replace("model.layers.", "net."))
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    renamed = {name.replace("model.layers.", "net."): array for name, array in tensors.items()}
    mx.save_safetensors(str(new / "model.safetensors"), renamed)
    paths = {key: path.replace("model.layers.", "net.") for key, path in known.layout.paths.items()}
    row = replace(known.layout, name="new", paths=paths)
    monkeypatch.setattr(layouts, "LAYOUTS", {**LAYOUTS, "new": row})

    assert Checkpoint(new).layout is row
    assert np.array_equal(logits(new), logits(folder))
    assert plan(new).parts == plan(folder).parts
    made = [
        convert(source, tmp_path / f"made-{source.name}", make_recipe("mxfp4-q4"), need_tokenizer=False)
        for source in (folder, new)
    ]
    files = [(m.folder / "model.safetensors").read_bytes() for m in made]
    assert files[0] == files[1]
    assert HF.mark in read_folder(made[1].folder)
