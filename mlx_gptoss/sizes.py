"""Numbers of bytes as text: 4GB, 512MiB."""

from __future__ import annotations

import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int | None:
    """A number of bytes from 4GB, 512MiB, 1.5gb or plain 1000000; None for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else None
