"""The model leaves memory when nobody asks for it, and comes back with the next request."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from fastapi.testclient import TestClient

from mlx_gptoss.cli import run
from mlx_gptoss.errors import MemoryLimitError, RequestError
from mlx_gptoss.llm import LLM, load
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.running.residence import Residence
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM

pytest_plugins = ["tests.support.server_fixtures"]

IDLE = 300.0
CHAT = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class House:
    """A residence whose LLMs are counted."""

    def __init__(self, tokenizer: Tokenizer, idle: float | None = IDLE) -> None:
        self.clock = Clock()
        self.busy = False
        self.made: list[ScriptedLLM] = []
        self.tokenizer = tokenizer
        self.failure: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.residence = Residence(idle, lambda: self.busy, self.clock)
        self.residence.attach(self.load(), self.load)

    def load(self) -> LLM:
        assert self.gate.wait(20)
        if self.failure is not None:
            raise self.failure
        self.made.append(ScriptedLLM(self.tokenizer))
        return self.made[-1]  # type: ignore[return-value]

    async def after(self, seconds: float) -> bool:
        """Whether the LLM is there once so much time has passed."""
        self.clock.now += seconds
        await self.residence.check()
        return self.residence.llm is not None


@pytest.fixture
def house(tokenizer: Tokenizer) -> House:
    return House(tokenizer)


def test_an_idle_model_is_unloaded_and_loaded_again_when_asked_for(house: House) -> None:
    async def scenario() -> None:
        assert await house.after(IDLE - 1)
        assert not await house.after(1)
        assert house.made[0].closed and len(house.made) == 1
        assert await house.residence.get() is house.made[1]  # type: ignore[comparison-overlap]
        assert await house.after(IDLE - 1), "asking begins the time anew"

    asyncio.run(scenario())


def test_it_stays_while_a_request_runs_and_for_the_idle_time_after(house: House) -> None:
    async def scenario() -> None:
        house.busy = True
        assert await house.after(10 * IDLE)
        house.busy = False
        assert await house.after(IDLE - 1)
        assert not await house.after(1)

    asyncio.run(scenario())


def test_without_an_idle_time_or_a_way_back_it_stays(tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        house = House(tokenizer, idle=None)
        house.residence.keep(0)
        assert house.residence.idle_left is None
        assert await house.after(1e6)
        alone = House(tokenizer)
        alone.residence.attach(alone.residence.llm)
        assert await alone.after(1e6)

    asyncio.run(scenario())


def test_a_request_may_ask_for_another_time(house: House) -> None:
    async def scenario() -> None:
        house.residence.keep(-1)
        assert house.residence.idle_left is None
        assert await house.after(1e6)
        house.residence.keep(10)
        await house.residence.get()
        assert house.residence.idle_left == 10
        assert not await house.after(10)
        house.residence.keep(None)
        await house.residence.get()
        assert house.residence.idle_left == IDLE
        house.residence.keep(0)
        assert not await house.after(0)

    asyncio.run(scenario())


def test_many_who_ask_at_once_load_it_once_and_one_who_leaves_takes_nothing_along(house: House) -> None:
    async def scenario() -> None:
        await house.after(IDLE)
        house.gate.clear()
        asking = [asyncio.create_task(house.residence.get()) for _ in range(8)]
        await asyncio.sleep(0)
        asking[0].cancel()
        await asyncio.sleep(0)
        house.gate.set()
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert {id(one) for one in found[1:]} == {id(house.made[1])}
        assert len(house.made) == 2

    asyncio.run(scenario())


def test_a_failed_load_is_told_and_tried_again(house: House) -> None:
    async def scenario() -> None:
        await house.after(IDLE)
        house.failure = MemoryLimitError("too large")
        with pytest.raises(MemoryLimitError):
            await house.residence.get()
        house.failure = None
        assert await house.residence.get() is house.made[1]  # type: ignore[comparison-overlap]

    asyncio.run(scenario())


def test_before_the_first_load_there_is_nothing_to_wait_for() -> None:
    async def scenario() -> None:
        residence = Residence(IDLE, lambda: False)
        with pytest.raises(ApiError, match="still loading"):
            await residence.get()

    asyncio.run(scenario())


def served(tokenizer: Tokenizer, write: Callable[..., Any] | None = None) -> tuple[Any, list[ScriptedLLM]]:
    """An application whose model may be unloaded, and its LLMs."""
    made: list[ScriptedLLM] = []

    def make() -> LLM:
        made.append(ScriptedLLM(tokenizer, *([] if write is None else [write])))
        return made[-1]  # type: ignore[return-value]

    app = create_app(None, ServerSettings(idle_unload=IDLE))
    app.state.server.attach(make(), make)
    return app, made


def unload(state: ServerState) -> None:
    state.residence.keep(0)
    asyncio.run(state.residence.check())
    state.residence.keep(None)
    assert state.llm is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, HI),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/responses/input_tokens", {"input": "hi"}),
        ("/v1/messages", HI | {"max_tokens": 9}),
        ("/v1/messages/count_tokens", HI),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": "hi", "echo": True, "logprobs": 1, "max_tokens": 0}),
        ("/api/chat", HI | {"stream": False}),
        ("/api/generate", {"prompt": "hi", "stream": False}),
        ("/api/generate", {"prompt": "hi", "raw": True, "stream": False}),
        ("/api/generate", {}),
    ],
)
def test_every_api_brings_the_model_back(tokenizer: Tokenizer, path: str, body: dict[str, Any]) -> None:
    app, made = served(tokenizer)
    client = TestClient(app, base_url="http://localhost")
    unload(app.state.server)
    assert client.post(path, json=body).status_code == 200
    assert len(made) == 2 and made[0].closed and not made[1].closed


def test_the_lists_say_whether_it_is_loaded_and_do_not_load_it(tokenizer: Tokenizer) -> None:
    app, made = served(tokenizer)
    client = TestClient(app, base_url="http://localhost")

    def told() -> tuple[Any, ...]:
        return (
            client.get("/health").json()["loaded"],
            client.get("/v1/models").json()["data"][0]["loaded"],
            client.get("/api/v0/models").json()["data"][0]["state"] == "loaded",
            len(client.get("/api/ps").json()["models"]) == 1,
        )

    assert told() == (True,) * 4
    unload(app.state.server)
    assert told() == (False,) * 4
    assert client.get("/health").json() == {"status": "ok", "model": "scripted", "loaded": False}
    assert client.get("/api/tags").json()["models"][0]["name"] == "scripted:latest"
    assert client.get("/metrics").status_code == 200
    assert len(made) == 1


def test_ollamas_keep_alive_sets_the_time(tokenizer: Tokenizer) -> None:
    app, made = served(tokenizer)
    client = TestClient(app, base_url="http://localhost")

    def idle_left() -> Any:
        return app.state.server.residence.idle_left

    def chat(**fields: Any) -> Any:
        return client.post("/api/chat", json={"model": "any", "stream": False, **fields}).json()

    chat(**HI, keep_alive="1h")
    assert 3500 < idle_left() <= 3600
    chat(**HI, keep_alive=-1)
    assert idle_left() is None
    chat(**HI)
    assert idle_left() <= IDLE
    assert chat(keep_alive=0)["done_reason"] == "unload" and made[0].closed
    assert client.get("/api/ps").json() == {"models": []}
    assert chat()["done_reason"] == "load" and len(made) == 2
    told = chat(**HI)
    assert told["load_duration"] >= 0 and told["message"]["content"] == "You said: hi"


def test_a_request_that_runs_is_not_cut_off(tokenizer: Tokenizer) -> None:
    release = threading.Event()

    def write(*_: Any) -> Script:
        assert release.wait(20)
        return Script(text="done")

    app, made = served(tokenizer, write)
    state = app.state.server

    async def scenario() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asking = asyncio.create_task(client.post(CHAT, json=HI))
            while not state.jobs.active:
                await asyncio.sleep(0)
            state.residence.keep(0)
            await state.residence.check()
            assert state.llm is not None
            release.set()
            assert (await asking).json()["choices"][0]["message"]["content"] == "done"
            await state.residence.check()
            assert state.llm is None and made[0].closed

    asyncio.run(scenario())


def test_unloading_frees_the_weights_and_kept_prefixes_come_back(tmp_path: Path) -> None:
    def make() -> LLM:
        return load("demo", max_context=512, prefix_cache=tmp_path / "prefixes")

    app = create_app(None, ServerSettings(idle_unload=IDLE))
    state = app.state.server
    gc.collect()
    before = mx.get_active_memory()
    state.attach(make(), make)
    client = TestClient(app, base_url="http://localhost")
    text = "Anna is 31 years old and lives in Rome. " * 4
    body = {"prompt": text, "max_tokens": 1, "temperature": 0}
    first = client.post("/v1/completions", json=body).json()
    weights = mx.get_active_memory() - before
    assert weights > 3e6
    unload(state)
    gc.collect()
    assert mx.get_active_memory() - before < weights / 20
    again = client.post("/v1/completions", json=body).json()
    assert again["choices"] == first["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 10
    state.llm.close()


@pytest.mark.parametrize("time", ["soon", "0", "-5m", "5 m"])
def test_what_is_no_idle_time_is_told(capsys: pytest.CaptureFixture[str], time: str) -> None:
    assert run(["serve", "demo", f"--idle-unload={time}"]) == 2
    assert "--idle-unload" in capsys.readouterr().err
    with pytest.raises(RequestError, match="idle_unload"):
        ServerSettings(idle_unload=0)
