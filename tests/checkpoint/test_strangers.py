"""Files from strangers: what is no regular file, too large, or no number is refused at once, in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlx_gptoss.checkpoint.reader import load_model
from mlx_gptoss.checkpoint.safetensors import read_folder
from mlx_gptoss.convert.convert import convert
from mlx_gptoss.errors import CheckpointError, ConfigError, ConversionError, GptOssError, TokenizerError
from mlx_gptoss.llm import load
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.endless import ends
from tests.support.random_weights import Shape

SHAPE = Shape(layers=2, hidden=64, intermediate=64, experts=4, top_k=2, window=16, vocab=320)
GIGABYTE = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_byte_tokenizer(write_checkpoint(tmp_path / "model", SHAPE))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def sparse(path: Path) -> None:
    os.truncate(path, GIGABYTE)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("spoil", [fifo, sparse, device])
@pytest.mark.parametrize(
    ("name", "error"),
    [("config.json", ConfigError), ("tokenizer.json", TokenizerError), ("*.safetensors", CheckpointError)],
)
def test_what_is_no_file_of_a_model_is_refused_at_once(
    folder: Path, spoil: Callable[[Path], None], name: str, error: type[GptOssError]
) -> None:
    (path, *_) = sorted(folder.glob(name))
    spoil(path)
    with ends(), pytest.raises(error) as told:
        load(folder, kv_budget=32 * 2**20)
    assert path.name in str(told.value) or str(folder) in str(told.value)
    assert "\n" not in str(told.value)


def test_an_index_that_is_no_file_is_refused_at_once(folder: Path) -> None:
    fifo(folder / "model.safetensors.index.json")
    with ends(), pytest.raises(CheckpointError, match=r"index\.json"):
        load_model(folder)


def test_a_header_of_many_tensors_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"tensor.{i:09}.of.a.stranger": entry for i in range(200_000)}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    parsed: list[str] = []
    monkeypatch.setattr("mlx_gptoss.checkpoint.safetensors.json.loads", lambda text, **_: parsed.append(text))
    with pytest.raises(CheckpointError, match="header"):
        read_folder(tmp_path)
    assert not parsed


@pytest.mark.parametrize("shape", [[10**30], [2**62, 2**62], [int("9" * 4000)], [-1], [1.5]])
def test_a_shape_of_any_numbers_is_one_line(tmp_path: Path, shape: list[object]) -> None:
    entry = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    header = json.dumps(entry).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError) as told:
        read_folder(tmp_path)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.sinks",
        "model.layers.0.mlp.experts.down_proj_bias",
        "lm_head.weight",
    ],
)
def test_weights_that_are_no_numbers_are_named(folder: Path, name: str, value: float) -> None:
    tensor = read_folder(folder)[name]
    bits = (np.array([value], np.float32).view(np.uint32) >> 16).astype("<u2")
    assert tensor.dtype == "BF16"
    with tensor.path.open("r+b") as file:
        file.seek(tensor.start + 2 * (tensor.nbytes // 4))
        file.write(bits.tobytes())
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model(folder)


@pytest.mark.parametrize("where", [".", "inside", "deep/inside"])
def test_a_conversion_into_its_source_is_refused(folder: Path, where: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConversionError, match="inside the source"):
        convert(folder, folder / where)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Metaspace"}]}),
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
        ("model", {"type": "WordPiece", "vocab": {}}),
    ],
)
def test_a_tokenizer_with_parts_that_rewrite_text_is_refused(folder: Path, part: str, value: object) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    with pytest.raises(TokenizerError, match=part):
        Tokenizer(path)


def test_a_model_in_a_forked_process_says_so_at_once(folder: Path) -> None:
    with load(folder, kv_budget=32 * 2**20) as llm:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover (its coverage is not collected)
            try:
                llm.submit([1, 2, 3])
                told = "submitted"
            except GptOssError as error:
                told = str(error)
            os.write(writer, told.encode())
            llm.close()
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert b"before fork()" in pipe.read()
        assert os.waitpid(child, 0)[1] == 0
        assert list(llm.generate([1, 2, 3]))[:1]


def test_a_copy_of_the_model_still_loads(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert load_model(tmp_path / "copy").config.num_layers == 2
