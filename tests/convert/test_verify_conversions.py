"""What the converter makes verifies against what it was made from, whatever the layout and the recipe."""

from pathlib import Path

import pytest

from mlx_gptoss import cli
from mlx_gptoss.checkpoint.safetensors import read_header
from mlx_gptoss.convert import quality
from mlx_gptoss.convert.convert import convert
from mlx_gptoss.convert.manifest import read_manifest
from mlx_gptoss.convert.quality import compare
from mlx_gptoss.convert.recipes import make_recipe
from mlx_gptoss.convert.verify import PartReport, Verification, verify
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.gguf_checkpoint import write_gguf
from tests.support.random_weights import MlxRecipe, Shape

LAYOUTS = ("hf", "original", "bf16", "mlx")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    made = {}
    for layout in LAYOUTS:
        made[layout] = write_checkpoint(root / layout, layout=layout, recipe=MlxRecipe(dense_bits=8))
        write_byte_tokenizer(made[layout])
    return made


def part(found: Verification, name: str) -> PartReport:
    return next(p for p in found.parts if p.part == name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ["mxfp4-q4", "mxfp4-q8", "mxfp4"])
def test_a_conversion_verifies_against_its_source(
    sources: dict[str, Path], tmp_path: Path, layout: str, recipe: str
) -> None:
    made = convert(sources[layout], tmp_path / "made", make_recipe(recipe))
    found = verify(made.folder, sources[layout])
    found.check()
    assert part(found, "experts").measured == 0.0
    for p in found.parts:
        assert p.measured == pytest.approx(p.recorded, rel=1e-3)
    if recipe != "mxfp4" and layout != "mlx":
        assert 0 < (part(found, "attention").measured or 0) < (0.15 if recipe == "mxfp4-q4" else 0.01)
    if recipe == "mxfp4" and layout != "bf16":
        assert found.copies == len(found.manifest.tensors)


@pytest.mark.parametrize("q8", [False, True])
def test_a_gguf_file_is_a_source_like_any_other(tmp_path: Path, q8: bool) -> None:
    source = write_gguf(tmp_path / "model.gguf", Shape(), q8=q8)
    made = convert(source, tmp_path / "made", need_tokenizer=False)
    found = verify(made.folder, source)
    found.check()
    assert part(found, "experts").measured == 0.0 and (part(found, "head").measured or 0) > 0


def test_a_fast_conversion_verifies_and_gets_its_file_hashes(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    made = convert(sources["hf"], tmp_path / "made", fast=True)
    assert any(entry.sha256 is None for entry in read_manifest(made.folder).files.values())
    verify(made.folder, sources["hf"]).check()
    assert all(entry.sha256 is not None for entry in read_manifest(made.folder).files.values())


def test_an_error_that_the_manifest_understates_is_found(sources: dict[str, Path], tmp_path: Path) -> None:
    made = convert(sources["hf"], tmp_path / "made")
    text = (made.folder / "manifest.json").read_text()
    name = "lm_head.weight"
    entry = made.manifest.tensors[name]
    (made.folder / "manifest.json").write_text(text.replace(str(entry.relative_error), "0.001"))
    told = [str(p) for p in verify(made.folder, sources["hf"]).problems]
    assert len(told) == 1 and told[0].startswith(f"{name}: its error against the source is")


def test_the_source_of_another_conversion_is_told(sources: dict[str, Path], tmp_path: Path) -> None:
    made = convert(sources["hf"], tmp_path / "made")
    other = write_checkpoint(tmp_path / "other", seed=7)
    told = [str(p) for p in verify(made.folder, other).problems]
    assert any("experts.gate_up_proj_blocks: its bytes are not" in text for text in told)
    assert any("lm_head.weight: its error against the source is" in text for text in told)


def test_a_change_that_the_manifest_was_made_to_hide_is_found_in_the_source(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """A tensor and its hashes changed together agree with each other, but not with the source."""
    from tests.support.converted import sha256

    made = convert(sources["hf"], tmp_path / "made")
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    weights = made.folder / "model.safetensors"
    info = read_header(weights)[name]
    before = weights.read_bytes()
    data = bytearray(before)
    data[info.start + 3] ^= 0x11
    weights.write_bytes(data)
    text = (made.folder / "manifest.json").read_text()
    for old, new in (
        (before, bytes(data)),
        (before[info.start : info.end], bytes(data[info.start : info.end])),
    ):
        text = text.replace(sha256(old), sha256(new))
    (made.folder / "manifest.json").write_text(text)
    assert verify(made.folder).ok
    assert [str(p) for p in verify(made.folder, sources["hf"]).problems] == [
        f"{name}: its bytes are not the source's"
    ]


def test_the_lossless_recipe_predicts_what_the_source_predicts(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    tokens = list(b"Alice was beginning to get very tired of sitting by her sister on the bank")
    found = {}
    for recipe in ("mxfp4", "mxfp4-q8", "mxfp4-q4"):
        made = convert(sources["hf"], tmp_path / recipe, make_recipe(recipe))
        found[recipe] = compare(made.folder, sources["hf"], tokens)
    assert found["mxfp4"].kl == 0.0 and found["mxfp4"].top1 == 1.0
    assert 0 < found["mxfp4-q8"].kl < found["mxfp4-q4"].kl


def test_convert_verify_share_as_a_person_does(
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = quality.default_text()[:200]  # the whole page is 4,000 of these tokens, one a byte
    monkeypatch.setattr(quality, "default_text", lambda: start)
    source, folder = str(sources["hf"]), str(tmp_path / "made")
    convert(source, folder)
    assert cli.run(["verify", folder, "--source", source, "--quality"]) == 0
    assert "KL divergence" in capsys.readouterr().out
    arguments = ["share", folder, "someone/tiny", "--dry-run", "--license", "apache-2.0"]
    assert cli.run(arguments) == 0
    card = capsys.readouterr().out
    assert "## Quality" in card and "Alice's Adventures in Wonderland" in card
