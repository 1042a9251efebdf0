"""Running code as another user than the tests'."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parents[2])
NOBODY = 65534


def as_nobody(code: str) -> str:
    """What the code prints, run by an ordinary user with a Python that user can reach. Finds the package."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; the other tests run as an ordinary one")
    environment = {"PYTHONPATH": ROOT, "PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run(
                [python, "-c", code],
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
                env=environment,
                cwd="/",
                capture_output=True,
                text=True,
            )
        except (PermissionError, FileNotFoundError):  # it lies in root's home
            continue
        assert done.returncode == 0, done.stderr
        return done.stdout
    pytest.skip("no Python that an ordinary user could run")
