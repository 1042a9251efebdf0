"""LaTeX formulas as MathML, which every current browser draws."""

from __future__ import annotations

import re
from functools import lru_cache

from latex2mathml.converter import convert

MAX_LENGTH = 4000  # characters of a formula
_MAX_DEPTH = 60  # of braces: the converter is recursive
# Environments that latex2mathml does not know, by the one that it lays out as they are.
_ENVIRONMENT = re.compile(
    r"\\(begin|end)\{(?:aligned|gathered|gather|multline|equation|eqnarray|flalign|alignat|alignedat)\*?\}"
    r"(?:(?<=at\})\{\d+\}|(?<=at\*\})\{\d+\})?"
)
_BRACE = re.compile(r"(?<!\\)[{}]")
_NUMBERING = re.compile(r"\\(?:label\{[^{}]*\}|nonumber|notag)")
# latex2mathml sets "n log n" without a space.
_NAME = re.compile(r"(?P<script>(?:<msu[bp]>|<msubsup>)?)<mi>(?P<name>[a-z]{2,})</mi>")
_OPERANDS = ("</mi>", "</mn>", "</msub>", "</msup>", "</msubsup>", "</mfrac>", "&#x00029;</mo>")
_THIN = 0.1667  # em
_LEFT, _RIGHT = (re.compile(rf"\\{side}(?![a-zA-Z])") for side in ("left", "right"))


@lru_cache(maxsize=512)
def mathml(latex: str, *, display: bool) -> str | None:
    """The formula as a `<math>` element, or None when it cannot be shown faithfully.

    The result is not sanitised: a formula can set attributes (`\\href`, `\\style`).
    """
    if len(latex) > MAX_LENGTH or not _balanced(latex):
        return None
    source = _NUMBERING.sub("", _ENVIRONMENT.sub(r"\\\1{align*}", latex.strip()))
    try:
        result = convert(source, display="block" if display else "inline")
    except Exception:  # it raises classes of its own, IndexError, RecursionError, ...
        return None
    # A command that it does not know comes back as a name with its backslash.
    if "\\" in result or "<mi>&</mi>" in result or "<munderover />" in result:
        return None
    return _NAME.sub(_spaced, result)


def _spaced(name: re.Match[str]) -> str:
    """The name of a function as an operator, a thin space from what it follows and what it is applied to."""
    before, after = name.string[: name.start()], name.string[name.end() :]
    left = _THIN if before.endswith(_OPERANDS) else 0
    right = 0 if after.startswith(("</mrow>", '<mo stretchy="false">&#x00028;')) else _THIN
    return f'{name["script"]}<mo lspace="{left}em" rspace="{right}em">{name["name"]}</mo>'


def _balanced(latex: str) -> bool:
    """Whether braces and \\left with \\right pair up: in what is still being written they do not."""
    depth = 0
    for brace in _BRACE.finditer(latex.replace("\\\\", "")):
        depth += 1 if brace[0] == "{" else -1
        if not 0 <= depth <= _MAX_DEPTH:
            return False
    return depth == 0 and len(_LEFT.findall(latex)) == len(_RIGHT.findall(latex))
