"""The names a model goes by: short ones for OpenAI's checkpoints, and the one that a mistyped name meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

DEMO = "demo"
SHORT_NAMES = {
    "20b": "openai/gpt-oss-20b",
    "120b": "openai/gpt-oss-120b",
    "safeguard-20b": "openai/gpt-oss-safeguard-20b",
    "safeguard-120b": "openai/gpt-oss-safeguard-120b",
}


def expand(model: str | Path) -> str:
    """The Hub id of a short name; any other text as it is. A folder of that name comes first."""
    text = str(model)
    known = SHORT_NAMES.get(text.lower())
    return text if known is None or isinstance(model, Path) or Path(text).exists() else known


def short_name(repo: str) -> str:
    """What to type for a Hub id: its short name, where it has one."""
    return next((short for short, full in SHORT_NAMES.items() if full == repo), repo)


def did_you_mean(text: str, others: Iterable[str] = ()) -> str:
    """A remark that names what `text` is close to: "; did you mean '20b'?", or "" when there is nothing.

    others: names to think of beside the short ones, their Hub ids and "demo".
    """
    names = {DEMO: DEMO} | {short: short for short in SHORT_NAMES}
    for full in (*SHORT_NAMES.values(), *others):
        names |= {full.lower(): full, full.rpartition("/")[2].lower(): full}
    found = get_close_matches(text.lower(), names, n=1, cutoff=0.65)
    return f"; did you mean {names[found[0]]!r}?" if found and names[found[0]] != text else ""
