"""What a generator makes: a prompt, and what the assistant says and does, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_gptoss.harmony.types import Conversation

EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True)
class Problem:
    """A question of the closed world with its worked answer.

    `short` is the working at low effort, `lead` goes before it from medium on, `check` after it at high.
    `final` is the whole answer, `value` its bare text, `data` the same as JSON data (None: not offered),
    `keys` are fitting names for it in a JSON answer.
    """

    task: str
    question: str
    lead: str
    short: str
    check: str
    final: str
    value: str
    data: Any = None
    keys: tuple[str, ...] = ("answer", "result", "value", "output")

    def analysis(self, effort: str) -> str:
        """The reasoning at this effort."""
        parts = {"low": [self.short], "medium": [self.lead, self.short]}.get(
            effort, [self.lead, self.short, self.check]
        )
        return " ".join(p for p in parts if p)


@dataclass(frozen=True)
class Step:
    """One turn of the assistant: reasoning, then a final answer or a call and its result."""

    analysis: str
    final: str | None = None
    call: str | None = None
    arguments: str = "{}"
    result: str | None = None

    def text(self) -> str:
        """As the model writes it, from the token after `<|start|>assistant`."""
        head = f"<|channel|>analysis<|message|>{self.analysis}<|end|><|start|>assistant"
        if self.call is None:
            return f"{head}<|channel|>final<|message|>{self.final}<|return|>"
        return (
            f"{head}<|channel|>commentary to=functions.{self.call} <|constrain|>json<|message|>"
            f"{self.arguments}<|call|>"
        )


@dataclass
class Sample:
    """A conversation up to the assistant's turn, and the steps it should then take."""

    task: str
    conversation: Conversation
    steps: list[Step] = field(default_factory=list)
