"""What adapters teach the demo model, asked through the engine that serves: parts of benchmarks/tune.py."""

from __future__ import annotations

import re
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


def last_message(tokens: list[int]) -> tuple[str, str]:
    """To whom an answer's last message goes, "" for the user, and what it says."""
    header, _, said = TOKENIZER.decode(tokens).rpartition("<|message|>")
    to = re.search(r"to=(\S+?)(?=<|\s|$)", header.rpartition("<|start|>")[2])
    return to[1] if to else "", re.sub(r"<\|(return|call|end)\|>$", "", said)


def right(folder: Path | None, examples: Sequence[Example]) -> float:
    """The share of examples whose answer or call is written, whatever the reasoning before it."""
    pairs = zip(answers(folder, examples), examples, strict=True)
    found = [last_message(written) == last_message(e.wanted.tolist()) for written, e in pairs]
    return sum(found) / len(found)


def formed(folder: Path | None, examples: Sequence[Example]) -> float:
    """The share of answers of the form "= VALUE =", right or wrong."""
    finals = [last_message(written)[1] for written in answers(folder, examples)]
    return sum(f.startswith("= ") and f.endswith(" =") for f in finals) / len(finals)


def read(rows: list[dict[str, Any]]) -> list[Example]:
    return [example for row in rows for example in examples_of(row, TOKENIZER, "")]


def taught(scratch: Path, options: TuneOptions) -> Path:
    write_rows(scratch / "train.jsonl", style_rows("style train", 600))
    write_rows(scratch / "valid.jsonl", style_rows("style valid", 24))
    return tune("demo", scratch, scratch / "adapter", options, restart=True).folder


def learning() -> dict[str, float]:
    """A new form of answers: percent of unseen questions, before, and after 30 and 80 steps."""
    new = read(style_rows("style test", ASKED))
    found = {"before: in the new form": 100 * formed(None, new)}
    with tempfile.TemporaryDirectory() as scratch:
        for steps in (30, 80):
            folder = taught(Path(scratch), replace(LEARN, steps=steps))
            found[f"{steps} steps: in the new form"] = 100 * formed(folder, new)
            found[f"{steps} steps: and right"] = 100 * right(folder, new)
    return found


def keeping() -> dict[str, float]:
    """What else the model does, calls above all: percent right, without --keep and with it."""
    old, new = read(old_rows("old test", 2 * ASKED)), read(style_rows("style test", ASKED))
    found = {"before: old tasks right": 100 * right(None, old)}
    with tempfile.TemporaryDirectory() as scratch:
        keep = str(write_rows(Path(scratch) / "keep.jsonl", old_rows("old", 1000)))
        with_keep = replace(LEARN, keep=keep, lr=2e-3, steps=100, every=10)
        for name, options in (("without", LEARN), ("with", with_keep)):
            folder = taught(Path(scratch), options)
            found[f"{name} --keep: old tasks right"] = 100 * right(folder, old)
            found[f"{name} --keep: in the new form"] = 100 * formed(folder, new)
    return found


def preferring(seeds: Sequence[int] = (0, 1, 2)) -> dict[str, float]:
    """DPO: percent of unseen prompts to which the preferred answer is written."""
    pairs = [preference_of(row, TOKENIZER, "") for row in preference_rows("prefer test", ASKED)]
    chosen = [pair.chosen for pair in pairs]
    found = {"before": 100 * right(None, chosen)}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            train = write_rows(Path(scratch) / "train.jsonl", preference_rows(f"prefer {seed}", 200))
            folder = tune("demo", train, Path(scratch) / str(seed), replace(PREFER, seed=seed)).folder
            found[f"seed {seed}"] = 100 * right(folder, chosen)
    return found
