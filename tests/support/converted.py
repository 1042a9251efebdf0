"""A small converted folder with a true manifest, made without the converter: the lossless recipe by hand."""

import hashlib
from dataclasses import replace
from pathlib import Path

from mlx_gptoss.checkpoint.safetensors import TensorInfo, read_bytes, read_folder
from mlx_gptoss.convert.manifest import FileEntry, Manifest, SourceEntry, TensorEntry
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint

BASE = "openai/gpt-oss-20b"
REVISION = "6cee5e81ee83917806bbde320786a8fb61efebee"


def part_of(name: str) -> str:
    """The part of the model that a tensor of the hf layout belongs to."""
    for mark, part in (
        ("embed_tokens", "embedding"),
        ("lm_head", "head"),
        (".self_attn.", "attention"),
        (".router.", "router"),
        (".experts.", "experts"),
    ):
        if mark in name:
            return part
    return "norms"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_converted(folder: Path, *, seed: int = 0, shards: int = 3) -> Manifest:
    """Write checkpoint, tokenizer and manifest.json into `folder`."""
    write_checkpoint(folder, seed=seed, shards=shards)
    write_byte_tokenizer(folder)
    manifest = describe(folder)
    manifest.write(folder)
    return manifest


def describe(folder: Path) -> Manifest:
    """The manifest of a folder whose tensors are all copies."""
    files = {
        path.name: FileEntry(path.stat().st_size, sha256(path.read_bytes()))
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }
    return Manifest(
        tool_version="0.1.0",
        source=SourceEntry("hf-mxfp4", BASE, REVISION),
        recipe={"name": "mxfp4"},
        tensors={name: _entry(info) for name, info in read_folder(folder).items()},
        files=files,
    )


def without_file_hashes(manifest: Manifest) -> Manifest:
    return replace(manifest, files={name: FileEntry(entry.size) for name, entry in manifest.files.items()})


def _entry(info: TensorInfo) -> TensorEntry:
    return TensorEntry(
        action="copy",
        part=part_of(info.name),
        sources=(info.name,),
        dtype=info.dtype,
        shape=info.shape,
        bytes=info.nbytes,
        sha256=sha256(read_bytes(info).tobytes()),
        relative_error=0.0,
    )
