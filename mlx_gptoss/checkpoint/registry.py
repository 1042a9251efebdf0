"""Converted models on this machine: a list of their folders, so that they are found by name from anywhere.

It is a JSON list of paths in the state folder, the newest first. Folders that have gone drop out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from mlx_gptoss.errors import ConfigError
from mlx_gptoss.files import read_limited, state_folder

_LIMIT = 2**20  # bytes of the list


def remember(folder: Path) -> None:
    """Put a folder at the head of the list. Raises OSError when the list cannot be written, ConfigError."""
    path = folder.resolve()
    _write([path, *(other for other in remembered() if other != path)])


def forget(folder: Path) -> None:
    """Take a folder off the list. Raises OSError or ConfigError."""
    path = folder.resolve()
    _write([other for other in remembered() if other != path])


def remembered() -> list[Path]:
    """The folders that are still there. Raises ConfigError when the list is damaged."""
    path = _path()
    try:
        listed = json.loads(read_limited(path, _LIMIT))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): delete it, it only lists folders") from None
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise ConfigError(f"{path} is damaged: expected a list of folders; delete it, it only lists folders")
    return [folder for folder in map(Path, listed) if (folder / "config.json").is_file()]


def find(name: str) -> Path | None:
    """The newest folder on the list that is called `name`. Raises ConfigError."""
    return next((folder for folder in remembered() if folder.name == name), None)


def _path() -> Path:
    return state_folder() / "models.json"


def _write(folders: list[Path]) -> None:
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps([str(folder) for folder in folders], indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
