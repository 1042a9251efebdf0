"""Strict reading of safetensors files: headers that are checked whole, raw bytes read by range.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header mapping
each name to ``{"dtype", "shape", "data_offsets": [start, end]}`` with offsets counted from the end of the
header, then the data.  Tensors must tile the data exactly: no hole, no overlap, nothing left over.  Whatever
breaks a rule is a CheckpointError that names the file, what was found and what was expected.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.files import open_regular, read_limited

INDEX_NAME = "model.safetensors.index.json"
# gpt-oss-120b's largest header has some 100 kB; the format's own limit, 100 MB, takes a gigabyte to parse.
MAX_HEADER_BYTES = 16 * 2**20
MAX_INDEX_BYTES = 32 * 2**20

# dtype -> numpy's, of the raw bits: bfloat16 and float8 come as unsigned integers.
DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(code)
    for name, code in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": "<u2",
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
        "F8_E8M0": "u1",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U64": "<u8",
        "U32": "<u4",
        "U16": "<u2",
        "U8": "u1",
        "BOOL": "?",
    }.items()
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes ``start`` to ``end`` (absolute, in the file ``path``), row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    path: Path

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name, in the order of their data.

    Raises CheckpointError for anything that is not a whole, consistent file.
    """
    file = Path(path)
    size, raw = _read_raw_header(file)
    entries = _parse_json(raw, f"{file}: the header")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: the header is a JSON {type(entries).__name__}, expected an object")
    metadata = entries.pop("__metadata__", None)  # null is what MLX writes when it has none
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if metadata is not None and not texts:
        raise CheckpointError(f"{file}: __metadata__ must map names to strings, found {metadata!r:.80}")
    position = base = 8 + len(raw)
    tensors = [_check_entry(file, name, entry, base, size) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.start, t.end))
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise CheckpointError(
                f"{file}: {tensor.name} starts at byte {tensor.start - base} and {what} "
                f"(expected {position - base}); the file is corrupt, download it again"
            )
        position = tensor.end
    if position != size:
        raise CheckpointError(
            f"{file}: the tensors end at byte {position} but the file has {size} bytes; download it again"
        )
    return {t.name: t for t in tensors}


def read_names(folder: str | os.PathLike[str]) -> list[str]:
    """The names of a checkpoint folder's tensors: from its index, so that no other file is opened, where it
    has one. Raises CheckpointError as `read_folder` does.
    """
    index = Path(folder) / INDEX_NAME
    return list(_read_index(index) if os.path.lexists(index) else read_folder(folder))


def read_folder(
    folder: str | os.PathLike[str], wanted: Collection[str] | None = None
) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint folder, by name: all of them, or the `wanted` ones.

    The files are those its index names, else every ``*.safetensors`` in it that is not hidden (a Mac puts
    ``._NAME`` beside NAME on foreign disks).  They must lie inside the folder; in a Hugging Face cache, links
    into the repository's own ``blobs`` count as inside.  Raises CheckpointError for a missing, corrupt or
    escaping file, a name held twice, or an index that disagrees with the files. With an index, files that
    hold nothing wanted are not opened, and need not be there.
    """
    root = Path(folder)
    index = root / INDEX_NAME
    weight_map = _read_index(index) if os.path.lexists(index) else None
    if weight_map is not None:
        if wanted is not None:
            weight_map = {name: weight_map[name] for name in wanted if name in weight_map}
        files = sorted(set(weight_map.values()))
    else:
        files = sorted(p.name for p in root.glob("*.safetensors"))
        files = [name for name in files if not name.startswith(("adapter", "."))]
    if not files:
        raise CheckpointError(f"{root}: no safetensors files, expected {INDEX_NAME} or *.safetensors")
    found: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(_inside(root, file)).items():
            if wanted is not None and name not in wanted:
                continue
            if name in found:
                raise CheckpointError(
                    f"{root}: {name} is in both {found[name].path.name} and {file}; keep one"
                )
            found[name] = info
            if weight_map is not None and weight_map.get(name) != file:
                raise CheckpointError(
                    f"{index}: {name} is in {file}, the index says {weight_map.get(name, 'nothing of it')}"
                )
    for name, file in (weight_map or {}).items():
        if name not in found:
            raise CheckpointError(f"{index}: {name} should be in {file}, which does not hold it")
    return found


def read_bytes(info: TensorInfo, offset: int = 0, length: int | None = None) -> np.ndarray:
    """``length`` raw bytes (default: the rest) from byte ``offset`` of the tensor, as uint8 [length].

    Raises CheckpointError when the file has become shorter since its header was read.
    """
    count = info.nbytes - offset if length is None else length
    if offset < 0 or count < 0 or offset + count > info.nbytes:
        raise ValueError(f"{info.name}: bytes {offset}+{count} lie outside its {info.nbytes}")
    try:
        found = np.fromfile(info.path, np.uint8, count, offset=info.start + offset)
    except OSError as error:
        raise CheckpointError(f"{info.path}: cannot be read: {error.strerror}") from error
    if len(found) < count:
        raise CheckpointError(f"{info.path}: ended inside {info.name}; it was cut short")
    return found


def read_rows(info: TensorInfo, first: int = 0, last: int | None = None) -> np.ndarray:
    """Rows ``first`` to ``last`` (exclusive; default: all) along the first axis, as raw numpy values.

    bfloat16 comes as uint16 bits, float8 as uint8 bits. A scalar comes as it is.
    """
    rows = info.shape[0] if info.shape else 1
    last = rows if last is None else last
    size = info.nbytes // max(1, rows)
    values = read_bytes(info, first * size, (last - first) * size).view(DTYPES[info.dtype])
    return values.reshape((last - first, *info.shape[1:]) if info.shape else ())


def read_part(info: TensorInfo, axis: int, start: int, end: int) -> np.ndarray:
    """Entries ``start`` to ``end`` along an axis, as raw numpy values; see read_rows.

    Along the first axis, or the second of three or more, only their bytes are read.
    """
    if axis == 0:
        return read_rows(info, start, end)
    here = (slice(None),) * (axis - 1) + (slice(start, end),)
    if len(info.shape) == 2:
        return np.ascontiguousarray(read_rows(info)[:, start:end])
    count, rows, *rest = info.shape
    part = np.empty((*info.shape[:axis], end - start, *info.shape[axis + 1 :]), DTYPES[info.dtype])
    size = info.nbytes // (count * rows)
    for i in range(count):
        if axis == 1:
            values = read_bytes(info, (i * rows + start) * size, (end - start) * size)
            part[i] = values.view(part.dtype).reshape(end - start, *rest)
        else:
            part[i] = read_rows(info, i, i + 1)[0][here]
    return part


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 values -> float32, same shape."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _read_raw_header(file: Path) -> tuple[int, bytes]:
    """File size and the header's bytes, checked to fit into the file."""
    try:
        with open_regular(file) as stream:
            status = os.fstat(stream.fileno())
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file}: {status.st_size} bytes is too short for a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > min(status.st_size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: says its header has {length} bytes, the file has {status.st_size}; "
                    "it is truncated or not a model's safetensors file, download it again"
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    if len(raw) < length:
        raise CheckpointError(f"{file}: ended inside its header; download it again")
    return status.st_size, raw


def _parse_json(raw: bytes, what: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{what} holds {key!r} twice; the file is corrupt")
            result[key] = value
        return result

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}); the file is corrupt") from error
    except ValueError as error:  # an integer of thousands of digits
        raise CheckpointError(f"{what} holds an unreadable number ({error})") from error


def _naturals(value: Any) -> tuple[int, ...] | None:
    """The value as a tuple of integers >= 0, or None if it is anything else."""
    if isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value):
        return tuple(value)
    return None


def _check_entry(file: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    """One header entry, checked against its dtype, its shape and the file's size."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{file}: {name!r:.80} must hold dtype, shape and data_offsets, found {entry!r:.80}"
        )
    dtype, shape, offsets = entry["dtype"], _naturals(entry["shape"]), _naturals(entry["data_offsets"])
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype!r:.40}, expected one of {', '.join(DTYPES)}")
    if shape is None:
        raise CheckpointError(f"{file}: {name} has shape {entry['shape']!r:.60}, expected integers >= 0")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{file}: {name} has data_offsets {entry['data_offsets']!r:.60}, expected [start, end]"
        )
    expected = DTYPES[dtype].itemsize * prod(shape)
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{file}: {name} is {dtype} {list(shape)[:8]} = {expected} bytes, "
            f"its data_offsets hold {offsets[1] - offsets[0]}"
        )
    if base + offsets[1] > size:
        raise CheckpointError(
            f"{file}: {name} ends at byte {base + offsets[1]} of a file of {size}; it is truncated"
        )
    return TensorInfo(name, dtype, shape, base + offsets[0], base + offsets[1], file)


def _read_index(index: Path) -> dict[str, str]:
    """The index's weight_map: tensor name -> file name."""
    try:
        raw = read_limited(_inside(index.parent, index.name), MAX_INDEX_BYTES)
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from error
    content = _parse_json(raw, str(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty, expected tensor name -> file name")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {name} is mapped to {file!r:.80}, expected a .safetensors file name"
            )
    return weight_map


def _inside(root: Path, name: str) -> Path:
    """``root / name``, refused unless it lies in the folder, links followed.

    A Hugging Face cache keeps ``snapshots/<revision>/file -> ../../blobs/<hash>``: blobs count as inside.
    """
    if "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{root}: {name!r:.120} points outside the folder, expected a plain file name")
    path = root / name
    try:
        home, target = root.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no such file; the download is incomplete") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: links to {target}, outside the folder; copy the file into it")
    return path
