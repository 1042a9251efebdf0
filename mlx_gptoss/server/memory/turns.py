"""Assistant turns that this server sampled, kept so that history sent back is rendered with the same tokens.

Clients return an assistant's turn as text. Rendered anew it may become other tokens (the model writes its
headers in another order than the renderer, and a tokenizer has more than one way to spell a text), and the KV
cache would be lost from there on. So a turn is remembered under its tool calls' ids, or under its text and
the conversation before it, and given back when nothing in it was changed. A text alone names no turn: others
end in "OK." as well, and what their turns hold besides is not for this client. Nor is what was sampled for
another caller.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from mlx_gptoss.harmony import Conversation, Message, Reply
from mlx_gptoss.server.translate.conversation import AssistantTurn, after, digest

MAX_TOKENS = 1_000_000  # kept over all turns; some 36 bytes each


class TurnMemory:
    """The last turns, bounded in number and in tokens; the one used longest ago goes first."""

    def __init__(self, max_turns: int, max_tokens: int = MAX_TOKENS) -> None:
        self._max_turns = max_turns
        self._max_tokens = max_tokens
        self._turns: OrderedDict[str, tuple[Message, ...]] = OrderedDict()
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._turns)

    def remember_reply(self, caller: str, reply: Reply, text: str, conversation: Conversation) -> None:
        """Keep a reply that ended by itself, whose answer the client got as `text`.

        Where the server ran tools, each step is a turn of its own.
        """
        if reply.finish_reason not in ("stop", "tool_calls"):
            return
        history, step = digest(conversation), list[Message]()
        for message in reply.messages:
            step.append(message)
            if message.role == "tool":
                self.remember(caller, step[:-1], "", history)
                history, step = after(history, step), []
        self.remember(caller, step, text, history)

    def remember(self, caller: str, messages: Sequence[Message], text: str, history: bytes = b"") -> None:
        """Keep a turn that was sampled. `text` is its answer as the client got it, `history` the digest of
        what it answered.
        """
        key = _key(caller, [m.call_id for m in messages if m.call_id], text, history)
        # An answer that was cut at a stop text has no tokens, and the turn is not whole without it.
        if key is None or not all(m.token_ids for m in messages):
            return
        self._forget(key)
        self._turns[key] = tuple(messages)
        self._tokens += _count(messages)
        while len(self._turns) > self._max_turns or (
            self._tokens > self._max_tokens and len(self._turns) > 1
        ):
            self._forget(next(iter(self._turns)))

    def _forget(self, key: str) -> None:
        self._tokens -= _count(self._turns.pop(key, ()))

    def recall(self, caller: str, turn: AssistantTurn, history: bytes = b"") -> list[Message] | None:
        """The sampled messages of a turn after a history, or None when it is unknown or was edited."""
        key = _key(caller, [call.call_id for call in turn.calls], turn.text, history)
        if key is None or not _same(turn, self._turns.get(key, ())):
            return None
        self._turns.move_to_end(key)
        return list(self._turns[key])


def _key(caller: str, call_ids: Sequence[str], text: str, history: bytes) -> str | None:
    """What names a turn of a caller: its first call's id, or its text and what it answered."""
    if call_ids:
        return f"{caller}:call:{call_ids[0]}"
    if not text:
        return None
    return f"{caller}:text:{hashlib.sha256(history + text.encode('utf-8', 'surrogatepass')).hexdigest()}"


def _same(turn: AssistantTurn, messages: Sequence[Message]) -> bool:
    """Whether the client sent back what was sampled. What it left out, it did not change."""
    if not messages:
        return False
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
