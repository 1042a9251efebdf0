"""What the APIs tell of the model beside its name: its size, its shape, how its weights are stored."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mlx_gptoss.checkpoint.fingerprint import fingerprint
from mlx_gptoss.checkpoint.memory import MemoryPlan, plan
from mlx_gptoss.model.config import ModelConfig

FAMILY = "gptoss"


@dataclass(frozen=True)
class ModelFacts:
    """A model as it was loaded; what has to be read from its files is read when it is first asked for.

    asked: the folder or Hub id that was loaded. max_context: tokens of a prompt and its answer. adapters: the
    names of those that a request may ask for.
    """

    asked: str
    folder: Path
    config: ModelConfig
    max_context: int
    adapters: tuple[str, ...] = ()

    @property
    def publisher(self) -> str:
        """The owner in the Hub id, or "local"."""
        owner, slash, rest = self.asked.partition("/")
        return owner if slash and owner and "/" not in rest and not owner.startswith((".", "~")) else "local"

    @property
    def parameter_size(self) -> str:
        """Such as 20.9B."""
        count = self.config.parameters
        return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"

    @cached_property
    def _plan(self) -> MemoryPlan:
        return plan(self.folder)

    @property
    def size(self) -> int:
        """Bytes of the weights' files."""
        return self._plan.stored

    @property
    def quantization(self) -> str:
        """How the experts, most of the weights, are stored: MXFP4, 4bit, BF16, …"""
        stored = {part.format: part.stored for part in self._plan.parts if part.name == "experts"}
        most = max(stored, key=lambda form: stored[form])
        if most.startswith("affine"):
            return most.split()[1].replace("-", "")
        return {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(most, most.upper())

    @cached_property
    def digest(self) -> str:
        """A SHA-256 that tells this model from others; see fingerprint."""
        return fingerprint(self.folder)

    @cached_property
    def modified(self) -> datetime.datetime:
        """When the folder's files were last changed."""
        latest = max(path.stat().st_mtime for path in self.folder.iterdir() if path.is_file())
        return datetime.datetime.fromtimestamp(latest, datetime.UTC)
