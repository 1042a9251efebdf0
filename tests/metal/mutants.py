"""Slips in the kernels' texts, each of which the emulator or the comparison with the reference must notice.

python -m tests.metal.mutants [--docs docs/kernels.md]
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_gptoss.model.kernels import kernel as kernels
from mlx_gptoss.model.kernels.kernel import Launch, Program
from tests.metal import cases
from tests.metal.cases import Case
from tests.metal.emulator import Emulator, KernelError, missing

LISTED = Path(__file__).with_name("mutants.toml")
START, END = "<!-- mutants -->\n", "<!-- /mutants -->\n"


@dataclass(frozen=True)
class Mutant:
    """One slip: `old`, somewhere in the text of a kernel's program, becomes `new`."""

    kernel: str
    program: str
    kind: str
    what: str
    old: str
    new: str

    def applied(self, program: Program) -> Program:
        if program.name != self.program:
            return program
        assert self.old in program.header + program.source, f"{self.program}: {self.old!r} is not there"
        changed = (text.replace(self.old, self.new) for text in (program.header, program.source))
        header, source = changed
        return replace(program, header=header, source=source)


def mutants() -> list[Mutant]:
    """All that are listed; the first of each program changes nothing."""
    listed = tomllib.loads(LISTED.read_text(encoding="utf-8"))
    blocks = listed.pop("blocks")
    return [
        Mutant(kernel, program, *slip)
        for kernel, programs in listed.items()
        for program, some in programs.items()
        for slip in (("", "as it is", "", ""), *(blocks if some["blocks"] else ()), *some["slips"])
    ]


def tried_on(kernel: str) -> Iterator[Case]:
    """Small cases of a kernel on which its mutants are tried, one after the other."""
    f32, b16 = mx.float32, mx.bfloat16
    odd = {"hidden": 1056, "outputs": 7, "experts": 5, "k": 3, "tokens": 2}
    if kernel == "gate_up":
        yield cases.gate_up_case(1, f32, interleaved=True, **odd)
        yield cases.gate_up_case(2, b16, interleaved=False, scale=8.0, **odd)
    elif kernel == "down":
        yield cases.down_case(1, f32, hidden=7, outputs=1056, experts=5, k=3, tokens=2)
        yield cases.down_case(2, b16, hidden=7, outputs=1056, experts=5, k=3, tokens=2)
    elif kernel == "router":
        for dtype in (f32, b16):
            yield cases.router_case(1, dtype, hidden=132, experts=70, k=4, tokens=2, scale=30)
        yield cases.router_case(2, f32, hidden=132, experts=70, k=4, tokens=2, scale=1e-3)
        yield from cases.equals(f32)
    elif kernel == "attention":
        for keys, window in ((75, 40), (900, 0)):
            for dtype in (f32, b16):
                yield cases.attention_case(1, dtype, keys=keys, window=window, queries=3, kv_heads=2, group=3)
        yield cases.attention_case(2, f32, keys=600, window=0, kv_heads=1, group=2, scale=30.0)
    elif kernel == "attention_8_8":
        for dtype in (f32, b16):
            yield cases.attention_case(3, dtype, keys=75, window=0, kv_heads=2, group=2, bits=(8, 8))
        yield cases.attention_case(3, f32, keys=20, window=0, kv_heads=1, channels=96, group=2, bits=(8, 8))
    yield from (c for c in cases.not_finite(f32) if c.kernel.name == kernel)


def noticed(mutant: Mutant) -> str:
    """By what a mutant is noticed; "" when it is not."""
    for case in tried_on(mutant.kernel):
        emulator = Emulator(traced=True, seed=1)

        def run(
            program: Program, inputs: Sequence[mx.array], launch: Launch, emulator: Emulator = emulator
        ) -> list[mx.array]:
            return emulator.run(mutant.applied(program), inputs, launch)

        kernels.run = run
        try:
            if problem := case.problem(case.kernel(*case.inputs)):
                return f"numbers: {problem}"
        except KernelError as error:
            return str(error)
    return ""


def table(found: dict[Mutant, str]) -> str:
    """Markdown, a line for each mutant."""
    caught = sum(map(bool, found.values()))
    lines = [f"{caught} of {len(found)} are noticed.", "", "| kernel | slip | noticed by |", "|---|---|---|"]
    for mutant, by in found.items():
        first = (by.splitlines() or ["**not noticed**"])[0]
        stage, _, told = first.partition(": ")
        by = {"check": "clang", "lint": "the lint"}.get(stage) or told.split(" (threadgroup")[0] or first
        if stage == "numbers":
            by = "its numbers"
        lines.append(f"| `{mutant.program}` | {mutant.kind}: {mutant.what} | {by} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print which mutants are noticed; fails below 95 %."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, help="write the table into this page")
    options = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    found = {}
    for mutant in mutants():
        by = noticed(mutant)
        print(f"{mutant.program}, {mutant.what}: {(by or 'not noticed').splitlines()[0]}", flush=True)
        if mutant.kind:
            found[mutant] = by
        elif by:
            sys.exit("a kernel is right only with a slip in it")
    if options.docs:
        page = options.docs.read_text(encoding="utf-8")
        before, rest = page.split(START)
        options.docs.write_text(before + START + table(found) + END + rest.split(END)[1], encoding="utf-8")
    caught = sum(map(bool, found.values()))
    print(f"{caught} of {len(found)} mutants are noticed")
    sys.exit(caught < 0.95 * len(found))


if __name__ == "__main__":
    main()
