"""Message headers: what may stand between `<|start|>assistant` and `<|message|>`.

A Target is a kind of message; it knows the header texts that lead to it, special tokens spelled out. The
grammar of headers and the reading of a finished header both come from these texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from mlx_gptoss.tokenizer import SPECIAL_TOKENS, Special

Kind = Literal["analysis", "preamble", "final", "call"]
_MARKUP = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS.values())) + ")")
_FIELD = {text: field for field, text in SPECIAL_TOKENS.items()}


@dataclass(frozen=True)
class Target:
    """A kind of message the model may write next.

    channels: where it may stand. recipient: of a tool call, as harmony writes it ("functions.f", "python").
    content_types: what may follow channel and recipient, "" among them.
    """

    kind: Kind
    channels: tuple[str, ...]
    recipient: str | None = None
    content_types: tuple[str, ...] = ("",)

    @property
    def name(self) -> str:
        """The tool of a call as its caller declared it, "" for other messages."""
        return (self.recipient or "").removeprefix("functions.")

    def headers(self) -> Iterator[str]:
        """The header texts, up to <|message|>. A recipient stands after the channel or before it."""
        for channel in self.channels:
            for content_type in self.content_types:
                end = f"{content_type}<|message|>"
                if self.recipient is None:
                    yield f"<|channel|>{channel}{end}"
                else:
                    yield f"<|channel|>{channel} to={self.recipient}{end}"
                    yield f" to={self.recipient}<|channel|>{channel}{end}"


ANALYSIS = Target("analysis", ("analysis",))
PREAMBLE = Target("preamble", ("commentary",))
FINAL = Target("final", ("final",))
FINAL_JSON = Target("final", ("final",), content_types=("", " <|constrain|>json"))


def function_call(name: str) -> Target:
    """The call of a declared function."""
    types = ("", " <|constrain|>json", "<|constrain|>json", " json")
    return Target("call", ("commentary",), f"functions.{name}", types)


def builtin_call(recipient: str) -> Target:
    """The call of a built-in tool, which the model was taught to make while it reasons."""
    types = ("", " code", " <|constrain|>json", "<|constrain|>json", " json", " <|constrain|>code")
    return Target("call", ("analysis", "commentary"), recipient, types)


def header_grammar(targets: Iterable[Target], special: Special, *, after_message: bool) -> str:
    """The Lark grammar of the headers of `targets`; with `<|start|>assistant` first `after_message`."""
    start = f'<[{special.start}]> "assistant" header' if after_message else "header"
    forms = [_lark(text, special) for target in targets for text in target.headers()]
    return f"%llguidance {{}}\nstart: {start}\nheader: " + "\n  | ".join(forms) + "\n"


def _lark(text: str, special: Special) -> str:
    parts = [
        f"<[{getattr(special, _FIELD[part])}]>" if part in _FIELD else json.dumps(part, ensure_ascii=False)
        for part in _MARKUP.split(text)
        if part
    ]
    return " ".join(parts)
