"""What differs between machines, in one place: device, default dtype, memory, and what the backend can do.

macOS on Apple Silicon (Metal) is the target; MLX's CUDA and CPU backends on Linux run the same graph.
"""

from __future__ import annotations

import ctypes
import os
import platform as _platform
import resource
import sys
from collections.abc import Callable, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import mlx.core as mx

from mlx_gptoss.errors import RequestError

F = TypeVar("F", bound=Callable[..., Any])

# Freed buffers that MLX may keep for reuse, bytes.
CACHE_MIN = 64 * 2**20
CACHE_MAX = 1024 * 2**20
M_ARENA_MAX = -8  # of glibc's malloc.h

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

# In the texts of MLX's and Metal's errors: memory is short, or the GPU was taken away from its program.
OUT_OF_MEMORY = ("allocat", "insufficient memory", "out of memory", "outofmemory")
TAKEN_AWAY = (
    "gpu timeout",
    "errortimeout",
    "impacting interactivity",
    "impactinginteractivity",
    "victim of gpu error",
    "innocentvictim",
    "submissionsignored",
)

KernelMode = Literal["off", "on", "verify"]


@cache
def on_gpu() -> bool:
    """True when MLX's default device is a GPU (Metal or CUDA)."""
    return mx.default_device().type == mx.DeviceType.gpu


@cache
def on_metal() -> bool:
    """True when that GPU is Apple's."""
    return on_gpu() and mx.metal.is_available()


def kernel_mode(environment: Mapping[str, str] = os.environ) -> KernelMode:
    """Which Metal kernels of our own to use (see model/kernels): GPTOSS_KERNELS, by default "verify".

    Without Metal always "off". Raises RequestError for another value.
    """
    name = "GPTOSS_KERNELS"
    mode = environment.get(name) or "verify"
    if mode not in get_args(KernelMode):
        raise RequestError(f"{name} is {mode!r}: expected off, on or verify", name)
    return cast(KernelMode, mode) if on_metal() else "off"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY)


def is_resource_error(error: BaseException) -> bool:
    """Whether an error comes of a machine that is short of memory or busy: of no computation's doing."""
    text = str(error).lower()
    return is_out_of_memory(error) or any(words in text for words in TAKEN_AWAY)


def default_dtype() -> mx.Dtype:
    """bfloat16 on a GPU; float32 on the CPU backend, whose quantised kernels are 10 times faster with it."""
    return mx.bfloat16 if on_gpu() else mx.float32


def parse_dtype(name: str | mx.Dtype | None) -> mx.Dtype:
    """A dtype from its name; None gives the device's default. Raises RequestError."""
    if name is None:
        return default_dtype()
    if isinstance(name, mx.Dtype):
        name = str(name).removeprefix("mlx.core.")
    if name not in DTYPES:
        raise RequestError(f"dtype is {name!r}: expected one of {', '.join(DTYPES)}", "dtype")
    return DTYPES[name]


def fuse(function: F) -> F:
    """Compile a small elementwise function into one kernel on a GPU.

    Decided at the first call. The CPU backend would start a C++ compiler, which a machine need not have.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if on_gpu() else function(*args, **kwargs)

    return call  # type: ignore[return-value]


@cache
def total_memory() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def working_set() -> int | None:
    """Bytes that Metal lets the GPU keep resident; None without Metal."""
    size = mx.device_info().get("max_recommended_working_set_size") if on_gpu() else None
    return int(size) if size else None


def available_memory() -> int:
    """Bytes that can be taken now without swapping: on a Mac with Metal, what the GPU may keep resident."""
    if (size := working_set()) is not None:
        return max(0, size - mx.get_active_memory())
    if sys.platform.startswith("linux"):
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return min(int(line.split()[1]) * 1024, _left_to_groups())
    return total_memory()


# Linux's control groups, by version: their folder, limit, usage, and what of that is of files.
GROUPS = {
    1: (
        "memory/",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
    2: ("", "memory.max", "memory.current", ("file",)),
}


def _left_to_groups() -> int:
    try:
        memberships = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return sys.maxsize
    return left_to_groups(memberships, Path("/sys/fs/cgroup"))


def left_to_groups(memberships: str, root: Path) -> int:
    """Bytes that control groups (a container's, a service's) let a process still take.

    memberships: its /proc/PID/cgroup. What the groups hold of files counts as free: the kernel gives it up
    first.
    """
    left = sys.maxsize
    for line in memberships.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, limit, usage, files = GROUPS[1 if controllers else 2]
        # Inside a container the group's own path is not visible, and the root shows its limits.
        for folder in {root / f"{base}{group.strip('/')}", root / base}:
            try:
                most, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
                lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            except (OSError, ValueError):  # no such controller, or "max"
                continue
            held = sum(int(n) for name, n in map(str.split, lines) if name in files)
            left = min(left, max(0, most - used + held))
    return left


def memory_is_short() -> bool:
    """Whether macOS asks programs to give memory back; elsewhere False."""
    if sys.platform != "darwin":
        return False
    level = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(level))
    name = b"kern.memorystatus_vm_pressure_level"  # 1 normal, 2 warning, 4 critical
    failed = ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(level), ctypes.byref(size), None, 0)
    return not failed and level.value > 1


def kept_buffers(weights: int) -> int:
    """Bytes of freed buffers that MLX may keep beside a model of so many bytes."""
    return max(CACHE_MIN, min(CACHE_MAX, weights // 32))


def limit_memory(weights: int) -> None:
    """Bound what MLX keeps of freed buffers, and let a Mac wire the model's memory, so it is never paged out.

    weights: bytes of the model. The wired limit is 95 % of the device's recommended working set: the rest is
    a margin for other programs. Reuse of buffers pays for small ones; large ones would outgrow the plan.
    """
    mx.set_cache_limit(kept_buffers(weights))
    size = working_set() if mx.metal.is_available() else None
    if size is not None:
        mx.set_wired_limit(size * 95 // 100)


@cache
def _glibc() -> ctypes.CDLL | None:
    """Where it is the C library: its malloc keeps what was freed, which macOS's returns by itself."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "malloc_trim") else None


def release_memory(*, buffers: bool = True) -> None:
    """Return freed memory to the system. buffers: also those that MLX keeps for its next arrays."""
    if buffers:
        mx.clear_cache()
    if (glibc := _glibc()) is not None:
        glibc.malloc_trim(0)


def share_arenas() -> None:
    """Let the threads of this process allocate from few places, so that what they free can be returned.

    To be called before there are threads. glibc otherwise gives a server's threads an arena each.
    """
    if (glibc := _glibc()) is not None:
        glibc.mallopt(M_ARENA_MAX, 2)


def peak_rss() -> int:
    """The largest resident set of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory() -> int:
    """The larger of the process's peak resident set and MLX's peak allocation, bytes."""
    return max(peak_rss(), mx.get_peak_memory())


def system_build() -> str:
    """The build of macOS, such as "24G84"; elsewhere the kernel's release."""
    if sys.platform != "darwin":
        return _platform.release()
    build = ctypes.create_string_buffer(64)
    size = ctypes.c_size_t(len(build))
    failed = ctypes.CDLL(None).sysctlbyname(b"kern.osversion", build, ctypes.byref(size), None, 0)
    return _platform.release() if failed else build.value.decode()


def identity() -> str:
    """What measurements and verdicts of this machine hold for: its chip, its system and MLX."""
    from importlib.metadata import version

    chip = mx.device_info().get("device_name", _platform.machine())
    return f"{chip}, {_platform.system()} {system_build()}, MLX {version('mlx')}"


def describe() -> dict[str, str]:
    """Machine and versions, for benchmarks and reports."""
    from importlib.metadata import version

    return {
        "machine": _platform.machine(),
        "chip": str(mx.device_info().get("device_name", "unknown")),
        "system": f"{_platform.system()} {_platform.release()}",
        "cores": str(os.cpu_count()),
        "memory_gb": f"{total_memory() / 1e9:.1f}",
        "device": "gpu" if on_gpu() else "cpu",
        "python": _platform.python_version(),
        "mlx": version("mlx"),
    }
