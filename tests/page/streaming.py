"""A long answer with tables, code and mathematics."""

from __future__ import annotations

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


def long_answer(parts: int) -> str:
    """About 80 deltas of four characters a part."""
    return "".join(PART.format(n=n) for n in range(parts)) + "THE END"
