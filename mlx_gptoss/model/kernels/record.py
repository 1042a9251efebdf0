"""What was found out on this machine, kept from one process to the next in one JSON file.

{machine: {section: {name: value}}}. A machine is a chip, its system and MLX's version: with any of them
another, nothing is known. The file holds nothing of what users write; losing it costs the time to find out.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_gptoss.files import read_limited, state_folder

if TYPE_CHECKING:
    from mlx_gptoss.model.graph import Model

logger = logging.getLogger("mlx_gptoss.model")

LARGEST = 1 << 20  # bytes
# Machines that are remembered: an update of macOS or of MLX makes another one.
MACHINES = 8
# Seconds to wait for another process that writes: one that was stopped meanwhile must stop nobody else.
PATIENCE = 1.0


def sizes(model: Model) -> str:
    """What a layer's work follows from: the dtype and the sizes of a model."""
    config = model.config
    numbers = (
        config.hidden_size,
        config.intermediate_size,
        config.num_experts,
        config.experts_per_token,
        config.num_attention_heads,
        config.num_kv_heads,
        config.head_dim,
        config.sliding_window,
    )
    return f"{str(model.dtype).removeprefix('mlx.core.')} {' '.join(map(str, numbers))}"


class Record:
    """The file's part about one machine."""

    def __init__(self, machine: str, path: Path | None = None) -> None:
        self._machine = machine
        self._path = state_folder() / "machines.json" if path is None else path
        self._warned = False

    def get(self, section: str, name: str) -> Any:
        """What is known by this name, as JSON has it; None for nothing."""
        found = self._read().get(self._machine, {}).get(section, {})
        return found.get(name) if isinstance(found, dict) else None

    def put(self, section: str, name: str, value: Any) -> None:
        """Remember a value that JSON can hold. What cannot be written is told, and is not known next time."""
        self.change(section, name, lambda old: value)

    def change(self, section: str, name: str, make: Callable[[Any], Any]) -> None:
        """`put` what is made of the value until now (None for nothing), with no other process in between."""
        unfinished = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                machines = self._read()
                own = machines.pop(self._machine, {})
                known = own.get(section)
                known = known if isinstance(known, dict) else {}
                own[section] = {**known, name: make(known.get(name))}
                kept = dict([*machines.items(), (self._machine, own)][-MACHINES:])
                unfinished.write_text(json.dumps(kept, indent=1), encoding="utf-8")
                os.replace(unfinished, self._path)
        except OSError as error:
            logger.warning("%s is not written: %s", self._path, error)
            with contextlib.suppress(OSError):
                unfinished.unlink()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process is in here, as far as the file system knows locks."""
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.005)
                except OSError:  # a file system without locks
                    break
                else:
                    break
            yield
        finally:
            os.close(folder)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            machines = json.loads(read_limited(self._path, LARGEST))
            if not isinstance(machines, dict) or not all(isinstance(m, dict) for m in machines.values()):
                raise ValueError("not a record of machines")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            if not self._warned:
                logger.warning("%s is passed over: %s", self._path, error)
            self._warned = True
            return {}
        return machines
