"""One line of a doctor's report."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

# "ok" and "failed" are checks; "info" is a fact; "warning" works, but could be better; "none" does not apply.
Verdict: TypeAlias = Literal["ok", "info", "warning", "failed", "none"]


class Finding(NamedTuple):
    """What was looked at, what came of it, and the figures or the cure.

    figures: what was measured, by name, for programs; in bytes and seconds.
    """

    section: str
    name: str
    verdict: Verdict
    detail: str
    figures: Mapping[str, float] = MappingProxyType({})

    def as_data(self) -> dict[str, Any]:
        """As JSON has it."""
        return self._asdict() | {"figures": dict(self.figures)}
