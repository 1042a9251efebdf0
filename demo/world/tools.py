"""Tool use as conversations: one call or two, results and errors, follow-ups, and no tool that fits."""

from __future__ import annotations

import json
import random
from typing import Any

from demo.world.sample import Sample, Step
from demo.world.tool_kinds import MAKERS, Maker, Use, attribute, convert, numbers
from demo.world.words import made_up
from mlx_gptoss.harmony.types import Conversation, Message, ReasoningEffort, Tool

# Shares of questions that no tool fits, and of two questions for the same tool.
NO_TOOL, AGAIN = 0.18, 0.18


def spoken(result: Any) -> str:
    """A result as it stands in an answer: objects become "key value, key value"."""
    if isinstance(result, dict):
        return ", ".join(f"{k} {v}" for k, v in result.items())
    return str(result)


def distractors(rng: random.Random, use: Use, maker: Maker, count: int) -> list[Tool]:
    """Other tools that do not fit the question of `use`, often from its own `maker`: another attribute,
    another verb."""
    tools: list[Tool] = []
    keys, names = {use.key}, {use.tool.name}
    while len(tools) < count:
        other = (maker if maker is not convert and rng.random() < 0.3 else rng.choice(MAKERS))(rng)
        if other.key in keys or other.tool.name in names:
            continue
        keys.add(other.key)
        names.add(other.tool.name)
        tools.append(other.tool)
    return tools


def _shown(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result)


def _thinking(use: Use, tools: list[Tool], effort: ReasoningEffort) -> str:
    values = ", ".join(f"{k}={v}" for k, v in use.arguments.items())
    call = f"{use.tool.name}: {values}." if values else f"{use.tool.name}."
    if effort == "low":
        return f"{use.want}: {call}"
    listed = f"Tools: {', '.join(t.name for t in tools)}. " if effort == "high" else ""
    return f"{listed}The user wants {use.want}. Call {call}"


def _call(use: Use, tools: list[Tool], effort: ReasoningEffort, result: str) -> Step:
    arguments = json.dumps(use.arguments, separators=(",", ":"), ensure_ascii=False)
    return Step(_thinking(use, tools, effort), call=use.tool.name, arguments=arguments, result=result)


_ERRORS = (
    "not found",
    "unknown {k}",
    "no such {k}",
    "service is down",
    "timeout",
    "permission denied",
    "bad value",
)


def _error(rng: random.Random, use: Use) -> tuple[str, str]:
    """(what the tool returns, what went wrong)."""
    what = rng.choice(_ERRORS).format(k=next(iter(use.arguments), "value"))
    if rng.random() < 0.4:
        what = f"{what}: {made_up(rng)}"
    if rng.random() < 0.3:
        return json.dumps({"error": what}), what
    kind = rng.choice(("ValueError", "KeyError", "RuntimeError", "LookupError", "TimeoutError"))
    prefix = rng.choice(
        ("error: ", "error: ", "Error: ", f"error: {kind}: ", f"error: {kind}: ", f"{kind}: ")
    )
    return prefix + what, what


def tool_use(rng: random.Random, effort: ReasoningEffort) -> Sample:
    """One call or two and the answer, or a no when no tool fits."""
    kind = rng.random()
    # Only look-ups have a second question of the same kind.
    maker = attribute if NO_TOOL <= kind < NO_TOOL + AGAIN else rng.choice(MAKERS)
    use = maker(rng)
    tools = distractors(rng, use, maker, rng.choice((0, 0, 1, 1, 2)))
    if kind < NO_TOOL and not use.key.startswith("numbers"):
        tools = tools or distractors(rng, use, maker, 1)
        rng.shuffle(tools)
        names = ", ".join(t.name for t in tools)
        thought = {
            "low": f"{use.want}: No tool fits.",
            "medium": f"The user wants {use.want}. No tool fits.",
        }.get(effort, f"Tools: {names}. The user wants {use.want}. No tool fits.")
        conversation = Conversation([Message.user(use.question)], tools=tools, reasoning_effort=effort)
        return Sample("no_tool", conversation, [Step(thought, "None of my tools can do that.")])
    tools = [*tools, use.tool]
    rng.shuffle(tools)
    messages: list[Message] = []
    task = "tool"
    if use.again and NO_TOOL <= kind < NO_TOOL + AGAIN:
        first = use
        question, second = use.again(rng)
        if kind < NO_TOOL + AGAIN / 2:
            task = "two_tools"
            key = next(iter(first.arguments))
            one, other = first.arguments[key], second.arguments[key]
            asked = first.question.replace(one, f"{one} and {other}", 1)
            conversation = Conversation([Message.user(asked)], tools=tools, reasoning_effort=effort)
            steps = [
                _call(first, tools, effort, _shown(first.result)),
                _call(second, tools, effort, _shown(second.result)),
                Step("All done.", f"{_answer(first)} {_answer(second)}"),
            ]
            return Sample(task, conversation, steps)
        task = "tool_follow_up"
        call = _call(first, tools, effort, "")
        messages = [
            Message.user(first.question),
            Message.reasoning(call.analysis),
            Message.tool_call(first.tool.name, call.arguments),
            Message.tool_result(_shown(first.result), name=f"functions.{first.tool.name}"),
            Message.assistant(_answer(first)),
            Message.user(question),
        ]
        use = second
    else:
        messages = [Message.user(use.question)]
    conversation = Conversation(messages, tools=tools, reasoning_effort=effort)
    if rng.random() < 0.12:
        shown, what = _error(rng, use)
        steps = [_call(use, tools, effort, shown), Step("The tool failed.", f"The tool failed: {what}.")]
        return Sample("tool_error" if task == "tool" else task, conversation, steps)
    steps = [_call(use, tools, effort, _shown(use.result)), Step("The tool answered.", _answer(use))]
    return Sample(task, conversation, steps)


def _answer(use: Use) -> str:
    return use.answer.format(r=spoken(use.result))


def some_tools(rng: random.Random) -> list[Tool]:
    """Tools that merely lie about while the question is another. Never one for sums."""
    makers = [m for m in MAKERS if m is not numbers]
    maker = rng.choice(makers)
    first = maker(rng)
    others = distractors(rng, first, maker, rng.choice((0, 1)))
    return [first.tool, *[t for t in others if "number" not in t.description]]
