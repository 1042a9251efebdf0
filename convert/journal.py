"""What an unfinished conversion has done so far, so that the next run goes on instead of starting over.

One JSON object a line: first what is being converted and how, then a record per finished job. A record counts
only as far as the bytes on the disk still have the hashes it gives: so a line may reach the disk before the
data it speaks of, and neither a kill nor a power cut can make a wrong result.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_gptoss.convert.disk import writing
from mlx_gptoss.errors import ConversionError

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True)
class Record:
    """A finished job: SHA-256 of its outputs, sums of squares of its error and of what was measured."""

    digests: dict[str, str]
    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float | None:
        """sqrt(error / norm); None when nothing was measured."""
        if self.squared_norm > 0:
            return math.sqrt(self.squared_error / self.squared_norm)
        return 0.0 if self.squared_error == 0 else None


class Journal:
    """The journal of one conversion, locked against a second one; use it in a with statement.

    `identity` tells what is converted and how. restart: forget what is noted. Raises ConversionError when the
    folder holds the work of another conversion, or one that is still running.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, restart: bool = False) -> None:
        self.path = folder / JOURNAL_NAME
        self.records: dict[str, Record] = {}
        with writing(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
            if restart:
                os.ftruncate(self._file, 0)
            self._load(identity)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def add(self, name: str, record: Record) -> None:
        """Note a finished job. Its bytes must have been written and hashed."""
        self.records[name] = record
        self._append({"job": name, **asdict(record)})

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(
                f"{self.path.parent}: another conversion is writing here; wait for it or choose another"
            ) from None

    def _load(self, identity: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a run that was killed may have left half a line
        os.ftruncate(self._file, len(whole))
        os.lseek(self._file, 0, os.SEEK_END)
        if not whole:
            self._append(identity)
            return
        try:
            begun, *entries = [json.loads(line) for line in whole.splitlines()]
            wanted = json.loads(json.dumps(identity))  # as JSON brings it back: tuples become lists
            differs = [key for key in wanted if begun.get(key) != wanted[key]]
            self.records = {
                e["job"]: Record(dict(e["digests"]), float(e["squared_error"]), float(e["squared_norm"]))
                for e in entries
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{self.path}: not readable ({error}); start anew with --restart") from None
        if differs:
            raise ConversionError(
                f"{self.path.parent}: holds an unfinished conversion with another {' and '.join(differs)}; "
                "repeat that command to finish it, or start anew with --restart"
            )

    def _append(self, entry: dict[str, Any]) -> None:
        line = memoryview(json.dumps(entry, sort_keys=True).encode() + b"\n")
        with writing(self.path):
            while line:
                line = line[os.write(self._file, line) :]
