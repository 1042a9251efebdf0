"""The constraint of one assistant turn: a walk over its messages that says which token may follow.

A turn is a list of messages: header, body, end token. Headers are always constrained. Which bodies are,
and which targets a header may name, depends on the request. Where nothing is constrained, `allowed`
returns None without any work.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_gptoss.grammar.headers import Target, header_grammar
from mlx_gptoss.grammar.matcher import Matcher, Vocabulary
from mlx_gptoss.tokenizer import Tokenizer


@dataclass(frozen=True)
class Plan:
    """What a request asks of the turn.

    targets: the messages that may be written. bodies: the grammar of a target's body; a target without one
    is free text. strict: the turn must reach a constrained message, so that free bodies may end only with
    <|end|>. reasoning_budget: tokens of analysis at most; after that only an answer or a call may follow.
    """

    targets: tuple[Target, ...]
    bodies: Mapping[Target, str] = field(default_factory=dict)
    strict: bool = False
    reasoning_budget: int | None = None


class TurnConstraint:
    """Implements sampling.TokenConstraint. Starts after `<|start|>assistant`."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary, plan: Plan) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._plan = plan
        self._special = tokenizer.special
        self._reasoning_left = plan.reasoning_budget
        self._free = vocabulary.text_or(self._special.end)
        self._code = vocabulary.text_or(self._special.call)
        self._force_end = vocabulary.only(self._special.end)
        self._force_return = vocabulary.only(self._special.return_)
        self._state = "header"  # header, body, closed (a final message ended with <|end|>), done
        self._target: Target | None = None
        self._matcher: Matcher | None = None
        self._header: list[int] = []
        self._text = getincrementaldecoder("utf-8")(errors="replace")  # tells whether a character is cut
        self._open_header(after_message=False)

    @property
    def in_answer(self) -> bool:
        """True inside the body of a final message or of a call."""
        return self._state == "body" and self._target is not None and self._target.kind in ("final", "call")

    def allowed(self) -> np.ndarray | None:
        """The mask of the next token, or None. Masks may be shared between calls: do not write to them."""
        if self._state == "body" and self._target is not None:
            return self._allowed_in_body(self._target)
        if self._state == "header" and self._matcher is not None:
            return self._matcher.mask(self._special.endoftext)
        return self._force_return if self._state == "closed" else None

    def accept(self, token_id: int) -> None:
        """Follow the sampled token. Raises SchemaError when the mask did not allow it."""
        if self._state == "header":
            self._accept_in_header(token_id)
        elif self._state == "body" and self._target is not None:
            self._accept_in_body(self._target, token_id)
        else:
            self._state = "done"

    def _allowed_in_body(self, target: Target) -> np.ndarray | None:
        if self._matcher is not None:
            return self._matcher.mask(self._special.call if target.kind == "call" else self._special.return_)
        if target.kind == "call":
            return self._code
        if target.kind == "analysis" and self._reasoning_left is not None:
            spent = self._reasoning_left <= 0 and not self._text.getstate()[0]
            if spent or self._reasoning_left <= -3:  # a character has at most 3 more bytes
                return self._force_end
        return self._free if self._plan.strict and target.kind != "final" else None

    def _accept_in_header(self, token_id: int) -> None:
        assert self._matcher is not None
        self._matcher.accept(token_id)
        self._header.append(token_id)
        if token_id != self._special.message:
            return
        text = self._tokenizer.decode(self._header).removeprefix("<|start|>assistant")
        self._target = next(t for t in self._plan.targets if text in t.headers())
        grammar = self._plan.bodies.get(self._target)
        self._matcher = self._vocabulary.matcher(grammar) if grammar is not None else None
        self._state = "body"
        self._text.reset()

    def _accept_in_body(self, target: Target, token_id: int) -> None:
        special = self._special
        if self._matcher is not None:
            if token_id == (special.call if target.kind == "call" else special.return_):
                self._state = "done"
            else:
                self._matcher.accept(token_id)
        elif token_id in self._tokenizer.stop_ids:
            self._state = "done"
        elif token_id == special.end:
            # A turn is over after its answer; without this the model may go on and play the user.
            if target.kind == "final":
                self._state = "closed"
            else:
                self._open_header(after_message=True)
        elif token_id in (special.start, special.channel):
            # A message that was not ended. Its successor's header is constrained all the same.
            self._open_header(after_message=token_id == special.start)
            self._accept_in_header(token_id)
        elif target.kind == "analysis" and self._reasoning_left is not None:
            self._reasoning_left -= 1
            self._text.decode(self._tokenizer.token_bytes(token_id))

    def _open_header(self, *, after_message: bool) -> None:
        targets: Sequence[Target] = self._plan.targets
        if self._reasoning_left is not None and self._reasoning_left <= 0:
            targets = [t for t in targets if t.kind in ("final", "call")]
        grammar = header_grammar(targets, self._special, after_message=after_message)
        self._matcher = self._vocabulary.matcher(grammar)
        self._header = []
        self._target = None
        self._state = "header"
