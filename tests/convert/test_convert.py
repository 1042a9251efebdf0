"""Conversions: every layout comes to the same weights, experts bit for bit, readable here and by mlx-lm."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss import cli
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.checkpoint.safetensors import (
    INDEX_NAME,
    bfloat16_to_float32,
    read_bytes,
    read_folder,
    read_rows,
)
from mlx_gptoss.cli.convert import default_name
from mlx_gptoss.convert import affine, mxfp4
from mlx_gptoss.convert.convert import Converted, Progress, convert
from mlx_gptoss.convert.manifest import read_manifest
from mlx_gptoss.convert.recipes import RECIPES, make_recipe
from mlx_gptoss.convert.verify import bytes_to_read, verify
from mlx_gptoss.errors import ConversionError
from mlx_gptoss.model.quantization import Quantization
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.gguf_checkpoint import write_gguf
from tests.support.random_weights import MlxRecipe, Shape

SHAPE = Shape(vocab=320)
LAYOUTS = ("hf", "original", "bf16", "mlx", "gguf")


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint in every layout, with a tokenizer. Do not change the files."""
    root = tmp_path_factory.mktemp("layouts")
    for layout in ("hf", "original", "bf16", "mlx"):
        recipe = MlxRecipe(dense_bits=None) if layout == "mlx" else None
        write_byte_tokenizer(write_checkpoint(root / layout, SHAPE, layout=layout, recipe=recipe))
    write_gguf(write_byte_tokenizer(root / "gguf") / "tiny.gguf", SHAPE)
    return {layout: root / layout for layout in LAYOUTS}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: read_bytes(info).tobytes() for name, info in read_folder(folder).items()}


@pytest.fixture
def without_compiler() -> Iterator[None]:
    """mlx-lm compiles functions, which on the CPU calls a C++ compiler for seconds."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def dequantised(folder: Path, path: str, bits: int, group: int) -> np.ndarray:
    weight, scales, biases = (
        read_rows(read_folder(folder)[f"{path}.{s}"]) for s in ("weight", "scales", "biases")
    )
    return affine.dequantize(weight, scales, biases, bits, group)


def error_of(made: Converted, name: str) -> float:
    error = made.manifest.tensors[name].relative_error
    assert error is not None
    return error


def packing_of(folder: Path, path: str) -> Quantization:
    packing = Checkpoint(folder).quantization_of(path)
    assert packing is not None
    return packing


# --- round trips


def test_the_lossless_recipe_keeps_every_byte(layouts: dict[str, Path], tmp_path: Path) -> None:
    made = convert(layouts["hf"], tmp_path / "made", make_recipe("mxfp4"))
    assert weights(made.folder) == weights(layouts["hf"])
    assert {entry.action for entry in made.manifest.tensors.values()} == {"copy"}


def test_a_lossless_result_converts_to_itself(layouts: dict[str, Path], tmp_path: Path) -> None:
    once = convert(layouts["hf"], tmp_path / "once", make_recipe("mxfp4"))
    twice = convert(once.folder, tmp_path / "twice", make_recipe("mxfp4"))
    assert files(once.folder)["model.safetensors"] == files(twice.folder)["model.safetensors"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", ["original", "mlx", "gguf"])
def test_every_layout_of_mxfp4_comes_to_the_same_bytes(
    layouts: dict[str, Path], tmp_path: Path, layout: str, recipe: str
) -> None:
    expected = convert(layouts["hf"], tmp_path / "hf", make_recipe(recipe))
    found = convert(layouts[layout], tmp_path / "other", make_recipe(recipe))
    assert weights(found.folder) == weights(expected.folder)


def test_what_a_config_says_beyond_the_model_is_kept_and_openais_own_is_translated(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(layouts["hf"], tmp_path / "source"))
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"made_by": "somebody"}))
    made = json.loads((convert(source, tmp_path / "a").folder / "config.json").read_text())
    assert made["made_by"] == "somebody" and made["model_type"] == "gpt_oss"
    own = json.loads((convert(layouts["original"], tmp_path / "b").folder / "config.json").read_text())
    assert own["model_type"] == "gpt_oss" and own["num_hidden_layers"] == made["num_hidden_layers"]


def test_a_bf16_fine_tune_with_mxfp4_values_loses_nothing(layouts: dict[str, Path], tmp_path: Path) -> None:
    made = convert(layouts["bf16"], tmp_path / "made", make_recipe("mxfp4"))
    found, source = read_folder(made.folder), read_folder(layouts["bf16"])
    for which in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{which}"
        values = mxfp4.dequantize(read_rows(found[name + "_blocks"]), read_rows(found[name + "_scales"]))
        assert (values == bfloat16_to_float32(read_rows(source[name])).swapaxes(1, 2)).all()
        assert made.manifest.tensors[name + "_blocks"].relative_error == 0


def expert_values(folder: Path) -> dict[str, np.ndarray]:
    """What the experts of a converted folder stand for."""
    found = read_folder(folder)
    names = [name.removesuffix("_blocks") for name in found if name.endswith("_blocks")]
    parts = {n: [read_rows(found[f"{n}_{part}"]) for part in ("blocks", "scales")] for n in names}
    return {name: mxfp4.dequantize(*both) for name, both in parts.items()}


def assert_same_experts(made: Converted, expected: Converted, source: Path) -> None:
    found, wanted = expert_values(made.folder), expert_values(expected.folder)
    assert found.keys() == wanted.keys() and len(found) == 2 * SHAPE.layers
    assert all((found[name] == wanted[name]).all() for name in wanted)
    experts = [e for name, e in made.manifest.tensors.items() if name.endswith("_blocks")]
    assert {(entry.action, entry.relative_error) for entry in experts} == {("mxfp4", 0.0)}
    verify(made.folder, source).check()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_gguf_experts_that_are_floats_are_quantised_and_lose_nothing(
    layouts: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize, quantize

    reader, float_type = GGUFReader(layouts["gguf"] / "tiny.gguf"), GGMLQuantizationType[kind]
    tensors = []
    for t in reader.tensors:
        if t.tensor_type.name == "MXFP4":
            tensors.append((t.name, quantize(dequantize(t.data, t.tensor_type), float_type), float_type))
        else:
            tensors.append((t.name, t.data, t.tensor_type))
    source = rewrite_gguf(reader, tmp_path / "float.gguf", tensors)
    made = convert(source, tmp_path / "made", make_recipe("mxfp4"), need_tokenizer=False)
    assert_same_experts(made, convert(layouts["hf"], tmp_path / "hf", make_recipe("mxfp4")), source)


def test_gguf_experts_of_fewer_bits_are_still_refused(layouts: dict[str, Path], tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize, quantize

    reader, q8 = GGUFReader(layouts["gguf"] / "tiny.gguf"), GGMLQuantizationType.Q8_0
    tensors = [
        (t.name, quantize(dequantize(t.data, t.tensor_type), q8), q8)
        if t.name.endswith("ffn_up_exps.weight")
        else (t.name, t.data, t.tensor_type)
        for t in reader.tensors
    ]
    source = rewrite_gguf(reader, tmp_path / "q8.gguf", tensors)
    with pytest.raises(ConversionError, match="ffn_up_exps.weight is Q8_0, expected MXFP4 or floats"):
        convert(source, tmp_path / "made", need_tokenizer=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dense_experts_of_an_mlx_conversion_are_quantised_and_lose_nothing(
    layouts: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    source = shutil.copytree(layouts["mlx"], tmp_path / "dense")
    packed: Any = mx.load(str(source / "model.safetensors"))
    dense = {}
    for name, values in packed.items():
        path, _, last = name.rpartition(".")
        if ".experts." not in name or last == "bias":
            dense[name] = values
        elif last == "weight":
            scales = packed[f"{path}.scales"]
            whole = mx.dequantize(values, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
            dense[name] = whole.astype(getattr(mx, dtype))
    mx.save_safetensors(str(source / "model.safetensors"), dense, {"format": "mlx"})
    config = json.loads((source / "config.json").read_text())
    plain = {key: value for key, value in config.items() if not key.startswith("quantization")}
    (source / "config.json").write_text(json.dumps(plain))
    made = convert(source, tmp_path / "made", make_recipe("mxfp4"))
    assert_same_experts(made, convert(layouts["hf"], tmp_path / "hf", make_recipe("mxfp4")), source)


def test_the_exponent_search_lowers_the_error_of_other_experts(tmp_path: Path) -> None:
    folder = write_byte_tokenizer(write_checkpoint(tmp_path / "bf16", SHAPE, layout="bf16"))
    info = read_folder(folder)["model.layers.0.mlp.experts.down_proj"]
    random = np.random.default_rng(0).standard_normal(info.nbytes // 2).astype(np.float32)
    with open(info.path, "r+b") as stream:
        stream.seek(info.start)
        stream.write(affine.to_bfloat16(random).tobytes())
    plain = convert(folder, tmp_path / "plain", make_recipe("mxfp4"))
    searched = convert(folder, tmp_path / "searched", make_recipe("mxfp4"), mxfp4_search=True)
    name = f"{info.name}_blocks"
    errors = [error_of(made, name) for made in (plain, searched)]
    assert 0.1 < errors[1] < errors[0] < 0.13
    assert searched.manifest.tensors[name].action == "mxfp4-search"


def test_a_quantised_mlx_conversion_is_requantised_outside_the_experts(tmp_path: Path) -> None:
    source = write_byte_tokenizer(write_checkpoint(tmp_path / "mlx", SHAPE, layout="mlx"))  # 8 bits
    made = convert(source, tmp_path / "q4", make_recipe("mxfp4-q4"))
    same = convert(source, tmp_path / "q8", make_recipe("mxfp4-q8"))
    name = "model.layers.0.self_attn.q_proj"
    assert made.manifest.tensors[f"{name}.weight"].action == "affine-search"
    assert same.manifest.tensors[f"{name}.weight"].action == "copy"
    before, after = dequantised(source, name, 8, 64), dequantised(made.folder, name, 4, 64)
    assert 0.05 < np.linalg.norm(after - before) / np.linalg.norm(before) < 0.1
    assert made.folder.joinpath("config.json").read_text().count('"bits": 8') == SHAPE.layers  # the routers


def test_more_bits_than_the_source_has_are_remarked_upon(tmp_path: Path) -> None:
    source = write_byte_tokenizer(
        write_checkpoint(tmp_path / "mlx", SHAPE, layout="mlx", recipe=MlxRecipe(dense_bits=4))
    )
    made = convert(source, tmp_path / "q8", make_recipe("mxfp4-q8"))
    parts = [note.split(" was quantised to 4 bits before")[0] for note in made.notes]
    assert sorted(parts) == ["attention", "embedding", "head"]


def test_published_gguf_files_with_q8_parts_are_read(tmp_path: Path) -> None:
    folder = write_byte_tokenizer(tmp_path / "gguf")
    write_gguf(folder / "tiny.gguf", SHAPE, q8=True)
    hf = write_byte_tokenizer(write_checkpoint(tmp_path / "hf", SHAPE))
    made = convert(folder / "tiny.gguf", tmp_path / "made", make_recipe("mxfp4"))
    found, expected = read_folder(made.folder), read_folder(hf)
    for name in ("lm_head.weight", "model.layers.1.self_attn.o_proj.weight"):
        values, truth = (bfloat16_to_float32(read_rows(t[name])) for t in (found, expected))
        assert 0.001 < np.linalg.norm(values - truth) / np.linalg.norm(truth) < 0.01
    experts = [name for name in expected if "_blocks" in name or "_scales" in name]
    assert all((read_bytes(found[n]) == read_bytes(expected[n])).all() for n in experts)


def split_gguf(path: Path, parts: int) -> list[Path]:
    """The file as `parts` files named as llama.cpp does, the header's fields in the first."""
    from gguf import GGUFReader

    reader, made = GGUFReader(path), []
    for number in range(parts):
        made.append(path.with_name(f"{path.stem}-{number + 1:05d}-of-{parts:05d}.gguf"))
        tensors = [(t.name, t.data, t.tensor_type) for t in reader.tensors[number::parts]]
        rewrite_gguf(reader, made[-1], tensors, fields=number == 0)
    path.unlink()
    return made


def rewrite_gguf(
    reader: Any, path: Path, tensors: list[tuple[str, Any, Any]], *, fields: bool = True
) -> Path:
    """Other tensors (name, data, type) under the header of a file that is open, or under none."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "gpt-oss")
    for name, field in reader.fields.items():
        if fields and not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("named", ["first part", "last part", "folder"])
def test_a_split_gguf_is_one_model_whichever_part_is_named(
    layouts: dict[str, Path], tmp_path: Path, named: str
) -> None:
    folder = write_byte_tokenizer(tmp_path / "gguf")
    parts = split_gguf(write_gguf(folder / "tiny.gguf", SHAPE), 3)
    (folder / "._tiny-00001-of-00003.gguf").write_bytes(b"left by a Mac")
    if named != "folder":
        write_gguf(folder / "other.gguf", SHAPE, seed=1)
    source = {"first part": parts[0], "last part": parts[-1], "folder": folder}[named]
    made = convert(source, tmp_path / "made")
    expected = convert(layouts["gguf"], tmp_path / "expected")
    assert weights(made.folder) == weights(expected.folder)
    assert list(made.manifest.source.files) == [part.name for part in parts]
    size = sum(part.stat().st_size for part in parts)
    assert bytes_to_read(made.manifest, source) == bytes_to_read(made.manifest) + size
    verify(made.folder, source).check()


def test_a_folder_of_gguf_may_have_a_config(layouts: dict[str, Path], tmp_path: Path) -> None:
    folder = write_byte_tokenizer(tmp_path / "gguf")
    write_gguf(folder / "tiny.gguf", SHAPE)
    shutil.copy(layouts["hf"] / "config.json", folder)
    made = convert(folder, tmp_path / "made")
    assert made.manifest.source.kind == "gguf"
    verify(made.folder, folder).check()
    assert cli.run(["verify", str(made.folder), "--source", str(folder)]) == 0


def test_safetensors_beside_a_gguf_file_are_what_is_converted(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_byte_tokenizer(write_checkpoint(tmp_path / "both", SHAPE))
    (folder / "tiny.gguf").write_bytes(b"not looked at")
    assert convert(folder, tmp_path / "made").manifest.source.kind == "hf-mxfp4"


def test_what_a_mac_leaves_beside_files_is_not_taken_for_weights(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_byte_tokenizer(write_checkpoint(tmp_path / "hf", SHAPE, shards=1))
    (folder / "._model.safetensors").write_bytes(b"left by a Mac")
    made = convert(folder, tmp_path / "made", make_recipe("mxfp4"))
    assert weights(made.folder) == weights(layouts["hf"])
    for name in ("._model.safetensors", ".DS_Store"):
        (made.folder / name).write_bytes(b"left by a Mac")
    found = verify(made.folder, folder)
    found.check()
    assert found.extra == ()


def test_float32_parts_are_stored_as_bfloat16_with_their_error(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    made = convert(layouts["gguf"], tmp_path / "made", make_recipe("mxfp4"))
    # Norms and biases of the generator are bfloat16 values: widened in GGUF, nothing is lost on the way back.
    assert made.manifest.tensors["model.norm.weight"].action == "relayout"
    assert {e.relative_error for e in made.manifest.tensors.values() if e.relative_error is not None} == {0.0}


# --- what comes out


def test_expert_bytes_are_verbatim_in_the_default_recipe(layouts: dict[str, Path], tmp_path: Path) -> None:
    made = convert(layouts["hf"], tmp_path / "made")
    source, found = weights(layouts["hf"]), weights(made.folder)
    experts = [name for name in source if ".experts." in name]
    assert len(experts) == 6 * SHAPE.layers and all(found[name] == source[name] for name in experts)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "mxfp4-q4"),
        ({"head": 4, "group_size": 64}, "mxfp4-q4"),
        (
            {"head": 8, "attention": 16, "embedding": 4, "group_size": 32},
            "mxfp4-q4, head 8, attention bf16, group 32",
        ),
        ({"name": "mxfp4", "attention": 16, "embedding": 6}, "mxfp4, embedding 6"),
    ],
)
def test_a_recipe_with_replaced_values_says_so(options: dict[str, Any], name: str) -> None:
    recipe = make_recipe(**options)
    assert recipe.name == name
    assert (recipe in RECIPES.values()) == ("," not in name)
    assert ("groups of 32" in recipe.summary) == (recipe.group_size == 32)
    assert ("head in 8 bits" in recipe.summary) == (recipe.head == 8)


@pytest.mark.parametrize("recipe", RECIPES)
def test_results_load_here(layouts: dict[str, Path], tmp_path: Path, recipe: str) -> None:
    made = convert(layouts["hf"], tmp_path / "made", make_recipe(recipe))
    assert Checkpoint(made.folder).layout.name == "hf"


def test_parts_can_have_bits_of_their_own(layouts: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe("mxfp4-q4", head=6, attention=8, embedding=16, group_size=32)
    made = convert(layouts["hf"], tmp_path / "made", recipe)
    found = {p: packing_of(made.folder, p) for p in ("lm_head", "model.layers.0.self_attn.k_proj")}
    assert {(q.bits, q.group_size) for q in found.values()} == {(6, 32), (8, 32)}
    assert Checkpoint(made.folder).quantization_of("model.embed_tokens") is None
    packed = {n: (e.bits, e.group_size) for n, e in made.manifest.tensors.items() if e.bits is not None}
    assert packed["lm_head.weight"] == (6, 32)
    assert packed["model.layers.0.mlp.experts.down_proj_blocks"] == (4, 32)
    assert len(packed) == 1 + 6 * SHAPE.layers  # the embedding and the router are kept
    errors = {p: error_of(made, f"{p}.weight") for p in found}
    assert errors["lm_head"] > errors["model.layers.0.self_attn.k_proj"] > 0


def test_mlx_lm_computes_the_same_logits_from_the_lossless_recipe(
    layouts: dict[str, Path], tmp_path: Path, without_compiler: None
) -> None:
    from mlx_lm.utils import load_model

    tokens = mx.array([list(range(7, 27))])

    def logits(folder: Path) -> np.ndarray:
        model, _ = load_model(folder)
        model.set_dtype(mx.float32)
        return np.array(model(tokens))

    expected = logits(layouts["hf"])
    for layout in ("hf", "bf16"):
        made = convert(layouts[layout], tmp_path / layout, make_recipe("mxfp4"))
        assert np.abs(logits(made.folder) - expected).max() < 1e-4


def test_mlx_lm_loads_and_generates_from_the_default_recipe(
    layouts: dict[str, Path], tmp_path: Path, without_compiler: None
) -> None:
    import mlx_lm

    made = convert(layouts["hf"], tmp_path / "made")
    model, tokenizer = mlx_lm.load(str(made.folder))[:2]
    assert model.lm_head.bits == 4 and model.model.layers[0].mlp.experts.up_proj.mode == "mxfp4"
    assert not hasattr(model.model.layers[0].mlp.router, "bits")
    expected = dequantised(made.folder, "lm_head", 4, 64)
    head = model.lm_head
    found = np.array(mx.dequantize(head.weight, head.scales, head.biases, 64, 4).astype(mx.float32))
    assert np.abs(found - expected).max() < 0.01
    assert isinstance(mlx_lm.generate(model, tokenizer, [1, 2, 3], max_tokens=3), str)


def test_rope_is_told_in_the_old_keys_too(tmp_path: Path) -> None:
    source = write_byte_tokenizer(write_checkpoint(tmp_path / "hf", SHAPE, rope_parameters=True))
    config = json.loads((convert(source, tmp_path / "made").folder / "config.json").read_text())
    assert config["rope_theta"] == SHAPE.rope_theta and config["rope_scaling"]["truncate"] is False


def test_shards_have_an_index_and_the_size_that_was_asked_for(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    whole = convert(layouts["hf"], tmp_path / "whole")
    made = convert(layouts["hf"], tmp_path / "made", shard_size=200_000)
    shards = sorted(p.name for p in made.folder.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((made.folder / name).stat().st_size < 210_000 for name in shards)
    assert set(json.loads((made.folder / INDEX_NAME).read_text())["weight_map"].values()) == set(shards)
    assert weights(made.folder) == weights(whole.folder)


def test_the_manifest_tells_every_tensor_and_file(layouts: dict[str, Path], tmp_path: Path) -> None:
    made = convert(layouts["hf"], tmp_path / "made", shard_size=200_000)
    manifest = read_manifest(made.folder)
    assert manifest == made.manifest
    assert manifest.source.kind == "hf-mxfp4" and manifest.recipe["head"] == 4
    assert {name: e.sha256 for name, e in manifest.files.items()} | {"manifest.json": None} == (
        files(made.folder) | {"manifest.json": None}
    )
    for name, data in weights(made.folder).items():
        entry = manifest.tensors[name]
        assert entry.sha256 == hashlib.sha256(data).hexdigest() and entry.bytes == len(data)
    scales = manifest.tensors["lm_head.scales"]
    assert scales.sources == ("lm_head.weight",) and scales.relative_error is None


def test_recorded_errors_are_the_true_ones(layouts: dict[str, Path], tmp_path: Path) -> None:
    made = convert(layouts["hf"], tmp_path / "made")
    source = bfloat16_to_float32(read_rows(read_folder(layouts["hf"])["lm_head.weight"]))
    error = np.linalg.norm(dequantised(made.folder, "lm_head", 4, 64) - source) / np.linalg.norm(source)
    assert made.manifest.tensors["lm_head.weight"].relative_error == pytest.approx(float(error), rel=1e-4)


def test_a_conversion_with_the_search_has_a_fifth_less_error_than_mlx(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    made, fast = (
        convert(layouts["hf"], tmp_path / "made"),
        convert(layouts["hf"], tmp_path / "fast", fast=True),
    )
    entries = made.manifest.tensors
    searched = [name for name, e in entries.items() if e.relative_error and "search" in e.action]
    assert len(searched) == 2 + 4 * SHAPE.layers
    assert {fast.manifest.tensors[name].action for name in searched} == {"affine"}
    errors = [sum(entries[n].bytes * error_of(c, n) ** 2 for n in searched) for c in (made, fast)]
    assert errors[0] < 0.82 * errors[1]


def test_threads_and_order_do_not_change_a_byte(layouts: dict[str, Path], tmp_path: Path) -> None:
    one = convert(layouts["hf"], tmp_path / "one", workers=1)
    many = convert(layouts["hf"], tmp_path / "many", workers=5)
    assert files(one.folder) == files(many.folder)


def test_rows_that_do_not_divide_get_a_smaller_group_or_stay(tmp_path: Path) -> None:
    shape = replace(
        SHAPE, hidden=96, head_dim=24
    )  # 96 = 3 x 32; attention's output has 8 x 24 = 192 = 3 x 64
    source = write_byte_tokenizer(write_checkpoint(tmp_path / "hf", shape))
    made = convert(source, tmp_path / "made")
    assert packing_of(made.folder, "lm_head").group_size == 32
    assert packing_of(made.folder, "model.layers.0.self_attn.o_proj").group_size == 64
    assert "head: 96 columns do not divide into groups of 64, quantised in groups of 32" in made.notes
    narrow = replace(SHAPE, heads=2, kv_heads=1, head_dim=24)  # attention's output has 48 columns
    odd = write_byte_tokenizer(write_checkpoint(tmp_path / "odd", narrow))
    made = convert(odd, tmp_path / "made-odd")
    assert Checkpoint(made.folder).quantization_of("model.layers.0.self_attn.o_proj") is None
    assert any("kept in bfloat16" in note for note in made.notes)


def test_progress_ends_where_it_said_it_would(layouts: dict[str, Path], tmp_path: Path) -> None:
    seen: list[Progress] = []
    convert(layouts["hf"], tmp_path / "made", progress=seen.append)
    assert seen[-1].done == seen[-1].total > 0
    assert all(a.done <= b.done for a, b in itertools.pairwise(seen))


# --- the small files


def test_stop_tokens_are_completed(layouts: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_byte_tokenizer(write_checkpoint(source, SHAPE))
    (source / "generation_config.json").write_text('{"eos_token_id": 319, "do_sample": true}')
    made = convert(source, tmp_path / "made")
    config = json.loads((made.folder / "generation_config.json").read_text())
    tokens = {
        t["content"]: t["id"] for t in json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    }
    wanted = [tokens[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>")]
    assert config == {"do_sample": True, "eos_token_id": [319, *(t for t in wanted if t != 319)]}


def test_tokenizer_files_are_copied_unchanged(layouts: dict[str, Path], tmp_path: Path) -> None:
    made = convert(layouts["hf"], tmp_path / "made")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (made.folder / name).read_bytes() == (layouts["hf"] / name).read_bytes()


def test_the_original_folder_finds_its_tokenizer_above(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model" / "original", SHAPE, layout="original")
    write_byte_tokenizer(tmp_path / "model")
    made = convert(tmp_path / "model" / "original", tmp_path / "made")
    assert (made.folder / "tokenizer.json").is_file()


def test_a_tokenizer_can_come_from_elsewhere_or_be_left_out(
    layouts: dict[str, Path], bare_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match="no tokenizer.json; name a folder"):
        convert(bare_folder, tmp_path / "none")
    with_one = convert(bare_folder, tmp_path / "with", tokenizer=layouts["hf"])
    without = convert(bare_folder, tmp_path / "without", need_tokenizer=False)
    assert (with_one.folder / "tokenizer.json").exists() and not (without.folder / "tokenizer.json").exists()


# --- the command


def test_the_commands_help_tells_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {recipe.summary}." in told for name, recipe in RECIPES.items())


def test_the_command_converts_verifies_and_sums_up(
    layouts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "made")
    assert cli.run(["convert", str(layouts["hf"]), target, "--head", "6", "--fast", "--verify"]) == 0
    told = capsys.readouterr().out
    assert "recipe mxfp4-q4" in told and "experts" in told and "verified:" in told
    assert read_manifest(target).recipe["head"] == 6


def test_the_command_answers_a_mistake_in_one_line(
    layouts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    assert cli.run(["convert", str(layouts["hf"]), str(tmp_path / "full")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("size", "status"), [("0", 1), ("-1", 2), ("many", 2), ("1", 0)])
def test_a_shard_size_that_is_none_is_told_in_one_line(
    layouts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, status: int
) -> None:
    target = tmp_path / "made"
    arguments = ["convert", str(layouts["hf"]), str(target), "--fast", f"--shard-size={size}"]
    assert cli.run(arguments) == status
    told = capsys.readouterr().err
    if status == 0:
        assert len(list(target.glob("*.safetensors"))) > 50
    else:
        assert size in told.splitlines()[-1] and "expected " in told and not target.exists()


def test_the_target_is_named_after_the_source(tmp_path: Path) -> None:
    assert default_name("openai/gpt-oss-20b") == "gpt-oss-20b"
    assert default_name(str(tmp_path / "model.gguf")) == "model"
    assert default_name(str(tmp_path / "model-00001-of-00002.gguf")) == "model"


def test_a_conversion_reports_its_size(layouts: dict[str, Path], tmp_path: Path) -> None:
    made: Converted = convert(layouts["hf"], tmp_path / "made")
    total = sum(p.stat().st_size for p in made.folder.iterdir() if p.name != "manifest.json")
    assert made.nbytes == total
