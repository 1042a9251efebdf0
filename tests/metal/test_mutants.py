"""The slips of mutants.toml are slips in the texts of today, and docs/kernels.md lists them.

`make metal` tries them all.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mlx_gptoss.model.kernels.kernel import Program
from tests.metal.cases import Case
from tests.metal.emulator import missing
from tests.metal.mutants import mutants, noticed, tried_on

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def programs() -> dict[str, Program]:
    first: list[Case] = [next(tried_on(kernel)) for kernel in sorted({m.kernel for m in mutants()})]
    return {program.name: program for case in first for program in case.kernel.programs}


def test_every_slip_changes_its_program() -> None:
    texts = programs()
    assert {m.program for m in mutants()} == set(texts) - {"attention_8_8_parts"}  # of the same two texts
    for mutant in mutants():
        assert not mutant.kind or mutant.applied(texts[mutant.program]) != texts[mutant.program], mutant.what


def test_every_program_has_twelve_slips_and_the_page_lists_them() -> None:
    listed = [m for m in mutants() if m.kind]
    assert min(Counter(m.program for m in listed).values()) >= 12
    page = PAGE.read_text(encoding="utf-8")
    assert not [m.what for m in listed if f"| `{m.program}` | {m.kind}: {m.what} |" not in page]


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("what", ["none before scores are read", "the window one too wide"])
def test_a_slip_is_noticed(what: str) -> None:
    (mutant,) = [m for m in mutants() if m.what == what]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_gptoss.model.kernels.kernel.run", None)
        assert noticed(mutant)
