"""Rows of a data set to token ids, with the tokens that are to be learned.

A row is one of
- {"messages": [..], "tools": [..]}: OpenAI's chat form, with "reasoning" ("thinking", "reasoning_content")
  and "tool_calls" on the assistant's messages; "weight": 0 leaves one unlearned. The row may also say
  "reasoning_effort" and "current_date".
- {"prompt": .., "completion": ..}: a user's message and the answer.
- {"text": ..}: text as it is, all of it learned.
- {"prompt": .. or "messages": [..], "chosen": .., "rejected": ..}: a preferred and another answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_gptoss.errors import GptOssError, TuneError
from mlx_gptoss.harmony import Conversation, Message, Tool
from mlx_gptoss.harmony.render import render_messages
from mlx_gptoss.harmony.types import CONSTRAIN
from mlx_gptoss.tokenizer import Tokenizer

_REASONING = ("reasoning", "thinking", "reasoning_content")
_CONVERSATION = ("reasoning_effort", "current_date")
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """A sequence to read and what to learn of it: `wanted` int32 [n] is to follow the tokens at `rows` int32
    [n].

    ids int32 [t]. `wanted` is the token after a row as the model has to write it: after an answer in the
    middle of a conversation <|return|>, where the history shows <|end|>. where: file and line, for errors.
    """

    ids: np.ndarray
    rows: np.ndarray
    wanted: np.ndarray
    where: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Kept(Example):
    """A sequence at whose rows the model is to say what it says without the adapter, whatever `wanted` is."""


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt."""

    chosen: Example
    rejected: Example

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


def examples_of(row: object, tokenizer: Tokenizer, where: str) -> list[Example]:
    """The examples of a row. Raises TuneError, naming `where`, for a row that cannot be used."""
    try:
        if not isinstance(row, Mapping):
            raise TuneError("expected an object, {'messages': [..]}")
        if isinstance(row.get("text"), str):
            return [_of_text(row["text"], tokenizer, where)]
        if "completion" in row or "messages" in row:
            return list(_of_conversation(_conversation(row), _weights(row), tokenizer, where))
    except GptOssError as error:
        raise TuneError(f"{where}: {error}") from None
    keys = ", ".join(map(repr, list(row)[:6])) or "nothing"
    raise TuneError(f"{where}: holds {keys}: expected 'messages', 'prompt' and 'completion', or 'text'")


def preference_of(row: object, tokenizer: Tokenizer, where: str) -> Preference:
    """The pair of a row. Raises TuneError as `examples_of` does."""
    try:
        if not isinstance(row, Mapping) or not {"chosen", "rejected"} <= row.keys():
            raise TuneError("expected 'chosen' and 'rejected' beside 'prompt' or 'messages'")
        before = row["prompt"] if "prompt" in row else row.get("messages")
        prompt = _messages([{"role": "user", "content": before}] if isinstance(before, str) else before)
        if not prompt or prompt[-1].role == "assistant":
            raise TuneError("the prompt must end with a message to the assistant")
        sides = []
        for key in ("chosen", "rejected"):
            said = row[key]
            answer = _messages([{"role": "assistant", "content": said}] if isinstance(said, str) else said)
            if isinstance(said, list) and answer[: len(prompt)] == prompt:
                answer = answer[len(prompt) :]  # TRL's form repeats the prompt
            if not answer or any(m.role != "assistant" for m in answer):
                raise TuneError(f"{key!r} holds other messages than the assistant's")
            conversation = _with_messages(row, [*prompt, *answer])
            learned = range(len(prompt), len(prompt) + len(answer))
            sides.append(_encode(conversation, set(learned), tokenizer, where))
    except GptOssError as error:
        raise TuneError(f"{where}: {error}") from None
    return Preference(*sides)


def prompt_of(row: Mapping[str, Any]) -> Conversation:
    """The conversation of a row up to where the assistant speaks last: what to sample an answer to."""
    if isinstance(row.get("text"), str):
        return Conversation([Message.user(row["text"])])
    if "chosen" in row:
        before = row.get("prompt", row.get("messages"))
        return _with_messages(
            row, _messages([{"role": "user", "content": before}] if isinstance(before, str) else before)
        )
    conversation = _conversation(row)
    said = [i for i, m in enumerate(conversation.messages) if m.role != "assistant"]
    return replace(conversation, messages=conversation.messages[: said[-1] + 1 if said else 0])


def _of_text(text: str, tokenizer: Tokenizer, where: str) -> Example:
    ids = np.array([*tokenizer.encode(text), tokenizer.special.endoftext], np.int32)
    if len(ids) < 2:
        raise TuneError("the text is empty")
    return Example(ids, np.arange(len(ids) - 1, dtype=np.int32), ids[1:], where)


def _of_conversation(
    conversation: Conversation, unlearned: set[int], tokenizer: Tokenizer, where: str
) -> Iterator[Example]:
    """One example, or two: reasoning before the first answer is shown to some generations and not to others.

    Each message is learned behind the prompt that the renderer would make where it is written.
    """
    messages = conversation.messages
    learned = {i for i, m in enumerate(messages) if m.role == "assistant"} - unlearned
    if not learned:
        raise TuneError("nothing to learn: no assistant message (of weight 1)")
    first = next((i for i, m in enumerate(messages) if m.channel == "final"), len(messages))
    hidden = {i for i, m in enumerate(messages[:first]) if m.channel == "analysis"}
    without = {i for i in learned if hidden and _answered_before(messages, i)}
    if whole := learned - without:
        end = max(whole) + 1
        yield _encode(replace(conversation, messages=messages[:end]), whole, tokenizer, where)
    if without:
        shown = [i for i in range(len(messages)) if i not in hidden]
        places = {place for place, i in enumerate(shown) if i in without}
        yield _encode(replace(conversation, messages=[messages[i] for i in shown]), places, tokenizer, where)


def _answered_before(messages: Sequence[Message], index: int) -> bool:
    """Whether the assistant's last message before the generation that wrote message `index` is an answer.

    Then the prompt leaves out the reasoning before the first answer (see harmony.render).
    """
    start = index
    while start and messages[start - 1].role == "assistant" and not _ends(messages[start - 1]):
        start -= 1
    before = next((m for m in reversed(messages[:start]) if m.role == "assistant"), None)
    return before is not None and before.channel == "final"


def _ends(message: Message) -> bool:
    """Whether a generation ends with this message of the assistant: an answer, or a call."""
    return message.channel == "final" or message.recipient is not None


def _encode(conversation: Conversation, learned: set[int], tokenizer: Tokenizer, where: str) -> Example:
    """The conversation's tokens; learned are those that the assistant writes for its messages `learned`."""
    special = tokenizer.special
    messages = [_as_sampled(m, tokenizer) if i in learned else m for i, m in enumerate(conversation.messages)]
    conversation = replace(conversation, messages=messages)
    prefix = 1 + len(tokenizer.encode("assistant"))  # which the prompt ends with
    ids: list[int] = []
    rows: list[int] = []
    wanted: list[int] = []
    goes_on = False  # whether the assistant's turn goes on after the message before
    for index, tokens in render_messages(conversation, tokenizer):
        message = None if index is None else conversation.messages[index]
        if index in learned:
            assert message is not None
            targets = list(tokens)
            if message.channel == "final":
                targets[-1] = special.return_
            first = 0 if goes_on else prefix
            rows += range(len(ids) + first - 1, len(ids) + len(tokens) - 1)
            wanted += targets[first:]
        ids += tokens
        goes_on = message is not None and message.role == "assistant" and not _ends(message)
    return Example(np.array(ids, np.int32), np.array(rows, np.int32), np.array(wanted, np.int32), where)


def _as_sampled(message: Message, tokenizer: Tokenizer) -> Message:
    """A call with its recipient behind the channel, where the model writes it; the renderer has it before."""
    if message.recipient is None or message.channel is None:
        return message
    special, kind = tokenizer.special, message.content_type or ""
    ids = [special.channel, *tokenizer.encode(f"{message.channel} to={message.recipient}{' ' * bool(kind)}")]
    if kind.startswith(CONSTRAIN):
        ids.append(special.constrain)
    ids += tokenizer.encode(kind.removeprefix(CONSTRAIN))
    ids += [special.message, *tokenizer.encode(message.content), special.call]
    return replace(message, token_ids=tuple(ids))


def _conversation(row: Mapping[str, Any]) -> Conversation:
    if "messages" in row:
        return _with_messages(row, _messages(row["messages"]))
    prompt, completion = row.get("prompt"), row["completion"]
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise TuneError("'prompt' and 'completion' must be texts, and the completion not empty")
    return _with_messages(row, [Message.user(prompt), Message.assistant(completion)])


def _with_messages(row: Mapping[str, Any], messages: Sequence[Message]) -> Conversation:
    """System and developer messages at the start become the instructions, as the server has it."""
    about = {key: row[key] for key in _CONVERSATION if row.get(key) is not None}
    tools = row.get("tools") or []
    if not isinstance(tools, list):
        raise TuneError(f"'tools' is a {type(tools).__name__}: expected a list")
    start = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))
    instructions = "\n\n".join(m.content for m in messages[:start]) or None
    declared = [Tool.from_dict(tool) for tool in tools]
    return Conversation(list(messages[start:]), instructions=instructions, tools=declared, **about)


def _messages(rows: object) -> list[Message]:
    if not isinstance(rows, list) or not rows:
        raise TuneError("'messages' is empty: expected a list of messages")
    return [message for index, row in enumerate(rows) for message in _message(row, f"messages[{index}]")]


def _weights(row: Mapping[str, Any]) -> set[int]:
    """The harmony messages (by index, after the instructions) that are not to be learned."""
    if "messages" not in row:
        return set()
    unlearned: set[int] = set()
    at, started = 0, False
    for index, entry in enumerate(row["messages"]):
        made = _message(entry, f"messages[{index}]")
        started = started or entry["role"] not in ("system", "developer")
        if not started:
            continue
        weight = entry.get("weight", 1)
        if weight not in (0, 1):
            raise TuneError(f"messages[{index}].weight is {weight!r}: expected 0 or 1")
        if weight == 0:
            unlearned.update(range(at, at + len(made)))
        at += len(made)
    return unlearned


def _message(row: object, where: str) -> list[Message]:
    """A message of OpenAI's form as harmony has it: reasoning, calls and answer are messages of their own."""
    if not isinstance(row, Mapping):
        raise TuneError(f"{where} is a {type(row).__name__}: expected an object")
    role, text = row.get("role"), _text(row.get("content"), where)
    if role not in ROLES:
        raise TuneError(f"{where}.role is {role!r}: expected one of {', '.join(ROLES)}")
    if role == "tool":
        return [Message.tool_result(text, name=row.get("name"), call_id=row.get("tool_call_id"))]
    if role != "assistant":
        return [Message(role, text)]
    made = [Message.reasoning(row[key]) for key in _REASONING if row.get(key)][:1]
    calls = row.get("tool_calls") or []
    if text and calls:
        made.append(Message.preamble(text))
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TuneError(
                f"{where}.tool_calls holds {call!r:.80}: expected a function's name and arguments"
            )
        arguments = function.get("arguments", "{}")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        made.append(Message.tool_call(function["name"], arguments, call.get("id")))
    if not calls and (text or not made):
        made.append(Message.assistant(text))
    return made


def _text(content: object, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content
    ):
        return "\n".join(part["text"] for part in content)
    raise TuneError(f"{where}.content is a {type(content).__name__}: expected text")
