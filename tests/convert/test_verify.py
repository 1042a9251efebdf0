"""Verifying a converted folder: against its manifest, its source, and its source's predictions."""

import errno
import json
import shutil
from dataclasses import asdict, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_gptoss import cli
from mlx_gptoss.checkpoint.safetensors import read_folder, read_header
from mlx_gptoss.convert import manifest as manifest_module
from mlx_gptoss.convert import verify as verify_module
from mlx_gptoss.convert.finite import Watch
from mlx_gptoss.convert.manifest import MANIFEST_NAME, Quality, read_manifest
from mlx_gptoss.convert.quality import compare, compare_on_text, default_text
from mlx_gptoss.convert.verify import CHUNK, Problem, hash_file, verify
from mlx_gptoss.errors import ConversionError, VerificationError
from mlx_gptoss.files import open_regular
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.converted import describe, sha256, without_file_hashes, write_converted
from tests.support.random_weights import MlxRecipe, Shape

LAST = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    write_converted(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def problems(folder: Path, source: Path | None = None) -> list[str]:
    return [str(problem) for problem in verify(folder, source).problems]


@pytest.mark.parametrize("count", [1, 10, 11, 12])
def test_ten_problems_are_told_and_the_others_counted(pristine: Path, count: int) -> None:
    found = replace(verify(pristine), problems=tuple(Problem(f"file-{i}", "bad") for i in range(count)))
    with pytest.raises(VerificationError) as caught:
        found.check()
    assert str(caught.value).count("bad") == min(count, 10)
    assert (f"; and {count - 10} more;" in str(caught.value)) == ("more" in str(caught.value)) == (count > 10)


# ---- against the manifest


def test_an_untouched_folder_verifies(pristine: Path) -> None:
    found = verify(pristine)
    found.check()
    assert found.ok and found.problems == () and found.extra == ()
    assert found.files == len(read_manifest(pristine).files)
    assert {part.part for part in found.parts} == {
        "attention",
        "embedding",
        "experts",
        "head",
        "norms",
        "router",
    }
    assert sum(part.bytes for part in found.parts) == sum(i.nbytes for i in read_folder(pristine).values())


def test_a_flipped_byte_at_either_end_of_a_tensor_is_found_and_the_tensor_named(folder: Path) -> None:
    pristine = (folder / LAST).read_bytes()
    for number, (name, info) in enumerate(read_header(folder / LAST).items()):
        flip(folder / LAST, info.start if number % 2 else info.end - 1)
        told = problems(folder)
        assert len(told) == 2, told
        assert told[0].startswith(f"{LAST}: sha256 is") and told[1].startswith(f"{name}: its bytes differ")
        (folder / LAST).write_bytes(pristine)


def test_a_changed_tokenizer_is_found(folder: Path) -> None:
    flip(folder / "tokenizer.json", 5)
    assert len(problems(folder)) == 1 and problems(folder)[0].startswith("tokenizer.json: sha256")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json: missing" in problems(folder)


def test_a_truncated_shard_is_named_with_its_sizes(folder: Path) -> None:
    data = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(data[:-1])
    assert any(text.startswith(f"{LAST}: {len(data) - 1:,} bytes, expected") for text in problems(folder))


def test_a_broken_header_is_a_problem_and_no_crash(folder: Path) -> None:
    flip(folder / LAST, 9)
    assert any(text.startswith(LAST) for text in problems(folder))


@pytest.mark.parametrize("field", ["dtype", "shape", "bytes"])
def test_a_tensor_that_is_not_what_the_manifest_says_is_named(folder: Path, field: str) -> None:
    manifest = read_manifest(folder)
    values: dict[str, Any] = {"dtype": "F16", "shape": (1, 2, 3), "bytes": 7}
    wrong = replace(manifest.tensors["lm_head.weight"], **{field: values[field]})
    replace(manifest, tensors={**manifest.tensors, "lm_head.weight": wrong}).write(folder)
    assert [text for text in problems(folder) if text.startswith("lm_head.weight: BF16 [512, 192], expected")]


def test_missing_and_unknown_tensors_are_named(folder: Path) -> None:
    manifest = read_manifest(folder)
    tensors = {("x" if name == "lm_head.weight" else name): entry for name, entry in manifest.tensors.items()}
    replace(manifest, tensors=tensors).write(folder)
    assert {"x: missing from the weights", "lm_head.weight: not in the manifest"} <= set(problems(folder))


def test_files_that_are_not_in_the_manifest_are_listed_and_weights_among_them_refused(folder: Path) -> None:
    (folder / "notes.txt").touch()
    (folder / "README.md").touch()
    assert verify(folder).extra == ("notes.txt",) and verify(folder).ok
    shutil.copy(folder / LAST, folder / "more.safetensors")
    assert any("remove them" in text for text in problems(folder))


def test_file_hashes_that_the_converter_left_open_are_filled_in_when_all_is_well(folder: Path) -> None:
    whole = (folder / MANIFEST_NAME).read_text()
    without_file_hashes(read_manifest(folder)).write(folder)
    assert verify(folder).ok
    assert (folder / MANIFEST_NAME).read_text() == whole
    without_file_hashes(read_manifest(folder)).write(folder)
    flip(folder / LAST)
    assert not verify(folder).ok
    assert all(entry.sha256 is None for entry in read_manifest(folder).files.values())


def test_on_a_disk_that_cannot_be_written_a_check_succeeds_with_a_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_file_hashes(read_manifest(folder)).write(folder)
    before = (folder / MANIFEST_NAME).read_text()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(manifest_module, "open", refuse, raising=False)
    monkeypatch.setattr(Path, "unlink", refuse)
    found = verify(folder)
    assert found.ok and len(found.notes) == 1
    assert "not stored" in found.notes[0] and "Read-only file system" in found.notes[0]
    assert (folder / MANIFEST_NAME).read_text() == before
    assert cli.run(["verify", str(folder)]) == 0
    assert "note: the hashes of the files were not stored" in capsys.readouterr().out


def test_the_error_lists_at_most_ten_problems_with_the_count(folder: Path) -> None:
    manifest = read_manifest(folder)
    replace(manifest, tensors={}).write(folder)
    with pytest.raises(VerificationError, match=rf"and {len(manifest.tensors) - 10} more") as caught:
        verify(folder).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
def test_a_files_hash_does_not_depend_on_how_it_falls_into_chunks(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    seen: list[int] = []
    assert hash_file(path, [], seen.append)[0] == sha256(data)
    assert sum(seen) == size


def test_a_tensors_hash_does_not_depend_on_how_it_falls_into_chunks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Shape(vocab=20_000), shards=1)
    path = tmp_path / "model.safetensors"
    assert path.stat().st_size > 2 * CHUNK
    data, header = path.read_bytes(), read_header(path)
    _, seen = hash_file(path, list(header.values()), lambda _: None)
    found = {name: watch.sha256 for name, watch in seen.items()}
    assert found == {name: sha256(data[info.start : info.end]) for name, info in header.items()}


@pytest.mark.parametrize(
    ("name", "value"),
    [("self_attn.sinks", b"\x80\x7f"), ("mlp.experts.down_proj_scales", b"\xff\xff")],
)
def test_a_nan_is_named_even_where_the_manifest_agrees(folder: Path, name: str, value: bytes) -> None:
    info = read_folder(folder)[f"model.layers.1.{name}"]
    with open(info.path, "r+b") as stream:
        stream.seek(info.end - 2)
        stream.write(value)
    (folder / MANIFEST_NAME).unlink()
    describe(folder).write(folder)
    assert problems(folder) == [f"{info.name}: holds NaN or infinity"]


@pytest.mark.parametrize("sizes", [[6], [1, 1, 1, 1, 1, 1], [3, 3], [2, 1, 3], [5, 1]])
@pytest.mark.parametrize("at", range(3))
def test_a_nan_is_seen_however_the_bytes_are_cut(sizes: list[int], at: int) -> None:
    values = np.array([0x3F80, 0x7F00, 0xFF7F], "<u2")
    for value in (values[at], 0x7FC0, 0xFF80):
        data = memoryview(np.where(np.arange(3) == at, value, values).astype("<u2").tobytes())
        watch, start = Watch("model.norm.weight", "BF16"), 0
        for size in sizes:
            watch.see(data[start : start + size])
            start += size
        assert watch.found == (value in (0x7FC0, 0xFF80))


def test_a_file_that_cannot_be_read_is_a_problem_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> BufferedReader:
        if path.name == "tokenizer.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_regular(path)

    monkeypatch.setattr(verify_module, "open_regular", refuse)
    assert problems(folder) == ["tokenizer.json: cannot be read (Permission denied); check its permissions"]
    for command in (["verify", str(folder)], ["share", str(folder), "someone/tiny", "--dry-run"]):
        assert cli.run(command) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "tokenizer.json: cannot be read" in lines[0]


def test_a_folder_without_a_manifest_and_no_folder_at_all_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no manifest.json"):
        verify(tmp_path)
    with pytest.raises(ConversionError, match="no such folder"):
        verify(tmp_path / "nothing")


# ---- against the source


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_copies_are_bit_identical_to_the_source_in_every_layout(
    folder: Path, tmp_path: Path, layout: str
) -> None:
    source = write_checkpoint(tmp_path / "source", layout=layout)
    found = verify(folder, source)
    assert found.ok and found.copies == len(found.manifest.tensors)
    assert all(part.measured == 0.0 for part in found.parts)


def test_another_source_is_told_apart_tensor_by_tensor(folder: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", seed=1)
    told = problems(folder, source)
    assert "lm_head.weight: its bytes are not the source's" in told
    assert any("experts.gate_up_proj_blocks: its bytes are not" in text for text in told)


def test_a_single_changed_expert_byte_in_the_source_is_found(folder: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=1)
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    flip(source / "model.safetensors", read_header(source / "model.safetensors")[name].start + 100)
    assert problems(folder, source) == [f"{name}: its bytes are not the source's"]


# ---- against the source's predictions


def tokens(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(0, 512, count)]


def test_the_same_weights_in_another_layout_predict_the_same(folder: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", layout="original")
    found = compare(folder, source, tokens(130))
    assert found.kl < 1e-9 and found.top1 == 1.0
    assert found.perplexity == pytest.approx(found.perplexity_source, rel=1e-6)


def test_fewer_bits_are_further_from_the_source(folder: Path, tmp_path: Path) -> None:
    found = []
    for bits in (8, 4):
        other = write_checkpoint(tmp_path / str(bits), layout="mlx", recipe=MlxRecipe(dense_bits=bits))
        found.append(compare(other, folder, tokens(100)))
    assert 0 < found[0].kl < found[1].kl and found[0].top1 > found[1].top1
    assert found[0].kl <= found[0].kl_p99


def test_quality_agrees_with_whole_forwards_of_both_models(folder: Path, tmp_path: Path) -> None:
    """The layer-by-layer pass against the everyday path: load both models, take logits, do it in numpy."""
    import mlx.core as mx

    from mlx_gptoss.checkpoint.reader import load_model
    from mlx_gptoss.model.batch import Segment

    other = write_checkpoint(tmp_path / "other", layout="mlx", recipe=MlxRecipe(dense_bits=4))
    ids = tokens(65)
    logs = []
    for path in (folder, other):
        model = load_model(path, mx.float32)
        logits = model(mx.array(ids), [Segment(len(ids), model.make_cache())])
        assert logits is not None
        values = np.array(logits, dtype=np.float64)
        logs.append(values - np.log(np.exp(values - values.max(-1, keepdims=True)).sum(-1, keepdims=True)))
        logs[-1] -= values.max(-1, keepdims=True)
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    losses = [-log[np.arange(64), ids[1:]].mean() for log in logs]
    found = compare(other, folder, ids)
    assert found.tokens == 65
    assert found.kl == pytest.approx(divergence.mean(), rel=1e-3)
    assert found.kl_p99 == pytest.approx(np.quantile(divergence, 0.99), rel=1e-3)
    assert found.top1 == (logs[0].argmax(-1) == logs[1].argmax(-1)).mean()
    assert found.perplexity_source == pytest.approx(np.exp(losses[0]), rel=1e-4)
    assert found.perplexity == pytest.approx(np.exp(losses[1]), rel=1e-4)


def test_a_long_text_is_read_in_windows(folder: Path) -> None:
    found = compare(folder, folder, tokens(101), window=32)
    assert found.tokens == 101 and found.kl == 0.0
    assert compare(folder, folder, tokens(97), window=32).tokens == 96  # a window of one predicts nothing


def test_different_models_and_empty_texts_are_refused(folder: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", Shape(layers=1))
    with pytest.raises(ConversionError, match="num_layers 2"):
        compare(folder, other, tokens(10))
    with pytest.raises(ConversionError, match="at least 2"):
        compare(folder, folder, [1])
    with pytest.raises(ConversionError, match="cannot be read as UTF-8"):
        compare_on_text(folder, folder, tmp_path / "none.txt")


def test_tokens_that_the_model_does_not_know_are_refused(folder: Path) -> None:
    with pytest.raises(ConversionError, match="has token 512, the model knows 512") as caught:
        compare(folder, folder, [1, 512, 2])
    assert "\n" not in str(caught.value)


def test_predictions_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    info = read_folder(folder)["model.norm.weight"]
    with open(info.path, "r+b") as stream:
        stream.seek(info.start)
        stream.write(b"\xc0\x7f")
    with pytest.raises(ConversionError, match="predictions .* are not finite"):
        compare(folder, source, tokens(10))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kl": None}, "quality.kl is None, expected a number"),
        ({"kl": float("nan")}, "quality.kl is nan, expected a finite number"),
        ({"perplexity": float("inf")}, "quality.perplexity is inf, expected a finite number"),
        ({"perplexity": 10**400}, "quality.perplexity is 1000.*, expected a finite number"),
        ({"top1": "1"}, "quality.top1 is '1', expected a number"),
        ({"tokens": -1}, "quality.tokens is -1, expected 0 or more"),
        ({"text": 3}, "quality.text is 3, expected a string"),
        (None, "quality.text is missing"),
        ([], r"quality is \[\], expected an object"),
    ],
)
def test_a_manifest_with_figures_that_no_card_can_print_is_refused(
    folder: Path, change: object, told: str
) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_text())
    whole = asdict(Quality("a text", 10, 0.1, 0.2, 0.9, 3.0, 3.1))
    content["quality"] = whole | change if isinstance(change, dict) else {} if change is None else change
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(ConversionError, match=told) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


def test_a_number_that_is_not_finite_is_never_written(folder: Path) -> None:
    before = (folder / MANIFEST_NAME).read_text()
    broken = replace(read_manifest(folder), quality=Quality("a text", 10, float("nan"), 0.2, 0.9, 3.0, 3.1))
    with pytest.raises(ConversionError, match="is not finite"):
        broken.write(folder)
    assert (folder / MANIFEST_NAME).read_text() == before
    assert not list(folder.glob(".manifest*"))


def test_the_built_in_text_is_a_page_of_alice() -> None:
    words = default_text().split()
    assert 600 < len(words) < 1000
    assert "Alice was beginning to get very tired of sitting by her sister" in default_text()


# ---- the command


def test_the_command_prints_tables_and_exits_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "everything agrees" in out and "experts" in out


def test_the_command_reports_a_problem_and_exits_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(folder / LAST)
    assert cli.run(["verify", str(folder)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert cli.run(["verify", str(folder), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False and told["problems"]


def test_the_command_measures_quality_and_records_it_for_the_card(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "source")
    write_byte_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.")
    arguments = ["verify", str(folder), "--source", str(source), "--quality", "--text", str(text), "--json"]
    assert cli.run(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["identical_to_source"] == told["tensors"]
    assert told["quality"]["text"] == "text.txt"
    assert told["quality"]["tokens"] == len(Tokenizer.from_folder(folder).encode(text.read_text()))
    assert read_manifest(folder).quality == Quality(**told["quality"])
    assert verify(folder).ok


def test_figures_that_cannot_be_recorded_are_still_printed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_byte_tokenizer(write_checkpoint(tmp_path / "source"))
    text = tmp_path / "text.txt"
    text.write_text("All work and no play.")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(manifest_module, "open", refuse, raising=False)
    arguments = ["verify", str(folder), "--source", str(source), "--quality", "--text", str(text), "--json"]
    assert cli.run(arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["quality"]["tokens"] > 0
    assert "note: the figures were not recorded" in captured.err
    assert read_manifest(folder).quality is None


def test_quality_without_a_source_is_a_usage_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(folder), "--quality"]) == 2
    assert "--source" in capsys.readouterr().err
