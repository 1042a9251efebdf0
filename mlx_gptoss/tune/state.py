"""A run's state in one file, from which it goes on to the bit: parameters, optimiser, place in the data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_gptoss.checkpoint.adapter import write_whole
from mlx_gptoss.errors import TuneError
from mlx_gptoss.tune.base import Tree, flat

STATE_FILE = "state.safetensors"


@dataclass
class Progress:
    """How far a run is. Losses are means over learned tokens; a check has those of a validation."""

    step: int = 0
    learned: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # validations since the best
    finished: str = ""


def save_state(folder: Path, tree: Tree, optimizer: dict[str, Any], progress: Progress, mark: str) -> None:
    """Write it whole or not at all. `mark`: what the run is of; see load_state. Raises OSError."""
    arrays = {f"parameters.{name}": value for name, value in flat(tree)}
    arrays |= {f"optimizer.{name}": value for name, value in flat(optimizer)}
    arrays = dict(sorted(arrays.items()))  # the file's order, whatever the trees' is
    about = {"mark": mark, "progress": json.dumps(asdict(progress))}
    write_whole(folder / STATE_FILE, lambda path: mx.save_safetensors(str(path), arrays, about))


def load_state(folder: Path, mark: str) -> tuple[Tree, dict[str, Any], Progress] | None:
    """What a run of the same mark left in the folder, or None where there is nothing.

    Raises TuneError when another run lies there, or the file cannot be read.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        loaded = mx.load(str(path), format="safetensors", return_metadata=True)
        assert isinstance(loaded, tuple)
        arrays, about = loaded
        progress = Progress(**json.loads(about["progress"]))
        mx.eval(list(arrays.values()))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise TuneError(f"{path}: not readable ({error}): delete it, or use another folder") from None
    if about.get("mark") != mark:
        raise TuneError(
            f"{folder}: holds a run with {_difference(about.get('mark', ''), mark)}: use another --out, or "
            "--restart to throw that run away"
        )

    def under(prefix: str) -> Any:
        return tree_unflatten(
            [(n.removeprefix(prefix), a) for n, a in arrays.items() if n.startswith(prefix)]
        )

    return under("parameters."), under("optimizer."), progress


def read_progress(folder: Path) -> Progress:
    """How far the run in a folder came. Raises TuneError when its state cannot be read."""
    path = folder / STATE_FILE
    try:
        loaded = mx.load(str(path), format="safetensors", return_metadata=True)
        assert isinstance(loaded, tuple)
        return Progress(**json.loads(loaded[1]["progress"]))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise TuneError(f"{path}: not readable ({error})") from None


def _difference(there: str, here: str) -> str:
    try:
        old, new = json.loads(there), json.loads(here)
        for key in new:
            if old.get(key) != new[key]:
                return f"{key} {old.get(key)!r}, and now it is {new[key]!r}"
    except (ValueError, AttributeError):
        pass
    return "other settings"
