"""The golden files beside this one: what transformers computed for checkpoints that can be written again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.support.random_weights import Shape

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(f.stem for f in GOLDEN.glob("*.npz"))


@dataclass(frozen=True)
class Golden:
    """`logits` are the last rows, one for each of the last len(logits) tokens."""

    shape: Shape
    seed: int
    tokens: np.ndarray
    prompt: int
    logits: np.ndarray
    tolerance: float  # the bar: 1e-4 up to 200 tokens, 1e-3 beyond


def load_golden(name: str) -> Golden:
    with np.load(GOLDEN / f"{name}.npz") as file:
        about = json.loads(file["about"].tobytes())
        tokens, prompt, logits = file["tokens"], int(file["prompt"]), file["logits"]
    tolerance = 1e-4 if len(tokens) <= 200 else 1e-3
    return Golden(Shape(**about["shape"]), about["seed"], tokens, prompt, logits, tolerance)
