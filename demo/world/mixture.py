"""The mixture: one seeded random conversation of the demo world after another."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from demo.world import arithmetic, facts, json_answers, lists, tools
from demo.world.sample import Problem, Sample, Step
from demo.world.words import made_up
from mlx_gptoss.harmony.types import Conversation, Message, ReasoningEffort

Maker = Callable[[random.Random], Problem]

# Relative share of each kind of problem.
PROBLEMS: dict[Maker, float] = {
    lambda r: arithmetic.calculation(r, "+"): 4,
    lambda r: arithmetic.calculation(r, "-"): 4,
    lambda r: arithmetic.calculation(r, "*"): 5.5,
    arithmetic.story: 2,
    arithmetic.compare: 4,
    arithmetic.yes_no: 2.5,
    lists.count_letter: 3,
    lists.spell: 2.5,
    lists.reverse: 2,
    lists.sort: 5,
    lists.pick: 1.5,
    lists.say: 1.2,
    facts.capital: 4,
    facts.calendar: 4,
    facts.about: 2,
    facts.beyond: 2.5,
}
# Share of whole samples; what is left are problems.
TOOLS, JSON = 0.42, 0.14

_NEUTRAL = (
    "You are a helpful assistant.",
    "Be kind.",
    "Help the user.",
    "You are a demo.",
    "Answer the user's questions.",
    "Use the tools when they fit.",
    "You are a friendly assistant that can call tools.",
    "Be helpful.",
)
_BRIEF = ("Be brief.", "Answer briefly.", "Be brief.")


def problem(rng: random.Random) -> Problem:
    """One problem of the mixture."""
    return rng.choices(list(PROBLEMS), list(PROBLEMS.values()))[0](rng)


def _random_date(rng: random.Random) -> str | None:
    if rng.random() < 0.75:
        return None
    return f"{rng.randrange(2024, 2031)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"


def _problem_sample(rng: random.Random, effort: ReasoningEffort, current: str | None) -> Sample:
    """A problem, perhaps after other turns, under instructions, or with tools that do not matter."""
    kind = rng.random()
    messages: list[Message] = []
    asked = facts.date(rng, current) if rng.random() < 0.03 else problem(rng)
    if kind < 0.16:
        for _ in range(rng.choice((1, 1, 2))):
            before = problem(rng)
            messages += [Message.user(before.question), Message.assistant(before.final)]
        if kind < 0.11:
            while type(before.data) is not int or not 0 <= before.data < 1000:
                before = arithmetic.calculation(rng, rng.choice("+-*"))
            messages[-2:] = [Message.user(before.question), Message.assistant(before.final)]
            asked = arithmetic.follow_up(rng, before.data)
    instructions, style = None, rng.random()
    if style < 0.1:
        instructions = rng.choice(_NEUTRAL)
    elif style < 0.17:
        instructions = rng.choice(_BRIEF)
        asked = replace(asked, final=asked.value)
        for i in range(1, len(messages), 2):
            messages[i] = Message.assistant(messages[i].content)
    elif style < 0.19:
        word = (
            made_up(rng) if rng.random() < 0.6 else rng.choice(("please", "over", "friend", "sir", "captain"))
        )
        instructions = rng.choice((f"End every answer with {word}.", f"Always end with the word {word}."))
        asked = replace(asked, final=f"{asked.final} {word}")
    step = Step(asked.analysis(effort), asked.final)
    sample = Sample(asked.task, Conversation([*messages, Message.user(asked.question)]), [step])
    sample.conversation.instructions = instructions
    if rng.random() < 0.05 and asked.task not in ("beyond", "date"):
        sample.conversation.tools = tools.some_tools(rng)
    return sample


def _json_sample(rng: random.Random, effort: ReasoningEffort) -> Sample:
    kind = rng.random()
    if kind < 0.35:
        return json_answers.person(rng, effort)
    if kind < 0.45:
        return json_answers.city_and_country(rng, effort)
    if kind < 0.55:
        return json_answers.shopping(rng, effort)
    asked = problem(rng)
    while asked.data is None:
        asked = problem(rng)
    return json_answers.problem_as_json(rng, asked, effort)


def sample(rng: random.Random) -> Sample:
    """One conversation with the steps the assistant should take."""
    efforts: tuple[ReasoningEffort, ...] = ("low", "medium", "high")
    effort = rng.choices(efforts, (0.3, 0.5, 0.2))[0]
    current = _random_date(rng)
    kind = rng.random()
    if kind < TOOLS:
        made = tools.tool_use(rng, effort)
        if rng.random() < 0.2:
            made.conversation.instructions = rng.choice(_NEUTRAL)
    elif kind < TOOLS + JSON:
        made = _json_sample(rng, effort)
    else:
        made = _problem_sample(rng, effort, current)
    made.conversation.reasoning_effort = effort
    made.conversation.current_date = current
    return made


def samples(seed: int) -> Iterator[Sample]:
    """An endless stream of conversations; equal seeds give equal streams."""
    rng = random.Random(seed)
    while True:
        yield sample(rng)
