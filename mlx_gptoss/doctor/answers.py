"""The demo model on this machine against stored answers, and on a GPU against MLX's CPU backend beside it.

The stored ones were given by MLX's CPU backend in float32. What differs here is MLX's backend, its versions,
or files that were damaged: the same sums in another order stay within the tolerance. The first operation that
differs is named. `scripts/make_doctor_answers.py` computes answers.json again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from zlib import crc32

import numpy as np

from mlx_gptoss import device
from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.reader import load_model
from mlx_gptoss.checkpoint.safetensors import read_bytes, read_folder
from mlx_gptoss.doctor.finding import Finding
from mlx_gptoss.doctor.walk import Operations, first_difference, operations
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
# The prompt whose operations are walked through: longer than the window with its reply, and the one where no
# router's choice is close.
WALKED = 2
# Of logits, and of an operation's values in terms of their size, in float32. Some GPUs compute its products
# in reduced precision.
TOLERANCE = 1e-3
TOLERANCE_GPU = 2e-2
# Of logits in bfloat16, from those in float32: three times what MLX's CPU backend gives.
TOLERANCE_BFLOAT16 = 0.5
PATIENCE = 120.0  # seconds for the CPU backend's answers


Result: TypeAlias = tuple[bool, str]
"""Whether something is right, and what is told of it."""


@dataclass(frozen=True)
class Answer:
    """A prompt, the reply by greedy decoding, and some logits after the last of its tokens."""

    prompt: list[int]
    reply: list[int]
    logits: list[float]


@dataclass(frozen=True)
class Answers:
    """What the demo model gives: replies, and the operations of a walk. weights: its tensors' checksums."""

    replies: list[Answer]
    operations: Operations
    weights: dict[str, int]

    def as_json(self) -> str:
        """Answers as they are stored."""
        return json.dumps(asdict(self), default=float, separators=(",", ":"))


def stored() -> Answers:
    """What the package ships."""
    return _read((files("mlx_gptoss.doctor") / "answers.json").read_text(encoding="utf-8"))


def _read(text: str) -> Answers:
    data: dict[str, Any] = json.loads(text)
    replies = [Answer(**entry) for entry in data.pop("replies")]
    return Answers(replies, **data)


def compute(prompts: Sequence[list[int]]) -> Answers:
    """The answers that the default device gives. Raises GptOssError."""
    from mlx_gptoss.llm import load

    with load("demo", dtype="float32") as llm:
        replies = [_reply(llm, prompt) for prompt in prompts]
    folder, walked = resolve("demo"), replies[WALKED]
    found = operations(load_model(folder, "float32"), walked.prompt + walked.reply)
    rounded = {name: [float(f"{x:.6g}") for x in values] for name, values in found.items()}
    return Answers(replies, rounded, checksums(folder))


def _reply(llm: LLM, prompt: list[int]) -> Answer:
    reply = list(llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=TOKENS)))
    last = llm.logits(prompt + reply)[-1, ::STRIDE]
    return Answer(prompt, reply, [round(float(x), 6) for x in last])


def checksums(folder: Path) -> dict[str, int]:
    """The CRC-32 of each tensor's bytes."""
    return {name: crc32(read_bytes(tensor).data) for name, tensor in sorted(read_folder(folder).items())}


def on_cpu() -> Answers:
    """The answers of MLX's CPU backend, in a process of its own. Raises GptOssError."""
    command = [sys.executable, "-P", "-m", "mlx_gptoss.doctor.reference"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise GptOssError(f"gave no answers in {PATIENCE:.0f} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise GptOssError(f"gave no answers: {said[-1]}")
    return _read(done.stdout)


def findings() -> Iterator[Finding]:
    """Whether weights, replies, logits and operations are what they should be."""
    known = stored()
    try:
        now = compute([answer.prompt for answer in known.replies])
    except GptOssError as error:
        yield Finding("demo model", "loads", "failed", str(error))
        return
    references = {"stored": known}
    if device.on_gpu():
        try:
            references["on the CPU"] = on_cpu()
        except GptOssError as error:
            yield Finding("demo model", "CPU backend", "failed", str(error))
    yield from judge(now, references, tolerance())
    if device.on_gpu():  # where it is the default
        yield in_bfloat16(known)


def tolerance() -> float:
    """What may differ on this machine."""
    return TOLERANCE_GPU if device.on_gpu() else TOLERANCE


def judge(now: Answers, references: dict[str, Answers], limit: float) -> Iterator[Finding]:
    """Answers against references, by where they are from; those "stored" know how the weights should be."""
    yield _weights(now.weights, references["stored"].weights)
    wrong = False
    for name, compare in (("greedy replies", _replies), ("logits", _logits), ("operations", _operations)):
        results = [compare(now, reference, where, limit) for where, reference in references.items()]
        told = "; ".join(told for _, told in results)
        right = all(right for right, _ in results)
        if name == "operations" and right and wrong:
            told += "; what differs is how they are compiled or scheduled, or a kernel of ours"
        wrong = wrong or not right
        yield Finding("demo model", name, "ok" if right else "failed", told)


def in_bfloat16(known: Answers) -> Finding:
    """The stored replies, read in bfloat16: how far their logits are, and how many tokens it would choose."""
    from mlx_gptoss.llm import load

    with load("demo", dtype="bfloat16") as llm:
        logits = [llm.logits(answer.prompt + answer.reply) for answer in known.replies]
    pairs = list(zip(known.replies, logits, strict=True))
    worst = float(np.max([np.abs(x[-1, ::STRIDE] - answer.logits).max() for answer, x in pairs]))
    chosen = [x[len(answer.prompt) - 1 : -1].argmax(axis=-1) == answer.reply for answer, x in pairs]
    same, count = int(sum(map(np.sum, chosen))), sum(map(len, chosen))
    told = f"{worst:.1g} from float32 ({TOLERANCE_BFLOAT16:g} allowed), {same} of {count} tokens"
    return Finding("demo model", "bfloat16", "ok" if worst <= TOLERANCE_BFLOAT16 else "failed", told)


def _weights(now: dict[str, int], known: dict[str, int]) -> Finding:
    changed = [name for name in {**known, **now} if now.get(name) != known.get(name)]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        told = f"not as shipped: {changed[0]}{more}; install the package again"
        return Finding("demo model", "weights", "failed", told)
    return Finding("demo model", "weights", "ok", f"all {len(known)} tensors as shipped")


def _replies(now: Answers, reference: Answers, where: str, limit: float) -> Result:
    pairs = list(zip(now.replies, reference.replies, strict=True))
    same = sum(a.reply == b.reply for a, b in pairs)
    return same == len(pairs), f"{same} of {len(pairs)} as {where}"


def _logits(now: Answers, reference: Answers, where: str, limit: float) -> Result:
    """Where the replies are the same."""
    pairs = zip(now.replies, reference.replies, strict=True)
    off = [float(np.abs(np.subtract(a.logits, b.logits)).max()) for a, b in pairs if a.reply == b.reply]
    if not off:
        return False, f"no reply is as {where}, so there are none to compare"
    worst = float(np.max(off))  # a NaN is the largest, and fails
    return worst <= limit, f"{worst:.1g} from those {where} ({limit:g} allowed)"


def _operations(now: Answers, reference: Answers, where: str, limit: float) -> Result:
    found = first_difference(reference.operations, now.operations, limit)
    if found is None:
        return True, f"all {len(reference.operations)} as {where}"
    by = f"by {found.amount:.1g} of its size ({limit:g} allowed)"
    if found.alone and not found.operation.startswith("head"):
        return False, f"{found.operation} alone is not as {where}, {by}: what follows from it is right"
    return False, f"{found.operation} is the first not as {where}, {by}"
