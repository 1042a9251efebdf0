"""What a kernel is made of: its text reaches MLX through one place, and its hash follows the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gptoss.model.kernels import kernel as kernels
from mlx_gptoss.model.kernels.kernel import Kernel, Launch, Program

TWICE = Program(
    "twice",
    ("x",),
    ("y",),
    "uint i = thread_position_in_grid.x; y[i] = both(x[i]);",
    "#define both(a) a + a\n",
)


def launched(x: mx.array) -> tuple[mx.array, ...]:
    launch = Launch((x.size, 1, 1), (1, 1, 1), ((tuple(x.shape), x.dtype),), (("T", x.dtype),))
    return tuple(TWICE(x, launch=launch))


DOUBLE = Kernel("double", (TWICE,), lambda x: x.ndim == 1, launched, lambda x: (x + x,))


def test_mlx_is_handed_the_text_under_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "exported"
    mx.export_function(str(path), lambda x: DOUBLE(x)[0], mx.zeros(16, mx.float16))
    recorded = path.read_bytes()
    assert TWICE.source.encode() in recorded and TWICE.header.encode() in recorded
    assert f"custom_kernel_twice_{TWICE.text_hash[:12]}".encode() in recorded


def test_every_launch_goes_through_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_hand(program: Program, inputs: Sequence[mx.array], launch: Launch) -> list[mx.array]:
        assert program is TWICE and launch.grid == (3, 1, 1)
        return [inputs[0] * 2]

    monkeypatch.setattr(kernels, "run", by_hand)
    x = mx.array([1.0, 2.0, 3.0])
    assert DOUBLE(x)[0].tolist() == DOUBLE.reference(x)[0].tolist() == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("change", ["name", "header", "source"])
def test_the_hash_follows_the_text(change: str) -> None:
    other = replace(TWICE, **{change: getattr(TWICE, change) + "s"})
    assert replace(DOUBLE, programs=(other,)).source_hash != DOUBLE.source_hash
    assert replace(DOUBLE, programs=(replace(TWICE),)).source_hash == DOUBLE.source_hash
