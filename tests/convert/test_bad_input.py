"""Broken checkpoints: every lie of a header, index or config is one clear error; nothing is written."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_gptoss.checkpoint.safetensors import INDEX_NAME, read_folder, read_header, read_rows
from mlx_gptoss.convert.convert import convert
from mlx_gptoss.convert.manifest import read_manifest
from mlx_gptoss.convert.quality import compare_on_text
from mlx_gptoss.convert.recipes import make_recipe
from mlx_gptoss.errors import CheckpointError, ConfigError, ConversionError, GptOssError
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.gguf_checkpoint import write_gguf
from tests.support.random_weights import MlxRecipe, Shape

SHAPE = Shape(hidden=64, intermediate=64, experts=4, heads=4, head_dim=16, vocab=320)
SHARD = "model-00001-of-00002.safetensors"
Damage = Callable[[Path], Any]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(write_checkpoint(tmp_path_factory.mktemp("whole"), SHAPE))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "source")


def header(change: Callable[[dict[str, Any], str], Any], shard: str = SHARD) -> Damage:
    """Change a shard's header; `change` gets the entries and the name of the first tensor in the file."""

    def damage(folder: Path) -> None:
        raw = (folder / shard).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        first = min((n for n in entries if n != "__metadata__"), key=lambda n: entries[n]["data_offsets"])
        change(entries, first)
        write_raw(folder / shard, json.dumps(entries).encode(), raw[8 + length :])

    return damage


def write_raw(path: Path, text: bytes, data: bytes) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def raw_header(text: bytes) -> Damage:
    return lambda folder: write_raw(folder / SHARD, text, b"")


def field(key: str, value: Any) -> Damage:
    return header(lambda entries, name: entries[name].update({key: value}))


def shifted(start: int, end: int) -> Damage:
    def change(entries: dict[str, Any], name: str) -> None:
        a, b = entries[name]["data_offsets"]
        entries[name]["data_offsets"] = [a + start, b + end]

    return header(change)


def index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / INDEX_NAME
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def mapped_to(file: Any) -> Damage:
    return index(lambda content: content["weight_map"].update({"lm_head.weight": file}))


def config(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))

    return damage


def linked(target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / SHARD).rename(folder.parent / "elsewhere.safetensors")
        (folder / SHARD).symlink_to(target)

    return damage


def duplicate_key(folder: Path) -> None:
    raw = (folder / SHARD).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip()
    entries = json.loads(text)
    name = next(n for n in entries if n != "__metadata__")
    doubled = text[:-1] + f', "{name}": {json.dumps(entries[name])}}}'.encode()
    write_raw(folder / SHARD, doubled, raw[8 + length :])


def same_tensor_twice(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    shutil.copy(folder / SHARD, folder / "model-extra.safetensors")


def poison(name: str, dtype: str) -> Damage:
    """Put a NaN (or, for scales, its byte) into a tensor."""

    def damage(folder: Path) -> None:
        info = read_folder(folder)[name]
        with open(info.path, "r+b") as stream:
            stream.seek(info.start + info.nbytes // 2 // 2 * 2)
            stream.write(np.array([0x7FC0], dtype).tobytes())

    return damage


def text(name: str, content: str | bytes) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def folder_in_place_of_a_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()


def without_weights(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX_NAME):
        path.unlink()


def cut(name: str, keep: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def named(folder: Path, *names: str) -> None:
    """Copies of tiny.gguf under these names, in its place."""
    for name in names:
        shutil.copy(folder / "tiny.gguf", folder / f"{name}.gguf")
    (folder / "tiny.gguf").unlink()


CASES: dict[str, tuple[Damage, type[GptOssError], str]] = {
    "empty shard": (cut(SHARD, 0), CheckpointError, "too short"),
    "shard of seven bytes": (cut(SHARD, 7), CheckpointError, "too short"),
    "shard cut in its header": (cut(SHARD, 300), CheckpointError, "truncated"),
    "shard cut in its data": (
        lambda f: cut(SHARD, (f / SHARD).stat().st_size - 10)(f),
        CheckpointError,
        "truncated",
    ),
    "shard with bytes at its end": (
        lambda f: text(SHARD, (f / SHARD).read_bytes() + b"x")(f),
        CheckpointError,
        "has",
    ),
    "header longer than the file": (text(SHARD, b"\xff" * 64), CheckpointError, "its header has"),
    "header of 2 EiB": (
        text(SHARD, (1 << 61).to_bytes(8, "little") + b"{}"),
        CheckpointError,
        "its header has",
    ),
    "header not JSON": (raw_header(b"{'a': 1}"), CheckpointError, "not valid JSON"),
    "header not UTF-8": (raw_header(b'{"\xff": 1}'), CheckpointError, "not valid JSON"),
    "header a list": (raw_header(b"[]"), CheckpointError, "expected an object"),
    "header nested without end": (raw_header(b"[" * 50_000), CheckpointError, "not valid JSON"),
    "header with an endless number": (raw_header(b'{"a": ' + b"9" * 9000 + b"}"), CheckpointError, "number"),
    "name held twice": (duplicate_key, CheckpointError, "twice"),
    "tensor in two files": (same_tensor_twice, CheckpointError, "is in both"),
    "metadata of numbers": (
        header(lambda e, n: e.update(__metadata__={"a": 1})),
        CheckpointError,
        "__metadata__",
    ),
    "metadata a list": (header(lambda e, n: e.update(__metadata__=[])), CheckpointError, "__metadata__"),
    "entry a number": (header(lambda e, n: e.update({n: 3})), CheckpointError, "must hold dtype"),
    "entry without a shape": (header(lambda e, n: e[n].pop("shape")), CheckpointError, "must hold dtype"),
    "entry with a fourth key": (field("strides", [1]), CheckpointError, "must hold dtype"),
    "unknown dtype": (field("dtype", "F4"), CheckpointError, "has dtype 'F4'"),
    "dtype a number": (field("dtype", 16), CheckpointError, "has dtype 16"),
    "negative length": (field("shape", [-1, -1]), CheckpointError, "integers >= 0"),
    "fractional length": (field("shape", [1.5]), CheckpointError, "integers >= 0"),
    "true for a length": (field("shape", [True]), CheckpointError, "integers >= 0"),
    "shape a number": (field("shape", 7), CheckpointError, "integers >= 0"),
    "huge shape": (field("shape", [1 << 62, 1 << 62]), CheckpointError, "its data_offsets hold"),
    "one offset": (field("data_offsets", [0]), CheckpointError, "expected \\[start, end\\]"),
    "offsets reversed": (field("data_offsets", [9, 3]), CheckpointError, "expected \\[start, end\\]"),
    "negative offset": (field("data_offsets", [-8, 8]), CheckpointError, "expected \\[start, end\\]"),
    "offsets beyond 64 bits": (
        field("data_offsets", [0, 1 << 70]),
        CheckpointError,
        "expected \\[start, end\\]",
    ),
    "offsets and shape disagree": (shifted(0, 8), CheckpointError, "its data_offsets hold"),
    "overlap": (shifted(8, 8), CheckpointError, "overlaps|hole"),
    "tensor beyond the file": (shifted(1 << 40, 1 << 40), CheckpointError, "truncated"),
    "wrong dtype of the same size": (field("dtype", "I16"), CheckpointError, "is I16, expected"),
    "tensor missing": (header(lambda e, n: e.update({"other": e.pop(n)})), CheckpointError, "index"),
    "index not JSON": (text(INDEX_NAME, "{"), CheckpointError, "not valid JSON"),
    "index a list": (text(INDEX_NAME, "[]"), CheckpointError, "weight_map is missing"),
    "index without a map": (text(INDEX_NAME, "{}"), CheckpointError, "weight_map is missing"),
    "index to a number": (mapped_to(7), CheckpointError, "expected a .safetensors file name"),
    "index to another kind of file": (mapped_to("config.json"), CheckpointError, "expected a .safetensors"),
    "index to a parent": (mapped_to("../x.safetensors"), CheckpointError, "points outside"),
    "index to a parent in disguise": (mapped_to("a/../../x.safetensors"), CheckpointError, "points outside"),
    "index to an absolute path": (mapped_to("/etc/x.safetensors"), CheckpointError, "points outside"),
    "index to a path with NUL": (mapped_to("a\0.safetensors"), CheckpointError, "points outside"),
    "index to a Windows path": (mapped_to("..\\x.safetensors"), CheckpointError, "points outside"),
    "index to the wrong shard": (mapped_to(SHARD), CheckpointError, "index says"),
    "index to a missing shard": (mapped_to("a.safetensors"), CheckpointError, "no such file"),
    "index with one name more": (
        index(lambda c: c["weight_map"].update(extra=SHARD)),
        CheckpointError,
        "does not hold it",
    ),
    "index with one name less": (
        index(lambda c: c["weight_map"].pop("lm_head.weight")),
        CheckpointError,
        "nothing",
    ),
    "shard missing": (gone(SHARD), CheckpointError, "no such file"),
    "shard a folder": (folder_in_place_of_a_shard, CheckpointError, "cannot be read"),
    "link out of the folder": (linked("../elsewhere.safetensors"), CheckpointError, "outside the folder"),
    "link in a circle": (linked(SHARD), CheckpointError, "no such file"),
    "no weights at all": (without_weights, CheckpointError, "no safetensors files"),
    "no config": (gone("config.json"), ConfigError, "no config.json"),
    "config not JSON": (text("config.json", "{"), ConfigError, "not readable"),
    "config of another model": (config(model_type="llama"), ConfigError, "'llama'"),
    "config with more layers": (config(num_hidden_layers=4, layer_types=None), CheckpointError, "is missing"),
    "config with fewer experts": (config(num_local_experts=8), CheckpointError, "has shape"),
    "unknown quant method": (config(quantization_config={"quant_method": "gptq"}), ConfigError, "'gptq'"),
    "no rope": (config(rope_scaling="absent", rope_parameters="absent"), ConfigError, "rope"),
    "NaN in a matrix": (poison("lm_head.weight", "<u2"), CheckpointError, "NaN"),
    "no tokenizer": (gone("tokenizer.json"), ConversionError, "no tokenizer.json"),
    "broken tokenizer": (text("tokenizer.json", "{}"), ConversionError, "added_tokens"),
    "broken generation config": (text("generation_config.json", "{"), ConfigError, "not readable"),
    "generation config a list": (text("generation_config.json", "[]"), ConfigError, "expected a JSON object"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_source_is_one_clear_error_and_nothing_is_written(
    folder: Path, tmp_path: Path, case: str
) -> None:
    damage, kind, told = CASES[case]
    damage(folder)
    with pytest.raises(kind, match=told) as error:
        convert(folder, tmp_path / "made")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "LICENSE"])
def test_a_file_that_grew_without_bound_is_refused_before_it_is_read(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (folder / name).touch()
    os.truncate(folder / name, 1 << 40)
    with pytest.raises(GptOssError, match=f"{name}.*(larger|not readable)"):
        convert(folder, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_pipes_in_place_of_files_are_refused_at_once(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(ConversionError, match=r"manifest\.json: cannot be read"):
        read_manifest(tmp_path)
    os.mkfifo(tmp_path / "text.txt")
    with pytest.raises(ConversionError, match=r"text\.txt: cannot be read"):
        compare_on_text(folder, folder, text_file=tmp_path / "text.txt")


def test_there_are_at_least_forty_cases() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("layout", ["hf", "original", "mlx", "gguf"])
@pytest.mark.parametrize("part", ["scales", "blocks"])
def test_a_nan_among_the_scales_of_experts_is_found_in_every_layout(
    tmp_path: Path, layout: str, part: str
) -> None:
    folder = write_byte_tokenizer(tmp_path / "source")
    if layout == "gguf":
        from gguf import GGUFReader

        path = write_gguf(folder / "tiny.gguf", SHAPE)
        tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.ffn_up_exps.weight")
        name, at = tensor.name, int(tensor.data_offset) + (17 if part == "scales" else 1)
    else:
        recipe = MlxRecipe(dense_bits=None) if layout == "mlx" else None
        write_checkpoint(folder, SHAPE, layout=layout, recipe=recipe)
        ends = {
            "hf": ("gate_up_proj_scales", "gate_up_proj_blocks"),
            "original": ("mlp1_weight.scales", "mlp1_weight.blocks"),
            "mlx": ("up_proj.scales", "up_proj.weight"),
        }[layout]
        tensors = read_folder(folder)
        name = next(n for n in tensors if n.endswith(ends[part == "blocks"]))
        path, at = tensors[name].path, tensors[name].start + 7
    with open(path, "r+b") as stream:
        stream.seek(at)
        stream.write(b"\xff")
    if part == "blocks":  # any byte is two numbers there
        assert convert(folder, tmp_path / "made").folder.is_dir()
        return
    with pytest.raises(CheckpointError, match=f"{name}: holds NaN") as error:
        convert(folder, tmp_path / "made")
    assert "\n" not in str(error.value) and not (tmp_path / "made").exists()


@pytest.mark.parametrize("value", [b"\xc0\x7f", b"\x80\xff"])
@pytest.mark.parametrize("name", ["self_attn.sinks", "mlp.router.bias", "mlp.experts.down_proj_bias"])
def test_a_nan_or_infinity_in_a_tensor_that_is_only_copied_is_found(
    folder: Path, tmp_path: Path, name: str, value: bytes
) -> None:
    info = read_folder(folder)[f"model.layers.1.{name}"]
    with open(info.path, "r+b") as stream:
        stream.seek(info.end - 2)
        stream.write(value)
    with pytest.raises(CheckpointError, match=f"{info.name}: holds NaN or infinity"):
        convert(folder, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("fast", [False, True])
def test_infinity_is_found_by_either_quantiser(folder: Path, tmp_path: Path, fast: bool) -> None:
    info = read_folder(folder)["model.layers.1.self_attn.k_proj.weight"]
    with open(info.path, "r+b") as stream:
        stream.seek(info.end - 2)
        stream.write(b"\x80\x7f")
    with pytest.raises(CheckpointError, match="k_proj.weight: holds NaN or infinity"):
        convert(folder, tmp_path / "made", fast=fast)


def test_a_folder_of_the_hubs_cache_is_read_through_its_links(folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--someone--tiny"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repo / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    made = convert(snapshot, tmp_path / "made")
    assert made.manifest.source.revision == "0" * 40
    assert all(entry.sha256 for entry in made.manifest.source.files.values())


def test_experts_that_were_requantised_are_refused(tmp_path: Path) -> None:
    recipe = MlxRecipe(expert_bits=4)
    shape = Shape(vocab=320)
    source = write_byte_tokenizer(write_checkpoint(tmp_path / "mlx", shape, layout="mlx", recipe=recipe))
    with pytest.raises(ConversionError, match="requantised to 4-bit affine"):
        convert(source, tmp_path / "made")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut("tiny.gguf", 3), "not readable as GGUF"),
        (cut("tiny.gguf", 200), "not readable as GGUF"),
        (lambda f: cut("tiny.gguf", (f / "tiny.gguf").stat().st_size - 99)(f), "GGUF|truncated"),
        (text("tiny.gguf", b"no such thing" * 9), "not readable as GGUF"),
        (lambda f: shutil.copy(f / "tiny.gguf", f / "other.gguf"), "holds 2 models .* name the file"),
        (lambda f: named(f, "a-00001-of-00002", "a-00002-of-00002"), "is in two files"),
        (lambda f: named(f, "a-00001-of-00003"), "without a-00002-of-00003.gguf, a-00003-of-00003.gguf;"),
        (lambda f: named(f, "a-00002-of-00002"), "is one of 2 parts, without a-00001-of-00002.gguf;"),
        (lambda f: named(f, "a-00004-of-00002"), "is one of 2 parts, without a-00001-of-00002.gguf,"),
        (lambda f: named(f, "a-00001-of-00000"), "is one of 0 parts, without a part of that number"),
        (lambda f: named(f, "a-00001-of-99999"), r"a-00011-of-99999.gguf \.\.;"),
        (lambda f: named(f, "a-00001-of-00001", "a-00001-of-00002"), "holds 2 models"),
        (lambda f: write_gguf(f / "tiny.gguf", Shape(vocab=320, layers=1)), None),
    ],
)
def test_broken_gguf_files_are_one_clear_error(tmp_path: Path, damage: Damage, told: str) -> None:
    folder = write_byte_tokenizer(tmp_path / "gguf")
    write_gguf(folder / "tiny.gguf", SHAPE)
    damage(folder)
    if told is None:
        assert convert(folder, tmp_path / "made").manifest.source.kind == "gguf"
        return
    with pytest.raises(CheckpointError, match=told):
        convert(folder, tmp_path / "made")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "q4"}, "'q4' does not exist"),
        ({"head": 7}, "head at 7 bits"),
        ({"embedding": 0}, "embedding at 0 bits"),
        ({"group_size": 48}, "group size 48"),
    ],
)
def test_impossible_recipes_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConversionError, match=told):
        make_recipe(**options)


def test_an_impossible_shard_size_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="shard size 0"):
        convert(folder, tmp_path / "made", shard_size=0)


def test_a_mutated_header_is_read_right_or_refused(whole: Path, tmp_path: Path) -> None:
    """Bytes of a true header changed, removed or doubled: a typed error, or tensors inside the file."""
    original = (whole / SHARD).read_bytes()
    length = int.from_bytes(original[:8], "little")
    chance = random.Random(0)
    path = tmp_path / "mutated.safetensors"
    refused = 0
    for _ in range(500):
        text = bytearray(original[: 8 + length])
        for _ in range(chance.choice([1, 1, 2, 5])):
            at = chance.randrange(len(text)) if chance.random() < 0.9 else chance.randrange(8)
            action = chance.random()
            if action < 0.5:
                text[at] = chance.choice(b'0123456789[]{}",:-.eE \x00\xff')
            elif action < 0.75:
                del text[at : at + chance.randrange(1, 40)]
            else:
                text[at:at] = text[at : at + chance.randrange(1, 200)]
        if chance.random() < 0.5:  # let the length be true, so that the JSON is reached
            text[:8] = max(0, len(text) - 8).to_bytes(8, "little")
        path.write_bytes(bytes(text) + original[8 + length :])
        try:
            tensors = read_header(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        for info in tensors.values():
            if info.shape:
                assert read_rows(info).nbytes == info.nbytes
    assert refused > 300


def test_mutated_numbers_never_pass_unnoticed_into_a_conversion(whole: Path, tmp_path: Path) -> None:
    """Every number of a header replaced: the checkpoint is refused before anything is written."""
    original = (whole / SHARD).read_bytes()
    length = int.from_bytes(original[:8], "little")
    entries = json.loads(original[8 : 8 + length])
    chance = random.Random(1)
    folder = shutil.copytree(whole, tmp_path / "source")
    names = [name for name in entries if name != "__metadata__"]
    for _ in range(40):
        name, key = chance.choice(names), chance.choice(["shape", "data_offsets"])
        changed = json.loads(json.dumps(entries))
        values = changed[name][key]
        at = chance.randrange(len(values))
        values[at] = chance.choice(
            [values[at] + 1, values[at] * 2 + 1, -values[at] - 1, 0.5, None, "1", 2**64]
        )
        write_raw(folder / SHARD, json.dumps(changed).encode(), original[8 + length :])
        with pytest.raises(CheckpointError):
            convert(folder, tmp_path / "made")
    assert not (tmp_path / "made").exists() and not (tmp_path / "made.partial").exists()
