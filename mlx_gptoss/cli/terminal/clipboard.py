"""Text to the clipboard: by the system's own program, or by asking the terminal (OSC 52), also over SSH."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import IO

MAX_OSC52 = 74_994  # characters of base64 that every terminal with OSC 52 takes


def program(environment: Mapping[str, str] = os.environ, system: str = sys.platform) -> list[str] | None:
    """The command that puts its input on this desktop's clipboard; None over SSH, or where there is none."""
    if "SSH_CONNECTION" in environment:
        return None  # it would be the clipboard of the wrong machine
    candidates = [["pbcopy"]] if system == "darwin" else []
    if environment.get("WAYLAND_DISPLAY"):
        candidates.append(["wl-copy"])
    if environment.get("DISPLAY"):
        candidates += [["xclip", "-selection", "clipboard"], ["xsel", "--clipboard", "--input"]]
    found = (command for command in candidates if shutil.which(command[0], path=environment.get("PATH")))
    return next(found, None)


def copy(text: str, terminal: IO[str]) -> str:
    """Copy a text; how, in a few words. Raises OSError when the program fails, or there is too much of it."""
    command = program()
    if command is not None:
        # Its output goes nowhere: xclip stays behind and would hold our own open.
        done = subprocess.run(
            command,
            input=text.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=False,
        )
        if done.returncode:
            raise OSError(f"{command[0]} ended with {done.returncode}")
        return f"with {command[0]}"
    encoded = base64.b64encode(text.encode()).decode()
    if len(encoded) > MAX_OSC52:
        raise OSError(f"{len(text):,} characters are too many to hand to the terminal")
    terminal.write(f"\x1b]52;c;{encoded}\a")
    terminal.flush()
    return "through the terminal, if it allows that"
