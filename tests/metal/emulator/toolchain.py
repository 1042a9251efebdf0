"""Clang, out of the wheel `ziglang`: checks a kernel's text and makes a library of it."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
SINGLE = ("-Xclang", "-cl-single-precision-constant")  # in Metal 1.0 is a float
CHECKS = (
    *(
        "-Qunused-arguments",
        "-Wall",
        "-Wno-unused",
        "-Wno-unknown-attributes",
        "-Wno-c++17-attribute-extensions",
    ),
    *("-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-Werror=conditional-uninitialized"),
    *("-Werror=vla-extension", "-Werror=c++17-extensions", "-Werror=c++20-extensions"),
    *("-Werror=double-promotion", "-Werror=array-bounds", "-Werror=float-conversion"),
    *("-Werror=shift-count-overflow", "-Werror=return-type", "-Werror=literal-conversion"),
)
TRAPS = "unsigned-integer-overflow,signed-integer-overflow,shift-exponent,array-bounds,integer-divide-by-zero"


class KernelError(Exception):
    """A kernel is refused, or does what none may do. `stage` is lint, check, compile or run."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(f"{stage}: {message}")
        self.stage = stage


def missing() -> str:
    """Why kernels cannot be run here; "" where they can."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return "the emulator runs on Linux x86-64 alone"
    return (
        "" if importlib.util.find_spec("ziglang") else "clang comes with the wheel ziglang, of the extra test"
    )


@cache
def _folder() -> Path:
    """What is compiled stays: a library's name is decided by all that it is made of."""
    folder = HERE.parents[2] / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def _zig() -> str:
    found = importlib.util.find_spec("ziglang")
    assert found is not None and found.origin is not None
    return str(Path(found.origin).parent / "zig")


def _clang(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    cache_folder = str(_folder() / "zig")
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache_folder, "ZIG_LOCAL_CACHE_DIR": cache_folder}
    command = [_zig(), "cc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _made(name: str, sources: str, *arguments: str | Path, code: str | None = None) -> Path:
    """A library that clang makes of `code`, or has made already of the same sources and arguments."""
    told = "\0".join((sources, code or "", *map(str, arguments)))
    path = _folder() / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:20]}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=_folder()) as folder:
        files: list[Path] = []
        if code is not None:
            files = [Path(folder) / "kernel.cpp"]
            files[0].write_text(code, encoding="ascii")
        out = Path(folder) / "made.so"
        done = _clang(*arguments, *files, "-o", out)
        if done.returncode:
            raise KernelError("compile", done.stderr)
        out.replace(path)
    return path


@cache
def _sources() -> str:
    return "".join((HERE / name).read_text(encoding="ascii") for name in ("shim.h", "machine.cpp"))


@cache
def machine() -> ctypes.CDLL:
    """The library that runs kernels; theirs find their hooks in it."""
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    flags = ("-O2", "-g0", "-shared", "-fPIC", "-nostdlib", "-fno-sanitize=all", "-fno-stack-protector")
    path = _made("machine", _sources(), "-x", "c++", *flags, HERE / "machine.cpp")
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.emulator_allocate.restype = ctypes.c_void_p
    library.emulator_allocate.argtypes = [ctypes.c_uint64]
    library.emulator_free.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    return library


def check(code: str) -> None:
    """Have clang look at a kernel with Metal's address spaces. Raises KernelError."""
    flags = ("-x", "c++", "-std=c++14", "-DMSL_CHECK", "-O1", "-S", "-emit-llvm", f"-I{HERE}")
    with tempfile.TemporaryDirectory(dir=_folder()) as folder:
        path = Path(folder) / "kernel.cpp"
        path.write_text(code, encoding="ascii")
        done = _clang(*flags, *SINGLE, *CHECKS, path, "-o", Path(folder) / "kernel.ll")
    if done.returncode:
        raise KernelError("check", done.stderr)


@cache
def library(code: str, traced: bool, trapped: bool) -> ctypes.CDLL:
    """A kernel's code as a library. trapped: integers that overflow end it. Raises KernelError."""
    flags = [
        "-x",
        "c++",
        "-std=c++17",
        "-O2",
        "-g0",
        "-march=native",
        "-shared",
        "-fPIC",
        "-nostdlib",
        f"-I{HERE}",
    ]
    flags += ["-fno-stack-protector", "-ftrivial-auto-var-init=pattern", "-fno-sanitize=all", "-w"]
    if trapped:
        flags += [f"-fsanitize={TRAPS}", "-fsanitize-trap=all"]
    if traced:
        flags += ["-fno-vectorize", "-fno-slp-vectorize", "-fsanitize-coverage=func,trace-loads,trace-stores"]
    machine()
    return ctypes.CDLL(str(_made("kernel", _sources(), *flags, *SINGLE, code=code + IMAGE)))


# Where the library's own memory is.
IMAGE = """
#ifndef MSL_CHECK
extern "C" {
extern char __start_threadgroup_memory[] __attribute__((weak, visibility("hidden")));
extern char __stop_threadgroup_memory[] __attribute__((weak, visibility("hidden")));
extern char __ehdr_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
void emulator_image(char** found) {
  found[0] = __start_threadgroup_memory;
  found[1] = __stop_threadgroup_memory;
  found[2] = __ehdr_start;
  found[3] = _end;
}
}
#endif
"""
