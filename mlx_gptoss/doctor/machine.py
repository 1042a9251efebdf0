"""The machine, its memory, its packages, its disk, and whether the Hub can be reached."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from mlx_gptoss import device
from mlx_gptoss.doctor.finding import Finding, Verdict

PACKAGES = ("gptoss-mlx", "mlx", "mlx-lm", "huggingface_hub", "llguidance")
NEEDED = 11.2e9  # bytes of 20b in 4 bits: its weights, and its download
PATIENCE = 3.0  # seconds for the Hub to answer


def findings() -> Iterator[Finding]:
    """Facts, and warnings where 20b would not fit."""
    facts = device.describe()
    told = f"{facts['chip']}, {facts['cores']} cores, {facts['memory_gb']} GB"
    yield Finding("machine", "chip", "info", told)
    yield Finding("machine", "system", "info", f"{facts['system']}, Python {facts['python']}")
    yield Finding("machine", "packages", "info", ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    yield _gpu()
    yield _memory()
    yield _working_set()
    yield _disk()
    yield _hub()


def _gpu() -> Finding:
    if device.on_gpu():
        return Finding("machine", "GPU", "ok", "MLX computes on it")
    told = "MLX has none here and computes on the CPU"
    return Finding("machine", "GPU", "none", told)


def _memory() -> Finding:
    room = device.available_memory()
    figures = {"available_bytes": room, "total_bytes": device.total_memory()}
    detail = f"{room / 1e9:.1f} GB for a model and its cache"
    if room >= NEEDED:
        return Finding("machine", "memory", "ok", detail, figures)
    return Finding("machine", "memory", "warning", f"{detail}; 20b takes 11.2 GB in 4 bits", figures)


def _working_set() -> Finding:
    size = device.working_set()
    if size is None:
        told = "all memory is the CPU's" if not device.on_gpu() else "the GPU has memory of its own"
        return Finding("machine", "working set", "none", told)
    total = device.total_memory()
    told = f"the GPU may keep {size / 1e9:.1f} of {total / 1e9:.1f} GB"
    # What macOS and other programs should keep, at the least.
    megabytes = (total - max(4 * 2**30, total // 8)) >> 20
    if megabytes << 20 > size:
        told += f"; until a restart `sudo sysctl iogpu.wired_limit_mb={megabytes}` lets it keep more"
    return Finding("machine", "working set", "info", told, {"bytes": size})


def cache_folder() -> Path:
    """The Hub's cache, or the nearest folder above it that exists."""
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    return place


def _disk() -> Finding:
    free = shutil.disk_usage(cache_folder()).free
    verdict: Verdict = "ok" if free > 2 * NEEDED else "warning"
    cure = "" if verdict == "ok" else "; 20b needs 13.8 GB to download, and 11.2 GB more to convert"
    return Finding("machine", "disk", verdict, f"{free / 1e9:.1f} GB free where the Hub's cache is{cure}")


def _hub() -> Finding:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return Finding("machine", "Hub", "none", "HF_HUB_OFFLINE is set: not asked")
    where = urlsplit(ENDPOINT)
    port = where.port or (80 if where.scheme == "http" else 443)
    try:
        socket.create_connection((where.hostname or "", port), PATIENCE).close()
    except OSError as error:
        told = f"not reachable: {error.strerror or error}"
        return Finding("machine", "Hub", "warning", told)
    return Finding("machine", "Hub", "ok", "reachable")
