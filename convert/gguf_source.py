"""GGUF files of gpt-oss as a source: read with the `gguf` package, experts brought into OpenAI's byte order.

A GGUF block of MXFP4 is 17 bytes: the scale, then 16 bytes of which byte j holds value j in its low nibble
and value j + 16 in its high one. Gate and up are apart. Dense parts may be in any type `gguf` dequantises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gptoss.checkpoint.reader import NAMES
from mlx_gptoss.convert.sources import Source, SourceTensor
from mlx_gptoss.errors import CheckpointError, ConfigError, ConversionError
from mlx_gptoss.model.config import ModelConfig, read_config

ARCHITECTURE = "gpt-oss"
BLOCK_BYTES = 17  # of MXFP4: a scale byte and 32 nibbles
FLOATS = {"F16", "BF16", "F32"}
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # how llama.cpp names the files of a model that is split

# Part -> name in GGUF, without .weight / .bias; `post_attention_norm` was `ffn_norm` in early files.
_NAMES = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention.norm": "blk.{i}.attn_norm",
    "attention.q": "blk.{i}.attn_q",
    "attention.k": "blk.{i}.attn_k",
    "attention.v": "blk.{i}.attn_v",
    "attention.out": "blk.{i}.attn_output",
    "attention.sinks": "blk.{i}.attn_sinks",
    "moe.norm": "blk.{i}.post_attention_norm",
    "moe.router": "blk.{i}.ffn_gate_inp",
    "moe.gate": "blk.{i}.ffn_gate_exps",
    "moe.up": "blk.{i}.ffn_up_exps",
    "moe.down": "blk.{i}.ffn_down_exps",
}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a GGUF file; `shape` is numpy's (rows first), `type` gguf's GGMLQuantizationType."""

    name: str
    path: Path
    start: int
    nbytes: int
    shape: tuple[int, ...]
    type: Any


def open_gguf(path: Path, *, id: str | None = None) -> Source:
    """The model in a GGUF file (any part of one that is split), or in the files of a folder.

    Raises ConversionError when the `gguf` package is missing or the file is not gpt-oss, CheckpointError when
    it is broken or lacks something.
    """
    files = gguf_files(path)
    model = _Model(path, files)
    config = model.config()
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        config = read_config(folder)[0]
    tensors = {tensor.name: tensor for tensor in model.read(config)}
    model.check_all_used()
    return Source(
        kind="gguf",
        id=id or path.resolve().name,
        revision=folder.name if folder.parent.name == "snapshots" else None,
        folder=folder,
        files=files,
        config=config,
        raw_config=config.to_hf(),
        tensors=tensors,
    )


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


class _Model:
    """Headers of all files together, and which tensors have been asked for."""

    def __init__(self, where: Path, files: tuple[Path, ...]) -> None:
        self.where = where
        self.tensors: dict[str, _Tensor] = {}
        self.fields: dict[str, Any] = {}
        self._used: set[str] = set()
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
                if t.name in self.tensors:
                    raise CheckpointError(f"{file}: {t.name} is in two files; keep one model in the folder")
                self.tensors[t.name] = tensor
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
        get = lambda name, default=None: self.field(f"{ARCHITECTURE}.{name}", default)  # noqa: E731
        embedding = self.tensors.get(f"{_NAMES['embedding']}.weight")
        if embedding is None:
            raise CheckpointError(f"{self.where}: {_NAMES['embedding']}.weight is missing")
        original = get("rope.scaling.original_context_length")
        return ModelConfig.from_original(
            {
                "num_hidden_layers": get("block_count"),
                "hidden_size": get("embedding_length"),
                "intermediate_size": get("expert_feed_forward_length"),
                "num_experts": get("expert_count"),
                "experts_per_token": get("expert_used_count"),
                "head_dim": get("attention.key_length"),
                "num_attention_heads": get("attention.head_count"),
                "num_key_value_heads": get("attention.head_count_kv"),
                "vocab_size": embedding.shape[0],
                "sliding_window": get("attention.sliding_window"),
                "rope_theta": get("rope.freq_base"),
                "rope_scaling_factor": get("rope.scaling.factor"),
                "initial_context_length": original,
                "rope_ntk_alpha": get("rope.scaling.yarn_beta_slow", 1.0),
                "rope_ntk_beta": get("rope.scaling.yarn_beta_fast", 32.0),
            }
        )

    def take(self, name: str, shape: tuple[int, ...]) -> _Tensor:
        """A tensor of this shape. Raises CheckpointError."""
        if "post_attention_norm" in name and name not in self.tensors:
            name = name.replace("post_attention_norm", "ffn_norm")
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.where}: {name} is missing")
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
        self._used.add(name)
        return tensor

    def check_all_used(self) -> None:
        """Raise CheckpointError for tensors that are no part of the model."""
        extra = [name for name in self.tensors if name not in self._used]
        if extra:
            raise CheckpointError(f"{self.where}: {', '.join(extra[:10])} are not part of the model")

    def read(self, c: ModelConfig) -> Iterator[SourceTensor]:
        """Every tensor under Hugging Face's names."""
        hf, vocabulary = NAMES["hf"], (c.vocab_size, c.hidden_size)
        yield self._dense(_NAMES["embedding"] + ".weight", hf["embedding"] + ".weight", vocabulary)
        q, kv = c.num_attention_heads * c.head_dim, c.num_kv_heads * c.head_dim
        for i in range(c.num_layers):
            old = {part: name.format(i=i) for part, name in _NAMES.items()}
            new = {part: name.format(i=i) for part, name in hf.items()}
            for part in ("attention.norm", "moe.norm"):
                yield self._dense(old[part] + ".weight", new[part], (c.hidden_size,))
            sinks = self._either(old["attention.sinks"] + ".weight", old["attention.sinks"])
            yield self._dense(sinks, new["attention.sinks"], (c.num_attention_heads,))
            for part, rows, columns in (
                ("attention.q", q, c.hidden_size),
                ("attention.k", kv, c.hidden_size),
                ("attention.v", kv, c.hidden_size),
                ("attention.out", c.hidden_size, q),
                ("moe.router", c.num_experts, c.hidden_size),
            ):
                yield self._dense(old[part] + ".weight", new[part] + ".weight", (rows, columns))
                yield self._dense(old[part] + ".bias", new[part] + ".bias", (rows,))
            yield from self._experts(c, old, new)
        yield self._dense(_NAMES["norm"] + ".weight", hf["norm"], (c.hidden_size,))
        yield self._dense(_NAMES["head"] + ".weight", hf["head"] + ".weight", vocabulary)

    def _either(self, first: str, second: str) -> str:
        return first if first in self.tensors else second

    def _experts(self, c: ModelConfig, old: dict[str, str], new: dict[str, str]) -> Iterator[SourceTensor]:
        e, d, f = c.num_experts, c.hidden_size, c.intermediate_size
        halves = ("moe.gate", "moe.up")
        for target, parts, rows, columns in (
            ("moe.gate_up", halves, f, d),
            ("moe.down", ("moe.down",), d, f),
        ):
            weights = [self.take(old[p] + ".weight", (e, rows, columns)) for p in parts]
            biases = [self.take(old[p] + ".bias", (e, rows)) for p in parts]
            yield _joined(new[f"{target}_bias"], [_dense_reader(b) for b in biases], "F32", biases, (rows,))
            kinds = {w.type.name for w in weights}
            if kinds <= FLOATS:
                name = new[target].removesuffix("_blocks")
                yield _joined(name, [_dense_reader(w) for w in weights], "F32", weights, (rows, columns))
                continue
            if kinds != {"MXFP4"}:
                raise ConversionError(
                    f"{weights[0].path}: {weights[0].name} is {' and '.join(sorted(kinds))}, expected MXFP4 "
                    "or floats; other types have lost the published weights, convert another file"
                )
            blocks = [_block_reader(w) for w in weights]
            scales = [_scale_reader(w) for w in weights]
            yield _joined(new[target], blocks, "U8", weights, (rows, columns // 32, 16))
            yield _joined(new[f"{target}_scales"], scales, "U8", weights, (rows, columns // 32))

    def _dense(self, source: str, target: str, shape: tuple[int, ...]) -> SourceTensor:
        tensor = self.take(source, shape)
        return SourceTensor(target, "F32", shape, (tensor.name,), _dense_reader(tensor))


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


def _dense_reader(tensor: _Tensor) -> Any:
    def read(first: int, last: int) -> np.ndarray:
        from gguf.quants import dequantize

        raw = _read_rows(tensor, first, last)
        if tensor.type.name == "F32":
            values = raw.view("<f4")
        elif tensor.type.name == "F16":
            values = raw.view("<f2").astype(np.float32)
        else:
            try:
                values = dequantize(raw, tensor.type)
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


def _scale_reader(tensor: _Tensor) -> Any:
    return lambda first, last: _packed_rows(tensor, first, last)[..., 0]


def _block_reader(tensor: _Tensor) -> Any:
    def read(first: int, last: int) -> np.ndarray:
        packed = _packed_rows(tensor, first, last)[..., 1:]
        low, high = packed & 15, packed >> 4  # values 0..15 and 16..31 of the block
        blocks = np.empty_like(packed)
        blocks[..., :8] = low[..., 0::2] | (low[..., 1::2] << np.uint8(4))
        blocks[..., 8:] = high[..., 0::2] | (high[..., 1::2] << np.uint8(4))
        return blocks

    return read


def _joined(
    name: str, readers: list[Any], dtype: str, tensors: list[_Tensor], row_shape: tuple[int, ...]
) -> SourceTensor:
    """One tensor [E, ..], or gate and up with their rows alternating, [E, 2 * rows, ..]."""
    shape = (tensors[0].shape[0], len(readers) * row_shape[0], *row_shape[1:])

    def read(first: int, last: int) -> np.ndarray:
        return np.stack([r(first, last) for r in readers], axis=2).reshape(last - first, *shape[1:])

    return SourceTensor(name, dtype, shape, tuple(t.name for t in tensors), read)
