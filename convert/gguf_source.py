"""GGUF files of gpt-oss, read with the `gguf` package and presented as one more layout.

A GGUF block of MXFP4 is 17 bytes: the scale, then 16 bytes of which byte j holds value j in its low nibble
and value j + 16 in its high one; experts are brought into OpenAI's byte order. Gate and up are apart. Dense
parts may be in any type `gguf` dequantises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gptoss.checkpoint.layouts import Form, Layout, PackingOf, check_tensors
from mlx_gptoss.checkpoint.safetensors import TensorInfo
from mlx_gptoss.convert.tensors import SourceTensor, stored
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


def read_gguf(
    path: Path, files: tuple[Path, ...]
) -> tuple[Layout, ModelConfig, dict[str, SourceTensor], PackingOf]:
    """The model in the files of `path`: layout, shape, stored tensors by name, how a matrix is packed.

    Raises ConversionError when the `gguf` package is missing or the file is not gpt-oss, CheckpointError when
    it is broken or lacks something.
    """
    raw: dict[str, SourceTensor] = {}
    fields: dict[str, Any] = {}
    for file in files:
        _load(file, raw, fields)
    folder = path if path.is_dir() else path.parent
    has_config = (folder / "config.json").is_file()
    config = read_config(folder)[0] if has_config else _config(path, fields, raw)

    def packing_of(matrix: str) -> Quantization | None:
        return MXFP4 if f"{matrix}.scales" in raw else None

    specs = {spec.name: spec for spec in GGUF.tensors(config, packing_of)}
    check_tensors({name: (t.dtype, t.shape) for name, t in raw.items()}, specs, path)
    return GGUF, config, raw, packing_of


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The files of one model, in order: a .gguf file with its siblings, if it is split, or a folder's.

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


def _load(file: Path, tensors: dict[str, SourceTensor], fields: dict[str, Any]) -> None:
    """Add a file's tensors, under today's names, and the fields of its header."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConversionError("reading GGUF needs the gguf package: pip install 'gptoss-mlx[gguf]'") from None
    try:
        reader = GGUFReader(file)
        for name, field in reader.fields.items():
            if not name.startswith("tokenizer."):
                fields.setdefault(name, field.contents())
        if (found := fields.get("general.architecture")) != ARCHITECTURE:
            raise ConversionError(f"{file}: its architecture is {found!r}, expected {ARCHITECTURE!r}")
        size = file.stat().st_size
        for t in reader.tensors:
            if t.data_offset + t.n_bytes > size:
                raise CheckpointError(f"{file}: ends inside {t.name}; it is truncated")
            for tensor in _shown(file, t):
                if tensor.name in tensors:
                    raise CheckpointError(f"{file}: {t.name} is in two files; keep one model in the folder")
                tensors[tensor.name] = tensor
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{file}: not readable as GGUF ({error}); download it again") from error


def _config(where: Path, fields: dict[str, Any], tensors: dict[str, SourceTensor]) -> ModelConfig:
    """The shape, from the header; what GGUF does not hold is fixed in every gpt-oss model."""
    if EMBEDDING not in tensors:
        raise CheckpointError(f"{where}: {EMBEDDING} is missing")
    found = {"vocab_size": tensors[EMBEDDING].shape[0]}
    for key, name in _FIELDS.items():
        value = fields.get(f"{ARCHITECTURE}.{name}", _DEFAULTS.get(key))
        if value is None:
            raise ConfigError(f"{where}: {ARCHITECTURE}.{name} is missing from the GGUF header")
        found[key] = value
    return ModelConfig.from_original(found)


def _shown(file: Path, t: Any) -> Iterator[SourceTensor]:
    """Gguf's ReaderTensor as safetensors would hold it: floats as float32, MXFP4 as words and scales."""
    shape, kind = tuple(int(n) for n in reversed(t.shape)), t.tensor_type
    start, nbytes = int(t.data_offset), int(t.n_bytes)
    size = nbytes // max(1, shape[0])
    raw = stored(TensorInfo(t.name, "U8", (shape[0], size), start, start + nbytes, file))
    name = t.name.replace(".ffn_norm.", ".post_attention_norm.")  # of early files, like the next
    name += ".weight" if name.endswith(".attn_sinks") else ""
    experts = name.endswith("_exps.weight")
    if experts and kind.name == "MXFP4":
        *rows, columns = shape
        packed = raw.mapped(lambda v: v.reshape(-1, *rows[1:], columns // 32, BLOCK_BYTES))
        yield packed.mapped(_words, dtype="U32", shape=(*rows, columns // 8))
        scales = name.removesuffix(".weight") + ".scales"
        yield packed.mapped(lambda v: v[..., 0], name=scales, shape=(*rows, columns // 32))
    elif experts and kind.name not in FLOATS:
        raise ConversionError(
            f"{file}: {t.name} is {kind.name}, expected MXFP4 or floats; other types have lost the published "
            "weights, convert another file"
        )
    else:

        def values(rows: np.ndarray) -> np.ndarray:
            from gguf.quants import dequantize

            try:
                found = dequantize(rows, kind)
            except NotImplementedError:
                raise ConversionError(f"{file}: {t.name} is {kind.name}, which cannot be read") from None
            return np.ascontiguousarray(found, np.float32).reshape(-1, *shape[1:])

        yield raw.mapped(values, name=name, dtype="F32", shape=shape)


def _words(packed: np.ndarray) -> np.ndarray:
    """GGUF's blocks uint8 [experts, rows, groups, 17] -> MXFP4 words uint32 [experts, rows, groups * 4]."""
    low, high = packed[..., 1:] & 15, packed[..., 1:] >> 4  # values 0..15 and 16..31 of the block
    blocks = np.empty(low.shape, np.uint8)
    blocks[..., :8] = low[..., 0::2] | (low[..., 1::2] << np.uint8(4))
    blocks[..., 8:] = high[..., 0::2] | (high[..., 1::2] << np.uint8(4))
    return blocks.view(np.uint32).reshape(*blocks.shape[:2], -1)
