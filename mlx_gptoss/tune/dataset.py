"""Where examples come from: a jsonl file, a folder with train.jsonl and valid.jsonl, or what the package
datasets reads: a Hub data set, or a folder of parquet and the like.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlx_gptoss.checkpoint.hub import explain, is_repo_id
from mlx_gptoss.errors import TuneError
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tune.examples import Example, Kept, Preference, examples_of, preference_of

Item = TypeVar("Item", Example, Preference)


@dataclass(frozen=True)
class Rows:
    """Rows of a data set: each with where it stands. sha256 is of the rows' text."""

    rows: list[tuple[str, Any]]
    sha256: str


@dataclass(frozen=True)
class DataSet:
    """What to learn from, what to validate on, and what must not be forgotten (`keep`), as rows."""

    train: Rows
    valid: Rows | None
    keep: Rows | None = None


@dataclass
class Encoded:
    """A data set in token ids. `left_out`: how many examples were longer than a step."""

    train: Sequence[Example | Preference]
    valid: Sequence[Example | Preference]
    replay: Sequence[Kept] = ()
    keep: Sequence[Kept] = ()
    left_out: int = 0
    sample_rows: list[Any] = field(default_factory=list)


def read_data(source: str, valid: str | None, keep: str | None, seed: int) -> DataSet:
    """Find the rows. `valid`: a file, a share such as "5%", "none", or None for valid.jsonl or 5 %.

    Raises TuneError for files that cannot be read, with the line at fault.
    """
    path = Path(source).expanduser()
    found: Rows | None = None
    if (path / "train.jsonl").is_file():
        train = read_jsonl(path / "train.jsonl")
        if (path / "valid.jsonl").is_file():
            found = read_jsonl(path / "valid.jsonl")
    elif path.exists() and not path.is_dir():
        train = read_jsonl(path)
    elif path.is_dir() or is_repo_id(source):
        train, found = _by_datasets(str(path) if path.is_dir() else source)
    else:
        raise TuneError(
            f"no file or folder {source!r}: expected a .jsonl file, a folder or a Hub data set's id"
        )
    if valid is not None and valid != "none" and not valid.endswith("%"):
        found = read_jsonl(Path(valid).expanduser())
    elif valid == "none":
        found = None
    elif valid is not None or found is None:
        train, found = _split(train, valid or "5%", seed)
    return DataSet(train, found, None if keep is None else read_jsonl(Path(keep).expanduser()))


def read_jsonl(path: Path) -> Rows:
    """A JSON value a line. Raises TuneError naming the line."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise TuneError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        place = data.count(b"\n", 0, error.start) + 1
        raise TuneError(f"{path}, line {place}: not UTF-8") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}, line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise TuneError(f"{path}, line {number}: not JSON ({error})") from None
    if not rows:
        raise TuneError(f"{path}: holds no examples: expected one JSON object a line")
    return Rows(rows, hashlib.sha256(data).hexdigest())


def encode(data: DataSet, tokenizer: Tokenizer, limit: int, *, skip_long: bool, preferences: bool) -> Encoded:
    """All examples as token ids, none longer than `limit`. Of every four to keep one is held out, to measure.

    Raises TuneError for a row that cannot be used, and for long ones unless `skip_long`.
    """
    left_out = 0

    def read(rows: Rows | None, pairs: bool) -> list[Any]:
        nonlocal left_out
        made: list[Any] = []
        for where, row in rows.rows if rows is not None else ():
            if pairs:
                made.append(preference_of(row, tokenizer, where))
            else:
                made += examples_of(row, tokenizer, where)
        fitting = _fitting(made, limit, skip_long)
        left_out += len(made) - len(fitting)
        return fitting

    train, valid = read(data.train, preferences), read(data.valid, preferences)
    keep = [Kept(e.ids, e.rows, e.wanted, e.where) for e in read(data.keep, False)]
    held = keep[::4] if len(keep) >= 8 else keep
    replay = [e for i, e in enumerate(keep) if i % 4] if len(keep) >= 8 else []
    if not train:
        raise TuneError("no example is left to learn from: all are longer than a step, raise --tokens")
    rows = (data.valid or data.train).rows
    return Encoded(train, valid, replay, held, left_out, [row for _, row in rows[:2]])


def _fitting(items: list[Any], limit: int, skip_long: bool) -> list[Any]:
    long = [item for item in items if len(item) > limit]
    if long and not skip_long:
        worst = max(long, key=len)
        where = worst.where if isinstance(worst, Example) else worst.chosen.where
        raise TuneError(
            f"{where}: {len(worst):,} tokens, and a step takes {limit:,} ({len(long)} of {len(items)} "
            "examples are longer): raise --tokens, or leave such examples out with --skip-long"
        )
    return [item for item in items if len(item) <= limit]


def pack(items: Sequence[Item], limit: int, rng: np.random.Generator) -> list[list[Item]]:
    """Groups of whole items of at most `limit` tokens: longest first into the first group with room.

    Items of one length, and the groups, come in random order.
    """
    order = sorted(rng.permutation(len(items)).tolist(), key=lambda i: -len(items[i]))
    groups: list[list[Item]] = []
    filled: list[int] = []
    for i in order:
        size = len(items[i])
        at = next((n for n, used in enumerate(filled) if used + size <= limit), len(groups))
        if at == len(groups):
            groups.append([])
            filled.append(0)
        groups[at].append(items[i])
        filled[at] += size
    return [groups[i] for i in rng.permutation(len(groups)).tolist()]


def _split(rows: Rows, share: str, seed: int) -> tuple[Rows, Rows | None]:
    """Some rows for validation; none where there are fewer than ten."""
    try:
        part = float(share.removesuffix("%")) / 100
    except ValueError:
        part = -1.0
    if not 0 <= part <= 0.5:
        raise TuneError(f"valid is {share!r}: expected a file or a share from 0% to 50%")
    count = max(1, round(part * len(rows.rows))) if part and len(rows.rows) >= 10 else 0
    if not count:
        return rows, None
    chosen = set(np.random.default_rng(seed).permutation(len(rows.rows))[:count].tolist())
    parts: tuple[list[Any], list[Any]] = ([], [])
    for i, row in enumerate(rows.rows):
        parts[i in chosen].append(row)
    return Rows(parts[0], rows.sha256), Rows(parts[1], rows.sha256)


def _by_datasets(name: str) -> tuple[Rows, Rows | None]:
    """The rows of a folder or of a Hub data set, by the package datasets."""
    local = Path(name).is_dir()
    try:
        load_dataset = import_module("datasets").load_dataset
    except ImportError:
        missing = f"{name}: no train.jsonl in this folder, and" if local else f"{name!r} is no file, and"
        what = "other files" if local else "data sets of the Hub"
        raise TuneError(f"{missing} {what} need the package datasets: pip install datasets") from None
    try:
        parts = load_dataset(name)
    except Exception as error:
        if local:
            raise TuneError(f"{name}: no train.jsonl, nor what datasets reads ({error})") from error
        raise explain(error, name) from error
    if "train" not in parts:
        raise TuneError(f"{name!r}: no split 'train': it has {', '.join(map(repr, parts))}")
    valid = next((parts[key] for key in ("validation", "valid") if key in parts), None)
    return _listed(name, "train", parts["train"]), None if valid is None else _listed(name, "valid", valid)


def _listed(name: str, part: str, rows: Iterable[Any]) -> Rows:
    listed = [(f"{name}, {part} {i}", _said(row)) for i, row in enumerate(rows)]
    text = json.dumps([row for _, row in listed], default=str)
    return Rows(listed, hashlib.sha256(text.encode()).hexdigest())


def _said(value: Any) -> Any:
    """A row without its nulls: all rows of a table have the same keys, at every depth."""
    if isinstance(value, Mapping):
        return {key: _said(inner) for key, inner in value.items() if inner is not None}
    return [_said(inner) for inner in value] if isinstance(value, list) else value
