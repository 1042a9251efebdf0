"""What adapters teach the demo model, asked through the engine that serves: parts of benchmarks/tune.py."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_gptoss as gptoss
from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tune import TuneOptions, tune
from mlx_gptoss.tune.examples import Example, examples_of, preference_of
from tests.support.tuning import old_rows, preference_rows, style_rows, write_rows

LEARN = TuneOptions(
    rank=16, scale=4.0, tokens=1024, steps=80, every=80, lr=3e-3, warmup=0.1, samples=0, patience=0
)
PREFER = TuneOptions(method="dpo", tokens=1024, epochs=1, lr=2e-3, samples=0, patience=0)
ASKED = 100
GREEDY = gptoss.SamplingParams(temperature=0.0, max_tokens=240)
TOKENIZER = Tokenizer.from_folder(DEMO_FOLDER)


def answers(folder: Path | None, examples: Sequence[Example]) -> list[list[int]]:
    """What the model, with the adapter in a folder, writes where each example's answer starts."""
    with gptoss.load("demo", adapter=folder) as llm, ThreadPoolExecutor(16) as pool:
        prompts = [e.ids[: e.rows[0] + 1].tolist() for e in examples]
        return list(pool.map(lambda prompt: list(llm.generate(prompt, GREEDY)), prompts))


def exact(folder: Path | None, rows: list[dict[str, Any]]) -> float:
    """The share of rows whose whole answer, reasoning and calls included, is written token for token."""
    examples = [example for row in rows for example in examples_of(row, TOKENIZER, "")]
    return same(answers(folder, examples), examples)


def same(written: list[list[int]], examples: Sequence[Example]) -> float:
    """The share of examples that were written; the last token ends the answer and is not part of it."""
    pairs = list(zip(written, examples, strict=True))
    return sum(bool(w[: len(e.wanted) - 1] == e.wanted[:-1].tolist()) for w, e in pairs) / len(pairs)


def formed(folder: Path | None, rows: list[dict[str, Any]]) -> float:
    """The share of answers of the form "= VALUE =", right or wrong."""
    written = answers(folder, [example for row in rows for example in examples_of(row, TOKENIZER, "")])
    finals = [TOKENIZER.decode(w).rpartition("<|message|>")[2].partition("<|return|>")[0] for w in written]
    return sum(f.startswith("= ") and f.endswith(" =") for f in finals) / len(finals)


def taught(scratch: Path, options: TuneOptions) -> Path:
    write_rows(scratch / "train.jsonl", style_rows("style train", 600))
    write_rows(scratch / "valid.jsonl", style_rows("style valid", 24))
    return tune("demo", scratch, scratch / "adapter", options, restart=True).folder


def learning() -> dict[str, float]:
    """A new form of answers: percent of unseen questions, before, and after 30 and 80 steps."""
    rows, found = style_rows("style test", ASKED), dict[str, float]()
    found["before: in the new form"] = 100 * formed(None, rows)
    with tempfile.TemporaryDirectory() as scratch:
        for steps in (30, 80):
            folder = taught(Path(scratch), replace(LEARN, steps=steps))
            found[f"{steps} steps: in the new form"] = 100 * formed(folder, rows)
            found[f"{steps} steps: and the whole answer right"] = 100 * exact(folder, rows)
    return found


def keeping() -> dict[str, float]:
    """What else the model does: percent that is written as before, without --keep and with it."""
    rows, new = old_rows("old test", ASKED), style_rows("style test", ASKED)
    found = {"before: old tasks": 100 * exact(None, rows)}
    with tempfile.TemporaryDirectory() as scratch:
        keep = str(write_rows(Path(scratch) / "keep.jsonl", old_rows("old", 200)))
        for name, options in (("without", LEARN), ("with", replace(LEARN, keep=keep))):
            folder = taught(Path(scratch), options)
            found[f"{name} --keep: old tasks"] = 100 * exact(folder, rows)
            found[f"{name} --keep: in the new form"] = 100 * formed(folder, new)
    return found


def preferring(seeds: Sequence[int] = (0, 1, 2)) -> dict[str, float]:
    """DPO: percent of unseen prompts to which the preferred answer is written."""
    pairs = [preference_of(row, TOKENIZER, "") for row in preference_rows("prefer test", ASKED)]
    chosen = [pair.chosen for pair in pairs]
    found = {"before": 100 * same(answers(None, chosen), chosen)}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            train = write_rows(Path(scratch) / "train.jsonl", preference_rows(f"prefer {seed}", 200))
            folder = tune("demo", train, Path(scratch) / str(seed), replace(PREFER, seed=seed)).folder
            found[f"seed {seed}"] = 100 * same(answers(folder, chosen), chosen)
    return found
