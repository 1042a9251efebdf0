"""A long answer as it comes: the page stays responsive, and shows what came at once."""

from __future__ import annotations

import sys

from tests.page.browser import Keys, Page, scripted
from tests.support.scripted_llm import Script

pytest_plugins = ["tests.support.server_fixtures"]

PART = r"""### Part {n}

Some **words** about \(x_{n}^2\), `code` and [a link](https://example.org/{n}) that go on for a line or two.

| a | b | c |
|---|---|---|
| {n} | \(\frac{{1}}{{n}}\) | text |

```python
def part_{n}(x: int) -> int:
    return x * {n}  # times
```

\[
\sum_{{i=1}}^{{{n}}} i = \frac{{{n}({n}+1)}}{{2}}
\]

"""


def longest_and_last(page: Page) -> tuple[float, float]:
    """Milliseconds: the page's longest task, and from the last delta's arrival until it is on the screen."""
    page.open()
    page.js(
        "window.long = [0];"
        "new PerformanceObserver(list => long.push(...list.getEntries().map(e => e.duration)))"
        " .observe({entryTypes: ['longtask']});"
        "const read = ReadableStreamDefaultReader.prototype.read;"
        "ReadableStreamDefaultReader.prototype.read = async function() {"
        " const part = await read.call(this);"
        " const text = part.value ? new TextDecoder().decode(part.value) : '';"
        " if (text.includes('finish_reason\":\"stop')) window.came ??= performance.now();"
        " return part }"
    )
    page.write("go" + Keys.ENTER)
    page.wait(lambda: page.text(".turn.assistant").count("Part") > 3)
    page.js(
        "const look = () => {"
        " const last = document.querySelector('.turn.assistant .body').lastElementChild;"
        " if (last?.textContent.includes('THE END')) window.shown ??= performance.now();"
        " else setTimeout(look, 5) };"
        "look()"
    )
    page.wait(lambda: page.js("return window.shown"), seconds=120)
    page.finished()
    assert page.js("return document.querySelectorAll('.body math mfrac').length") == 120
    assert page.js("return document.querySelectorAll('.body figure.code').length") == 60
    return max(page.js("return window.long")), page.js("return window.shown - window.came")


def test_5000_tokens_never_block_the_page_and_are_shown_at_once(page: Page) -> None:
    text = "".join(PART.format(n=n) for n in range(60)) + "THE END"
    assert 4 * 4000 <= len(text) <= 4 * 6000  # about 5,000 deltas of four characters
    page.llm.write = scripted(Script(text=text, delay=0.002))
    runs: list[tuple[float, float]] = []
    # By the clock on the wall, which also counts what else the machine does: the best of some runs.
    bound = 200 if sys.gettrace() is None else 1000  # coverage slows the server beside the page
    while len(runs) < 4 and not any(longest <= 50 and late <= bound for longest, late in runs):
        runs.append(longest_and_last(page))
        print("longest task {:.0f} ms, last delta shown after {:.0f} ms".format(*runs[-1]))
    assert any(longest <= 50 and late <= bound for longest, late in runs), runs
