"""HTML of other renderers and of ours, made alike where only the spelling differs."""

from __future__ import annotations

import re

_CLASSES = r' class="(?:contains-task-list|task-list-item|task-list-item-checkbox)"'


def alike(html: str) -> str:
    """Without what has no meaning: white space between tags, the order of attributes, XHTML."""
    html = html.replace(" />", ">").replace("&quot;", '"').replace('=""', "")
    html = re.sub(r"\s+", " ", re.sub(r">\s+<", "><", html)).strip()
    html = html.replace("<s>", "<del>").replace("</s>", "</del>")
    html = re.sub(r' style="text-align:(\w+)"', r' align="\1"', html)
    html = re.sub(_CLASSES, "", html)
    return re.sub(r"<input[^>]*>", lambda box: "<input checked>" if "checked" in box[0] else "<input>", html)
