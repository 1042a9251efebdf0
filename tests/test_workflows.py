"""The workflows that GitHub runs: what they use is pinned, and what they run is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_gptoss.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# The source archive has no .github.
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="not a checkout")


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
        assert job["timeout-minutes"] and job["runs-on"]
        yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_to_a_commit_with_its_release_beside_it(path: Path) -> None:
    used = [step["uses"] for step in steps(path) if "uses" in step]
    pinned = re.findall(
        r"uses: ([\w-]+/[\w-]+@[0-9a-f]{40}) # v\d+\.\d+\.\d+$", path.read_text("utf-8"), re.M
    )
    assert used and pinned == used


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_runs_is_there(path: Path) -> None:
    run = "\n".join(step["run"] for step in steps(path) if "run" in step)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake (?:\w+=\S+ )*([a-z]+)", run):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for script in re.findall(r"\bbash (\S+)", run):
        assert (ROOT / script).is_file()
    assert set(re.findall(r"mlx-gptoss ([a-z]+)", run)) <= set(COMMANDS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_failure_before_a_pipe_fails_the_step(path: Path) -> None:
    piped = [step["run"] for step in steps(path) if "|" in step.get("run", "")]
    shell = yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", {}).get("run", {}).get("shell")
    assert not piped or shell == "bash"  # with -o pipefail, which GitHub's default lacks


def test_a_macs_own_results_are_kept() -> None:
    (path,) = (path for path in WORKFLOWS if path.name == "mac.yml")
    made = {name for step in steps(path) for name in re.findall(r"results/[\w-]+\.json", step.get("run", ""))}
    assert made == {"results/doctor.json", "results/bench-off.json", "results/bench-verify.json"}
    (upload,) = (step for step in steps(path) if "upload-artifact" in step.get("uses", ""))
    assert upload["with"]["path"] == "results/" and upload["if"] == "${{ !cancelled() }}"
