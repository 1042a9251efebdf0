"""Colours that can be read on light and on dark terminals: of the sixteen, those that are far from both."""

from __future__ import annotations

from pygments.token import Comment, Generic, Keyword, Name, Number, Operator, String, Token
from rich.style import Style
from rich.syntax import ANSISyntaxTheme
from rich.theme import Theme

# No white, black, yellow or bright colour, and no background: each vanishes on one of the two.
CODE_THEME = ANSISyntaxTheme(
    {
        Token: Style(),
        Comment: Style(dim=True, italic=True),
        Keyword: Style(color="blue", bold=True),
        Keyword.Type: Style(color="cyan"),
        Operator.Word: Style(color="blue", bold=True),
        Name.Builtin: Style(color="cyan"),
        Name.Function: Style(color="magenta"),
        Name.Class: Style(color="magenta", bold=True),
        Name.Decorator: Style(color="magenta"),
        Name.Tag: Style(color="blue", bold=True),
        Name.Attribute: Style(color="cyan"),
        Number: Style(color="cyan"),
        String: Style(color="green"),
        Generic.Deleted: Style(color="red"),
        Generic.Inserted: Style(color="green"),
        Generic.Heading: Style(bold=True),
        Generic.Subheading: Style(color="magenta", bold=True),
    }
)
THEME = Theme(
    {
        "markdown.code": Style(color="cyan"),
        "markdown.code_block": Style(),
        "markdown.block_quote": Style(dim=True),
        "markdown.item.bullet": Style(bold=True),
        "markdown.item.number": Style(bold=True),
        "markdown.list": Style(),
        "markdown.hr": Style(dim=True),
        "markdown.link": Style(color="blue", underline=True),
        "markdown.link_url": Style(color="blue", underline=True),
        "markdown.table.border": Style(dim=True),
        "markdown.table.header": Style(bold=True),
    }
)
