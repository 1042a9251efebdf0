"""Whether code that a model writes is held in on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_gptoss.doctor.finding import Finding, Verdict
from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools.sandbox import selftest


def findings() -> Iterator[Finding]:
    """One for all attempts that were held back, and one for each that was not."""
    try:
        checks = selftest.run()
    except ToolError as error:
        told = f"there can be none here ({error}); the python tool refuses to run"
        yield Finding("sandbox", "python tool", "failed", told)
        return
    held = sum(check.held for check in checks)
    crucial = [check for check in checks if not check.held and check.crucial]
    verdict: Verdict = "failed" if crucial else "ok"
    told = f"{held} of {len(checks)} attempts to get out were held back"
    yield Finding("sandbox", "python tool", verdict, told + ("; the tool refuses to run" if crucial else ""))
    for check in checks:
        if not check.held:
            yield Finding("sandbox", check.name, "failed" if check.crucial else "warning", check.detail)
