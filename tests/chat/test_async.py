"""Properties of the async doors: the same answers, cancellation that frees, and no thread a request."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing, suppress
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

import mlx_gptoss as gptoss
from mlx_gptoss.errors import BatchError, ContextLengthError, GptOssError, RequestError, ToolError
from mlx_gptoss.harmony import Done, MessageDone, TextDelta, ToolCall
from mlx_gptoss.llm import LLM
from tests.chat.test_conversations import answer, call, echo, said_last
from tests.support.scripted_model import scripted_engine

PROMPTS = [f"What is {a} + {b}?" for a in range(11, 15) for b in range(21, 25)]
# An event loop's own threads, in which requests are started.
LOOP_THREADS = min(32, (os.cpu_count() or 1) + 4)


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with gptoss.load("demo", max_context=4096) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(demo: LLM) -> list[str]:
    """The answers to PROMPTS, one at a time."""
    return [demo.respond(p, reasoning_effort="low", temperature=0.0, max_tokens=200).text for p in PROMPTS]


def until_idle(llm: LLM) -> None:
    """Wait for the engine to end what was cancelled."""
    deadline = time.monotonic() + 60
    while (stats := llm.stats()).running or stats.waiting:
        assert time.monotonic() < deadline, f"{stats.running} running, {stats.waiting} waiting"


async def streamed(llm: LLM, prompt: str, **request: Any) -> str:
    events = [event async for event in llm.astream(prompt, **request)]
    assert [type(e) for e in events].count(Done) == 1
    done = events[-1]
    assert isinstance(done, Done)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == done.reply.text
    return done.reply.text


async def responded(llm: LLM, prompt: str, **request: Any) -> str:
    return (await llm.arespond(prompt, **request)).text


def test_64_at_once_with_cancellations_answer_as_each_alone(demo: LLM, alone: list[str]) -> None:
    rng = random.Random(13)
    threads: list[int] = []
    before = {*threading.enumerate()}

    async def one(index: int) -> str | None:
        door = streamed if index % 2 else responded
        task = asyncio.create_task(
            door(demo, PROMPTS[index // 4], reasoning_effort="low", temperature=0.0, max_tokens=200)
        )
        if rng.random() < 0.4:
            # At any moment: while it is started, read, or answered.
            for _ in range(rng.randrange(60)):
                await asyncio.sleep(0)
            await asyncio.sleep(rng.random() * 0.3)
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return None
        finally:
            threads.append(threading.active_count())

    async def all_of_them() -> list[str | None]:
        return await asyncio.gather(*(one(index) for index in range(64)))

    answers = asyncio.run(all_of_them())
    whole = [(got, alone[index // 4]) for index, got in enumerate(answers) if got is not None]
    assert 20 <= len(whole) < 64
    assert [got for got, _ in whole] == [wanted for _, wanted in whole]
    assert max(threads) - len(before) <= LOOP_THREADS < 64
    until_idle(demo)
    assert {*threading.enumerate()} <= before
    assert demo.stats().live_kv_bytes == 0


def endless(context: str) -> str:
    return answer("long " * 2000)


@pytest.fixture
def slow() -> Iterator[LLM]:
    """A model that does not come to an end by itself."""
    llm, _ = scripted_engine(endless)
    with llm:
        yield llm


async def first_text(llm: LLM) -> None:
    """Leaves the stream at its first text."""
    async for event in llm.astream("go"):
        if isinstance(event, TextDelta):
            return


async def wait_for_it(llm: LLM) -> None:
    await llm.arespond("go")


async def send_it(llm: LLM) -> None:
    await llm.chat().asend("go")


async def ask_many(llm: LLM) -> None:
    async for _ in llm.arespond_many(["go"] * 5):
        raise AssertionError("none of them ends")


def asyncio_timeout(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await work

    asyncio.run(bounded())


def anyio_timeout(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        with anyio.move_on_after(0.3) as scope:
            await work
        assert scope.cancelled_caught

    anyio.run(bounded)


@pytest.mark.parametrize("bounded", [asyncio_timeout, anyio_timeout])
@pytest.mark.parametrize("door", [wait_for_it, send_it, ask_many])
def test_a_task_that_is_cancelled_frees_what_it_waits_for(slow: LLM, bounded: Any, door: Any) -> None:
    bounded(door(slow))
    until_idle(slow)
    assert slow.stats().live_kv_bytes == 0


def test_leaving_a_stream_cancels_it(slow: LLM) -> None:
    async def leave() -> None:
        await first_text(slow)
        async with aclosing(slow.astream("go")) as events:
            await anext(events)
        until_idle(slow)

    asyncio.run(leave())


def test_a_stream_that_nobody_reads_is_never_started(slow: LLM) -> None:
    slow.astream("go")
    assert slow.stats().prompt_tokens == 0
    with pytest.raises(RequestError, match="did you mean temperature"):
        slow.astream("go", temprature=1)  # type: ignore[call-arg]


def test_what_is_wrong_is_raised_where_it_is_awaited() -> None:
    llm, _ = scripted_engine(echo)

    async def ask() -> None:
        with pytest.raises(ContextLengthError):
            await llm.arespond("x" * 30_000)
        with pytest.raises(RequestError, match="did you mean instructions"):
            await llm.arespond("x", system="y")  # type: ignore[call-overload]
        assert (await llm.arespond("fine")).text == "you said fine"
        llm.close()
        with pytest.raises(GptOssError, match="closed"):
            await llm.arespond("x")

    asyncio.run(ask())


def test_closing_the_model_ends_those_who_wait(slow: LLM) -> None:
    async def ask() -> None:
        waiting = asyncio.create_task(wait_for_it(slow))
        await first_text(slow)
        await asyncio.to_thread(slow.close)
        with pytest.raises(GptOssError, match="the engine was closed"):
            await waiting

    asyncio.run(ask())


def test_logprobs_are_the_replys_too_when_they_are_asked_for() -> None:
    llm, _ = scripted_engine(lambda context: answer("héllo", "hm"))
    with llm:
        reply = asyncio.run(llm.arespond("x", logprobs=1))
        assert reply.logprobs is not None
        assert [token for token, _ in reply.logprobs] == llm.tokenizer.encode("héllo")
        assert llm.respond("x").logprobs is None


# --- chats


def adds(context: str) -> str:
    if "functions.add to=assistant" not in context:
        return call("add", {"a": 2, "b": 3})
    return answer(f"it is {said_last(context)}")


async def add(a: int, b: int) -> int:
    """Adds two numbers, slowly."""
    await asyncio.sleep(0.01)
    return a + b


def test_a_chat_runs_async_tools_on_the_loop() -> None:
    llm, _ = scripted_engine(adds)

    async def talk() -> None:
        chat = llm.chat(tools=[add])
        events = [event async for event in chat.astream("2 + 3?")]
        assert [e.name for e in events if isinstance(e, ToolCall)] == ["add"]
        assert [
            e.message.content for e in events if isinstance(e, MessageDone) and e.message.role == "tool"
        ] == ["5"]
        assert (await chat.asend("again")).text == "it is again"
        assert [m.role for m in chat.history] == [
            "user",
            "assistant",
            "tool",
            "assistant",
            "user",
            "assistant",
        ]

    with llm:
        asyncio.run(talk())
        with pytest.raises(ToolError, match="'add' is async: await the answer with asend or astream"):
            llm.chat(tools=[add]).send("2 + 3?")


def test_a_plain_tool_leaves_the_loop_free_while_it_runs() -> None:
    met = threading.Event()

    def meet(a: int, b: int) -> str:
        """Waits for the loop to do something else."""
        return "met" if met.wait(10) else "alone"

    meet.__name__ = "add"
    llm, _ = scripted_engine(adds)

    async def talk() -> str:
        async def beside() -> None:
            await asyncio.sleep(0.05)
            met.set()

        reply, _ = await asyncio.gather(llm.chat(tools=[meet]).asend("go"), beside())
        text: str = reply.text
        return text

    with llm:
        assert asyncio.run(talk()) == "it is met"


def test_a_chat_that_is_left_stays_as_it_was(slow: LLM) -> None:
    async def leave() -> None:
        chat = slow.chat()
        async for event in chat.astream("go"):
            if isinstance(event, TextDelta):
                break
        assert chat.history == []

    asyncio.run(leave())
    until_idle(slow)


def test_two_answers_of_one_chat_at_a_time_lose_nothing_in_silence() -> None:
    llm, _ = scripted_engine(echo)

    async def both() -> list[Any]:
        chat = llm.chat()
        got = await asyncio.gather(chat.asend("one"), chat.asend("two"), return_exceptions=True)
        assert len(chat.history) == 3
        return [*got]

    with llm:
        failed = [e for e in asyncio.run(both()) if isinstance(e, Exception)]
    assert len(failed) == 1 and "was changed while it answered" in str(failed[0])


# --- many prompts


def test_many_prompts_are_answered_with_their_index(demo: LLM, alone: list[str]) -> None:
    options: Any = {"reasoning_effort": "low", "temperature": 0.0, "max_tokens": 200}
    prompts, wanted = PROMPTS[:12], dict(enumerate(alone[:12]))
    assert {i: reply.text for i, reply in demo.respond_many(prompts, **options)} == wanted

    async def awaited() -> dict[int, str]:
        return {i: reply.text async for i, reply in demo.arespond_many(iter(prompts), **options)}

    assert asyncio.run(awaited()) == wanted


def test_no_more_prompts_are_under_way_than_asked_and_the_batch_is_full() -> None:
    llm, _ = scripted_engine(echo, max_running=4)
    taken = 0

    def prompts() -> Iterator[str]:
        nonlocal taken
        for n in range(20):
            taken += 1
            yield f"{n}"

    with llm:
        ended = 0
        for _ in llm.respond_many(prompts()):
            assert taken == min(20, ended + 8)
            ended += 1
        assert ended == taken == 20
        taken = 0
        next(llm.respond_many(prompts(), max_concurrency=3))
        assert taken == 3
        with pytest.raises(RequestError, match="max_concurrency is 0"):
            llm.respond_many([], max_concurrency=0)


def test_a_prompt_that_fails_ends_no_other_and_is_told_at_the_end() -> None:
    llm, _ = scripted_engine(lambda context: answer('{"n": "x"}' if "bad" in context else '{"n": 1}'))
    prompts: list[Any] = ["a", "x" * 30_000, "bad", 5, "b"]

    async def awaited(got: dict[int, str]) -> None:
        async for index, reply in llm.arespond_many(prompts, json_object=True):
            got[index] = reply.text

    with llm:
        for run in (
            lambda got: got.update((i, r.text) for i, r in llm.respond_many(prompts, json_object=True)),
            lambda got: asyncio.run(awaited(got)),
        ):
            got: dict[int, str] = {}
            with pytest.raises(BatchError, match="2 of 5 prompts failed; prompts") as caught:
                run(got)
            assert got == {0: '{"n": 1}', 2: '{"n": "x"}', 4: '{"n": 1}'}
            assert isinstance(caught.value.errors[1], ContextLengthError)
            assert "the prompt is a int" in str(caught.value.errors[3])


def test_what_is_wrong_for_every_prompt_is_raised_before_the_first() -> None:
    llm, _ = scripted_engine(echo)
    with llm:
        for door in (llm.respond_many, llm.arespond_many):
            with pytest.raises(RequestError, match="did you mean max_tokens"):
                door(["a"], max_new_tokens=5)  # type: ignore[call-overload]


def test_leaving_many_cancels_those_that_run() -> None:
    llm, _ = scripted_engine(lambda context: echo(context) if "quick" in context else endless(context))
    prompts = ["quick", *["slow"] * 7]

    async def leave() -> None:
        async with aclosing(llm.arespond_many(prompts)) as replies:
            assert (await anext(replies))[1].text == "you said quick"

    with llm:
        for index, reply in llm.respond_many(prompts):
            assert (index, reply.text) == (0, "you said quick")
            break
        until_idle(llm)
        asyncio.run(leave())
        until_idle(llm)


def test_many_prompts_share_a_short_queue_with_others() -> None:
    llm, _ = scripted_engine(echo, max_running=1, max_waiting=1)
    with llm:
        replies = dict(llm.respond_many(map(str, range(12)), max_concurrency=8))
    assert [replies[n].text for n in range(12)] == [f"you said {n}" for n in range(12)]


def test_a_model_that_is_closed_ends_many_at_once() -> None:
    llm, _ = scripted_engine(echo)

    def prompts() -> Iterator[str]:
        yield "a"
        llm.close()
        while True:
            yield "b"

    with pytest.raises(GptOssError, match="the engine is closed"):
        list(llm.respond_many(prompts()))


# --- where it runs


def make_app(llm: LLM) -> FastAPI:
    """What a user of FastAPI writes."""
    app = FastAPI()

    @app.get("/answer")
    async def answer(prompt: str) -> dict[str, str]:
        reply = await llm.arespond(prompt, reasoning_effort="low", temperature=0.0, max_tokens=200)
        return {"text": reply.text}

    @app.get("/stream")
    async def stream(prompt: str) -> StreamingResponse:
        async def texts() -> AsyncIterator[str]:
            async for event in llm.astream(prompt, reasoning_effort="low", temperature=0.0, max_tokens=200):
                if isinstance(event, TextDelta):
                    yield event.text

        return StreamingResponse(texts())

    return app


def test_a_fastapi_app_serves_64_at_once_with_clients_that_leave(demo: LLM, alone: list[str]) -> None:
    rng = random.Random(14)
    before = {*threading.enumerate()}

    async def ask(client: httpx.AsyncClient, index: int) -> str | None:
        path = "/stream" if index % 2 else "/answer"
        wait = rng.random() * 0.3 if rng.random() < 0.3 else None
        try:
            async with asyncio.timeout(wait):
                response = await client.get(path, params={"prompt": PROMPTS[index // 4]}, timeout=None)
        except TimeoutError:
            return None
        return response.text if index % 2 else str(response.json()["text"])

    async def serve() -> list[str | None]:
        transport = httpx.ASGITransport(make_app(demo))
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            return await asyncio.gather(*(ask(client, index) for index in range(64)))

    answers = asyncio.run(serve())
    assert all(got in (None, alone[index // 4]) for index, got in enumerate(answers))
    assert 20 <= sum(got is not None for got in answers) < 64
    until_idle(demo)
    assert {*threading.enumerate()} <= before


NOTEBOOK = (
    'import mlx_gptoss as gptoss\nllm = gptoss.load("demo", max_context=2048)\nllm',
    'await llm.arespond("What is 17 + 25?", reasoning_effort="low", temperature=0.0)',
    'async for event in llm.astream("What is 2 + 3?", reasoning_effort="low", temperature=0.0):\n'
    "    if isinstance(event, gptoss.TextDelta):\n"
    '        print(event.text, end="")',
    'llm.respond("What is 4 + 5?", reasoning_effort="low", temperature=0.0)',
    'chat = llm.chat(temperature=0.0)\n(await chat.asend("What is the capital of Norway?")).text',
    "import asyncio\n"
    'task = asyncio.create_task(llm.arespond("Why?", temperature=1.0))\n'
    "await asyncio.sleep(0)\n"
    "task.cancel()\n"
    "print((await asyncio.gather(task, return_exceptions=True))[0].__class__.__name__)",
    "sorted(dict(llm.respond_many(['What is 1 + 1?', 'What is 2 + 2?'], temperature=0.0)))",
)


def test_a_jupyter_kernel_awaits_and_shows_replies() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in NOTEBOOK])
    # Text that is streamed comes in one piece or in several.
    client = nbclient.NotebookClient(book, timeout=120, kernel_name="python3", coalesce_streams=True)
    client.execute()
    shown = [cell.outputs[0] for cell in book.cells]
    assert shown[0].data["text/plain"].startswith("<LLM demo, experts mxfp4, the rest bfloat16, weights ")
    assert shown[1].data["text/markdown"] == "17 + 25 = 42."
    assert shown[1].data["text/plain"].startswith("<Reply '17 + 25 = 42.', stop, ")
    assert shown[2].text == "2 + 3 = 5."
    assert shown[3].data["text/markdown"] == "4 + 5 = 9."
    assert shown[4].data["text/plain"] == "'The capital of Norway is Oslo.'"
    assert shown[5].text == "CancelledError\n"
    assert shown[6].data["text/plain"] == "[0, 1]"
