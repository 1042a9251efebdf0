"""All checks, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mlx_gptoss.doctor import answers, chosen, kernels, machine, sandbox, speed
from mlx_gptoss.doctor.finding import Finding


def examine(model: str | None = None) -> Iterator[Finding]:
    """The findings, each as soon as it is there; also about a model that is on this machine, if one is named.

    Takes some seconds. Raises ModelNotFoundError or HubError, at once, for a model that is not.
    """
    return _examine(None if model is None else chosen.folder_of(model))


def _examine(folder: Path | None) -> Iterator[Finding]:
    yield from _whole("machine", machine.findings)
    weights = None if folder is None else chosen.largest_file(folder)
    bandwidth = None
    for finding in _whole("speed", partial(speed.findings, weights)):
        bandwidth = finding.figures.get(speed.BANDWIDTH, bandwidth)
        yield finding
    if folder is not None:
        yield from _whole("model", partial(chosen.findings, folder, bandwidth))
    yield from _whole("demo model", answers.findings)
    yield from _whole("kernels", partial(kernels.findings, folder))
    yield from _whole("sandbox", sandbox.findings)


def _whole(section: str, findings: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A section's findings. What it raises becomes one: MLX may fail on this machine in ways not foreseen."""
    try:
        yield from findings()
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        yield Finding(section, "examination", "failed", f"{type(error).__name__}: {first}")
