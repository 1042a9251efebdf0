"""GGUF files of gpt-oss, read with the `gguf` package and shown as a layout like any other.

A GGUF block of MXFP4 is 17 bytes: the scale, then 16 bytes of which byte j holds value j in its low nibble
and value j + 16 in its high one; experts are brought into OpenAI's byte order. Gate and up are apart. Dense
parts may be in any type `gguf` dequantises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gptoss.checkpoint.layouts import Form, Layout, Packing, check_tensors
from mlx_gptoss.convert.tensors import ReadRows, SourceTensor
from mlx_gptoss.errors import CheckpointError, ConfigError, ConversionError
from mlx_gptoss.model.config import ModelConfig, read_config
from mlx_gptoss.model.quantization import MXFP4, Quantization

ARCHITECTURE = "gpt-oss"
BLOCK_BYTES = 17  # of MXFP4: a scale byte and 32 nibbles
FLOATS = {"F16", "BF16", "F32"}
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # how llama.cpp names the files of a model that is split

_PATHS = {
    "embedding": "token_embd",
    "norms.attention": "blk.{i}.attn_norm.weight",
    "attention.q": "blk.{i}.attn_q",
    "attention.k": "blk.{i}.attn_k",
    "attention.v": "blk.{i}.attn_v",
    "attention.out": "blk.{i}.attn_output",
    "attention.sinks": "blk.{i}.attn_sinks.weight",
    "norms.experts": "blk.{i}.post_attention_norm.weight",
    "router": "blk.{i}.ffn_gate_inp",
    "experts.gate": "blk.{i}.ffn_gate_exps",
    "experts.up": "blk.{i}.ffn_up_exps",
    "experts.down": "blk.{i}.ffn_down_exps",
    "norms.final": "output_norm.weight",
    "head": "output",
}
GGUF = Layout("gguf", "gguf", _PATHS, Form.MATRICES, ".weight", ".scales", ".bias")
EMBEDDING = f"{_PATHS['embedding']}.weight"
# OpenAI's keys of the config, and GGUF's.
_FIELDS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "expert_feed_forward_length",
    "num_experts": "expert_count",
    "experts_per_token": "expert_used_count",
    "head_dim": "attention.key_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
    "rope_scaling_factor": "rope.scaling.factor",
    "initial_context_length": "rope.scaling.original_context_length",
    "rope_ntk_alpha": "rope.scaling.yarn_beta_slow",
    "rope_ntk_beta": "rope.scaling.yarn_beta_fast",
}
_DEFAULTS = {"rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0}
_EXPERTS = "_exps.weight"  # how the names of the experts' weights end


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a GGUF file; `shape` is numpy's (rows first), `type` gguf's GGMLQuantizationType."""

    name: str
    path: Path
    start: int
    nbytes: int
    shape: tuple[int, ...]
    type: Any


def read_gguf(
    path: Path, files: tuple[Path, ...]
) -> tuple[Layout, ModelConfig, dict[str, SourceTensor], Packing]:
    """The model in the files of `path`: layout, shape, stored tensors by name, how a matrix is packed.

    Raises ConversionError when the `gguf` package is missing or the file is not gpt-oss, CheckpointError when
    it is broken or lacks something.
    """
    header = _Header(path, files)
    folder = path if path.is_dir() else path.parent
    config = read_config(folder)[0] if (folder / "config.json").is_file() else header.config()
    raw = {tensor.name: tensor for found in header.tensors.values() for tensor in _shown(found)}

    def packing(matrix: str) -> Quantization | None:
        return MXFP4 if f"{matrix}.scales" in raw else None

    check_tensors(raw, {spec.name: spec for spec in GGUF.tensors(config, packing)}, path)
    return GGUF, config, raw, packing


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The files of one model, in order: a .gguf file, with its siblings where it is a part; or a folder's.

    Raises CheckpointError when a part is absent, and for a folder that holds no model or several.
    """
    if path.is_dir():
        found = sorted(path.glob("[!.]*.gguf"))
        models = {_PART.sub(r"-of-\2.gguf", file.name) for file in found}
        if len(models) != 1:
            shown = ", ".join(file.name for file in found[:10]) + (" .." if len(found) > 10 else "")
            raise CheckpointError(
                f"{path}: holds {len(models)} models in GGUF ({shown}), expected one; name the file to take"
            )
        path = found[0]
    part = _PART.search(path.name)
    if part is None:
        return (path,)
    stem, count = path.name[: part.start()], part[2]
    files = tuple(path.with_name(f"{stem}-{i:05d}-of-{count}.gguf") for i in range(1, int(count) + 1))
    absent = [file.name for file in files if not file.is_file()]
    if absent or path not in files:
        shown = ", ".join(absent[:10]) + (" .." if len(absent) > 10 else "") or "a part of that number"
        raise CheckpointError(f"{path}: is one of {int(count)} parts, without {shown}; download all of them")
    return files


class _Header:
    """The headers of all files together, tensors under today's names."""

    def __init__(self, where: Path, files: tuple[Path, ...]) -> None:
        self.where = where
        self.tensors: dict[str, _Tensor] = {}
        self.fields: dict[str, Any] = {}
        for file in files:
            self._load(file)
        if self.field("general.architecture") != ARCHITECTURE:
            found = self.fields.get("general.architecture")
            raise ConversionError(f"{where}: its architecture is {found!r}, expected {ARCHITECTURE!r}")

    def _load(self, file: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ConversionError(
                "reading GGUF needs the gguf package: pip install 'mlx-gptoss[gguf]'"
            ) from None
        try:
            reader = GGUFReader(file)
            for name, field in reader.fields.items():
                if not name.startswith("tokenizer."):
                    self.fields.setdefault(name, field.contents())
            size = file.stat().st_size
            for t in reader.tensors:
                shape = tuple(int(n) for n in reversed(t.shape))
                tensor = _Tensor(t.name, file, int(t.data_offset), int(t.n_bytes), shape, t.tensor_type)
                if tensor.start + tensor.nbytes > size:
                    raise CheckpointError(f"{file}: ends inside {t.name}; it is truncated")
                name = t.name.replace(".ffn_norm.", ".post_attention_norm.")  # of early files, like the next
                name += ".weight" if name.endswith(".attn_sinks") else ""
                if name in self.tensors:
                    raise CheckpointError(f"{file}: {t.name} is in two files; keep one model in the folder")
                self.tensors[name] = tensor
        except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{file}: not readable as GGUF ({error}); download it again") from error

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the header. Raises ConfigError when it is missing and there is no default."""
        value = self.fields.get(name, default)
        if value is None:
            raise ConfigError(f"{self.where}: {name} is missing from the GGUF header")
        return value

    def config(self) -> ModelConfig:
        """The shape, from the header; what GGUF does not hold is fixed in every gpt-oss model."""
        embedding = self.tensors.get(EMBEDDING)
        if embedding is None:
            raise CheckpointError(f"{self.where}: {EMBEDDING} is missing")
        found = {
            key: self.field(f"{ARCHITECTURE}.{name}", _DEFAULTS.get(key)) for key, name in _FIELDS.items()
        }
        return ModelConfig.from_original(found | {"vocab_size": embedding.shape[0]})


def _read_rows(tensor: _Tensor, first: int, last: int) -> np.ndarray:
    """Raw bytes of rows of the first axis, uint8 [last - first, bytes a row]."""
    size = tensor.nbytes // tensor.shape[0]
    try:
        with open(tensor.path, "rb", buffering=0) as stream:
            stream.seek(tensor.start + first * size)
            data = stream.read((last - first) * size)
    except OSError as error:
        raise CheckpointError(f"{tensor.path}: cannot be read: {error.strerror}") from error
    if len(data) < (last - first) * size:
        raise CheckpointError(f"{tensor.path}: ended inside {tensor.name}; it was cut short")
    return np.frombuffer(data, np.uint8).reshape(last - first, size)


def _shown(tensor: _Tensor) -> Iterator[SourceTensor]:
    """A tensor as safetensors would hold it: floats as float32, MXFP4 as words and scales."""
    experts, kind = tensor.name.endswith(_EXPERTS), tensor.type.name
    if experts and kind == "MXFP4":
        *rows, columns = tensor.shape
        words, scales = (*rows, columns // 8), (*rows, columns // 32)
        yield SourceTensor(tensor.name, "U32", words, (tensor.name,), _words_reader(tensor))
        name = tensor.name.removesuffix(".weight") + ".scales"
        yield SourceTensor(name, "U8", scales, (tensor.name,), _scales_reader(tensor))
    elif experts and kind not in FLOATS:
        raise ConversionError(
            f"{tensor.path}: {tensor.name} is {kind}, expected MXFP4 or floats; other types have lost the "
            "published weights, convert another file"
        )
    else:
        yield SourceTensor(tensor.name, "F32", tensor.shape, (tensor.name,), _float_reader(tensor))


def _float_reader(tensor: _Tensor) -> ReadRows:
    def read(first: int, last: int) -> np.ndarray:
        from gguf.quants import dequantize

        try:
            values = dequantize(_read_rows(tensor, first, last), tensor.type)
        except NotImplementedError:
            raise ConversionError(
                f"{tensor.path}: {tensor.name} is {tensor.type.name}, which cannot be read"
            ) from None
        return np.ascontiguousarray(values, np.float32).reshape(last - first, *tensor.shape[1:])

    return read


def _packed_rows(tensor: _Tensor, first: int, last: int) -> np.ndarray:
    """MXFP4 blocks as they are, uint8 [experts, rows, groups, 17]."""
    _, rows, columns = tensor.shape
    return _read_rows(tensor, first, last).reshape(last - first, rows, columns // 32, BLOCK_BYTES)


def _scales_reader(tensor: _Tensor) -> ReadRows:
    return lambda first, last: _packed_rows(tensor, first, last)[..., 0]


def _words_reader(tensor: _Tensor) -> ReadRows:
    def read(first: int, last: int) -> np.ndarray:
        packed = _packed_rows(tensor, first, last)[..., 1:]
        low, high = packed & 15, packed >> 4  # values 0..15 and 16..31 of the block
        blocks = np.empty_like(packed)
        blocks[..., :8] = low[..., 0::2] | (low[..., 1::2] << np.uint8(4))
        blocks[..., 8:] = high[..., 0::2] | (high[..., 1::2] << np.uint8(4))
        return blocks.view(np.uint32).reshape(*blocks.shape[:2], -1)

    return read
