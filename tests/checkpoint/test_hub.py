"""Resolving a model: demo, folder or Hub id; downloads from a stand-in of the Hub, whole, broken, offline."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_gptoss.checkpoint import hub
from mlx_gptoss.errors import ConfigError, GptOssError, HubError, ModelNotFoundError
from mlx_gptoss.model.config import read_config
from tests.support.checkpoints import hf_config, original_config
from tests.support.hub_server import HubServer
from tests.support.random_weights import Shape

REPO = "someone/tiny-gpt-oss"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
FILES = {
    "config.json": json.dumps(hf_config(Shape())).encode(),
    "generation_config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "LICENSE": b"Apache",
    "README.md": b"# card",
    ".gitattributes": b"*",
    "original/config.json": json.dumps(original_config(Shape())).encode(),
    "original/model.safetensors": b"copy",
    "metal/model.bin": b"copy",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def test_a_hub_id_downloads_only_what_loading_reads(server: HubServer) -> None:
    server.add_repo(REPO, FILES)
    folder = hub.resolve(REPO)
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert present == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
    }
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert not any("metal" in path or "original" in path for path in server.paths("GET"))


@pytest.mark.parametrize(
    ("prefix", "config", "told"),
    [
        ("", {"model_type": "llama"}, "model_type is 'llama'"),
        ("", hf_config(Shape()) | {"hidden_size": "big"}, "hidden_size is 'big'"),
        ("original/", original_config(Shape()) | {"head_dim": 0}, "head_dim is 0"),
    ],
)
@pytest.mark.parametrize("revision", [None, "v2"])
def test_another_models_config_is_all_that_is_downloaded_of_it(
    server: HubServer, prefix: str, config: dict[str, object], told: str, revision: str | None
) -> None:
    files = {prefix + "config.json": json.dumps(config).encode(), prefix + "model.safetensors": WEIGHTS}
    server.add_repo(REPO, files, ref=revision or "main")
    for _ in range(2):
        with pytest.raises(ConfigError, match=told):
            hub.resolve(REPO, revision=revision)
    fetched = [path.split("/resolve/")[1] for path in server.paths("GET") if "/resolve/" in path]
    assert [path.partition("/")[2] for path in fetched] == [prefix + "config.json"]


def test_a_second_resolve_transfers_no_file(server: HubServer) -> None:
    server.add_repo(REPO, FILES)
    first = hub.resolve(REPO)
    server.requests.clear()
    assert hub.resolve(REPO) == first
    assert not any("/resolve/" in request.path for request in server.requests)


def test_a_repository_of_the_original_layout_alone_resolves_to_it(server: HubServer) -> None:
    server.add_repo(REPO, {name: data for name, data in FILES.items() if name.startswith("original/")})
    folder = hub.resolve(REPO)
    assert folder.name == "original"
    assert (folder / "model.safetensors").read_bytes() == b"copy"
    assert hub.resolve(REPO, offline=True) == folder


def test_a_pinned_revision_is_honoured_online_and_offline(server: HubServer) -> None:
    old = server.add_repo(REPO, FILES)
    server.add_repo(REPO, FILES | {"model.safetensors": b"release"}, ref="v2")
    server.add_repo(REPO, FILES | {"model.safetensors": b"newest"})
    for offline in (False, True):
        assert (hub.resolve(REPO, offline=offline) / "model.safetensors").read_bytes() == b"newest"
        assert (
            hub.resolve(REPO, revision="v2", offline=offline) / "model.safetensors"
        ).read_bytes() == b"release"
        assert (
            hub.resolve(REPO, revision=old, offline=offline) / "model.safetensors"
        ).read_bytes() == WEIGHTS


@pytest.mark.parametrize("how", ["argument", "environment", "unreachable", "server down", "token refused"])
def test_a_cached_model_needs_no_network(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from huggingface_hub import constants

    server.add_repo(REPO, FILES)
    folder = hub.resolve(REPO)
    server.requests.clear()
    if how == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif how != "argument":
        server.fail("/api/models", 503 if how == "server down" else 401, times=99)
    assert hub.resolve(REPO, offline=how == "argument") == folder
    if how in ("argument", "environment"):
        assert server.requests == []


def test_an_incomplete_download_does_not_pass_for_a_cached_model(server: HubServer) -> None:
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    shards = {
        "model-1.safetensors": b"one",
        "model-2.safetensors": b"two",
        "model.safetensors.index.json": index,
    }
    server.add_repo(REPO, {"config.json": FILES["config.json"]} | shards)
    folder = hub.resolve(REPO)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="offline was asked for"):
        hub.resolve(REPO, offline=True)
    assert (hub.resolve(REPO) / "model-2.safetensors").read_bytes() == b"two"


def test_a_dropped_connection_resumes_where_it_broke(server: HubServer) -> None:
    server.add_repo(REPO, FILES)
    server.cut("/model.safetensors", after=300_000)
    server.cut("/model.safetensors", after=500_000)
    folder = hub.resolve(REPO)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    gets = [r for r in server.requests if r.method == "GET" and r.path.endswith("/model.safetensors")]
    starts = [int(r.range.removeprefix("bytes=").rstrip("-")) if r.range else 0 for r in gets]
    assert len(gets) == 3 and starts[0] == 0
    assert 290_000 < starts[1] <= 300_000 and 790_000 < starts[2] <= 800_000
    assert sum(request.sent for request in gets) < len(WEIGHTS) + 3 * 4096


def test_a_connection_that_keeps_dropping_is_one_clear_line_and_a_rerun_finishes(server: HubServer) -> None:
    server.add_repo(REPO, FILES)
    server.cut("/model.safetensors", after=0, times=6)
    with pytest.raises(HubError, match="run the same command again") as caught:
        hub.resolve(REPO)
    assert_one_line(caught.value)
    server.requests.clear()
    assert (hub.resolve(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    fetched = [path.rsplit("/", 1)[1] for path in server.paths("GET") if "/resolve/" in path]
    assert fetched[0] == "model.safetensors" and "config.json" not in fetched


@pytest.mark.parametrize(
    ("status", "headers", "kind", "says"),
    [
        (
            404,
            {"X-Error-Code": "RepoNotFound"},
            ModelNotFoundError,
            "no model 'someone/tiny-gpt-oss' on the Hub",
        ),
        (403, {"X-Error-Code": "GatedRepo"}, HubError, "is gated: accept its terms at http"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, HubError, "hf auth login"),
        (403, {}, HubError, "permissions"),
        (429, {}, HubError, "too many requests"),
        (500, {}, HubError, "answered 500"),
    ],
)
def test_a_refusal_tells_its_cure(
    server: HubServer, status: int, headers: dict[str, str], kind: type[GptOssError], says: str
) -> None:
    server.add_repo(REPO, FILES)
    server.fail("/api/models", status, headers=headers, times=99)
    with pytest.raises(kind, match=says) as caught:
        hub.resolve(REPO)
    assert_one_line(caught.value)


def test_unknown_revisions_are_named(server: HubServer) -> None:
    server.add_repo(REPO, FILES)
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'"):
        hub.resolve(REPO, revision="v9")


def test_an_unreachable_hub_is_one_clear_line(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="check the connection to http://127.0.0.1:9") as caught:
        hub.resolve(REPO)
    assert_one_line(caught.value)


def test_a_repository_without_safetensors_says_what_it_has(server: HubServer) -> None:
    server.add_repo(REPO, {"model.gguf": b"GGUF", "README.md": b""})
    with pytest.raises(ModelNotFoundError, match=r"no safetensors weights \(it has .gguf, .md\)"):
        hub.resolve(REPO)


def test_a_single_gguf_file_is_downloaded_where_gguf_will_do(server: HubServer) -> None:
    server.add_repo(REPO, {"model.gguf": b"GGUF", "README.md": b""})
    folder = hub.resolve(REPO, gguf=True)
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]
    assert hub.resolve(REPO, gguf=True, offline=True) == folder
    parts = {f"m-0000{i}-of-00002.gguf": b"GGUF" for i in (1, 2)}
    server.add_repo(REPO, parts, ref="split")
    assert {path.name for path in hub.resolve(REPO, gguf=True, revision="split").iterdir()} == set(parts)
    assert hub.resolve(folder / "model.gguf", gguf=True) == folder / "model.gguf"
    server.add_repo(REPO, {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    with pytest.raises(ModelNotFoundError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\)"):
        hub.resolve(REPO, gguf=True)


def test_a_disk_too_small_is_refused_before_the_first_byte(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo(REPO, FILES)
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(HubError, match="set HF_HOME"):
        hub.resolve(REPO)
    assert not any("/resolve/" in request.path for request in server.requests)


def test_a_disk_that_fills_up_is_one_clear_line(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    server.add_repo(REPO, FILES)
    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(HubError, match="the disk is full") as caught:
        hub.resolve(REPO)
    assert_one_line(caught.value)


def test_a_folder_resolves_to_itself_without_a_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve(tmp_path) == tmp_path


def test_a_folder_that_only_holds_original_resolves_to_it(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == tmp_path / "original"
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "text", ["./nowhere", "/no/such/folder", "~/nothing-here", "nowhere", "a/b/c", "", "a/", "a b/c"]
)
def test_a_mistyped_folder_is_told_without_asking_the_network(server: HubServer, text: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no folder") as caught:
        hub.resolve(text)
    assert_one_line(caught.value)
    assert server.requests == []


def test_a_mistyped_path_that_looks_like_an_id_mentions_the_folder(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no folder of that name in 'models'"):
        hub.resolve("models/gpt-oss-20b")


def test_a_name_longer_than_a_file_name_may_be_is_no_model(server: HubServer) -> None:
    with pytest.raises(ModelNotFoundError, match="a' cannot be read: File name too long"):
        hub.resolve("a" * 300)
    assert server.requests == []


def test_a_folder_that_may_not_be_entered_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **options: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)  # a folder of mode 0 is no obstacle to root
    with pytest.raises(ModelNotFoundError, match="cannot be read: Permission denied") as caught:
        hub.resolve(tmp_path)
    assert_one_line(caught.value)


def test_the_home_of_nobody_is_a_mistyped_folder() -> None:
    with pytest.raises(ModelNotFoundError, match="no folder '~no-such-user/model'"):
        hub.resolve("~no-such-user/model")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelNotFoundError, match="is a file"):
        hub.resolve(path)


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("openai/gpt-oss-20b", True),
        ("a/" + "b" * 94, True),
        ("a/" + "b" * 95, False),
        ("gpt-oss", False),
        ("a/b/c", False),
        ("a/b--c", False),
        ("a/b..c", False),
        ("./model", False),
    ],
)
def test_a_hub_id_is_owner_and_name(text: str, is_id: bool) -> None:
    assert hub.is_repo_id(text) == is_id


def assert_one_line(error: Exception) -> None:
    assert "\n" not in str(error) and len(str(error)) < 320


def test_a_repository_that_moves_while_it_is_downloaded_is_not_loaded(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo(REPO, FILES)
    read = read_config

    def moved(folder: Path) -> object:
        found = read(folder)
        server.add_repo(REPO, FILES | {"model.safetensors": b"of a stranger"})
        return found

    monkeypatch.setattr(hub, "read_config", moved)
    with pytest.raises(HubError, match="changed while it was downloaded"):
        hub.resolve(REPO)
    monkeypatch.setattr(hub, "read_config", read)
    assert (hub.resolve(REPO) / "model.safetensors").read_bytes() == b"of a stranger"


def test_some_files_of_weights_are_downloaded_without_the_others(server: HubServer) -> None:
    shards = [f"model-{i}.safetensors" for i in (1, 2, 3)]
    index = {"weight_map": {f"tensor {i}": name for i, name in enumerate(shards)}}
    files = {name: WEIGHTS + bytes([i]) for i, name in enumerate(shards)}
    server.add_repo(
        REPO,
        {
            "config.json": FILES["config.json"],
            "model.safetensors.index.json": json.dumps(index).encode(),
            **files,
        },
    )
    folder = hub.resolve(REPO, weights=shards[1:2])
    assert sorted(path.name for path in folder.glob("*.safetensors")) == shards[1:2]
    assert hub.resolve(REPO, weights=shards[1:2], offline=True) == folder
    for wanted in (None, shards[:2]):
        with pytest.raises(ModelNotFoundError, match="not wholly in the local cache"):
            hub.resolve(REPO, weights=wanted, offline=True)
    assert sorted(path.name for path in hub.resolve(REPO).glob("*.safetensors")) == shards
