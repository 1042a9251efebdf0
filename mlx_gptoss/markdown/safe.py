"""What of HTML and MathML may be shown: nh3 with lists of what is allowed.

Links lead to http, https, mailto or to footnotes of the same text; nothing loads anything, nothing has a
style of its own, and a length in a formula is no more than two digits.
"""

from __future__ import annotations

import re

import nh3

from mlx_gptoss.markdown.code import CLASSES

LINK = re.compile(r"(?:https?://|mailto:)[^\s]+", re.IGNORECASE)
_NOTE = re.compile(r"fn(?:ref)?-[\w-]{1,80}")
_LENGTH = re.compile(r"[+-]?\d{0,2}(?:\.\d{1,4})?(?:em|ex|pt)?")
_COLOUR = re.compile(r"#[0-9a-fA-F]{3,6}|[a-zA-Z]{3,20}")


def _names(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


_ATTRIBUTES: dict[str, frozenset[str]] = {
    "a": _names("href target"),
    "div": _names("tabindex role aria-label"),
    "ol": _names("start"),
    "pre": _names("data-language tabindex"),
    "section": _names("aria-label"),
    "span": _names("role aria-label"),
    "sup": _names("id"),
    "li": _names("id"),
    "td": _names("data-align"),
    "h3": _names("data-level"),
    "h4": _names("data-level"),
    "h5": _names("data-level"),
    "h6": _names("data-level"),
    "th": _names("data-align scope"),
}
_TAGS = _names("p blockquote ul hr br strong em s sub kbd mark u code table thead tbody tr") | frozenset(
    _ATTRIBUTES
)
_SIZES = _names(
    "width height depth lspace rspace voffset minsize maxsize linethickness rowspacing columnspacing"
)
_MATH_ATTRIBUTES = _SIZES | _names(
    "display displaystyle scriptlevel mathvariant mathcolor stretchy fence form separator accent accentunder",
    "movablelimits largeop symmetric columnalign notation xmlns",
)
_MATH = _names(
    "math mrow mi mo mn mtext mspace ms mfrac msqrt mroot mstyle merror mpadded mphantom menclose msub msup",
    "msubsup munder mover munderover mmultiscripts mprescripts mtable mtr mtd",
)
_CLASSES = {
    "span": CLASSES | {"math", "task"},
    "div": _names("math table plain"),
    "section": _names("footnotes"),
    "sup": _names("footnote"),
    "li": _names("todo"),
    "a": _names("back"),
}


def safe(html: str) -> str:
    """The HTML without anything that is not on the lists."""
    return _CLEANER.clean(html)


def _attribute(tag: str, name: str, value: str) -> str | None:
    """The value of an allowed attribute, None to leave it out."""
    if name == "href":
        return value if LINK.match(value) or (value[:1] == "#" and _NOTE.fullmatch(value[1:])) else None
    if name == "target":
        return value if value == "_blank" else None
    if name == "id":
        return value if _NOTE.fullmatch(value) else None
    if tag in _MATH and name in _SIZES:
        return value if all(_LENGTH.fullmatch(part) for part in value.split()) else None
    if name == "mathcolor":
        return value if _COLOUR.fullmatch(value) else None
    return value


_CLEANER = nh3.Cleaner(
    tags=_TAGS | _MATH,
    attributes=_ATTRIBUTES | dict.fromkeys(_MATH, _MATH_ATTRIBUTES),
    attribute_filter=_attribute,
    allowed_classes=_CLASSES,
    url_schemes={"http", "https", "mailto"},
    link_rel="noopener noreferrer nofollow",
)
