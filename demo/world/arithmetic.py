"""Sums worked out in digits, comparison, and small stories around them.

Every working has a fixed shape (three digits each, columns from the right), so that a small model finds
the next digit at a fixed distance.
"""

from __future__ import annotations

import random

from demo.world.sample import Problem
from demo.world.words import NAMES, THINGS


def add_columns(a: int, b: int) -> str:
    """Working of a + b, both below 1000: "017+025: 7+5+0=12 1+2+1=04 0+0+0=00. 0042=42."."""
    carry, parts = 0, []
    for place in (1, 10, 100):
        x, y = a // place % 10, b // place % 10
        total = x + y + carry
        parts.append(f"{x}+{y}+{carry}={total:02}")
        carry = total // 10
    return f"{a:03}+{b:03}: {' '.join(parts)}. {a + b:04}={a + b}."


def compare_columns(a: int, b: int) -> str:
    """Digits of a and b, both below 1000, from the left until they differ: "060,053: 0=0 6>5"."""
    signs = []
    for x, y in zip(f"{a:03}", f"{b:03}", strict=True):
        signs.append(f"{x}{_sign(int(x), int(y))}{y}")
        if x != y:
            break
    return f"{a:03},{b:03}: {' '.join(signs)}"


def _sign(a: int, b: int) -> str:
    return "<" if a < b else ">" if a > b else "="


def subtract_columns(a: int, b: int) -> str:
    """Working of a - b, both below 1000; the smaller is taken from the larger."""
    large, small = max(a, b), min(a, b)
    borrow, parts = 0, []
    for place in (1, 10, 100):
        x, y = large // place % 10, small // place % 10
        needs = int(x < y + borrow)
        parts.append(f"{needs}{x}-{y}-{borrow}={10 * needs + x - y - borrow}")
        borrow = needs
    minus = f" Minus, so {a - b}." if a < b else ""
    columns = f"{large:03}-{small:03}: {' '.join(parts)}. {large - small:04}={large - small}."
    return f"{compare_columns(a, b)}. {columns}{minus}"


def multiply_columns(a: int, b: int) -> str:
    """Working of a * b for a below 100 and b below 10."""
    ones, tens = a % 10 * b, a // 10 * b
    carry = ones // 10
    columns = f"{a % 10}*{b}={ones:02} {a // 10}*{b}={tens:02}+{carry}={tens + carry:02}."
    return f"{a:02}*{b}: {columns} {a * b:04}={a * b}."


def _operand(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3)))


def work(op: str, a: int, b: int) -> tuple[str, str, str, int]:
    """(lead, working, check, result) of one operation: op is +, - or *."""
    if op == "+":
        return f"Add {a} and {b}.", add_columns(a, b), f"Check: {add_columns(b, a)} It agrees.", a + b
    if op == "-":
        check = add_columns(abs(a - b), min(a, b))
        return f"Take {b} from {a}.", subtract_columns(a, b), f"Check: {check} It agrees.", a - b
    large, small = (b, a) if a < 10 <= b or (a < 10 and b < 10 and b > a) else (a, b)
    tens, ones = large // 10 * 10, large % 10
    check = add_columns(tens * small, ones * small)
    return (
        f"Multiply {a} by {b}.",
        multiply_columns(large, small),
        f"Check: {tens}*{small}={tens * small} {ones}*{small}={ones * small}. {check} It agrees.",
        a * b,
    )


_ASK = {
    "+": (
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "{a} + {b}",
        "{a}+{b}=?",
        "Add {a} and {b}.",
        "Calculate {a} + {b}.",
    ),
    "-": (
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "{a} - {b}",
        "{a}-{b}=?",
        "Subtract {b} from {a}.",
        "Calculate {a} - {b}.",
    ),
    "*": (
        "What is {a} * {b}?",
        "What is {a} times {b}?",
        "{a} x {b}",
        "{a}*{b}=?",
        "Multiply {a} by {b}.",
        "Calculate {a} * {b}.",
    ),
}
_KEYS = {"+": ("sum", "total"), "-": ("difference", "rest"), "*": ("product", "total")}


def calculation(rng: random.Random, op: str) -> Problem:
    """A bare sum, difference or product."""
    a, b = _operand(rng), _operand(rng)
    if op == "-" and a < b and rng.random() < 0.4:
        a, b = b, a
    if op == "*":
        a, b = rng.randrange(100 if rng.random() < 0.7 else 10), rng.randrange(10)
        if rng.random() < 0.4:
            a, b = b, a
    lead, short, check, value = work(op, a, b)
    return Problem(
        {"+": "add", "-": "subtract", "*": "multiply"}[op],
        rng.choice(_ASK[op]).format(a=a, b=b),
        lead,
        short,
        check,
        f"{a} {op} {b} = {value}.",
        str(value),
        value,
        ("answer", "result", "value", *_KEYS[op]),
    )


_STORIES = (
    ("+", "{n} has {a} {t}s and gets {b} more. How many {t}s does {n} have now?"),
    ("+", "There are {a} {t}s here and {b} {t}s there. How many are there in all?"),
    ("-", "{n} has {a} {t}s and loses {b}. How many {t}s are left?"),
    ("-", "There were {a} {t}s. {n} took {b} of them. How many are left?"),
    ("*", "{n} buys {a} boxes with {b} {t}s each. How many {t}s is that?"),
)


def story(rng: random.Random) -> Problem:
    """A sum told as a short story; the answer is a count."""
    op, text = rng.choice(_STORIES)
    a, b = rng.randrange(2, 100), rng.randrange(2, 100)
    if op == "-":
        a, b = max(a, b), min(a, b)
    if op == "*":
        b = rng.randrange(2, 10)
    lead, short, check, value = work(op, a, b)
    question = text.format(
        n=rng.choice(NAMES), a=a, b=b, t=rng.choice([t for t in THINGS[:90] if t[-1] not in "shy"])
    )
    return Problem("story", question, lead, short, check, f"The answer is {value}.", str(value), value)


def compare(rng: random.Random) -> Problem:
    """Which of two numbers is larger or smaller."""
    a, b = _operand(rng), _operand(rng)
    if rng.random() < 0.4:
        b = min(999, max(0, a + rng.choice((-20, -9, -2, -1, 1, 2, 9, 20))))
    b = b + 1 if a == b else b
    word, smaller = rng.choice((("larger", 0), ("bigger", 0), ("greater", 0), ("smaller", 1), ("less", 1)))
    value = min(a, b) if smaller else max(a, b)
    question = rng.choice(
        ("Which is {w}, {a} or {b}?", "What is {w}: {a} or {b}?", "Which number is {w}, {a} or {b}?")
    )
    return Problem(
        "compare",
        question.format(w=word, a=a, b=b),
        f"Compare {a} and {b}.",
        f"{compare_columns(a, b)}, {min(a, b)}<{max(a, b)}. {word}: {value}.",
        f"Check: {max(a, b)}>{min(a, b)}. Right.",
        f"{value} is {word}.",
        str(value),
        value,
        ("answer", "number", word),
    )


_FOLLOW = (
    ("*", 2, ("And twice that?", "Double that.", "What is twice that?", "Now double it.")),
    ("*", None, ("And times {b}?", "Multiply that by {b}.", "Now times {b}.")),
    ("+", None, ("And {b} more?", "Add {b} to that.", "Now add {b}.", "And plus {b}?")),
    ("-", None, ("And minus {b}?", "Take {b} from that.", "Now subtract {b}.", "And {b} less?")),
)


def follow_up(rng: random.Random, before: int) -> Problem:
    """A question about the number of the turn before (0 to 999; below 100 for products)."""
    choices = [f for f in _FOLLOW if f[0] != "*" or before < 100]
    op, b, asks = rng.choice(choices)
    if b is None:
        b = rng.randrange(2, 10) if op == "*" else rng.randrange(1, 100)
    lead, short, check, value = work(op, before, b)
    return Problem(
        "follow_up",
        rng.choice(asks).format(b=b),
        f"That was {before}. {lead}",
        f"{before}{op}{b}. {short}",
        check,
        f"{before} {op} {b} = {value}.",
        str(value),
        value,
    )


def yes_no(rng: random.Random) -> Problem:
    """Whether a number is larger or smaller than another."""
    a, b = rng.randrange(10 ** rng.choice((1, 2, 3))), rng.randrange(10 ** rng.choice((1, 2, 3)))
    b = b + 1 if a == b else b
    word, truth = rng.choice((("larger", a > b), ("smaller", a < b)))
    value = "Yes" if truth else "No"
    return Problem(
        "compare",
        f"Is {a} {word} than {b}?",
        f"Compare {a} and {b}.",
        f"{compare_columns(a, b)}, {a}{_sign(a, b)}{b}. {word}: {value}.",
        f"Check: {max(a, b)}>{min(a, b)}. Right.",
        f"{value}.",
        value,
        truth,
        ("answer", "result", word, f"is_{word}"),
    )
