"""A text without what tells whose machine it is from: paths, and the names of the user and of the host."""

from __future__ import annotations

import getpass
import re
import socket
from pathlib import Path

from mlx_gptoss.checkpoint.names import DEMO, SHORT_NAMES

PACKAGE = Path(__file__).resolve().parent.parent


def without_names(text: str, model: str | None = None) -> str:
    """The text with PATH, USER, HOST and MODEL in their places. model: as it was asked for."""
    host = socket.gethostname()
    if model is not None and model.lower() not in (DEMO, *SHORT_NAMES):
        text = text.replace(str(Path(model)), "MODEL")
    for path in (PACKAGE, Path.home()):  # whole: they may have spaces
        if path != Path("/"):
            text = text.replace(str(path), "PATH")
    text = re.sub(r"(?<![\w.:/])(?:PATH|MODEL|~)?/[^\s'\"`,;:()]+", "PATH", text)
    for name, word in ((_user(), "USER"), (host, "HOST"), (host.split(".")[0], "HOST")):
        if name:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", word, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return ""
