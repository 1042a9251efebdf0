"""Conversions whose experts lie in one run of bytes each, for streaming."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.expert_file import ExpertFiles
from mlx_gptoss.checkpoint.layouts import RECORD_ALIGNMENT, STREAMING
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.checkpoint.safetensors import read_folder
from mlx_gptoss.convert import writer
from mlx_gptoss.convert.card import model_card
from mlx_gptoss.convert.convert import convert
from mlx_gptoss.convert.manifest import read_manifest
from mlx_gptoss.convert.recipes import make_recipe
from mlx_gptoss.convert.verify import verify
from mlx_gptoss.errors import CheckpointError, ConversionError
from mlx_gptoss.model.batch import Segment
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import MlxRecipe, Shape

SHAPE = Shape(vocab=64)


def logits(folder: Path, slots: int | None = None) -> np.ndarray:
    checkpoint = Checkpoint(folder, "float32")
    if slots is not None:
        checkpoint.streaming = ExpertFiles(checkpoint, slots)
    model = read_model(checkpoint)
    found = model(mx.arange(12), [Segment(12, model.make_cache())])
    assert found is not None
    return np.array(found)


def make(source: Path, target: Path, recipe: str = "mxfp4", *, for_streaming: bool = True) -> Path:
    return convert(
        source, target, make_recipe(recipe), need_tokenizer=False, for_streaming=for_streaming
    ).folder


@pytest.mark.parametrize("recipe", ["mxfp4", "mxfp4-q4"])
@pytest.mark.parametrize("layout", ["hf", "original", "bf16", "mlx"])
def test_it_computes_what_the_same_conversion_without_records_does(
    tmp_path: Path, layout: str, recipe: str
) -> None:
    source = write_checkpoint(tmp_path / "source", SHAPE, layout=layout, recipe=MlxRecipe(None))
    made, plain = (make(source, tmp_path / f"{on}", recipe, for_streaming=on) for on in (True, False))
    expected = logits(plain)
    assert Checkpoint(made).layout is STREAMING
    assert np.array_equal(logits(made), expected)
    assert np.array_equal(logits(made, 4), expected)
    found = verify(made, source)
    assert found.ok, found.problems
    assert found.copies and not found.extra


def test_records_lie_on_whole_pages(tmp_path: Path) -> None:
    made = make(write_checkpoint(tmp_path / "source", SHAPE), tmp_path / "made", "mxfp4-q4")
    records = [t for name, t in read_folder(made).items() if name.endswith(".records")]
    assert len(records) == SHAPE.layers
    assert all(
        t.start % RECORD_ALIGNMENT == 0 == t.nbytes // SHAPE.experts % RECORD_ALIGNMENT for t in records
    )


def test_it_converts_back_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SHAPE, shards=1)
    made = make(source, tmp_path / "made")
    back = make(made, tmp_path / "back", for_streaming=False)
    plain = make(source, tmp_path / "plain", for_streaming=False)
    names = [p.name for p in plain.glob("*.safetensors")]
    assert [(back / n).read_bytes() for n in names] == [(plain / n).read_bytes() for n in names]


def test_a_stopped_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", SHAPE)
    whole = make(source, tmp_path / "whole")
    original, calls = writer._write_at, []

    def full(*args: object) -> None:
        calls.append(1)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_at", full)
        with pytest.raises(ConversionError, match="the disk is full"):
            make(source, tmp_path / "made")
    made = make(source, tmp_path / "made")
    names = sorted(p.name for p in whole.iterdir())
    assert names == sorted(p.name for p in made.iterdir())
    assert all((made / n).read_bytes() == (whole / n).read_bytes() for n in names)


@pytest.mark.parametrize("harm", ["changed", "source"])
def test_another_byte_is_noticed(tmp_path: Path, harm: str) -> None:
    source = write_checkpoint(tmp_path / "source", SHAPE)
    made = make(source, tmp_path / "made")
    (tensor, *_) = [t for name, t in read_folder(made).items() if name.endswith("1.mlp.experts.records")]
    if harm == "source":
        source = write_checkpoint(tmp_path / "other", SHAPE, seed=3)
    else:
        with tensor.path.open("r+b") as file:
            file.seek(tensor.start + 5)
            file.write(b"\0\1\2")
    found = verify(made, source)
    assert tensor.name in [problem.name for problem in found.problems]


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SHAPE)
    tensor = read_folder(source)["model.layers.1.mlp.experts.down_proj_scales"]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.end - 1)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match="down_proj.* holds NaN"):
        make(source, tmp_path / "made")


def test_its_card_says_who_loads_it(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", SHAPE)
    cards = [
        model_card(read_manifest(make(source, tmp_path / f"{on}", for_streaming=on)), "a/b", license="mit")
        for on in (True, False)
    ]
    assert ["Only mlx-gptoss loads this form" in card for card in cards] == [True, False]
    assert ["mlx_lm.generate" in card for card in cards] == [False, True]
