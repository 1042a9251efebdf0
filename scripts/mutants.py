"""Mutation testing: does some test notice when a comparison is flipped or a number is off by one?

    python -m scripts.mutants [TARGET ..] [--count 400] [--seed 1] [--jobs 2] [--tests FILE ..]

A target is a room ("engine") or a module ("engine.scheduler"); by default all rooms of TESTS. The sites where
cosmic-ray's operators apply are ranked by a hash of the seed, the definition and the line, so that an edit
moves only its own sites in or out of the sample. One mutant is made at each of the first `count` sites, and
the tests that run its statement run on it, in a copy of the tree, up to the first failure.

Verdicts are appended to build/mutants/results.jsonl, and a run that is repeated goes on where it was; what
survived runs again once one of its test files has changed. `--tests` tries a few files instead, while one
writes them. build/mutants/report.json has the table and the survivors' diffs. Survivors judged to be no
different in behaviour stand in tests/mutants_equivalent.toml.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import fcntl
import hashlib
import json
import queue
import re
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import TypeAlias

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from parso.python.tree import Class, Function, Lambda
from parso.tree import NodeOrLeaf

from scripts.count_imports import room_of, sources
from scripts.mutants_bench import ROOT, TESTS, Bench, Lines, Stage, digest, test_files

WORK = ROOT / "build" / "mutants"
EQUIVALENT = ROOT / "tests" / "mutants_equivalent.toml"

Place: TypeAlias = tuple[tuple[int, int], tuple[int, int]]  # (line, column) of its start and end

# Of cosmic-ray's operators those whose mutants are a slip that someone could make. Left out are the many that
# raise a TypeError wherever they apply (+ to @, < to `is`) and are no test of the tests.
OPERATORS = re.compile(
    "core/("
    "ReplaceComparisonOperator_(Eq_NotEq|Eq_LtE|Eq_GtE|NotEq_Eq|NotEq_Lt|NotEq_Gt|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt"
    "|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt|Is_IsNot|IsNot_Is)"
    "|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_FloorDiv|FloorDiv_Mul|Div_Mul|Mod_FloorDiv|Pow_Mul"
    "|RShift_LShift|LShift_RShift|BitOr_BitAnd|BitAnd_BitOr|BitXor_BitOr)"
    "|ReplaceUnaryOperator_(USub_UAdd|Delete_USub|Delete_Not|Delete_Invert)"
    "|AddNot|ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd"
    "|ReplaceBreakWithContinue|ReplaceContinueWithBreak|ExceptionReplacer|NumberReplacer|ZeroIterationForLoop)"
)


OUTCOMES = ("killed", "timeout", "survived", "equivalent")
COLUMNS = {"name": 28, "sampled": 9, **{outcome: len(outcome) + 2 for outcome in OUTCOMES}, "percent": 9}


# What only guards against slips elsewhere, or is for type checkers: no test could tell it from its opposite.
GUARD = re.compile(r"(strict|frozen)=$|\s*if (TYPE_CHECKING|__name__)\b")


@dataclass(frozen=True)
class Site:
    """A place in the code and the (operator, occurrence) pairs that change it. `key` survives line shifts.

    `code` is a digest of the function or class around it.
    """

    module: str
    definition: str
    line: int
    key: str
    code: str
    changes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Mutant:
    """One change: the lines it replaces, and the module's new source."""

    module: str
    definition: str
    line: int
    key: str
    code: str
    before: str
    after: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant. `code` and `tests` are digests of its definition and its test files."""

    key: str
    outcome: str  # one of OUTCOMES
    by: str = ""  # the test that noticed
    seconds: float = 0.0
    code: str = ""
    tests: str = ""


def rank(seed: int, key: str) -> str:
    """A place in a random order that depends on the seed and the key alone."""
    return hashlib.sha256(f"{seed} {key}".encode()).hexdigest()


def sites(module: str, source: str) -> list[Site]:
    """Every place in a module's source that an operator changes."""
    lines = source.splitlines()
    nodes = list(ast_nodes(get_ast(source)))
    changes: dict[Place, list[tuple[str, int]]] = defaultdict(list)
    around: dict[Place, tuple[str, str]] = {}
    for name in filter(OPERATORS.fullmatch, operator_names()):
        operator = get_operator(name)()
        places = ((node, *place) for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (node, start, end) in enumerate(places):
            changes[start, end].append((name, occurrence))
            if (start, end) not in around:
                around[start, end] = _definition(node, lines[start[0] - 1])
    found, seen = [], Counter[str]()
    for (start, end), pairs in sorted(changes.items()):
        line, (definition, code) = lines[start[0] - 1], around[start, end]
        if GUARD.search(line[: start[1]]) or GUARD.match(line):
            continue
        column = start[1] - (len(line) - len(line.lstrip()))
        key = f"{module}:{definition}:{line.strip()}:{column}"
        seen[key] += 1
        found.append(Site(module, definition, start[0], f"{key}:{seen[key]}", code, tuple(pairs)))
    return found


def _definition(node: NodeOrLeaf, line: str) -> tuple[str, str]:
    """The name of the function or class around a node, and a digest of its code; at the top of the line's."""
    at: NodeOrLeaf | None = node
    while at is not None and not (isinstance(at, Function | Class) and not isinstance(at, Lambda)):
        at = at.parent
    if at is None:
        return "", digest(line)
    code: str = at.get_code()  # type: ignore[no-untyped-call]
    return at.name.value, digest(code)


def mutant_at(site: Site, source: str, seed: int) -> Mutant | None:
    """The first change of a site, in the seed's order, that a test could notice; None when none could."""
    for name, occurrence in sorted(site.changes, key=lambda change: rank(seed, f"{site.key} {change}")):
        mutated = mutate_code(source, get_operator(name)(), occurrence)
        if mutated is None or _meaning(mutated) in (None, _meaning(source)):
            continue
        old, new = _changed(source, mutated)
        key = f"{site.key} -> {new}"
        return Mutant(site.module, site.definition, site.line, key, site.code, old, new, mutated)
    return None


@cache
def _meaning(source: str) -> str | None:
    """The syntax tree without annotations, which are never evaluated; None for a syntax error."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if hasattr(node, name):
                setattr(node, name, None)
    return ast.dump(tree)


def _changed(old: str, new: str) -> tuple[str, str]:
    """The lines that differ, without their indentation."""
    a, b = old.splitlines(), new.splitlines()
    first = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    last = next(i for i, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y)
    return tuple("\n".join(x.strip() for x in s[first : len(s) - last]) for s in (a, b))  # type: ignore[return-value]


def sample(targets: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants of the targets in the seed's order, equally many of each room that has them."""
    rooms: dict[str, list[tuple[Site, str]]] = defaultdict(list)
    for module, path in sources(ROOT).items():
        if any(module == t or module.startswith(f"{t}.") for t in targets):
            source = path.read_text(encoding="utf-8")
            rooms[room_of(module)] += [(site, source) for site in sites(module, source)]
    if not any(rooms.values()):
        raise SystemExit(f"nothing to mutate in {', '.join(targets)}")
    ranked = [sorted(found, key=lambda pair: rank(seed, pair[0].key)) for found in rooms.values()]
    chosen: list[Mutant] = []
    for site, source in filter(None, chain.from_iterable(zip_longest(*ranked))):
        if len(chosen) == count:
            break
        mutant = mutant_at(site, source, seed)
        if mutant is not None:
            chosen.append(mutant)
    print(f"{len(chosen)} mutants at {sum(map(len, ranked))} sites, seed {seed}", flush=True)
    return chosen


class Campaign:
    """Runs a sample of mutants and keeps the verdicts."""

    def __init__(self, mutants: list[Mutant], jobs: int, tests: list[str]) -> None:
        self.mutants = mutants
        self.verdicts: dict[str, Verdict] = {}
        self._results = WORK / "results.jsonl"
        self._benches = [Bench(WORK / f"tree{i}") for i in range(jobs)]
        files = tests or test_files(dict.fromkeys(e for m in mutants for e in TESTS[room_of(m.module)]))
        for bench in self._benches:
            bench.compile(files)
        lines, read = Lines(self._benches[0], WORK / "lines", files), cache(Path.read_text)
        self._stages: dict[str, list[Stage]] = {}
        for m in mutants:
            self._stages[m.key] = lines.stages(m.module, read(sources(ROOT)[m.module]), m.line)
        self._recall()
        equivalent = load_equivalent()
        for m in mutants:
            if any(_is(m, entry) for entry in equivalent):
                self.verdicts[m.key] = Verdict(m.key, "equivalent")

    def _tests(self, m: Mutant) -> str:
        """A digest of the test files that a mutant meets."""
        files = sorted({file for stage in self._stages[m.key] for file in stage.files})
        return digest("".join((ROOT / file).read_text(encoding="utf-8") for file in files))

    def _recall(self) -> None:
        """Take over the verdicts of earlier runs that still hold."""
        if not self._results.exists():
            return
        mutants = {m.key: m for m in self.mutants}
        for line in self._results.read_text(encoding="utf-8").splitlines():
            old = Verdict(**json.loads(line))
            m = mutants.get(old.key)
            if m is None or old.code != m.code:
                continue
            if old.outcome != "survived" or old.tests == self._tests(m):
                self.verdicts[old.key] = old

    def run(self) -> None:
        """Test every mutant without a verdict."""
        pending = [m for m in self.mutants if m.key not in self.verdicts]
        benches: queue.SimpleQueue[Bench] = queue.SimpleQueue()
        for bench in self._benches:
            benches.put(bench)

        def work(m: Mutant) -> Verdict:
            bench, start = benches.get(), time.perf_counter()
            try:
                outcome, by = bench.try_out(m.module, m.source, self._stages[m.key])
            finally:
                benches.put(bench)
            return Verdict(m.key, outcome, by, round(time.perf_counter() - start, 1), m.code, self._tests(m))

        with (
            ThreadPoolExecutor(len(self._benches)) as pool,
            self._results.open("a", encoding="utf-8") as file,
        ):
            futures = [pool.submit(work, m) for m in pending]
            try:
                for i, future in enumerate(as_completed(futures)):
                    verdict = future.result()
                    self.verdicts[verdict.key] = verdict
                    print(json.dumps(asdict(verdict)), file=file, flush=True)
                    short = verdict.key.replace("\n", " ")
                    print(f"{i + 1}/{len(pending)} {verdict.outcome} {verdict.seconds} {short}", flush=True)
            finally:
                for future in futures:
                    future.cancel()

    def survivors(self) -> Iterator[Mutant]:
        return (m for m in self.mutants if self.verdicts[m.key].outcome == "survived")


def load_equivalent() -> list[dict[str, str]]:
    """The judged survivors: module, definition, before, after (absent: whatever it becomes), reason."""
    return list(tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("mutant", []))


def _is(mutant: Mutant, entry: dict[str, str]) -> bool:
    place = (mutant.module, mutant.definition, mutant.before)
    return place == (entry["module"], entry["definition"], entry["before"]) and (
        entry.get("after", mutant.after) == mutant.after
    )


def stale(entries: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Entries whose code is gone."""
    modules = sources(ROOT)
    gone = []
    for entry in entries:
        path = modules.get(entry["module"])
        lines = [] if path is None else [x.strip() for x in path.read_text(encoding="utf-8").splitlines()]
        if not set(entry["before"].splitlines()) <= set(lines):
            gone.append(entry)
    return gone


def table(campaign: Campaign) -> list[dict[str, str | int | float]]:
    """Counts for each room and each module, with the share killed of those that are not equivalent."""
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for m in campaign.mutants:
        for group in {room_of(m.module), m.module}:
            groups[group][campaign.verdicts[m.key].outcome] += 1
    rows: list[dict[str, str | int | float]] = []
    for group, counts in sorted(groups.items()):
        found, survived = counts["killed"] + counts["timeout"], counts["survived"]
        share = round(100 * found / (found + survived), 1) if found + survived else 100.0
        rows.append(
            {"name": group, "sampled": counts.total(), **{o: counts[o] for o in OUTCOMES}, "percent": share}
        )
    return rows


def report(campaign: Campaign, seed: int) -> None:
    """Print the table and the survivors, and write both to report.json."""
    rows, survivors = table(campaign), []
    for m in campaign.survivors():
        old = sources(ROOT)[m.module].read_text(encoding="utf-8").splitlines()
        diff = difflib.unified_diff(old, m.source.splitlines(), m.module, m.definition, n=2, lineterm="")
        judge = {"module": m.module, "definition": m.definition, "before": m.before, "after": m.after}
        survivors.append({**judge, "diff": "\n".join(diff)})
    made = {"seed": seed, "count": len(campaign.mutants), "table": rows, "survivors": survivors}
    (WORK / "report.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
    for survivor in survivors:
        print(f"\n{survivor['diff']}")
    print("\n" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
    for row in rows:
        print("".join(f"{row[name]:>{width}}" for name, width in COLUMNS.items()))
    for entry in stale(load_equivalent()):
        print(f"{EQUIVALENT.name}: {entry['module']} has no {entry['before']!r} any more")


def main() -> None:
    """Run mutants as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", default=list(TESTS), metavar="TARGET")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tests", nargs="*", default=[], metavar="FILE")
    asked = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    lock = (WORK / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit(f"another run is under way in {WORK}") from None
    campaign = Campaign(sample(asked.targets, asked.count, asked.seed), asked.jobs, asked.tests)
    campaign.run()
    report(campaign, asked.seed)


if __name__ == "__main__":
    main()
