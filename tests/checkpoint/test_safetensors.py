"""A file of tensors is read by range, and what it says of itself is held against its bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_gptoss.checkpoint.safetensors import INDEX_NAME, read_bytes, read_folder, read_header, read_rows
from mlx_gptoss.errors import CheckpointError

A = np.arange(24, dtype="<f4").reshape(4, 3, 2)
B = np.arange(10, dtype="<u2")


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ENTRIES = {"a": entry("F32", [4, 3, 2], 0, 96), "b": entry("BF16", [10], 96, 116)}


def write(path: Path, entries: Any, data: bytes = A.tobytes() + B.tobytes()) -> Path:
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "model.safetensors", {"b": ENTRIES["b"], "a": ENTRIES["a"]})


def test_tensors_come_in_the_order_of_their_data_with_their_places(file: Path) -> None:
    found = read_header(file)
    base = file.stat().st_size - 116
    assert [(t.name, t.dtype, t.shape, t.start - base, t.end - base, t.nbytes) for t in found.values()] == [
        ("a", "F32", (4, 3, 2), 0, 96, 96),
        ("b", "BF16", (10,), 96, 116, 20),
    ]


def test_rows_and_bytes_are_those_of_the_range(file: Path) -> None:
    found = read_header(file)
    for first in range(5):
        for last in (*range(first, 5), None):
            assert np.array_equal(read_rows(found["a"], first, last), A[first:last])
    assert np.array_equal(read_rows(found["b"]), B)
    assert read_bytes(found["b"], 3, 5).tobytes() == B.tobytes()[3:8]
    assert read_bytes(found["b"], 3).tobytes() == B.tobytes()[3:]
    assert len(read_bytes(found["b"], 20)) == len(read_bytes(found["b"], 7, 0)) == 0


@pytest.mark.parametrize("shape", [[1, 5], [0, 5], [5, 0], [], [2]])
def test_tensors_of_few_rows_are_read_whole(tmp_path: Path, shape: list[int]) -> None:
    values = np.arange(int(np.prod(shape)), dtype="<f4").reshape(shape)
    entries = {"x": entry("F32", shape, 0, values.nbytes)}
    found = read_rows(read_header(write(tmp_path / "model.safetensors", entries, values.tobytes()))["x"])
    assert found.shape == values.shape and np.array_equal(found, values)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, 21), (20, 1), (21, None), (5, 16)])
def test_bytes_outside_the_tensor_are_refused(file: Path, offset: int, length: int | None) -> None:
    with pytest.raises(ValueError, match="b: bytes .* outside its 20"):
        read_bytes(read_header(file)["b"], offset, length)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({**ENTRIES, "b": entry("BF16", [9], 96, 116)}, r"b is BF16 \[9\] = 18 bytes, .* hold 20"),
        ({**ENTRIES, "b": entry("F32", [10], 96, 116)}, r"b is F32 \[10\] = 40 bytes, .* hold 20"),
        ({**ENTRIES, "b": entry("BF16", [11], 96, 118)}, r"b ends at byte \d+ of a file of \d+"),
        ({**ENTRIES, "b": entry("BF16", [10], 94, 114)}, "b starts at byte 94 and overlaps .*expected 96"),
        ({"a": ENTRIES["a"], "b": entry("BF16", [9], 98, 116)}, "starts at byte 98 and leaves a hole"),
        ({"a": ENTRIES["a"]}, r"the tensors end at byte \d+ but the file has \d+ bytes"),
        ({**ENTRIES, "b": entry("BF16", [10], 116, 96)}, r"b has data_offsets \[116, 96\]"),
        ({**ENTRIES, "b": entry("BF17", [10], 96, 116)}, "b has dtype 'BF17'"),
        ({**ENTRIES, "b": entry("BF16", [-10], 96, 116)}, r"b has shape \[-10\]"),
        ({**ENTRIES, "__metadata__": {"a": 1}}, "__metadata__ must map names to strings"),
        ([ENTRIES], "the header is a JSON list"),
    ],
)
def test_a_header_that_does_not_fit_is_told_with_its_numbers(tmp_path: Path, entries: Any, told: str) -> None:
    path = write(tmp_path / "model.safetensors", entries)
    with pytest.raises(CheckpointError, match=told) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_an_integer_of_thousands_of_digits_is_a_broken_header(tmp_path: Path) -> None:
    text = b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 1]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="unreadable number"):
        read_header(path)


ONE, TWO = "model-1.safetensors", "model-2.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "told"),
    [
        ({"a": TWO, "b": TWO, "c": ONE}, "a is in model-1.safetensors, the index says model-2"),
        ({"a": ONE, "b": ONE, "c": TWO}, "b is in model-2.safetensors, the index says model-1"),
        ({"a": ONE, "c": TWO}, "b is in model-2.safetensors, the index says nothing"),
        ({"a": ONE, "b": TWO, "c": TWO}, "c should be in model-2.safetensors, which does not hold it"),
    ],
)
def test_an_index_that_disagrees_with_its_files_is_refused(
    tmp_path: Path, weight_map: dict[str, str], told: str
) -> None:
    write(tmp_path / ONE, {"a": ENTRIES["a"]}, A.tobytes())
    write(tmp_path / TWO, {"b": entry("BF16", [10], 0, 20)}, B.tobytes())
    good = {"a": ONE, "b": TWO}
    for stored in (good, weight_map):
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": stored}))
        if stored == good:
            assert {name: info.path.name for name, info in read_folder(tmp_path).items()} == good
        else:
            with pytest.raises(CheckpointError, match=told):
                read_folder(tmp_path)


def test_a_name_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    for name in (ONE, TWO):
        write(tmp_path / name, {"a": ENTRIES["a"]}, A.tobytes())
    with pytest.raises(CheckpointError, match=f"a is in both {ONE} and {TWO}"):
        read_folder(tmp_path)
