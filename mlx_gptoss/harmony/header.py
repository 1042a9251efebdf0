"""Message headers: role, recipient, channel and content type, read from what stands before `<|message|>`.

A header is cut into segments at its special tokens. `read_header` reads one that was completed by
`<|message|>`; `recover_header` makes the best of one that was not, where the rest of the text is taken as
the content. Both accept anything. What they repaired is listed in `Header.problems`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import NamedTuple, cast

from mlx_gptoss.harmony.namespaces import BROWSER, PYTHON
from mlx_gptoss.harmony.types import CHANNELS, CONSTRAIN, FUNCTIONS, ROLES, Role

BUILTIN_TOOLS = (PYTHON.name, BROWSER.name)
# Words that say how the content is written, as opposed to whom it goes to.
CONTENT_TYPES = ("json", "code", "text")
# Recipients that are not tools: the message is for everyone, or for the person.
PEOPLE = ("all", "user", "assistant")

# As in the library, a channel's name ends at any white space or "<", other words at ASCII white space.
_AFTER_CHANNEL = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000<]")
_ASCII_SPACE = re.compile(r"[ \t\n\r\f]+")
_RECIPIENT = re.compile(r"\s*to=\s*([\w.:/-]+)")
_CONTENT_TYPE = re.compile(r"\s*(json|code|text)(?![\w.])")
_ROLE = re.compile(rf"\s*({'|'.join(ROLES)})(?![a-z])")


class Segment(NamedTuple):
    """Text of a header and the special token before it: "", "channel" or "constrain"."""

    marker: str
    text: str


class _Word(NamedTuple):
    text: str
    constrain: bool = False

    @property
    def is_recipient(self) -> bool:
        return not self.constrain and self.text.startswith("to=")


@dataclass
class Header:
    """What a header says. `content` is text of the message that was found inside it."""

    role: Role = "assistant"
    name: str | None = None
    recipient: str | None = None
    channel: str | None = None
    content_type: str | None = None
    content: str = ""
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def calls_tool(self) -> bool:
        """True when the message is a call of a tool by the assistant."""
        return self.role == "assistant" and self.recipient is not None and self.recipient not in PEOPLE

    def report(self, kind: str, detail: str) -> None:
        """Note what was repaired."""
        self.problems.append((kind, detail))


def spell(segments: Sequence[Segment]) -> str:
    """The header as text, markup spelled out."""
    return "".join(f"<|{s.marker}|>{s.text}" if s.marker else s.text for s in segments)


def is_tool_name(word: str) -> bool:
    """True for what can only be a tool: a dotted name, or a built-in one."""
    return word in BUILTIN_TOOLS or ("." in word.strip(".") and not word.startswith("."))


def read_header(segments: Sequence[Segment], *, role_given: bool, live: bool) -> Header:
    """The header before a `<|message|>`.

    `role_given`: the prompt ended in `<|start|>assistant`, so that the header starts after the role. `live`:
    the tokens come from a model, which speaks for the assistant only.
    """
    header = Header()
    words = _words(segments, header)
    if not role_given:
        words = _take_role(words, header, live)
    elif words and words[0] == ("assistant", False):
        words = words[1:]
    surplus = _take_fields(words, header)
    if surplus:
        text = " ".join(surplus)
        header.report("header_text", spell(segments))
        if not header.calls_tool:
            header.content = f"{text} {header.content}" if header.content else f"{text} "
    check_header(header)
    return header


def check_header(header: Header) -> None:
    """Report what is complete but not as the format has it."""
    if header.role != "assistant":
        return
    if header.channel is None:
        header.report("missing_channel", "")
    if not header.calls_tool or header.recipient is None:
        return
    root, dot, _ = header.recipient.partition(".")
    if root in BUILTIN_TOOLS:
        return
    if not dot:
        header.report("bare_recipient", header.recipient)
    if header.channel not in ("commentary", None) and (root == FUNCTIONS or not dot):
        header.report("call_on_other_channel", header.channel or "")


def _words(segments: Sequence[Segment], header: Header) -> list[_Word]:
    """The words of the header in their order; channels are taken out."""
    words: list[_Word] = []
    for index, segment in enumerate(segments):
        # At its two ends a header may hold any white space.
        text = segment.text.rstrip() if index == len(segments) - 1 else segment.text
        text = text.lstrip() if index == 0 else text
        if segment.marker == "channel":
            text = _take_channel(text, header)
        elif segment.marker == "constrain":
            head, *rest = _ASCII_SPACE.split(text, maxsplit=1)
            if not head and rest and rest[0]:
                header.report("header_text", f"{CONSTRAIN}{text}")
                head, *rest = _ASCII_SPACE.split(rest[0], maxsplit=1)
            words.append(_Word(CONSTRAIN + head, True))
            text = "".join(rest)
        words += [_Word(w) for w in _ASCII_SPACE.split(text) if w]
    return words


def _take_channel(text: str, header: Header) -> str:
    """Set the channel from what follows `<|channel|>`; return the rest."""
    end = _AFTER_CHANNEL.search(text)
    value, rest = (text[: end.start()], text[end.start() :]) if end else (text, "")
    if not value:
        first = _ASCII_SPACE.split(rest.strip(), maxsplit=1)
        header.report("unknown_channel", text)
        if first[0] not in CHANNELS:
            return rest
        value, rest = first[0], "".join(first[1:])
    elif value not in CHANNELS:
        header.report("unknown_channel", value)
        known = next((c for c in CHANNELS if value.lower().startswith(c)), None)
        if known is not None:
            value, rest = known, f"{value[len(known) :]}{rest}"
    if header.channel is not None:
        header.report("duplicate_channel", header.channel)
    header.channel = value
    return rest


def _take_role(words: list[_Word], header: Header, live: bool) -> list[_Word]:
    """Set role and name from the first word; return the others."""
    if not words or words[0].constrain or words[0].is_recipient:
        header.report("missing_role", "")
        return words
    first, others = words[0].text, words[1:]
    role, _, name = first.partition(":")
    if first in ROLES:
        header.role, header.name = cast(Role, first), "tool" if first == "tool" else None
    elif name and role in ROLES and role != "tool":
        header.role, header.name = cast(Role, role), name
    elif is_tool_name(first) or (others and (not live or _Word("to=assistant") in others)):
        header.role, header.name = "tool", first
        if not others:
            header.report("unknown_role", first)
    else:
        header.report("unknown_role", first)
        glued = first.removeprefix("assistant")
        return [_Word(glued), *others] if glued != first else others
    if live and header.role != "assistant":
        header.report("foreign_role", header.name or header.role)
    return others


def _take_fields(words: list[_Word], header: Header) -> list[str]:
    """Set recipient and content type from the words after the role; return those that fit nowhere."""
    plain = [w.text for w in words if not w.constrain and not w.is_recipient]
    recipients = [w.text.removeprefix("to=") for w in words if w.is_recipient]
    types = [w.text for w in words if w.constrain]
    surplus = [f"to={r}" for r in recipients[1:]] + types[1:]
    if plain and plain[0] in CHANNELS and header.channel is None:
        header.channel = plain.pop(0)
        header.report("channel_without_marker", header.channel)
    if recipients:
        header.recipient = recipients[0] or (plain.pop(0) if plain else None)
        if not recipients[0]:
            header.report("header_text", "to=")
    elif plain and _may_be_recipient(plain, types, header):
        header.recipient = plain.pop(0)
        header.report("recipient_without_to", header.recipient)
    if types:
        header.content_type = types[0]
    elif len(plain) == 1 and (header.recipient is not None or plain[0] in CONTENT_TYPES):
        if recipients and words[-1].is_recipient:
            header.report("header_text", plain[0])
        header.content_type = plain.pop()
    return plain + surplus


def _may_be_recipient(plain: list[str], types: list[str], header: Header) -> bool:
    """True when the first plain word names whom the message goes to, though "to=" is missing."""
    if is_tool_name(plain[0]):
        return True
    called = header.channel == "commentary" and plain[0] not in CONTENT_TYPES
    return len(plain) + len(types) <= 2 and (called or header.role != "assistant")


def recover_header(segments: Sequence[Segment], *, role_given: bool, live: bool) -> Header:
    """The header and the content of a message that has no `<|message|>`."""
    header = Header()
    content: list[str] = []
    for index, (marker, text) in enumerate(segments):
        rest = text
        if marker == "channel":
            rest = _recover_channel(text, header)
        elif marker == "constrain":
            rest = text.lstrip(ascii_lowercase)
            header.content_type = CONSTRAIN + text.removesuffix(rest)
        elif index == 0 and (not role_given or text.lstrip().startswith("assistant")):
            rest = _recover_role(text, header, live)
        content.append(_recover_fields(rest, header))
    header.content = "".join(content)
    if any(s.marker for s in segments):
        header.content = header.content.lstrip()
    return header


def _recover_role(text: str, header: Header, live: bool) -> str:
    found = _ROLE.match(text)
    if found is None:
        return text
    role = cast(Role, found.group(1))
    if role != "assistant" and (live or role == "tool"):
        # A stray word at the start of an answer is likelier than a turn the model has no business with.
        return text
    header.role = role
    return text[found.end() :]


def _recover_channel(text: str, header: Header) -> str:
    known = next((c for c in CHANNELS if text.strip().lower().startswith(c)), None)
    if known is None:
        # A channel cut off in its name says nothing yet; anything else may be the answer.
        return "" if any(c.startswith(text.strip()) for c in CHANNELS) else text
    if header.channel is not None:
        header.report("duplicate_channel", header.channel)
    header.channel = known
    return text.lstrip()[len(known) :]


def _recover_fields(text: str, header: Header) -> str:
    found = _RECIPIENT.match(text)
    if found is not None and header.recipient is None:
        header.recipient = found.group(1)
        text = text[found.end() :]
    found = _CONTENT_TYPE.match(text) if header.recipient is not None else None
    if found is not None and header.content_type is None:
        header.content_type = found.group(1)
        text = text[found.end() :]
    return text.lstrip() if header.recipient is not None else text
