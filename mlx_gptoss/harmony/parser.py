"""The streaming parser: sampled tokens to typed events, one token at a time.

It is total. Every sequence of tokens is parsed, nothing raises, and no text is lost: what the format does
not allow becomes a `Diagnostic` beside the message that could be recovered. A token costs the same however
long the stream is.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from mlx_gptoss.harmony.events import (
    Diagnostic,
    Event,
    MessageDone,
    PreambleDelta,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
)
from mlx_gptoss.harmony.header import Header, Segment, check_header, read_header, recover_header, spell
from mlx_gptoss.harmony.types import FUNCTIONS, Message

if TYPE_CHECKING:
    from mlx_gptoss.tokenizer import Tokenizer

# What can be wrong, and what is made of it.
DIAGNOSTICS = {
    "missing_start": "a message began without <|start|>: it is the assistant's",
    "duplicate_start": "<|start|> came twice, with at most the role between: one was dropped",
    "missing_message": "a message ended, or the next began, before <|message|>: its text is the content",
    "long_header": "a header ran on without <|message|>: its text is the content from there on",
    "truncated_header": "the stream ended inside a header: its text is the content",
    "missing_end": "a message was cut off by <|start|>, <|channel|> or <|endoftext|>: it ends there",
    "stray_end": "an end token stood where no message was: dropped",
    "stray_token": "a special token stood where it means nothing: dropped",
    "unknown_token": "an id that the vocabulary does not have: dropped",
    "incomplete_utf8": "a message ended inside a character: U+FFFD stands for it",
    "missing_role": "a header without a role: it is the assistant's",
    "unknown_role": "a role nobody has: a tool's if it is a tool's name, else the assistant's",
    "foreign_role": "the model spoke for someone else: kept as a message, shown to nobody",
    "missing_channel": "an assistant's message without a channel: taken as the answer",
    "unknown_channel": "a channel that does not exist: one whose name it starts with, else taken as answer",
    "duplicate_channel": "two channels: the later one counts",
    "channel_without_marker": "a channel's name without <|channel|> before it",
    "recipient_without_to": "a recipient without to= before it",
    "bare_recipient": "a function called without its namespace",
    "call_on_other_channel": "a function called on another channel than commentary",
    "header_text": "words that do not belong in a header: in the content, unless it is a call",
    "unfinished_call": "the stream ended inside a call: not reported as a ToolCall",
}

# More words than any header has: role, recipient, channel and content type, and some to spare.
MAX_HEADER_WORDS = 8
MAX_HEADER_CHARACTERS = 512

_DELTA_OF: dict[str, Callable[[str], Event]] = {"analysis": ReasoningDelta, "commentary": PreambleDelta}
_BETWEEN, _HEADER, _CONTENT = range(3)


def new_call_id() -> str:
    """An id for a call, unique across conversations."""
    return f"call_{secrets.token_hex(12)}"


class StreamParser:
    """Parses what a model samples after `<|start|>assistant`, or with `from_start` a whole transcript.

    `push` each token, then `finish`; each returns the events that it caused. `messages` holds the messages
    that are complete.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        call_id_factory: Callable[[], str] = new_call_id,
        from_start: bool = False,
    ) -> None:
        self.messages: list[Message] = []
        self._new_call_id = call_id_factory
        self._live = not from_start
        self._detokenizer = tokenizer.detokenizer()
        self._is_special = tokenizer.is_special
        self._vocab_size = tokenizer.vocab_size
        self._tokenizer = tokenizer
        special = tokenizer.special
        self._special = special
        self._on_special: dict[int, Callable[[int], Iterator[Event]]] = {
            special.start: self._on_start,
            special.channel: self._on_marker,
            special.constrain: self._on_marker,
            special.message: self._on_message,
            **dict.fromkeys((special.end, *tokenizer.stop_ids), self._on_end),
        }
        self._position = 0
        self._calls = 0
        self._begin(role_given=self._live)
        if from_start:
            self._state = _BETWEEN

    def push(self, token_id: int) -> list[Event]:
        """Take in one token."""
        if self._state == _CONTENT and not self._is_special(token_id) and 0 <= token_id < self._vocab_size:
            self._position += 1
            self._tokens.append(token_id)
            text = self._detokenizer.push(token_id)
            if not text:
                return []
            self._content.append(text)
            return [self._delta(text)] if self._delta is not None else []
        events = list(self._step(token_id))
        self._position += 1
        return events

    def finish(self) -> list[Event]:
        """The stream has ended, for whatever reason. The parser is then ready for another transcript."""
        events: list[Event] = []
        if self._state == _CONTENT:
            events += self._close(ended=False)
        elif self._state == _HEADER and (self._tokens or not self._role_given):
            events += self._recover("truncated_header", ended=False)
        self._state = _BETWEEN
        return events

    # What a token does.

    def _step(self, token_id: int) -> Iterator[Event]:
        handler = self._on_special.get(token_id)
        if handler is not None:
            yield from handler(token_id)
        elif not 0 <= token_id < self._vocab_size:
            yield self._diagnostic("unknown_token", str(token_id))
        elif self._is_special(token_id):
            yield self._diagnostic("stray_token", self._tokenizer.decode([token_id]))
        else:
            yield from self._on_text(token_id)

    def _on_text(self, token_id: int) -> Iterator[Event]:
        if self._state == _BETWEEN:
            yield self._diagnostic("missing_start", self._tokenizer.decode([token_id]))
            self._begin(role_given=False, started=False)
        self._tokens.append(token_id)
        self._add_header_text(self._detokenizer.push(token_id))
        if self._words > MAX_HEADER_WORDS or self._characters > MAX_HEADER_CHARACTERS:
            yield from self._open(self._recovered("long_header"))

    def _on_start(self, token_id: int) -> Iterator[Event]:
        if self._state == _CONTENT:
            yield self._diagnostic("missing_end", "<|start|>")
            yield from self._close()
        elif self._state == _HEADER:
            if self._header_text().strip() in ("", "assistant"):
                kind = "duplicate_start" if self._started else "missing_message"
                yield self._diagnostic(kind, self._header_text())
            else:
                yield from self._recover("missing_message")
        self._begin(role_given=False)

    def _on_marker(self, token_id: int) -> Iterator[Event]:
        name = "channel" if token_id == self._special.channel else "constrain"
        if self._state == _CONTENT and name == "constrain":
            yield self._diagnostic("stray_token", "<|constrain|>")
            return
        if self._state == _CONTENT:
            yield self._diagnostic("missing_end", "<|channel|>")
            yield from self._close()
            self._begin(role_given=True, started=False)
        elif self._state == _BETWEEN:
            yield self._diagnostic("missing_start", f"<|{name}|>")
            self._begin(role_given=True, started=False)
        self._tokens.append(token_id)
        self._add_header_text(self._detokenizer.finish())
        self._segments.append([name])

    def _on_message(self, token_id: int) -> Iterator[Event]:
        if self._state == _CONTENT:
            yield self._diagnostic("stray_token", "<|message|>")
            return
        if self._state == _BETWEEN:
            yield self._diagnostic("missing_start", "<|message|>")
            self._begin(role_given=True, started=False)
        self._tokens.append(token_id)
        header = read_header(self._cut(), role_given=self._role_given, live=self._live)
        yield from self._open(header)

    def _on_end(self, token_id: int) -> Iterator[Event]:
        if self._state == _BETWEEN or (self._state == _HEADER and not self._tokens and not self._started):
            yield self._diagnostic("stray_end", self._tokenizer.decode([token_id]))
            return
        self._tokens.append(token_id)
        if self._state == _CONTENT:
            if token_id == self._special.endoftext:
                yield self._diagnostic("missing_end", "<|endoftext|>")
            yield from self._close()
        else:
            yield from self._recover("missing_message")
        self._state = _BETWEEN

    # What a message goes through.

    def _begin(self, *, role_given: bool, started: bool = True) -> None:
        """A header begins. `started`: after a `<|start|>`."""
        self._state = _HEADER
        self._role_given = role_given
        self._started = started
        self._tokens: list[int] = []
        self._segments: list[list[str]] = [[""]]
        self._words = 0
        self._characters = 0
        self._in_word = False
        self._content: list[str] = []
        self._header = Header()
        self._delta: Callable[[str], Event] | None = None
        self._call: ToolCallDelta | None = None

    def _add_header_text(self, text: str) -> None:
        if not text:
            return
        words = len(text.split())
        if words and self._in_word and not text[0].isspace():
            words -= 1
        self._words += words
        self._in_word = not text[-1].isspace()
        self._characters += len(text)
        self._segments[-1].append(text)

    def _header_text(self) -> str:
        return spell(self._cut())

    def _cut(self) -> list[Segment]:
        self._add_header_text(self._detokenizer.finish())
        return [Segment(marker, "".join(texts)) for marker, *texts in self._segments]

    def _recovered(self, problem: str) -> Header:
        segments = self._cut()
        header = recover_header(segments, role_given=self._role_given, live=self._live)
        header.problems.insert(0, (problem, spell(segments)))
        check_header(header)
        addressed = header.channel or header.recipient or header.role != "assistant"
        if header.content.strip() and not addressed:
            header.channel = "final"
        return header

    def _recover(self, problem: str, *, ended: bool = True) -> Iterator[Event]:
        """Make a message of a header that got no `<|message|>`, when there is anything in it."""
        header = self._recovered(problem)
        if header.content.strip() or header.channel is not None or header.recipient is not None:
            # A call whose name may be cut off is not announced.
            yield from self._open(header, announce=ended or header.content != "")
            yield from self._close(ended=ended)
        else:
            yield self._diagnostic(*header.problems[0])

    def _open(self, header: Header, *, announce: bool = True) -> Iterator[Event]:
        """The header is known and the content begins."""
        self._header = header
        self._state = _CONTENT
        for kind, detail in header.problems:
            yield self._diagnostic(kind, detail)
        if header.calls_tool and header.recipient is not None:
            if announce:
                name = header.recipient.removeprefix(f"{FUNCTIONS}.") or header.recipient
                self._call = ToolCallDelta(self._calls, self._new_call_id(), name, "")
                self._calls += 1
                yield self._call
                self._delta = partial(ToolCallDelta, self._calls - 1, self._call.call_id, name)
        elif header.role == "assistant":
            self._delta = _DELTA_OF.get(header.channel or "", TextDelta)
        if header.content:
            yield from self._add(header.content)

    def _add(self, text: str) -> Iterator[Event]:
        self._content.append(text)
        if self._delta is not None:
            yield self._delta(text)

    def _close(self, *, ended: bool = True) -> Iterator[Event]:
        """The message is over; `ended` unless the stream is, too."""
        if rest := self._detokenizer.finish():
            yield self._diagnostic("incomplete_utf8", rest)
            yield from self._add(rest)
        header, call, content = self._header, self._call, "".join(self._content)
        if header.calls_tool and not ended and not _is_whole(content):
            yield self._diagnostic("unfinished_call", header.recipient or "")
        elif call is not None:
            yield ToolCall(call.index, call.call_id, call.name, content, header.recipient or "")
        message = Message(
            header.role,
            content,
            header.channel,
            header.recipient,
            header.name,
            header.content_type,
            call.call_id if call is not None else None,
            self._sampled(),
        )
        self.messages.append(message)
        self._state = _BETWEEN
        yield MessageDone(message, ended)

    def _sampled(self) -> tuple[int, ...] | None:
        """The message's tokens after `<|start|>assistant`; None where they do not start that way."""
        if self._header.role != "assistant":
            return None
        if self._role_given:
            return tuple(self._tokens)
        role = b""
        for index, token in enumerate(self._tokens):
            if self._is_special(token):
                return tuple(self._tokens) if index == 0 else None
            role += self._tokenizer.token_bytes(token)
            if role == b"assistant":
                return tuple(self._tokens[index + 1 :])
            if not b"assistant".startswith(role):
                return None
        return None

    def _diagnostic(self, kind: str, detail: str) -> Diagnostic:
        return Diagnostic(kind, detail, self._position)


def _is_whole(arguments: str) -> bool:
    """True for arguments that are a JSON object to the last brace, though no end token followed."""
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False
