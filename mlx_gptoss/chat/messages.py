"""A caller's prompt as harmony messages: a text, Messages, and dicts as OpenAI's chat API has them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from mlx_gptoss.errors import RequestError, ToolError, did_you_mean
from mlx_gptoss.harmony import Message
from mlx_gptoss.harmony.types import FUNCTIONS, ROLES, check_type

# A dict: {"role": "user", "content": "Why?"}; see read_prompt.
Prompt: TypeAlias = str | Sequence[Message | Mapping[str, Any]]

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def read_prompt(prompt: Prompt) -> tuple[str | None, list[Message]]:
    """(instructions, messages). Instructions are the dicts of a system or developer before the first turn;
    later ones are developer messages.

    A dict of the assistant may have `reasoning` (or `reasoning_content`, `thinking`) and `tool_calls`; its
    content then came before the calls. A tool's has `tool_call_id`, or its `name`. Content is text, or a list
    of text parts. Other keys are ignored. Raises RequestError or ToolError, naming the place.
    """
    if isinstance(prompt, str):
        return None, [Message.user(prompt)]
    if isinstance(prompt, Message | Mapping) or not isinstance(prompt, Iterable):
        raise RequestError(
            f"the prompt is a {type(prompt).__name__}: expected text, or a list of messages", "prompt"
        )
    instructions: list[str] = []
    messages: list[Message] = []
    for index, item in enumerate(prompt):
        where = f"messages[{index}]"
        if isinstance(item, Message):
            messages.append(item)
        elif not isinstance(item, Mapping):
            raise RequestError(
                f"{where} is a {type(item).__name__}: expected a Message, or a dict with role and content",
                where,
            )
        elif item.get("role") in ("system", "developer") and not messages:
            instructions.append(_content(item, where))
        else:
            messages += _from_dict(item, where)
    if not messages:
        raise RequestError("the prompt holds no messages: give at least one", "prompt")
    return "\n\n".join(instructions) or None, messages


def _from_dict(item: Mapping[str, Any], where: str) -> list[Message]:
    match item.get("role"):
        case "user":
            return [Message.user(_content(item, where))]
        case "system" | "developer":
            return [Message("developer", _content(item, where))]
        case "assistant":
            return _assistant(item, where)
        case "tool":
            return [_result(item, where)]
        case str(role):
            near = did_you_mean(role, ROLES, {"ai": "assistant", "model": "assistant", "human": "user"})
            raise RequestError(
                f"{where}.role is {role!r}: expected one of {', '.join(ROLES)}{near}", f"{where}.role"
            )
    raise RequestError(
        f"{where} has no role: expected {{'role': …, 'content': …}}, the role one of {', '.join(ROLES)}",
        f"{where}.role",
    )


def _assistant(item: Mapping[str, Any], where: str) -> list[Message]:
    reasoning = next((item[k] for k in ("reasoning", "reasoning_content", "thinking") if item.get(k)), None)
    calls = item.get("tool_calls") or ()
    check_type(calls, list | tuple, f"{where}.tool_calls", "a list of calls")
    messages = []
    if reasoning is not None:
        messages.append(Message.reasoning(_text(reasoning, f"{where}.reasoning")))
    if item.get("content"):
        text = _content(item, where)
        messages.append(Message.preamble(text) if calls else Message.assistant(text))
    messages += [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return messages or [Message.assistant(_content(item, where))]


def _call(call: object, where: str) -> Message:
    match call:
        case {"function": {"name": str(name), **function}, **more}:
            arguments, call_id = function.get("arguments") or "{}", more.get("id")
            if isinstance(arguments, Mapping):
                arguments = json.dumps(arguments, ensure_ascii=False, default=str)
            return Message.tool_call(
                name,
                _string(arguments, f"{where}.function.arguments", "JSON as text"),
                None if call_id is None else _string(call_id, f"{where}.id"),
            )
    raise ToolError(
        f"{where} is no call of a function: expected {{'id': …, 'function': {{'name': …, 'arguments': …}}}}",
        where,
    )


def _result(item: Mapping[str, Any], where: str) -> Message:
    content, call_id, name = _content(item, where), item.get("tool_call_id"), item.get("name")
    check_type(call_id, str | None, f"{where}.tool_call_id", "the id of an earlier call")
    if call_id:
        return Message.tool_result(content, call_id=call_id)
    if not isinstance(name, str) or not name:
        raise ToolError(
            f"{where} has no tool_call_id: give the id of the call it answers", f"{where}.tool_call_id"
        )
    return Message.tool_result(content, name=name if "." in name else f"{FUNCTIONS}.{name}")


def _content(item: Mapping[str, Any], where: str) -> str:
    content = item.get("content")
    if content is None:
        near = "".join(did_you_mean(key, ("content",)) for key in item if key != "role")
        raise RequestError(f"{where} has no content: expected text{near}", f"{where}.content")
    return _text(content, f"{where}.content")


def _text(content: object, where: str) -> str:
    """The text of a content, of which the parts of a list are lines."""
    if isinstance(content, list | tuple):
        return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))
    return _string(content, where)


def _part(part: object, where: str) -> str:
    match part:
        case str(text):
            return text
        case {"type": kind, **rest} if kind in _TEXT_PARTS:
            return _string(rest.get("refusal" if kind == "refusal" else "text"), f"{where}.text")
        case {"type": str(kind)}:
            raise RequestError(f"{where} is of type {kind[:40]!r}: gpt-oss reads text only", f"{where}.type")
    raise RequestError(f"{where} is no part of a content: expected {{'type': 'text', 'text': …}}", where)


def _string(value: object, where: str, expected: str = "text") -> str:
    check_type(value, str, where, expected)
    return str(value)
