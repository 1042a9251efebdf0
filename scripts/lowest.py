"""Print what pyproject.toml requires, each at its lower bound, as constraints for pip.

python scripts/lowest.py [EXTRA ..] > constraints.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<extras>[\w,-]+)\])?((>=|==)(?P<bound>[\w.]+))?[^;]*(;.*)?")


def bounds(project: dict[str, Any], extras: list[str]) -> dict[str, str]:
    """Distribution -> lower bound, of the dependencies and of these extras, which may name each other.

    Raises ValueError for a requirement without a lower bound, or with two.
    """
    found: dict[str, str] = {}
    optional = [project["optional-dependencies"][extra] for extra in extras]
    for requirement in chain(project["dependencies"], *optional):
        match = REQUIREMENT.fullmatch(requirement)
        if match and match["name"] == project["name"]:
            found |= bounds(project, match["extras"].split(","))
        elif match and match["bound"]:
            if found.setdefault(match["name"], match["bound"]) != match["bound"]:
                raise ValueError(f"{match['name']} has two lower bounds: keep one")
        else:
            raise ValueError(f"{requirement!r} has no lower bound: write it as NAME>=VERSION")
    return found


def main(extras: list[str]) -> None:
    """Print a constraint for each dependency."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    for name, bound in sorted(bounds(project, extras).items()):
        print(f"{name}=={bound}")


if __name__ == "__main__":
    main(sys.argv[1:])
