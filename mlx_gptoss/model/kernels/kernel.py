"""What a Metal kernel of our own is, and the one place where it is handed to MLX.

A Kernel does what some operations of the graph do together. It comes with these operations as its reference,
and without a verdict on the machine at hand nothing uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import mlx.core as mx

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# MLX hands smaller arrays over in constant memory, to which the texts' pointers do not point.
DEVICE_SIZE = 8
Size: TypeAlias = tuple[int, int, int]
Template: TypeAlias = tuple[tuple[str, mx.Dtype | int | bool], ...]


@dataclass(frozen=True)
class Launch:
    """How a program is run. grid: threads in all; threadgroup: threads that share memory.

    outputs: shape and dtype of each. template: the values of the text's type and number parameters; each
    new set of them is compiled anew, so nothing that changes from token to token belongs there.
    """

    grid: Size
    threadgroup: Size
    outputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]
    template: Template = ()


@dataclass(frozen=True)
class Program:
    """The text of one Metal function, as mx.fast.metal_kernel takes it: its body, and what stands before it.

    contiguous: MLX copies inputs that are not row-contiguous. Otherwise the text goes by NAME_strides.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str = ""
    contiguous: bool = True

    @cached_property
    def text_hash(self) -> str:
        """Tells apart all that MLX is told of the function."""
        parts = (self.name, *self.inputs, "->", *self.outputs, self.header, self.source, str(self.contiguous))
        return hashlib.sha256("\0".join(parts).encode("ascii")).hexdigest()

    @cached_property
    def function(self) -> Callable[..., list[mx.array]]:
        """MLX's kernel. MLX compiles at every call where two texts of one name alternate: none do."""
        made: Any = mx.fast.metal_kernel(
            name=f"{self.name}_{self.text_hash[:12]}",
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=self.source,
            header=self.header,
            ensure_row_contiguous=self.contiguous,
        )
        return made  # type: ignore[no-any-return]

    def __call__(self, *inputs: mx.array, launch: Launch) -> list[mx.array]:
        return run(self, inputs, launch)


def run(program: Program, inputs: Sequence[mx.array], launch: Launch) -> list[mx.array]:
    """Have MLX run a program: lazily, on Metal alone. Every launch goes through here."""
    return program.function(
        inputs=list(inputs),
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[shape for shape, _ in launch.outputs],
        output_dtypes=[dtype for _, dtype in launch.outputs],
    )


@dataclass(frozen=True)
class Kernel:
    """An operation: its programs, and the same in MLX's operations.

    accepts, launch and reference take the same arrays. accepts: whether their shapes and dtypes suit the
    kernel (their values never matter). launch and reference are lazy and return the same arrays, but for
    rounding: a kernel adds in float32 and rounds once.
    """

    name: str
    programs: tuple[Program, ...]
    accepts: Callable[..., bool]
    launch: Callable[..., tuple[mx.array, ...]]
    reference: Callable[..., tuple[mx.array, ...]]

    def __call__(self, *inputs: mx.array) -> tuple[mx.array, ...]:
        return self.launch(*inputs)

    def in_float32(self, *inputs: mx.array) -> tuple[mx.array, ...]:
        """The reference of the same numbers in float32: what a kernel's own outputs are rounded from."""
        return self.reference(*(a.astype(mx.float32) if a.dtype in FLOATS else a for a in inputs))

    @cached_property
    def source_hash(self) -> str:
        """Changes with any of the programs' texts."""
        return hashlib.sha256("".join(p.text_hash for p in self.programs).encode("ascii")).hexdigest()
