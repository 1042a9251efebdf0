"""Texts that want to run something, load something or cover the page: families, each in many forms."""

from __future__ import annotations

from itertools import product

CODE = "window.hacked=1"
_SCHEMES = ("javascript", "JaVaScRiPt", "java\tscript", "&#106;avascript", "vbscript", "data", "file", "blob")
_TAGS = (
    "script",
    "img",
    "svg",
    "iframe",
    "object",
    "embed",
    "style",
    "link",
    "meta",
    "base",
    "form",
    "video",
)
_WRAPS = ("{}", "# {}", "- {}", "> {}", "| a |\n|---|\n| {} |", "**{}**", "[^1]\n\n[^1]: {}", "1. x\n\n   {}")
_FORMULAS = (
    r"\href{javascript:window.hacked=1}{x}",
    r"\href{https://evil.example}{x}",
    r"\style{position:fixed;inset:0}{x}",
    r"\class{plain}{x}",
    r"\text{<script>window.hacked=1</script>}",
    r"\text{</math><img src=x onerror=window.hacked=1>}",
    r"<mglyph src=https://evil.example>",
    r"\hspace{9999em} x",
    r"\rule{9999em}{9999em}",
    r"\mathrm{<annotation-xml encoding='text/html'><script>window.hacked=1</script>}",
    r"\color{url(https://evil.example)}{x}",
    r"\colorbox{red}{x}",
    r"\unicode{x}",
    r"\includegraphics{https://evil.example/x.png}",
    r"\def\a{\a\a}\a",
    "{" * 3000,
    r"\frac" * 2000,
    r"\left(" * 500,
)
_DELIMITERS = (("$", "$"), ("$$", "$$"), ("\\(", "\\)"), ("\\[\n", "\n\\]"), ("```math\n", "\n```"))
_DEEP = (
    ">",
    "> ",
    "- ",
    "[",
    "![",
    "*",
    "**a ",
    "_",
    "`",
    "(",
    "<",
    "\\(",
    "\\[",
    "$",
    "|",
    "~~",
    "1. ",
    "\t- ",
)


def documents() -> list[str]:
    """All of them."""
    found = []
    for tag, wrap in product(_TAGS, _WRAPS):
        handlers = f'onload="{CODE}" onerror="{CODE}" style="position:fixed;inset:0"'
        raw = f"<{tag} src=https://evil.example/x href=javascript:{CODE} {handlers}>{CODE}</{tag}>"
        found.append(wrap.format(raw))
    for scheme, (before, after) in product(
        _SCHEMES, (("[x](", ")"), ("![x](", ")"), ("<", ">"), ("[x]\n\n[x]: ", ""))
    ):
        found.append(f"{before}{scheme}:{CODE}{after}")
    for formula, (before, after) in product(_FORMULAS, _DELIMITERS):
        found.append(before + formula + after)
    found += [one * 10_000 for one in _DEEP]
    found += [
        f'```"><img src=x onerror={CODE}>\nx\n```',
        f"```js onload={CODE}\nx\n```",
        f'[x](https://e.example "\\" onmouseover=\\"{CODE}")',
        f'[x](https://e.example/"onmouseover={CODE})',
        f'![x" onerror="{CODE}](https://evil.example/x.png)',
        "[x](#prompt) [y](/v1/models) [z](//evil.example) [w](\\\\evil.example)",
        f"<sub onclick={CODE}>x</sub> <br onload={CODE}> <mark style=position:fixed>x</mark>",
        "<br><sub><sup><kbd>" * 200,
        "</div></main></body></html><script>window.hacked=1</script>",
        "<!-- --><![CDATA[<script>window.hacked=1</script>]]><?php x ?>",
        "<math><mtext><table><mglyph><style><img src=x onerror=window.hacked=1>",
        '<noscript><p title="</noscript><img src=x onerror=window.hacked=1>">',
        "[^<script>]: x\n\ny[^<script>]",
        "&lt;script&gt;window.hacked=1&lt;/script&gt; &#60;script&#62;",
        "\x00\x01<scr\x00ipt>window.hacked=1</scr\x00ipt>\ufeff\u202e",
        "[a]: javascript:window.hacked=1\n[b]: data:text/html,<script>\n\n[a] [b] ![a]",
        "https://evil.example/\"onmouseover=window.hacked=1 www.evil.example/'x",
        "mailto:a@b.example?subject=<script> <javascript:x> <data:x>",
    ]
    found += [f"{'  ' * depth}- {'x' * depth}" * 50 for depth in range(0, 60, 2)]
    found += [
        f"| {'a | ' * width}\n|{'---|' * width}\n| {'<b>x</b> | ' * width}" for width in range(1, 60, 3)
    ]
    return found
