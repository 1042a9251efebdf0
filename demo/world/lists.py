"""Letters of words, and short lists reversed, sorted and counted."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from demo.world.sample import Problem
from demo.world.words import NAMES, SPELLED, THINGS, made_up, proper, thing


def count_letter(rng: random.Random) -> Problem:
    """How often a letter occurs in a word; the working spells the word with a running count."""
    word = rng.choice(SPELLED)
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    seen, parts = 0, []
    for c in word:
        seen += c == letter
        parts.append(f"{c}{seen}")
    question = rng.choice(
        (
            'How many "{c}" are in "{w}"?',
            "How many {c}'s are in {w}?",
            "How many times does the letter {c} occur in {w}?",
            "Count the letter {c} in {w}.",
            "How many {c} are in the word {w}?",
        )
    )
    return Problem(
        "count_letter",
        question.format(c=letter, w=word),
        f"Count {letter} in {word}.",
        f"{''.join(parts)}. {seen}.",
        f"Check: {' '.join([letter] * seen) or 'none'}, {seen}.",
        f'"{word}" has {seen} "{letter}".',
        str(seen),
        seen,
        ("answer", "count", "number"),
    )


def spell(rng: random.Random) -> Problem:
    """A word spelled, or its letters counted."""
    word = rng.choice(SPELLED)
    spelled = "-".join(word)
    numbered = "".join(f"{c}{i}" for i, c in enumerate(word, 1))
    if rng.random() < 0.5:
        question = rng.choice(("Spell {w}.", "How do you spell {w}?", "Spell the word {w}."))
        return Problem(
            "spell",
            question.format(w=word),
            f"Spell {word}.",
            f"{spelled}.",
            f"Check: {numbered}.",
            f"{spelled}.",
            spelled,
            spelled,
            ("answer", "spelling"),
        )
    question = rng.choice(
        ("How many letters are in {w}?", "How long is the word {w}?", "How many letters has {w}?")
    )
    return Problem(
        "spell",
        question.format(w=word),
        f"Count the letters of {word}.",
        f"{numbered}.",
        f"Check: {spelled}.",
        f'"{word}" has {len(word)} letters.',
        str(len(word)),
        len(word),
        ("answer", "length", "count"),
    )


def _items(rng: random.Random, distinct_initials: bool = False) -> list[str]:
    count = rng.choice((3, 3, 3, 4))
    kind = rng.random()
    make: Callable[[], str] = (
        (lambda: rng.choice(THINGS))
        if kind < 0.5 or distinct_initials
        else (lambda: made_up(rng, 2))
        if kind < 0.55
        else (lambda: str(rng.randrange(100)))
        if kind < 0.85
        else (lambda: rng.choice(NAMES))
    )
    items: list[str] = []
    while len(items) < count:
        item = make()
        if item not in items and not (distinct_initials and item[0] in {i[0] for i in items}):
            items.append(item)
    return items


def reverse(rng: random.Random) -> Problem:
    """A list of three or four items backwards; the working numbers the items."""
    items = _items(rng)
    text, back = ", ".join(items), ", ".join(items[::-1])
    numbered = " ".join(f"{i} {x}" for i, x in enumerate(items, 1))
    count = len(items)
    down = " ".join(f"{count - i} {x}" for i, x in enumerate(items[::-1]))
    question = rng.choice(
        ("Reverse this list: {t}", "Reverse: {t}", "Reverse the list {t}.", "Write this list backwards: {t}")
    )
    return Problem(
        "reverse",
        question.format(t=text),
        "Reverse the list.",
        f"{numbered}. {down}.",
        f"Check: {count} items.",
        f"{back}",
        back,
        items[::-1],
        ("answer", "items", "list", "reversed"),
    )


def least_by_pairs(items: list[str]) -> str:
    """The least of some strings, found by a walk: "62 74< 62 57> 57 56> 56"."""
    least, walk = items[0], []
    for other in items[1:]:
        walk.append(f"{least} {other}{'<' if least < other else '>'}")
        least = min(least, other)
    return f"{' '.join(walk)} {least}"


def sort(rng: random.Random) -> Problem:
    """Three or four numbers below 100, or three words, sorted by picking the least again and again."""
    key: Callable[[str], Any]
    if rng.random() < 0.75:
        items = [str(n) for n in rng.sample(range(100), rng.choice((3, 3, 3, 4)))]
        key, what, shown = int, "numbers", [f"{int(x):02}" for x in items]
    else:
        items = _items(rng, distinct_initials=True)[:3]
        key, what, shown = str, "words", items
    ordered = sorted(items, key=key)
    left, parts = list(shown), []
    while len(left) > 1:
        parts.append(f"{' '.join(left)}: {least_by_pairs(left)}.")
        left.remove(min(left))
    parts.append(f"{left[0]}.")
    text, done = ", ".join(items), ", ".join(ordered)
    question = rng.choice(("Sort these {k}: {t}", "Sort: {t}", "Sort the list {t}.", "Put in order: {t}"))
    data = [int(x) for x in ordered] if key is int else ordered
    return Problem(
        "sort",
        question.format(k=what, t=text),
        f"Sort {len(items)} {what}.",
        " ".join(parts),
        f"Check: {' '.join(ordered)}, {len(items)} items.",
        done,
        done,
        data,
        ("answer", "items", "list", "sorted"),
    )


def pick(rng: random.Random) -> Problem:
    """The first, last or n-th item of a list, or how many there are."""
    items = _items(rng)
    numbered = " ".join(f"{i} {x}" for i, x in enumerate(items, 1))
    text = ", ".join(items)
    if rng.random() < 0.2:
        n = len(items)
        return Problem(
            "pick",
            f"How many items are in this list: {text}?",
            "Count the items.",
            f"{numbered}. {n}.",
            "",
            f"There are {n} items.",
            str(n),
            n,
            ("answer", "count", "number"),
        )
    place, word = rng.choice(((0, "first"), (len(items) - 1, "last"), (1, "second"), (2, "third")))
    item = items[place]
    return Problem(
        "pick",
        f"What is the {word} item in this list: {text}?",
        f"Find the {word} item.",
        f"{numbered}. The {word} is {item}.",
        "",
        f"The {word} item is {item}.",
        item,
        item,
        ("answer", "item", word),
    )


def say(rng: random.Random) -> Problem:
    """Words to repeat."""
    text = " ".join([thing(rng) for _ in range(rng.choice((1, 2, 3)))]) if rng.random() < 0.6 else proper(rng)
    question = rng.choice(("Say {t}.", "Repeat after me: {t}", "Repeat: {t}", "Say: {t}"))
    return Problem("say", question.format(t=text), "Repeat the words.", f"{text}.", "", text, text)
