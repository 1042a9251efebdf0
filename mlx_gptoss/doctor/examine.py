"""All checks, in the order of the report."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_gptoss.doctor import answers, machine, sandbox, speed
from mlx_gptoss.doctor.finding import Finding


def examine() -> Iterator[Finding]:
    """The findings, each as soon as it is there. Takes some seconds; the sandbox's attempts take longest."""
    yield from machine.findings()
    yield from speed.findings()
    yield from answers.findings()
    yield from sandbox.findings()
