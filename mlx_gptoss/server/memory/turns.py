"""Assistant turns that this server sampled, kept so that history sent back is rendered with the same tokens.

Clients return an assistant's turn as text. Rendered anew it may become other tokens (the model writes its
headers in another order than the renderer, and a tokenizer has more than one way to spell a text), and the KV
cache would be lost from there on. So a turn is remembered under its tool calls' ids, or under its text and
the conversation before it, and given back when nothing in it was changed. A text alone names no turn: others
end in "OK." as well, and what their turns hold besides is not for this client.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mlx_gptoss.harmony import Conversation, Message

MAX_TOKENS = 1_000_000  # kept over all turns; some 36 bytes each


@dataclass(frozen=True)
class Call:
    """A function call as a client sends it back. `arguments` is JSON text."""

    call_id: str
    name: str
    arguments: str


@dataclass
class AssistantTurn:
    """What a client says the assistant did in one turn."""

    reasoning: str = ""
    preamble: str = ""
    text: str = ""
    calls: list[Call] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.preamble or self.text or self.calls)

    def messages(self) -> list[Message]:
        """The turn in harmony, as it has to be rendered when its tokens are not known."""
        result = []
        if self.reasoning:
            result.append(Message.reasoning(self.reasoning))
        if self.preamble:
            result.append(Message.preamble(self.preamble))
        result += [Message.tool_call(call.name, call.arguments, call.call_id) for call in self.calls]
        if self.text:
            result.append(Message.assistant(self.text))
        return result


def opening(conversation: Conversation) -> bytes:
    """The digest of what stands before a conversation's first message."""
    shown = (conversation.instructions, conversation.tools, conversation.response_schema)
    return hashlib.sha256(repr(shown).encode()).digest()


def after(history: bytes, messages: Iterable[Message]) -> bytes:
    """The digest of a history that goes on with `messages`. Reasoning does not count: clients may drop it."""
    for message in messages:
        if message.channel != "analysis":
            said = json.dumps([message.role, message.channel, message.recipient, message.content])
            history = hashlib.sha256(history + said.encode()).digest()
    return history


def digest(conversation: Conversation) -> bytes:
    """The digest of a whole conversation, under which the turn that follows it is remembered."""
    return after(opening(conversation), conversation.messages)


class TurnMemory:
    """The last turns, bounded in number and in tokens; the one used longest ago goes first."""

    def __init__(self, max_turns: int, max_tokens: int = MAX_TOKENS) -> None:
        self._max_turns = max_turns
        self._max_tokens = max_tokens
        self._turns: OrderedDict[int, tuple[Message, ...]] = OrderedDict()
        self._keys: dict[str, int] = {}
        self._names: dict[int, list[str]] = {}
        self._tokens = 0
        self._next = 0

    def __len__(self) -> int:
        return len(self._turns)

    def remember(self, messages: Sequence[Message], text: str, history: bytes = b"") -> None:
        """Keep a turn that was sampled. `text` is its answer as the client got it, `history` the digest of
        what it answered."""
        kept = tuple(messages)
        names = [_call_key(m.call_id) for m in kept if m.call_id]
        if text and not names:
            names = [_text_key(history, text)]
        # An answer that was cut at a stop text has no tokens, and the turn is not whole without it.
        if not names or not all(m.token_ids for m in kept):
            return
        turn = self._next
        self._next += 1
        self._turns[turn] = kept
        self._names[turn] = names
        self._keys.update(dict.fromkeys(names, turn))
        self._tokens += _count(kept)
        while len(self._turns) > self._max_turns or (
            self._tokens > self._max_tokens and len(self._turns) > 1
        ):
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        turn, messages = self._turns.popitem(last=False)
        self._tokens -= _count(messages)
        for name in self._names.pop(turn):
            if self._keys.get(name) == turn:
                del self._keys[name]

    def recall(self, turn: AssistantTurn, history: bytes = b"") -> list[Message] | None:
        """The sampled messages of a turn after a history, or None when it is unknown or was edited."""
        key = _call_key(turn.calls[0].call_id) if turn.calls else _text_key(history, turn.text)
        number = self._keys.get(key)
        if number is None:
            return None
        messages = self._turns[number]
        if not _same(turn, messages):
            return None
        self._turns.move_to_end(number)
        return list(messages)


def _same(turn: AssistantTurn, messages: Iterable[Message]) -> bool:
    """Whether the client sent back what was sampled. What it left out, it did not change."""
    messages = list(messages)
    calls = [m for m in messages if m.call_id]
    if [m.call_id for m in calls] != [c.call_id for c in turn.calls]:
        return False
    for sampled, call in zip(calls, turn.calls, strict=True):
        recipient = (sampled.recipient or "").removeprefix("functions.")
        if recipient != call.name or not _same_json(sampled.content, call.arguments):
            return False
    said = [m for m in messages if m.recipient is None]
    reasoning = "".join(m.content for m in said if m.channel == "analysis")
    preamble = "".join(m.content for m in said if m.channel == "commentary")
    final = "".join(m.content for m in said if m.channel == "final")
    # A preamble is part of the content, a part of its own, or (where a format was asked for) reasoning.
    content = (preamble + final, f"{preamble}\n\n{final}", final)
    told = turn.preamble + turn.text
    return (not told or told in content) and turn.reasoning in ("", reasoning, reasoning + preamble)


def _same_json(ours: str, theirs: str) -> bool:
    """Equal as text, or as the data that a client has parsed and written again."""
    if ours == theirs:
        return True
    try:
        return bool(json.loads(ours) == json.loads(theirs))
    except (ValueError, RecursionError):
        return False


def _count(messages: Iterable[Message]) -> int:
    return sum(len(m.token_ids or ()) for m in messages)


def _call_key(call_id: str) -> str:
    return f"call:{call_id}"


def _text_key(history: bytes, text: str) -> str:
    return "text:" + hashlib.sha256(history + text.encode("utf-8", "surrogatepass")).hexdigest()
