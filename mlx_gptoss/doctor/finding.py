"""One line of a doctor's report."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

# "ok" and "failed" are checks; "info" is a fact; "warning" works, but could be better; "none" does not apply.
Verdict: TypeAlias = Literal["ok", "info", "warning", "failed", "none"]


class Finding(NamedTuple):
    """What was looked at, what came of it, and the figures or the cure."""

    section: str
    name: str
    verdict: Verdict
    detail: str
