"""The model that was asked about: whether its files are whole, whether it fits, and how fast it can be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlx_gptoss.checkpoint.expectation import read_from_disk
from mlx_gptoss.checkpoint.hub import is_repo_id, resolve
from mlx_gptoss.checkpoint.memory import MemoryPlan, gigabytes, plan_experts
from mlx_gptoss.checkpoint.names import expand
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.device import available_memory
from mlx_gptoss.doctor.finding import Finding
from mlx_gptoss.engine.options import EngineOptions
from mlx_gptoss.errors import CheckpointError, ConfigError, MemoryLimitError, ModelNotFoundError
from mlx_gptoss.llm import SCRATCH, wanted_kv


def folder_of(model: str) -> Path:
    """The folder of a model that is on this machine. Raises ModelNotFoundError, HubError."""
    try:
        return resolve(model, offline=True)
    except ModelNotFoundError as error:
        if is_repo_id(expand(model)):
            told = f"{model!r} is not on this machine: `mlx-gptoss pull {model}` downloads it"
            raise ModelNotFoundError(told) from error
        raise


def largest_file(folder: Path) -> Path | None:
    """What the disk's speed is told by; None for a folder without weights."""
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size, default=None)


def findings(folder: Path, bandwidth: float | None) -> Iterator[Finding]:
    """What the files' headers tell; nothing is loaded. bandwidth: of the memory, bytes a second, if known."""
    try:
        checkpoint = Checkpoint(folder)
    except (CheckpointError, ConfigError) as error:
        yield Finding("model", "files", "failed", str(error))
        return
    count = len(checkpoint.tensors)
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    told = f"{gigabytes(stored)} in {count} tensors, layout {checkpoint.layout.name}, all there"
    yield Finding("model", "files", "ok", told)
    room = available_memory()
    try:
        memory = plan_experts(checkpoint, "auto", room, SCRATCH + wanted_kv(checkpoint, EngineOptions()))
    except MemoryLimitError as error:
        yield Finding("model", "memory", "failed", str(error))
        return
    yield _memory(memory, room)
    if bandwidth is not None:
        yield _ceiling(memory, bandwidth)


def _memory(memory: MemoryPlan, room: int) -> Finding:
    figures = {"needed_bytes": memory.total(), "available_bytes": room}
    if memory.slots is None:
        told = f"needs {gigabytes(memory.total())} of {gigabytes(room)}"
        return Finding("model", "memory", "ok", told, figures)
    told = f"{memory.slots} of {memory.config.num_experts} experts a layer fit; the others stay on the disk"
    return Finding("model", "memory", "warning", told, figures)


def _ceiling(memory: MemoryPlan, bandwidth: float) -> Finding:
    rate = bandwidth / memory.read_per_token
    told = f"{rate:,.1f} tokens/s at most: each reads {gigabytes(memory.read_per_token)}"
    if memory.slots is not None:
        told += f", beside {gigabytes(read_from_disk(memory))} of the disk, as a model of hit rates has it"
    return Finding("model", "decode", "info", told, {"most_tokens_per_second": rate})
