"""A long answer with tables, code and mathematics, and what the page makes of it as it comes."""

from __future__ import annotations

from tests.page.browser import Keys, Page

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


ANSWER = "".join(PART.format(n=n) for n in range(60)) + "THE END"  # about 5,000 deltas of four characters


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
