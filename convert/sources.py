"""What can be converted, seen in one way: the model's tensors under Hugging Face's names."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gptoss.checkpoint.layouts import (
    HF,
    Form,
    Layout,
    PackingOf,
    RecordPart,
    part_of,
    record_parts,
    sizes,
)
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.checkpoint.safetensors import INDEX_NAME
from mlx_gptoss.convert.gguf_source import gguf_files, read_gguf
from mlx_gptoss.convert.manifest import FileEntry, SourceEntry
from mlx_gptoss.convert.tensors import (
    SourceTensor,
    as_blocks,
    floats,
    from_affine,
    from_mxfp4,
    interleaved,
    rows_of,
    stored,
    transposed,
)
from mlx_gptoss.errors import ConversionError
from mlx_gptoss.files import open_regular
from mlx_gptoss.model.config import ModelConfig


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert. `raw_config` has Hugging Face's keys, without what it says of quantisation."""

    kind: str
    id: str
    revision: str | None
    folder: Path
    files: tuple[Path, ...]
    config: ModelConfig
    raw_config: dict[str, Any]
    tensors: dict[str, SourceTensor]

    def fingerprint(self) -> dict[str, list[Any]]:
        """Per file: size, time of last change, SHA-256 of its first megabyte (its header). Cheap."""
        return {self._label(path): [*self._stat(path), _head_digest(path)] for path in self.files}

    def check_unchanged(self, fingerprint: dict[str, list[Any]]) -> None:
        """Raise ConversionError if a file is no longer what it was when the fingerprint was taken."""
        for path in self.files:
            if self._stat(path) != fingerprint[self._label(path)][:2]:
                raise ConversionError(
                    f"{path}: changed while it was being converted, nothing was finished; "
                    "convert it again from the start (--restart)"
                )

    def entry(self) -> SourceEntry:
        """The manifest's description. A Hub cache names files by their SHA-256, which is taken over."""
        files = {}
        for path in self.files:
            blob = path.resolve().name
            known = blob if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else None
            files[self._label(path)] = FileEntry(self._stat(path)[0], known)
        return SourceEntry(self.kind, self.id, self.revision, files)

    def _label(self, path: Path) -> str:
        """A file's path inside the source's folder."""
        return path.relative_to(self.folder).as_posix()

    @staticmethod
    def _stat(path: Path) -> list[int]:
        try:
            status = os.stat(path)
        except OSError as error:
            raise ConversionError(
                f"{path}: {error.strerror}; it was there when the conversion began"
            ) from None
        return [status.st_size, status.st_mtime_ns]


def open_source(folder: Path, *, id: str | None = None) -> Source:
    """Recognise and check the checkpoint in a folder, or the GGUF file at a path; only headers are read.

    Raises ConfigError, CheckpointError or ConversionError naming what does not fit.
    """
    place = folder if folder.is_dir() else folder.parent
    if is_gguf(folder):
        files = gguf_files(folder)
        layout, config, raw, packing_of = read_gguf(folder, files)
        raw_config = config.to_hf()
    else:
        checkpoint = Checkpoint(folder)
        files = tuple(sorted({info.path for info in checkpoint.tensors.values()}))
        layout, config, packing_of = checkpoint.layout, checkpoint.config, checkpoint.quantization_of
        raw = {name: stored(info) for name, info in checkpoint.tensors.items()}
        # OpenAI's own config has other keys.
        raw_config = dict(checkpoint.raw_config if "model_type" in checkpoint.raw_config else config.to_hf())
    raw_config.pop("quantization", None)
    raw_config.pop("quantization_config", None)
    tensors = _Model(folder, layout, config, raw, packing_of).tensors()
    return Source(
        kind=layout.kind,
        id=id or folder.resolve().name,
        revision=place.name if place.parent.name == "snapshots" else None,
        folder=place,
        files=files,
        config=config,
        raw_config=raw_config,
        tensors={tensor.name: tensor for tensor in tensors},
    )


def is_gguf(path: Path) -> bool:
    """Whether this is a .gguf file, or a folder whose only weights are such files."""
    if not path.is_dir():
        return path.suffix == ".gguf"
    others = any(path.glob("[!.]*.safetensors")) or (path / INDEX_NAME).exists()
    return not others and any(path.glob("[!.]*.gguf"))


def _head_digest(path: Path) -> str:
    with open_regular(path) as stream:
        return hashlib.sha256(stream.read(1 << 20)).hexdigest()


@dataclass(frozen=True)
class _Model:
    """The stored tensors of a source (`raw`, by name), brought into Hugging Face's layout."""

    where: Path
    layout: Layout
    config: ModelConfig
    raw: Mapping[str, SourceTensor]
    packing_of: PackingOf

    def tensors(self) -> Iterator[SourceTensor]:
        """In the order of the result."""
        size = sizes(self.config)
        for key, layer in HF.places(self.config.num_layers):
            part = part_of(key)
            if part == "experts":
                found = self._stack(key, layer)
            elif len(size[key]) == 1:
                found = iter([floats(self.raw[self.layout.path(key, layer)]).called(HF.path(key, layer))])
            else:
                found = self._matrix(key, layer)
            yield from (replace(tensor, part=part) for tensor in found)

    def _matrix(self, key: str, layer: int) -> Iterator[SourceTensor]:
        """A matrix, and its bias where it has one."""
        source, first, size = key, 0, sizes(self.config)
        if key not in self.layout.paths:  # q, k and v lie in one matrix
            names = ["attention.q", "attention.k", "attention.v"]
            first = sum(size[name][0] for name in names[: names.index(key)])
            source = self.layout.qkv[0]
        path, target = self.layout.path(source, layer), HF.path(key, layer)

        def take(ending: str) -> SourceTensor:
            whole = self.raw[path + ending]
            return rows_of(whole, first, first + size[key][0]).called(target + ending)

        packing = self.packing_of(path)
        if packing is None:
            matrix = floats(take(".weight"))
        elif packing.mode == "affine":
            pieces = (take(".weight"), take(".scales"), take(".biases"))
            matrix = from_affine(f"{target}.weight", pieces, packing)
        else:
            raise ConversionError(
                f"{self.where}: {path} is stored in {packing.mode}, expected bf16 or affine; "
                "convert the checkpoint it was made from instead"
            )
        yield replace(matrix, path=target)
        if f"{path}.bias" in self.raw:
            yield floats(take(".bias"))

    def _stack(self, key: str, layer: int) -> Iterator[SourceTensor]:
        """The bias and the matrices of all experts: MXFP4 as it is, or floats."""
        layout, target = self.layout, HF.path(key, layer)
        keys = layout.gate_up if key == "experts.gate_up" else (key,)
        paths = [layout.path(k, layer) for k in keys]

        def take(ending: str) -> list[SourceTensor]:
            return [self.raw[path + ending] for path in paths]

        yield interleaved([floats(t) for t in take(layout.expert_bias)]).called(target + HF.expert_bias)
        packings = [layout.stack_packing(path, self.packing_of) for path in paths]
        for path, packing in zip(paths, packings, strict=True):
            if packing is not None and packing.mode != "mxfp4":
                raise ConversionError(
                    f"{self.where}: {path} was requantised to {packing.bits}-bit {packing.mode}, from which "
                    "the MXFP4 weights cannot be restored; convert the checkpoint it was made from instead"
                )
        if layout.experts is Form.RECORDS:
            blocks, scales = self._in_records(key, layer)
            yield replace(from_mxfp4(target, blocks, scales), name=target, path=target)
            return
        weights = take(layout.expert_weight)
        if packings[0] is None:
            stack = interleaved([floats(t) for t in weights])
            stack = transposed(stack) if layout.experts is Form.TRANSPOSED else stack
        else:
            blocks = interleaved([as_blocks(t) for t in weights]).called(target + HF.expert_weight)
            scales = interleaved(take(layout.expert_scales)).called(target + HF.expert_scales)
            stack = from_mxfp4(target, blocks, scales)
        yield replace(stack, name=target, path=target)

    def _in_records(self, key: str, layer: int) -> Iterator[SourceTensor]:
        """Blocks and scales of a stack of experts, cut out of their records."""
        records = self.raw[self.layout.path("experts.records", layer)]
        for part in record_parts(self.config):
            if part.key == key:
                shape = (records.rows, *part.shape)

                def cut(rows: np.ndarray, part: RecordPart = part) -> np.ndarray:
                    return rows[:, part.start : part.end].reshape(-1, *part.shape)

                yield records.mapped(cut, shape=shape).called(HF.path(key, layer) + part.ending)
