"""The demo model on this machine against stored answers, which MLX's CPU backend gave in float32.

What differs here is MLX's backend, its versions, or files that were damaged: the same sums in another order
stay within TOLERANCE. `scripts/make_doctor_answers.py` computes answers.json again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_gptoss import device
from mlx_gptoss.doctor.finding import Finding, Verdict
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.sampling import SamplingParams

if TYPE_CHECKING:
    from mlx_gptoss.llm import LLM

PROMPTS = (
    "What is 17 + 25?",
    "What is 358 + 267?",
    "What is the capital of France?",
    "How many r are in strawberry?",
    "Sort these numbers: 31, 7, 52",
    "Who are you?",
)
TOKENS = 64  # of a reply at most
STRIDE = 61  # of a position's logits every so many are stored
# Of logits in float32. A GPU computes float32 products of matrices in reduced precision on some chips.
TOLERANCE = 1e-3
TOLERANCE_GPU = 2e-2


@dataclass(frozen=True)
class Answer:
    """A prompt, the reply by greedy decoding, and some logits after the last of its tokens."""

    prompt: list[int]
    reply: list[int]
    logits: list[float]


def stored() -> list[Answer]:
    """What the package ships."""
    text = (files("mlx_gptoss.doctor") / "answers.json").read_text(encoding="utf-8")
    return [Answer(**entry) for entry in json.loads(text)]


def compute(llm: LLM, prompt: list[int]) -> Answer:
    """The answer of a model here."""
    reply = list(llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=TOKENS)))
    return Answer(prompt, reply, [float(x) for x in llm.logits(prompt + reply)[-1, ::STRIDE]])


def as_data(answers: list[Answer]) -> list[dict[str, Any]]:
    """What answers.json holds."""
    return [asdict(answer) | {"logits": [round(x, 6) for x in answer.logits]} for answer in answers]


def findings() -> Iterator[Finding]:
    """Whether the replies are the stored ones, and how far the logits are from them."""
    from mlx_gptoss.llm import load

    try:
        with load("demo", dtype="float32") as llm:
            pairs = [(answer, compute(llm, answer.prompt)) for answer in stored()]
    except GptOssError as error:
        yield Finding("demo model", "loads", "failed", str(error))
        return
    wrong = [number for number, (was, now) in enumerate(pairs, 1) if was.reply != now.reply]
    told = f"{len(pairs) - len(wrong)} of {len(pairs)} as stored"
    yield Finding("demo model", "greedy replies", "failed" if wrong else "ok", told)
    same = [(was, now) for was, now in pairs if was.reply == now.reply]
    if same:
        worst = max(float(np.abs(np.subtract(was.logits, now.logits)).max()) for was, now in same)
        limit = TOLERANCE_GPU if device.on_gpu() else TOLERANCE
        verdict: Verdict = "ok" if worst <= limit else "failed"  # a NaN fails
        told = f"differ by {worst:.1e} at most, {limit:g} is allowed"
        yield Finding("demo model", "logits", verdict, told)
