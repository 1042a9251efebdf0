"""A kernel's text: as MLX would hand it to Metal, what Metal forbids in it, and as C++ for a host."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_gptoss.model.kernels.kernel import Launch, Program

# What a parameter with this attribute is, of the thread `p` (shim.h: Place).
PLACES = {
    "thread_position_in_grid": "emulator::vector(p.in_grid)",
    "thread_position_in_threadgroup": "emulator::vector(p.in_group)",
    "threadgroup_position_in_grid": "emulator::vector(p.group)",
    "threads_per_threadgroup": "emulator::vector(p.threads)",
    "threads_per_grid": "emulator::vector(p.grid)",
    "threadgroups_per_grid": "emulator::vector(p.groups)",
    "thread_index_in_threadgroup": "p.index",
    "thread_index_in_simdgroup": "p.lane",
    "simdgroup_index_in_threadgroup": "p.simdgroup",
    "simdgroups_per_threadgroup": "p.simdgroups",
    "threads_per_simdgroup": "32u",
}
SCALARS = "half|float|bfloat|bfloat16_t|float16_t|bool|T|u?int|u?int(?:8|16|32|64)_t|u?char|u?short|size_t"
TYPES = rf"(?:{SCALARS})[234]?"
WORDS = "double|goto|new|delete|throw|try|virtual|thread_local|typeid|asm"


@dataclass(frozen=True)
class HostText:
    """C++ of a kernel, and what its buffers are, in order: NAME, NAME_shape, NAME_strides or NAME_ndim."""

    code: str
    buffers: tuple[str, ...]


def recorded(program: Program, inputs: Sequence[mx.array], launch: Launch) -> str:
    """The text that MLX would compile. Exporting a graph writes it down, on a machine without Metal too."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exported"
        mx.export_function(str(path), lambda *arrays: _graph(program, arrays, launch), *inputs)
        data = path.read_bytes()
    mark = b"CustomKernel"
    at = data.index(mark) + len(mark)
    for _ in ("its name", "its text"):
        length = int.from_bytes(data[at : at + 8], "little")
        found, at = data[at + 8 : at + 8 + length], at + 8 + length
    return found.decode("ascii")


def _graph(program: Program, arrays: Sequence[mx.array], launch: Launch) -> list[mx.array]:
    return program.function(
        inputs=list(arrays),
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[shape for shape, _ in launch.outputs],
        output_dtypes=[dtype for _, dtype in launch.outputs],
    )


def lint(text: str) -> list[str]:
    """What Metal refuses and clang, even with address spaces, does not."""
    code = re.sub(r"//[^\n]*", "", text)
    found = [] if text.isascii() else ["a character that is not ASCII"]
    forbidden = rf"\b(?:{WORDS}|long\s+long)\b|\bstd::|\[[=&]\]"
    found += [f"not in Metal: {m[0]}" for m in re.finditer(forbidden, code)]
    for m in re.finditer(rf"[^\n;,(){{}}]*\b((?:const\s+)?{TYPES})\s*([*&])(?!&)\s*(?:\w+|\)|>)", code):
        before = m[0][: m.start(2) - m.start(0)]
        if re.search(r"\b(?:return|case)\b|[=+\-*/<]\s*$", before):
            continue
        if not re.search(rf"\b(?:device|constant|threadgroup|thread)\b[\w\s<>:]*{TYPES}\s*$", before):
            found.append(f"a pointer or reference without address space: {m[0].strip()}")
    cast = (
        rf"\(\s*(?:const\s+)?(?:device|constant|threadgroup|thread)\s+(?:const\s+)?{TYPES}\s*\*\s*\)\s*[\w(&]"
    )
    found += [f"a cast that may change the address space: {m[0]}" for m in re.finditer(cast, code)]
    outside = re.sub(r"\{[^{}]*\}", "{}", code)
    while (shorter := re.sub(r"\{(?:[^{}]|\{\})+\}", "{}", outside)) != outside:
        outside = shorter
    kinds = "static|inline|const|constexpr|threadgroup|device"
    variable = rf"^\s*(?:(?:{kinds})\s+)*{TYPES}\s+\w+\s*(?:\[[^\]]*\]\s*)?="
    found += [f"a global that is not constant: {m[0].strip()}" for m in re.finditer(variable, outside, re.M)]
    for name, body in _functions(code):
        if re.search(rf"\b{name}\s*(?:<[^<>;]*>)?\s*\(", body):
            found.append(f"recursion: {name}")
        if re.search(rf"\bthreadgroup\s+{TYPES}\s+\w+\s*(?:\[|;)", body):
            found.append(f"threadgroup memory declared outside of a kernel: {name}")
    return found


def _functions(code: str) -> list[tuple[str, str]]:
    """Name and body of the helper functions."""
    found = []
    for m in re.finditer(rf"\b(?:{TYPES}|void|auto)\s+(\w+)\s*\(([^;{{}}]*)\)\s*\{{", code):
        depth, at = 1, m.end()
        while depth and at < len(code):
            depth += {"{": 1, "}": -1}.get(code[at], 0)
            at += 1
        if "[[buffer" not in m[2]:
            found.append((m[1], code[m.end() : at]))
    return found


def host_text(text: str, inputs: Sequence[str], constants: dict[int, str] | None = None) -> HostText:
    """The kernel's text as C++, with `emulator_body`, which calls it for one thread.

    constants: the values of function constants by their index; only MLX's own kernels have them.
    """
    signature = re.search(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", text, re.S)
    assert signature is not None
    instance = re.search(r"decltype\((\w+<.*?>)\)", text)
    called = instance[1] if instance else signature[1]
    arguments: list[str] = []
    buffers: list[str] = []
    for parameter in signature[2].split(",\n"):
        m = re.fullmatch(r"\s*(.*?)([*&]?)\s*(\w+) \[\[(\w+)(?:\((\d+)\))?\]\]", parameter, re.S)
        assert m is not None, parameter
        kind = re.sub(r"\b(?:device|constant)\b", "", m[1])
        if m[4] == "buffer":
            arguments.append(f"{'*' if m[2] == '&' else ''}({kind}*)buffers[{len(buffers)}]")
            buffers.append(m[3])
        else:
            arguments.append(PLACES[m[4]])
    code = re.sub(r"\ntemplate \[\[host_name.*", "\n", text, flags=re.S)
    for index, value in (constants or {}).items():
        code = re.sub(rf"\s*\[\[function_constant\({index}\)\]\]\s*;", f" = {value};", code)
    code = re.sub(r"[ \t]*\[\[[a-z_]+(?:\(\w+\))?\]\]", "", code)
    code = re.sub(
        r"(^|[;{])(\s*)threadgroup(\s+[\w<>: ]+?\s+\w+\s*(?:\[[^;]*\])?\s*;)",
        r"\1\2THREADGROUP_VARIABLE\3",
        code,
        flags=re.M,
    )
    constant = r"^(\s*)(?:static\s+)?constant(\s+(?:constexpr\s+|const\s+)*\w+\s+\w+\s*(?:\[[^\]]*\])*\s*=)"
    code = re.sub(constant, r"\1CONSTANT_VARIABLE constant\2", code, flags=re.M)
    call = f"{called}({', '.join(arguments)});"
    body = f'extern "C" void emulator_body(void** buffers, const emulator::Place& p) {{ {call} }}'
    whole = f'#include "shim.h"\n#line 1 "kernel.metal"\n{code}\nauto* instance = &{called};\n'
    return HostText(f"{whole}#ifndef MSL_CHECK\n{body}\n#endif\n", tuple(buffers))
