"""Processes that examine a kernel, as the record of a machine names them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def end_examiners(record: Path) -> None:
    """Let the record say that a process that has ended meanwhile is at what this one is at."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    text = record.read_text(encoding="utf-8")
    own = f'"pid": {os.getpid()},'
    assert own in text
    record.write_text(text.replace(own, f'"pid": {child.pid},'), encoding="utf-8")
