"""The terminal chat over a scripted model, as a program of its own for tests in a real terminal.

    python -m tests.support.chat_app

The model echoes what it was told; "long" gets a long answer, "markdown" one with every kind of block.
"""

from __future__ import annotations

import time
from typing import Any

from mlx_gptoss.cli.chat import run_chat
from mlx_gptoss.cli.terminal.talk import Settings
from tests.support.scripted_model import scripted_engine

MARKDOWN = """# A heading

Some **bold** words and `code`.

- one
- two

```python
print("hello")
```

| a | b |
|---|---|
| 1 | 2 |
"""


def script(context: str) -> str:
    """What the model says next."""
    said = context.rsplit("<|message|>", 1)[1].split("<|end|>")[0]
    answer = f"You said: {said}"
    if said == "long":
        answer = "\n\n".join(f"Paragraph {i} of a long answer." for i in range(400))
    elif said == "markdown":
        answer = MARKDOWN
    elif said.startswith("count "):
        answer = f"{len(said)} characters"
    reasoning = "Let me think about what was said."
    return (
        f"<|channel|>analysis<|message|>{reasoning}<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{answer}<|return|>"
    )


def main() -> None:
    engine, model = scripted_engine(script)
    forward = type(model).__call__

    def slowly(self: object, *args: Any, **kwargs: object) -> object:
        time.sleep(0.002 + 0.0002 * args[0].size)  # a real model is not instantaneous either
        return forward(self, *args, **kwargs)  # type: ignore[arg-type]

    type(model).__call__ = slowly  # type: ignore[method-assign,assignment]
    with engine:
        run_chat(engine, Settings())


if __name__ == "__main__":
    main()
