"""Programs run as kernel.run would have Metal run them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.kernels.kernel import Launch, Program
from tests.metal.emulator.text import HostText, host_text, lint, recorded
from tests.metal.emulator.toolchain import KernelError, check, library, machine

SIXTEEN = {mx.bfloat16: mx.uint16}  # numpy has no bfloat16
NUMPY = {
    mx.bfloat16: np.uint16,
    mx.float16: np.float16,
    mx.float32: np.float32,
    mx.uint32: np.uint32,
    mx.int32: np.int32,
    mx.uint8: np.uint8,
}
NOT_THERE = 255  # machine.cpp
KEPT_FROM = 1 << 20  # bytes from which the guarded copy of an input is kept for its next use


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("marks", ctypes.c_void_p),
        ("output", ctypes.c_uint64),
    )


class _Job(ctypes.Structure):
    _fields_ = (
        ("body", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("count", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("traced", ctypes.c_uint64),
        ("image", ctypes.c_void_p * 4),
        ("simd_operations", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("message", ctypes.c_char * 256),
    )


class _Guarded:
    """Memory between pages that cannot be touched."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(machine().emulator_allocate(size))
        whole = (ctypes.c_uint8 * size).from_address(self.address)
        self.bytes = np.ctypeslib.as_array(whole) if size else np.empty(0, np.uint8)

    def __del__(self) -> None:
        machine().emulator_free(self.address, self.size)


@dataclass
class Report:
    """What one launch did. loads: how often each byte of an input was loaded (traced alone)."""

    program: str
    simd_operations: int
    barriers: int
    loads: dict[str, np.ndarray] = field(default_factory=dict)


class Emulator:
    """Its `run` stands in for kernel.run. traced: every load and store is looked at, which takes longer.

    seed: the order in which threads run; 0 is their own. checked: the text must pass what
    Metal asks of it, and no integer may overflow.
    """

    def __init__(self, *, traced: bool = False, seed: int = 0, checked: bool = True) -> None:
        self.traced, self.seed, self.checked = traced, seed, checked
        self.constants: dict[int, str] = {}
        self.reports: list[Report] = []
        self._kept: dict[int, tuple[mx.array, _Guarded]] = {}

    def run(self, program: Program, inputs: Sequence[mx.array], launch: Launch) -> list[mx.array]:
        """As kernel.run, at once. Raises KernelError."""
        text = self._text(program, inputs, launch)
        made = library(text.code, self.traced, self.checked)
        named = dict(zip(program.inputs, inputs, strict=True))
        outputs = dict(zip(program.outputs, launch.outputs, strict=True))
        memory: dict[str, _Guarded] = {}
        marks: dict[str, np.ndarray] = {}
        for name in text.buffers:
            if name in outputs:
                shape, dtype = outputs[name]
                memory[name] = _Guarded(int(np.prod(shape)) * np.dtype(NUMPY[dtype]).itemsize)
            elif name in named:
                memory[name], marks[name] = self._guarded(named[name], program.contiguous)
            else:
                memory[name] = _copied(_about(named, name, program.contiguous))
            if self.traced:
                marks.setdefault(name, np.zeros(memory[name].size, np.uint8))
        self._launch(program, made, text, launch, memory, marks if self.traced else {}, outputs)
        return [_output(memory[name], *outputs[name]) for name in program.outputs]

    def _text(self, program: Program, inputs: Sequence[mx.array], launch: Launch) -> HostText:
        kinds = tuple((a.dtype, a.ndim, a.size < 8) for a in inputs)
        key = (
            program,
            kinds,
            launch.template,
            tuple(d for _, d in launch.outputs),
            tuple(self.constants.items()),
        )
        if key not in _TEXTS:
            text = recorded(program, [mx.zeros_like(a) for a in inputs], launch)
            if self.checked and (found := lint(text)):
                raise KernelError("lint", "; ".join(found))
            host = host_text(text, program.inputs, self.constants)
            if self.checked:
                check(host.code)
            _TEXTS[key] = host
        return _TEXTS[key]

    def _launch(
        self,
        program: Program,
        made: ctypes.CDLL,
        text: HostText,
        launch: Launch,
        memory: dict[str, _Guarded],
        marks: dict[str, np.ndarray],
        outputs: Mapping[str, object],
    ) -> None:
        job = _Job(count=len(text.buffers), seed=self.seed, traced=self.traced)
        job.body = ctypes.cast(made.emulator_body, ctypes.c_void_p)
        job.grid[:], job.threadgroup[:] = launch.grid, _within(launch)
        made.emulator_image(job.image)
        job.buffers = (_Buffer * len(text.buffers))(
            *(
                _Buffer(
                    memory[n].address, memory[n].size, marks[n].ctypes.data if marks else None, n in outputs
                )
                for n in text.buffers
            )
        )
        if machine().emulator_run(ctypes.byref(job)):
            raise KernelError("run", job.message.decode("ascii"))
        report = Report(program.name, job.simd_operations, job.barriers)
        for name in text.buffers if marks else ():
            if name in outputs and not marks[name].all():
                missed = int((marks[name] == 0).sum())
                raise KernelError("run", f"{missed} of {len(marks[name])} bytes of {name} are never written")
            if name in program.inputs:
                report.loads[name] = marks[name]
        self.reports.append(report)

    def _guarded(self, array: mx.array, contiguous: bool) -> tuple[_Guarded, np.ndarray]:
        """An input's memory, and the marks of its bytes: those between a view's rows are not there."""
        kept = self._kept.get(id(array))
        if kept is not None:
            return kept[1], np.zeros(kept[1].size, np.uint8)
        values = _raw(array)
        if contiguous or values.flags.c_contiguous:
            made = _copied(values)
            if made.size >= KEPT_FROM:
                self._kept[id(array)] = (array, made)
            return made, np.zeros(made.size, np.uint8)
        reach = sum((n - 1) * s for n, s in zip(values.shape, values.strides, strict=True)) + values.itemsize
        made = _Guarded(reach)
        marks = np.full(reach, NOT_THERE, np.uint8)
        view = np.ndarray(values.shape, values.dtype, made.bytes, strides=values.strides)
        view[...] = values
        for i in range(values.itemsize):
            np.ndarray(values.shape, np.uint8, marks, offset=i, strides=values.strides)[...] = 0
        return made, marks


def _within(launch: Launch) -> list[int]:
    """Threads of a threadgroup: no more than there are in all."""
    return [min(some, every) for some, every in zip(launch.threadgroup, launch.grid, strict=True)]


_TEXTS: dict[object, HostText] = {}


def _raw(array: mx.array) -> np.ndarray:
    """The values where they are, a dtype that numpy lacks as its bits."""
    mx.eval(array)
    seen = array.view(SIXTEEN[array.dtype]) if array.dtype in SIXTEEN else array
    mx.eval(seen)
    return np.asarray(seen)


def _copied(values: np.ndarray) -> _Guarded:
    made = _Guarded(values.nbytes)
    if values.nbytes:
        np.ndarray(values.shape, values.dtype, made.bytes)[...] = values
    return made


def _about(named: dict[str, mx.array], name: str, contiguous: bool) -> np.ndarray:
    """NAME_shape, NAME_strides or NAME_ndim, as MLX hands them over."""
    of, what = name.rsplit("_", 1)
    array = named[of]
    if what == "shape":
        return np.array(array.shape, np.int32)
    if what == "ndim":
        return np.array(array.ndim, np.int32)
    values = _raw(array)
    if contiguous:
        values = np.empty(values.shape, values.dtype)
    return np.array(values.strides, np.int64) // values.itemsize


def _output(memory: _Guarded, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    values = np.ndarray(shape, NUMPY[dtype], memory.bytes).copy()
    made = mx.array(values)
    return made.view(dtype) if dtype in SIXTEEN else made
