"""Sharing a converted folder with a stand-in of the Hub, with connections that break, and loading it back."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_gptoss import cli
from mlx_gptoss.checkpoint import hub
from mlx_gptoss.convert.card import model_card
from mlx_gptoss.convert.convert import convert
from mlx_gptoss.convert.manifest import MANIFEST_NAME, Manifest, Quality, SourceEntry, read_manifest
from mlx_gptoss.convert.recipes import make_recipe
from mlx_gptoss.convert.share import plan, upload
from mlx_gptoss.convert.verify import verify
from mlx_gptoss.errors import ConversionError, HubError, VerificationError
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.converted import describe, write_converted
from tests.support.hub_server import HubServer
from tests.support.random_weights import Shape

REPO = "someone/tiny-gpt-oss-mlx"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_converted(tmp_path / "model")
    return tmp_path / "model"


def remote(server: HubServer) -> dict[str, bytes]:
    return {path: blob.data for path, blob in server.repos[REPO].files().items()}


def uploads(server: HubServer) -> list[str]:
    return [path for path in server.paths("PUT") if path.startswith("/lfs/")]


def test_what_is_shared_is_exactly_the_manifests_files_the_manifest_and_the_card(
    server: HubServer, folder: Path
) -> None:
    (folder / "notes.txt").write_text("private")
    made = plan(folder, REPO)
    upload(made)
    expected = {name: (folder / name).read_bytes() for name in (*read_manifest(folder).files, MANIFEST_NAME)}
    assert remote(server) == expected | {"README.md": made.card.encode()}
    assert made.not_sent == ("notes.txt",)


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_is_private_unless_asked(server: HubServer, folder: Path, public: bool) -> None:
    upload(plan(folder, REPO, public=public))
    assert server.repos[REPO].private is not public


def test_what_was_shared_loads_by_its_id_pinned_and_offline(server: HubServer, folder: Path) -> None:
    first = upload(plan(folder, REPO)).rsplit("/", 1)[1]
    newer = folder.with_name("newer")
    write_converted(newer, seed=1)
    upload(plan(newer, REPO))
    for offline in (False, True):
        for revision, origin in ((None, newer), (first, folder)):
            back = hub.resolve(REPO, revision=revision, offline=offline)
            assert verify(back).ok
            weights = "model-00001-of-00002.safetensors"
            assert (back / weights).read_bytes() == (origin / weights).read_bytes()


def test_what_was_shared_generates_what_the_folder_generates(server: HubServer, folder: Path) -> None:
    """Through the engine, by its id, over connections that break; then from the cache, without a network."""
    import mlx_gptoss

    server.cut("/lfs/", after=10_000)
    upload(plan(folder, REPO))
    server.cut("/resolve/", after=10_000, times=2)
    greedy = mlx_gptoss.SamplingParams(temperature=0.0, max_tokens=8)
    replies = []
    for model, offline in ((str(folder), False), (REPO, False), (REPO, True)):
        with mlx_gptoss.load(model, dtype="float32", offline=offline, max_context=64) as llm:
            replies.append(list(llm.generate([1, 2, 3], greedy)))
    assert replies[0] and replies[0] == replies[1] == replies[2]


@pytest.mark.parametrize("multipart", [None, 50_000])
def test_an_upload_survives_connections_that_break(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path, multipart: int | None
) -> None:
    with HubServer(multipart=multipart) as server:
        server.use(monkeypatch, tmp_path / "cache")
        server.cut("/lfs/", after=10_000, times=2)
        upload(plan(folder, REPO))
        assert (
            remote(server)["model-00000-of-00002.safetensors"]
            == (folder / "model-00000-of-00002.safetensors").read_bytes()
        )


def test_an_interrupted_upload_goes_on_without_sending_finished_files_again(
    server: HubServer, folder: Path
) -> None:
    made = plan(folder, REPO)
    broken = made.files["model-00001-of-00002.safetensors"].sha256 or ""
    server.cut(f"/lfs/{broken}", after=1000, times=99)
    with pytest.raises(HubError, match="run the same command again"):
        upload(made)
    assert remote(server) == {}, "nothing is visible before everything is there"
    finished = [path for path in uploads(server) if broken not in path]
    assert finished
    server.faults.clear()
    server.requests.clear()
    upload(plan(folder, REPO))
    assert uploads(server) == [f"/lfs/{broken}"]
    assert verify(hub.resolve(REPO)).ok


def test_a_commit_that_failed_is_repeated_without_the_uploads(server: HubServer, folder: Path) -> None:
    server.fail("/commit/", 503)
    with pytest.raises(HubError, match="answered 503; run the same command again"):
        upload(plan(folder, REPO))
    server.requests.clear()
    upload(plan(folder, REPO))
    assert uploads(server) == [] and len(remote(server)) == len(plan(folder, REPO).files)


def test_sharing_again_sends_no_weights(server: HubServer, folder: Path) -> None:
    first = upload(plan(folder, REPO))
    server.requests.clear()
    assert upload(plan(folder, REPO)) == first
    assert uploads(server) == []


def test_a_dry_run_touches_no_network_and_prints_what_would_be_sent(
    server: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["share", str(folder), REPO, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert server.requests == []
    upload(plan(folder, REPO))
    assert {name: len(data) for name, data in remote(server).items()} == {
        name: entry["size"] for name, entry in told["files"].items()
    }
    assert told["card"].encode() == remote(server)["README.md"]
    assert cli.run(["share", str(folder), REPO, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "nothing was sent" in shown and all(name in shown for name in told["files"])


def test_the_command_uploads_and_prints_the_commit(
    server: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["share", str(folder), REPO, "--public"]) == 0
    assert f"sent: {server.endpoint}/{REPO}/commit/" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["changed byte", "missing file", "foreign weights", "renamed tensor"])
def test_a_folder_that_does_not_verify_is_refused_before_anything_is_sent(
    server: HubServer, folder: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "model-00001-of-00002.safetensors"
    if harm == "changed byte":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif harm == "missing file":
        (folder / "generation_config.json").unlink()
    elif harm == "foreign weights":
        (folder / "adapter.safetensors").write_bytes(weights.read_bytes())
    else:
        manifest = read_manifest(folder)
        renamed = {name.replace("lm_head", "head"): entry for name, entry in manifest.tensors.items()}
        replace(manifest, tensors=renamed).write(folder)
    with pytest.raises(VerificationError, match="does not verify"):
        plan(folder, REPO)
    assert cli.run(["share", str(folder), REPO]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert server.requests == []


def test_an_existing_public_repository_needs_the_word_public(server: HubServer, folder: Path) -> None:
    server.add_repo(REPO, {"README.md": b"mine"})
    with pytest.raises(HubError, match="say --public"):
        upload(plan(folder, REPO))
    assert remote(server) == {"README.md": b"mine"}


def test_a_repository_with_other_weights_is_refused(server: HubServer, folder: Path) -> None:
    server.add_repo(REPO, {"model.safetensors": b"other"})
    with pytest.raises(HubError, match=r"other weights \(model.safetensors\)"):
        upload(plan(folder, REPO, public=True))
    assert uploads(server) == []


@pytest.mark.parametrize(("status", "says"), [(401, "hf auth login"), (403, "permissions")])
def test_a_refused_upload_is_one_clear_line(
    server: HubServer, folder: Path, status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail("/api/", status, headers={"X-Error-Message": "no"}, times=99)
    assert cli.run(["share", str(folder), REPO, "--json"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0]


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "a b/c", "/abs", "../x", "a/"])
def test_an_id_must_be_namespace_slash_name(folder: Path, repo: str) -> None:
    with pytest.raises(ConversionError, match="expected NAMESPACE/NAME"):
        plan(folder, repo)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no manifest.json"):
        plan(tmp_path, REPO)


# ---- the card


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return read_manifest(folder)


def test_the_card_states_base_license_sizes_and_how_to_run(manifest: Manifest) -> None:
    from huggingface_hub import ModelCard

    text = model_card(manifest, REPO)
    data = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    assert data["base_model"] == "openai/gpt-oss-20b" and data["license"] == "apache-2.0"
    assert data["library_name"] == "mlx" and "mlx" in data["tags"]
    assert manifest.source.revision is not None and manifest.source.revision in text
    assert f'mlx_gptoss.load("{REPO}")' in text and f"mlx_lm.generate --model {REPO}" in text
    assert "Quality" not in text
    for part in ("embedding", "attention", "router", "experts", "norms", "head"):
        assert f"| {part} |" in text


def test_the_card_counts_the_weights_in_decimal_gigabytes(manifest: Manifest) -> None:
    tensors = {name: replace(entry, bytes=0) for name, entry in manifest.tensors.items()}
    tensors["lm_head.weight"] = replace(tensors["lm_head.weight"], bytes=1_270_000_000)
    tensors["model.norm.weight"] = replace(tensors["model.norm.weight"], bytes=60_000_000)
    text = model_card(replace(manifest, tensors=tensors), REPO)
    assert "1.33 GB of weights" in text
    sizes = dict(re.findall(r"^\| (\w+) \|.*\| ([\d.]+ \w+) \| [^|]+ \|$", text, re.M))
    assert (sizes["head"], sizes["norms"], sizes["experts"]) == ("1.27 GB", "60.0 MB", "0 bytes")


def test_the_card_prints_recorded_errors_and_quality(manifest: Manifest) -> None:
    name = "lm_head.weight"
    tensors = dict(manifest.tensors)
    tensors[name] = replace(tensors[name], action="affine-search", relative_error=0.0731)
    quality = Quality("a book", 1234, 0.0123, 0.2, 0.971, 3.5, 3.6)
    text = model_card(replace(manifest, tensors=tensors, quality=quality), REPO)
    assert "7.31%" in text and "0.0123 nats" in text and "97.1%" in text and "1,234 tokens of a book" in text


def test_the_card_tells_bits_and_group_of_every_part(tmp_path: Path) -> None:
    source = write_byte_tokenizer(write_checkpoint(tmp_path / "hf", Shape(hidden=96, head_dim=24)))
    recipe = make_recipe("mxfp4-q4", head=8, embedding=16)
    text = model_card(convert(source, tmp_path / "made", recipe).manifest, REPO, license="mit")
    rows = {row[0]: row[1:] for row in re.findall(r"^\| (\w+) \| (.*?) \| (.*?) \| (.*?) \|", text, re.M)}
    assert {part: row[1:] for part, row in rows.items()} == {
        "part": ("bits", "group"),
        "head": ("8", "32"),
        "attention": ("4", "32, 64"),  # 96 columns do not divide by 64, the output's 192 do
        "embedding": ("16", ""),
        "router": ("16", ""),
        "norms": ("16", ""),
        "experts": ("4", "32"),
    }
    assert "recipe `mxfp4-q4, head 8, embedding bf16`" in text


def test_the_card_never_tells_where_a_local_source_lay(manifest: Manifest) -> None:
    local = replace(manifest, source=SourceEntry("hf-bf16", "/home/someone/secret/my-tune"))
    with pytest.raises(ConversionError, match="--license"):
        model_card(local, REPO)
    text = model_card(local, REPO, license="mit")
    assert "secret" not in text and "my-tune" in text and "license: mit" in text


def test_a_base_model_that_is_no_id_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ConversionError, match="expected a Hub id"):
        model_card(manifest, REPO, base_model="nonsense")


def test_describing_a_folder_twice_gives_the_same_manifest(folder: Path) -> None:
    assert describe(folder).to_json() == (folder / MANIFEST_NAME).read_text()
