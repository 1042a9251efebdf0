"""Markdown as the model writes it: one parser for the page and the terminal, and safe HTML for the page.

`parser` configures markdown-it; `document` turns a text into blocks of HTML, `formula` and `code` are its
mathematics and its highlighting; `worker` does that in a process of its own, which can be stopped.
"""

__all__: list[str] = []
