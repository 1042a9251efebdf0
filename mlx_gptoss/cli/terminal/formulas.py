"""LaTeX formulas as one line of Unicode, where that is easy to read; the page's converter parses them."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import zip_longest
from unicodedata import category
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

_SUPER = dict(
    zip(
        "0123456789+-−=()niabcdefghjklmoprstuvwxyzT′″∗*∘",
        "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿⁱᵃᵇᶜᵈᵉᶠᵍʰʲᵏˡᵐᵒᵖʳˢᵗᵘᵛʷˣʸᶻᵀ′″**°",
        strict=True,
    )
)
_SUB = dict(zip("0123456789+-−=()aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ", strict=True))
_FRACTIONS = {"1/2": "½", "1/3": "⅓", "2/3": "⅔", "1/4": "¼", "3/4": "¾", "1/8": "⅛"}
_ROOTS = {"2": "√", "3": "∛", "4": "∜"}
_ACCENTS = {"^": "\u0302", "ˆ": "\u0302", "→": "\u20d7", "~": "\u0303", "˜": "\u0303", "˙": "\u0307"}
_ACCENTS |= {".": "\u0307", "¨": "\u0308", "¯": "\u0305", "‾": "\u0305", "―": "\u0305", "ˉ": "\u0305"}
_SIGNS = "+-−±∓¬"
_LARGE = "∑∏∫∬∮⋃⋂"
_OPENING = "([{|⟨⌊⌈"
_TIGHT = frozenset("()[]{}|⟨⟩⌊⌋⌈⌉!′./∂∇∠°∞∅%$" + _LARGE)  # without blanks around them
_NUMBERED = re.compile(r"\\(begin|end)\{(align|gather|equation)\}")
_NAMESPACE = ' xmlns="http://www.w3.org/1998/Math/MathML"'
_GROUPS = frozenset(("math", "mrow", "mstyle", "mpadded", "menclose"))
_SCRIPTS = frozenset(("msub", "msup", "msubsup", "munder", "mover", "munderover"))


class _Hard(Exception):
    """This formula has no plain line."""


@lru_cache(maxsize=512)
def unicode_formula(latex: str) -> str | None:
    """The formula in Unicode, an aligned one in lines; None when it is better shown as it is written."""
    from mlx_gptoss.markdown.formula import mathml

    markup = mathml(_NUMBERED.sub(r"\\\1{\2*}", latex), display=False)
    if markup is None:
        return None
    try:
        root: Element = ElementTree.fromstring(markup.replace(_NAMESPACE, ""))
        while root.tag in _GROUPS and len(root) == 1:
            root = root[0]
        if root.tag == "mtable":
            rows = ["".join(_line(list(cell)) for cell in row).strip() for row in root]
            return "\n".join(row for row in rows if row)
        return _line([root]).strip()
    except (_Hard, ElementTree.ParseError, RecursionError, ValueError, IndexError):
        return None  # the last two: a fraction or a script that lacks a part


def _line(nodes: list[Element]) -> str:
    """Nodes one after the other, with blanks where a reader needs them."""
    out = ""
    apart = False  # what comes next is an argument: of a function, of a sum
    for node, after in zip_longest(nodes, nodes[1:]):
        text = _text(node)
        if text in (",", ";", ":"):
            thousands = text == "," and after is not None and re.fullmatch(r"\d{3}", after.text or "")
            out += text if thousands else f"{text} "
        elif _is_operator(node, text):
            # A sign at the beginning, or behind another operator, belongs to what follows.
            sign = text in _SIGNS and (not out.strip() or out[-1] in _OPENING or out[-1] in " ,")
            out += text if sign else f"{'' if out.endswith(' ') else ' '}{text} "
        else:
            function = _is_function(node)
            blank = (function and bool(out) and out[-1] not in _OPENING) or (
                apart and not text.startswith("(")
            )
            out += f" {text}" if blank and text.strip() and not out.endswith(" ") else text
            apart = function or "/" in text or (node.tag in _SCRIPTS and _text(node[0]) in _LARGE)
            continue
        apart = False
    return out


def _is_operator(node: Element, text: str) -> bool:
    """Whether blanks belong around it; the converter calls some operators names."""
    if node.tag not in ("mo", "mi") or not text or text in _TIGHT:
        return False
    return not text.isalpha() and not text.isspace() and (node.tag == "mo" or category(text[0]) == "Sm")


def _is_function(node: Element) -> bool:
    """sin, log_2, max with what is below it."""
    while node.tag in _SCRIPTS:
        node = node[0]
    text = node.text or ""
    return node.tag in ("mi", "mo") and len(text) > 1 and text.isalpha()


def _text(node: Element) -> str:
    """One node. Raises _Hard for what has no plain form."""
    children = list(node)
    match node.tag:
        case "mi" | "mn" | "mo" | "mtext" | "ms":
            return (node.text or "").replace("\u2061", "").replace("\u2062", "").replace("\xa0", " ")
        case "mspace":
            return " "
        case "msqrt":
            return "√" + _wrapped(_line(children))
        case "mroot":
            index = _text(children[1])
            return _ROOTS.get(index, f"{_small(index, _SUPER)}√") + _wrapped(_text(children[0]))
        case "mfrac":
            above, below = (_line([child]).strip() for child in children)
            if " " in _outside(above):
                above = f"({above})"
            single = re.fullmatch(r"\d+|\w\W?|[dΔ∂δ]\w|[^\W\d]{3,}|\([^()]*\)", below)
            return _FRACTIONS.get(f"{above}/{below}", f"{above}/{below if single else f'({below})'}")
        case "msup":
            return _base(children[0]) + _small(_line([children[1]]), _SUPER, "^")
        case "msub" | "munder":
            return _base(children[0]) + _small(_line([children[1]]), _SUB, "_")
        case "msubsup" | "munderover":
            low, high = (_line([child]) for child in children[1:])
            return _base(children[0]) + _small(low, _SUB, "_") + _small(high, _SUPER, "^")
        case "mover":
            accent, over = _ACCENTS.get(_text(children[1])), _text(children[0])
            if accent is None or not over.isalnum() or (len(over) > 1 and accent != "\u0305"):
                raise _Hard
            return "".join(character + accent for character in over)
        case tag if tag in _GROUPS:
            return _line(children)
    raise _Hard


def _base(node: Element) -> str:
    """What carries a script: several factors are kept together."""
    text = _text(node)
    return f"({text})" if node.tag in _GROUPS and " " in _outside(text.strip()) else text


def _outside(text: str) -> str:
    """What stands outside of all parentheses."""
    depth, out = 0, ""
    for character in text:
        depth -= character in ")]}"
        out += character if depth == 0 else ""
        depth += character in "([{"
    return out


def _wrapped(text: str) -> str:
    """In parentheses, unless it holds together by itself."""
    text = text.strip()
    return text if text.isdigit() or len(text) == 1 or not _outside(text).strip("()") else f"({text})"


def _small(text: str, table: dict[str, str], mark: str = "") -> str:
    """A script in small characters, or behind its mark where Unicode lacks one of them."""
    tight = text.replace(" ", "")
    if tight and all(character in table for character in tight):
        return "".join(table[character] for character in tight)
    if not mark:
        raise _Hard
    return f"{mark}{_wrapped(text)}"
