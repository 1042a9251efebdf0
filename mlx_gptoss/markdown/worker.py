"""Rendering in a process of its own: a text that takes too long ends that process, and nothing else.

`python -m mlx_gptoss.markdown.worker` reads requests from its standard input and writes the answers to its
standard output, a line of JSON each, until the input ends: also when whoever started it was killed.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mlx_gptoss.markdown.document import Block, blocks, plain


@dataclass(frozen=True)
class Text:
    """A text to render; see `document.blocks`."""

    text: str
    name: str = "0"
    growing: bool = False


class Renderer:
    """Renders texts in a worker, which starts with the first one. For many threads; `close` it.

    seconds: how long the texts of one call may take. After that they are shown as they were written.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        self._seconds = seconds
        self._turn = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None

    def render(self, texts: Sequence[Text]) -> list[list[Block]]:
        """The blocks of each text. A text that cannot be rendered in time is one plain block."""
        with self._turn:
            answer = self._ask(texts)
            if answer is None and len(texts) > 1:  # one of them is at fault
                return [(self._ask([text]) or [[_as_written(text)]])[0] for text in texts]
            return answer or [[_as_written(text)] for text in texts]

    def close(self) -> None:
        """End the worker; the next call would start another."""
        with self._turn:
            self._end()

    def _ask(self, texts: Sequence[Text]) -> list[list[Block]] | None:
        """The worker's answer, None when it gave none in time."""
        if self._worker is None:
            self._start()
        worker = self._worker
        assert worker is not None and worker.stdin is not None and worker.stdout is not None
        timer = threading.Timer(self._seconds, worker.kill)
        try:
            worker.stdin.write(json.dumps([asdict(text) for text in texts]) + "\n")
            worker.stdin.flush()
            timer.start()
            line = worker.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            self._end()
            return None
        return [[Block(**block) for block in one] for one in json.loads(line)]

    def _start(self) -> None:
        command = [sys.executable, "-P", "-m", "mlx_gptoss.markdown.worker"]
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdout.readline()  # it is ready: starting counts for no text
        self._worker = worker
        weakref.finalize(self, _stop, worker)

    def _end(self) -> None:
        if self._worker is not None:
            _stop(self._worker)
            self._worker = None


def _stop(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(BrokenPipeError):  # a request that was not read to its end
                pipe.close()


def _as_written(text: Text) -> Block:
    return Block(plain(text.text), None if text.growing else text.text.count("\n") + 1)


def main() -> None:
    """Answer requests until the input ends."""
    print(flush=True)
    for line in sys.stdin:
        texts = [Text(**fields) for fields in json.loads(line)]
        answer = [
            [asdict(block) for block in blocks(text.text, text.name, growing=text.growing)] for text in texts
        ]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
