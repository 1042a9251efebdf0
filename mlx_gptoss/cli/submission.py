"""What `bench --submit` writes: a benchmark that others can compare theirs with, and nothing about its owner.

Texts are bound to patterns that no path, host or user name fits; models are told by their shape. The fields
make `docs/results/schema.json`; a change that a reader would notice takes a new SCHEMA_VERSION.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from mlx_gptoss.checkpoint.memory import MemoryPlan
    from mlx_gptoss.cli.options import ModelSource

SCHEMA_VERSION = 1
# Layers, experts and width of the models that have a name.
SHAPES = {(24, 32, 2880): "20b", (36, 128, 2880): "120b", (4, 4, 192): "demo"}

Version = Annotated[str, Field(pattern=r"^[0-9][0-9A-Za-z.+]{0,63}$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,24}$")]
Format = Annotated[str, Field(pattern=r"^[a-zA-Z0-9]{1,12}( [0-9]-bit / [0-9]{1,3})?$")]
Part = Literal["embedding", "attention", "router", "experts", "norms", "head"]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Machine(_Strict):
    """The hardware and its system."""

    chip: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 .,()@+-]{1,63}$")]
    system: Annotated[str, Field(pattern=r"^[A-Za-z]+ [0-9]+(\.[0-9]+)*$")]
    cores: Positive
    memory_gb: Rate
    device: Literal["gpu", "cpu"]


class Versions(_Strict):
    """Of the packages, and of Python."""

    gptoss_mlx: Version
    mlx: Version
    mlx_lm: Version
    python: Version


class Model(_Strict):
    """A model by its shape and the formats of its parts."""

    size: Literal["20b", "120b", "demo", "other"]
    layers: Positive
    experts: Positive
    hidden_size: Positive
    layout: Word
    formats: dict[Part, Format]
    dtype: Literal["bfloat16", "float16", "float32"]
    weights_bytes: Positive
    bytes_read_per_token: Positive


class Settings(_Strict):
    """How it was run. None: the default."""

    tokens: Positive
    kv_bits: Literal[4, 8] | None
    kv_budget: Positive | None
    max_context: Positive | None
    expert_memory: Literal["auto", "all"] | Positive
    draft: Literal["lookup", "model"] | None
    adapters: Count
    kernels: Literal["off", "on", "verify"]
    tuned: bool
    max_ops_per_buffer: Count | None
    max_mb_per_buffer: Count | None


class Speed(_Strict):
    """One measurement, as a row of `bench --json`."""

    runtime: Literal["mlx-gptoss", "mlx-lm"]
    context: Positive
    batch: Positive
    prefill_rate: Rate
    first_token: Rate
    warm_first_token: Rate | None
    decode_rate: Rate
    bandwidth_share: Amount | None


class StreamedExperts(_Strict):
    """What streaming experts from the disk came to."""

    slots: Positive
    hit_rate: Annotated[float, Field(ge=0, le=1)]
    read_per_token: Amount
    wait_per_token: Amount
    disk_bytes_per_second: dict[Literal["1", "4", "8"], Rate]
    decode_rate: Rate
    predicted_decode_rate: Rate


class UsedKernel(_Strict):
    """A kernel of our own that was in use at the end, and its gain where that was timed."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_, ]{1,80}$")]
    gain: Annotated[float, Field(allow_inf_nan=False)] | None


class Submission(_Strict):
    """A benchmark, as it is attached to the project's results."""

    schema_version: Literal[1]
    date: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
    machine: Machine
    versions: Versions
    model: Model
    settings: Settings
    bandwidth_bytes_per_second: Rate
    peak_memory_bytes: Positive
    experts: StreamedExperts | None
    kernels: list[UsedKernel]
    speeds: Annotated[list[Speed], Field(min_length=1)]

    def text(self) -> str:
        """The file's text, which is read back before it is given out."""
        text = self.model_dump_json(indent=2) + "\n"
        Submission.model_validate_json(text)
        return text


def submission(report: Mapping[str, Any], memory: MemoryPlan, source: ModelSource, tokens: int) -> Submission:
    """A report of `bench --json`, with what its reader cannot ask the machine any more."""
    config = memory.config
    # Of a part that is stored in several, the one that most of it has.
    formats = {part.name: part.format for part in sorted(memory.parts, key=lambda part: part.stored)}
    machine, experts = report["machine"], report["experts"]
    versions = {name.replace("-", "_"): version(name) for name in ("gptoss-mlx", "mlx", "mlx-lm")}
    shape = (config.num_layers, config.num_experts, config.hidden_size)
    if experts is not None:
        rates = {str(depth): rate for depth, rate in experts["disk_bytes_per_second"].items()}
        experts = experts | {"disk_bytes_per_second": rates}
    return Submission.model_validate(
        {
            "schema_version": SCHEMA_VERSION,
            "date": datetime.now(UTC).date().isoformat(),
            "machine": {
                "chip": re.sub(r"[^A-Za-z0-9 .,()@+-]", " ", machine["chip"])[:64].strip(),
                # Without the name that a Linux kernel's builder may have added.
                "system": re.sub(r"^([A-Za-z]+ [0-9]+(?:\.[0-9]+)*).*", r"\1", machine["system"]),
                "cores": int(machine["cores"]),
                "memory_gb": float(machine["memory_gb"]),
                "device": machine["device"],
            },
            "versions": versions | {"python": machine["python"]},
            "model": {
                "size": SHAPES.get(shape, "other"),
                "layers": config.num_layers,
                "experts": config.num_experts,
                "hidden_size": config.hidden_size,
                "formats": formats,
                **{key: report[key] for key in ("layout", "dtype", "weights_bytes", "bytes_read_per_token")},
            },
            "settings": _settings(source, tokens) | {"tuned": bool(report["tuned"])},
            **{key: report[key] for key in ("bandwidth_bytes_per_second", "peak_memory_bytes")},
            "kernels": [{"name": name, "gain": gain} for name, gain in report["kernels"].items()],
            "experts": experts,
            "speeds": report["rows"],
        }
    )


def _settings(source: ModelSource, tokens: int) -> dict[str, Any]:
    from mlx_gptoss.device import kernel_mode

    engine = source.engine
    draft = engine.get("draft")
    return {
        "tokens": tokens,
        "kv_bits": engine.get("kv_bits"),
        "kv_budget": engine.get("kv_budget"),
        "max_context": engine.get("max_context"),
        "expert_memory": engine.get("expert_memory", "auto"),
        "draft": draft if draft in (None, "lookup") else "model",
        "adapters": len(source.adapters),
        "kernels": kernel_mode(),
        "max_ops_per_buffer": _limit("MLX_MAX_OPS_PER_BUFFER"),
        "max_mb_per_buffer": _limit("MLX_MAX_MB_PER_BUFFER"),
    }


def _limit(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else None
