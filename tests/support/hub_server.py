"""A local stand-in of the Hub's HTTP API, on loopback: enough for huggingface_hub to list, download, create,
upload and commit models, with connections that break on demand.

    with HubServer() as hub:
        hub.add_repo("someone/model", {"config.json": b"{}"})
        hub.cut("model.safetensors", after=1000)     # the next transfer of it breaks after 1000 bytes

Every request is noted in `hub.requests`.
"""

import base64
import hashlib
import json
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS_SUFFIXES = (".safetensors", ".bin", "tokenizer.json")


@dataclass(frozen=True)
class Blob:
    """A file's content and how the Hub stores it."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """Commits by hash, each a whole tree; refs name some of them."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], ref: str = "main") -> str:
        tree = "".join(f"{path}\0{blob.oid}\n" for path, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}\n{tree}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.refs.get(revision, revision)]


@dataclass
class Request:
    """What a client asked for. `received`: bytes of body read, `sent`: bytes of body written."""

    method: str
    path: str
    range: str | None
    body: bytes = b""
    sent: int = 0


@dataclass
class _Fault:
    pattern: str
    times: int
    after: int | None = None  # break the transfer after that many bytes
    status: int | None = None  # or answer with that status
    headers: dict[str, str] = field(default_factory=dict)
    hold: bool = False  # at that point, wait until the server stops instead of breaking


class HubServer:
    """The stand-in. `multipart`: part size in bytes for uploads of large files (None: one PUT a file)."""

    def __init__(self, multipart: int | None = None) -> None:
        self.multipart = multipart
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[Request] = []
        self.faults: list[_Fault] = []
        self.lock = threading.Lock()
        self.held = threading.Event()  # a transfer has reached the point where it is held
        self.stopping = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Point huggingface_hub, which reads its settings once at import, here and at the folder `cache`."""
        from huggingface_hub import constants
        from huggingface_hub.utils import close_session, disable_progress_bars

        disable_progress_bars()
        close_session()
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks plain HTTP and LFS
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what a broken transfer may lose
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between tries
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")

    def add_repo(self, repo_id: str, files: Mapping[str, bytes], *, ref: str = "main") -> str:
        """A commit on `ref` that holds exactly `files`; returns its hash."""
        repo = self.repos.setdefault(repo_id, Repo())
        blobs = {path: Blob(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
        self.storage |= {blob.oid: blob.data for blob in blobs.values() if blob.lfs}
        return repo.commit(blobs, ref)

    def cut(self, pattern: str, *, after: int, times: int = 1) -> None:
        """Break the next `times` transfers whose path contains `pattern` after that many bytes of body.

        A download that is not longer is left whole.
        """
        self.faults.append(_Fault(pattern, times, after=after))

    def hold(self, pattern: str, *, after: int) -> None:
        """Hold the next transfer whose path contains `pattern` after that many bytes; `held` tells when."""
        self.faults.append(_Fault(pattern, 1, after=after, hold=True))

    def fail(
        self, pattern: str, status: int, *, times: int = 1, headers: dict[str, str] | None = None
    ) -> None:
        """Answer the next `times` requests whose path contains `pattern` with `status`."""
        self.faults.append(_Fault(pattern, times, status=status, headers=headers or {}))

    def paths(self, method: str) -> list[str]:
        return [request.path for request in self.requests if request.method == method]

    def take_fault(self, path: str, *, transfer: bool, length: float = math.inf) -> _Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.pattern in path and (fault.after is not None) == transfer:
                    if fault.after is not None and length <= fault.after:
                        continue  # nothing to break, and a closed connection would break the next request
                    fault.times -= 1
                    return fault
        return None


class _Broken(Exception):
    """The connection was cut on purpose."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.route = unquote(split.path)
        self.query = parse_qs(split.query)
        self.seen = Request(self.command, self.route, self.headers.get("Range"))
        with self.hub.lock:
            self.hub.requests.append(self.seen)
        try:
            self.seen.body = self._read_body()
            fault = self.hub.take_fault(self.route, transfer=False)
            if fault is not None:
                self._send(fault.status or 500, {"error": "on demand"}, fault.headers)
                return
            for pattern, name in _ROUTES:
                match = re.fullmatch(pattern, f"{self.command} {self.route}")
                if match:
                    getattr(self, name)(**match.groupdict())
                    return
            self._send(404, {"error": f"no such route: {self.command} {self.route}"})
        except _Broken:
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    # ---- plumbing

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return self._read_chunked()
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.take_fault(self.route, transfer=True) if self.command == "PUT" else None
        if fault is not None:
            self.rfile.read(min(fault.after or 0, length))
            self._break(fault)
        return self.rfile.read(length)

    def _read_chunked(self) -> bytes:
        fault = self.hub.take_fault(self.route, transfer=True) if self.command == "PUT" else None
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
            if fault is not None and len(body) >= (fault.after or 0):
                self._break(fault)
        self.rfile.readline()
        return bytes(body)

    def _send(self, status: int, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = None
        if self.command == "GET":
            fault = self.hub.take_fault(self.route, transfer=True, length=len(data))
        if fault is not None:
            data = data[: fault.after]
        self.wfile.write(data)
        self.wfile.flush()
        self.seen.sent = len(data)
        if fault is not None:
            self._break(fault)

    def _break(self, fault: _Fault) -> NoReturn:
        if fault.hold:
            self.hub.held.set()
            self.hub.stopping.wait(120)
        raise _Broken

    def _repo(self, repo_id: str, revision: str | None = None) -> tuple[Repo, str] | None:
        """The repository and a commit of it; answers 404 itself (as the Hub does) when there is none."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repo.refs.get(revision or "main", revision or "main")
        if commit not in repo.commits and revision is not None:
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, commit

    # ---- reading

    def info(self, repo: str, revision: str | None = None) -> None:
        found = self._repo(repo, revision)
        if found:
            files = found[0].commits.get(found[1], {})
            siblings = [
                {"rfilename": path}
                | ({"size": len(blob.data), "blobId": blob.oid} if "blobs" in self.query else {})
                for path, blob in files.items()
            ]
            self._send(
                200,
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": found[1],
                    "private": found[0].private,
                    "siblings": siblings,
                },
            )

    def tree(self, repo: str, revision: str) -> None:
        found = self._repo(repo, revision)
        if found:
            entries: list[dict[str, Any]] = []
            for path, blob in found[0].commits[found[1]].items():
                entry: dict[str, Any] = {
                    "type": "file",
                    "path": path,
                    "size": len(blob.data),
                    "oid": blob.oid,
                }
                if blob.lfs:
                    entry["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 130}
                entries.append(entry)
            self._send(200, entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo, revision)
        if not found:
            return
        blob = found[0].commits[found[1]].get(path)
        if blob is None:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": found[1], "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self._send(200, blob.data, headers)
            return
        first, last = int(asked[1]), int(asked[2] or len(blob.data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
        self._send(206, blob.data[first : last + 1], headers)

    # ---- writing

    def whoami(self) -> None:
        self._send(200, {"name": "someone", "type": "user", "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.seen.body)
        repo_id = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        private = asked.get("private") is True or asked.get("visibility") == "private"
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.repos[repo_id] = Repo(private=private)
            self.hub.repos[repo_id].commit({})
        self._send(409 if exists else 200, {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def validate_yaml(self) -> None:
        self._send(200, {"warnings": [], "errors": []})

    def preupload(self, repo: str, revision: str) -> None:
        found = self._repo(repo, revision)
        if found:
            present = found[0].files(revision)
            self._send(
                200,
                {
                    "files": [
                        {
                            "path": item["path"],
                            "uploadMode": "lfs" if item["path"].endswith(LFS_SUFFIXES) else "regular",
                            "shouldIgnore": False,
                            "oid": present[item["path"]].oid if item["path"] in present else None,
                        }
                        for item in json.loads(self.seen.body)["files"]
                    ]
                },
            )

    def batch(self, repo: str) -> None:
        asked = json.loads(self.seen.body)
        size = self.hub.multipart
        objects = []
        for item in asked["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            href = f"{self.hub.endpoint}/lfs/{item['oid']}"
            if item["oid"] not in self.hub.storage:
                upload: dict[str, Any] = {"href": href}
                if size is not None:
                    count = -(-item["size"] // size)
                    parts = {str(part): f"{href}/{part}" for part in range(1, count + 1)}
                    upload = {"href": f"{href}/complete", "header": {"chunk_size": str(size), **parts}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs/verify"}}
            objects.append(answer)
        self._send(200, {"transfer": "multipart" if size else "basic", "objects": objects})

    def put(self, oid: str) -> None:
        self._store(oid, self.seen.body)

    def put_part(self, oid: str, part: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(part)] = self.seen.body
        self._send(200, {}, {"ETag": f'"{hashlib.md5(self.seen.body).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid, {})
        self._store(oid, b"".join(parts[number] for number in sorted(parts)))

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            self._send(400, {"error": "the content does not have that hash"})
            return
        self.hub.storage[oid] = data
        self._send(200, {})

    def verify(self) -> None:
        asked = json.loads(self.seen.body)
        self._send(200 if len(self.hub.storage.get(asked["oid"], b"")) == asked["size"] else 404, {})

    def commit(self, repo: str, revision: str) -> None:
        found = self._repo(repo, revision)
        if not found:
            return
        files = dict(found[0].files(revision))
        for line in self.seen.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    self._send(400, {"error": f"{value['path']} was not uploaded"})
                    return
                files[value["path"]] = Blob(self.hub.storage[value["oid"]], lfs=True)
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = found[0].commit(files, revision)
        self._send(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    (rf"GET /api/models/{_REPO}", "info"),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>.+)", "info"),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)", "tree"),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/(?P<oid>[0-9a-f]+)", "put"),
    (r"PUT /lfs/(?P<oid>[0-9a-f]+)/(?P<part>\d+)", "put_part"),
    (r"POST /lfs/(?P<oid>[0-9a-f]+)/complete", "complete"),
    (r"POST /lfs/verify", "verify"),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
)


def _handler(hub: HubServer) -> type[_Handler]:
    return type("Handler", (_Handler,), {"hub": hub})
