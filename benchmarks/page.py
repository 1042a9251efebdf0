"""What the chat page costs, and how it keeps up.

    python -m benchmarks.page [--tokens 1024] [--rounds 5] [--runs 4]

The server: tokens a second of one stream of the demo model, read by a client in a process of its own, (1)
alone, (2) while that client also asks for rendering as the page does, of an answer full of tables, code and
mathematics that grows at the stream's speed, and (3) read by the page in a browser, which takes its own share
of this machine's processor. In turns; medians, which other programs upset. Before that the processor's time
for rendering that answer by the stream's time, at --speed: a share of one core.

The page (needs chromium and chromedriver): an answer of 5,000 tokens at --speed. The longest task of the main
thread, and the time from the last delta's arrival until it is on the screen, of each run.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlx_gptoss
from mlx_gptoss.markdown.document import blocks
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.server.run import make_server
from tests.page.browser import Keys, Page, make_driver, scripted
from tests.page.streaming import long_answer
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM

ANSWER = long_answer(60)  # about 5,000 deltas
PROMPT = "What is 358 + 267?"
PAUSE = 0.1  # seconds between two renderings, as in markdown.js
CHARACTERS = 4  # a token has of them, about


@contextmanager
def served(llm: Any) -> Iterator[str]:
    """The address of a server for an LLM."""
    urls: queue.Queue[str] = queue.Queue()
    server = make_server(create_app(llm, ServerSettings(port=0)), urls.put)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield urls.get()
    finally:
        server.should_exit = True
        thread.join()


def render_along(netloc: str, speed: float, stop: Any) -> None:
    """Ask for rendering as the page does: what is finished once, the open block again and again."""
    connection = http.client.HTTPConnection(netloc)
    began = time.perf_counter()
    offset = 0
    while not stop.is_set():
        asked = time.perf_counter()
        rest = ANSWER[offset : int((asked - began) * speed * CHARACTERS)]
        body = json.dumps({"texts": [{"text": rest, "name": "a", "growing": True}]})
        connection.request("POST", "/page/render", body, {"Content-Type": "application/json"})
        found = json.loads(connection.getresponse().read())["texts"][0]
        if lines := max((block["lines"] or 0 for block in found), default=0):
            offset += sum(len(line) + 1 for line in rest.split("\n")[:lines])
        if offset >= len(ANSWER):
            began, offset = time.perf_counter(), 0
        stop.wait(max(0.0, asked + PAUSE - time.perf_counter()))


def stream(netloc: str, fields: dict[str, Any]) -> float:
    """Tokens a second of an answer after its first, read over HTTP."""
    chat = {"messages": [{"role": "user", "content": PROMPT}], "stream": True, **fields}
    chat |= {"stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection(netloc)
    connection.request("POST", "/v1/chat/completions", json.dumps(chat), {"Content-Type": "application/json"})
    response = connection.getresponse()
    first, count = 0.0, 0
    while line := response.readline():
        if not first and (b'"delta":{"reasoning"' in line or b'"delta":{"content"' in line):
            first = time.perf_counter()
        if b'"usage":{' in line:
            count = json.loads(line[6:])["usage"]["completion_tokens"]
    connection.close()
    return (count - 1) / (time.perf_counter() - first)


def rendering_share(speed: float) -> float:
    """Of one core: the processor's time for an answer that is rendered as it grows, by that of the stream."""
    began = time.process_time()
    steps, offset = 0, 0
    while offset < len(ANSWER):
        steps += 1
        rest = ANSWER[offset : int(steps * PAUSE * speed * CHARACTERS)]
        found = blocks(rest, "a", growing=True)
        if lines := max((block.lines or 0 for block in found), default=0):
            offset += sum(len(line) + 1 for line in rest.split("\n")[:lines])
        elif len(rest) == len(ANSWER) - offset:
            break
    blocks(ANSWER, "a")  # once more as a whole, at its end
    return (time.process_time() - began) / (len(ANSWER) / CHARACTERS / speed)


def _client(netloc: str, fields: dict[str, Any], go: Any, results: Any) -> None:
    """Stream an answer whenever told to; with a speed, another thread has an answer rendered beside it."""
    while (speed := go.get()) is not None:
        stop = threading.Event()
        beside = threading.Thread(target=render_along, args=(netloc, speed, stop))
        if speed:
            beside.start()
        results.put(stream(netloc, fields))
        stop.set()
        if speed:
            beside.join()


def server_cost(tokens: int, rounds: int) -> dict[str, float]:
    """Tokens a second of the demo model, alone, with rendering, and with the page."""
    context = multiprocessing.get_context("spawn")
    go, results = context.Queue(), context.Queue()
    rows = []
    with mlx_gptoss.load("demo", max_context=4096) as llm, served(llm) as url:
        # Without its stop tokens an answer is as long as it may be.
        never = {str(token): -100 for token in llm.tokenizer.stop_ids}
        fields = {"max_tokens": tokens, "temperature": 0, "logit_bias": never}
        client = context.Process(target=_client, args=(urlsplit(url).netloc, fields, go, results))
        client.start()

        def by_client(speed: float) -> float:
            go.put(speed)
            return float(results.get())

        driver = make_driver()
        page = Page(driver, url)
        by_page(page, fields)  # the first of each is not counted
        by_client(by_client(0))
        for _ in range(rounds):
            alone = by_client(0)
            rows.append((alone, by_client(alone), by_page(page, fields)))
        driver.quit()
        go.put(None)
        client.join()
    return {
        "tokens_per_second": statistics.median(row[0] for row in rows),
        "with_rendering": statistics.median(row[1] for row in rows),
        "rendering_cost": statistics.median(1 - row[1] / row[0] for row in rows),
        "with_the_page": statistics.median(row[2] for row in rows),
        "page_cost": statistics.median(1 - row[2] / row[0] for row in rows),
    }


def by_page(page: Page, fields: dict[str, Any]) -> float:
    """Tokens a second of the same answer, as the page tells it."""
    page.open()
    page.wait(lambda: page.find("[data-server=ready]"))
    page.js(
        "const fields = arguments[0], real = window.fetch; window.fetch = (address, options) => {"
        " if (String(address).endsWith('/chat/completions'))"
        "  options.body = JSON.stringify({...JSON.parse(options.body), ...fields});"
        " return real(address, options) }",
        fields,
    )
    page.write(PROMPT + Keys.ENTER)
    page.wait(lambda: page.find(".turn.assistant[aria-busy=false]"), seconds=300)
    return float(page.text(".turn.assistant .rate").split()[0].replace(",", ""))


def longest_and_last(page: Page) -> tuple[float, float]:
    """Milliseconds: the page's longest task, and from the last delta's arrival until it is on the screen."""
    page.open()
    page.wait(lambda: page.find("[data-server=ready]"))
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


def page_lag(runs: int, speed: float, told: Callable[[str, float], None]) -> None:
    """How the page keeps up with a long answer."""
    with tempfile.TemporaryDirectory() as folder:
        llm = ScriptedLLM(byte_tokenizer(Path(folder)), scripted(Script(text=ANSWER, delay=1 / speed)))
        with served(llm) as url:
            driver = make_driver()
            page = Page(driver, url, llm)
            for _ in range(runs):
                longest, late = longest_and_last(page)
                told("longest_task_ms", longest)
                told("last_delta_ms", late)
            driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--speed", type=float, default=400.0, help="tokens a second of the long answer")
    options = parser.parse_args()

    def tell(name: str, value: float) -> None:
        print(f"{name:>24} {value:10.3f}", flush=True)

    tell("rendering_core_share", rendering_share(options.speed))
    for name, value in server_cost(options.tokens, options.rounds).items():
        tell(name, value)
    page_lag(options.runs, options.speed, tell)


if __name__ == "__main__":
    main()
