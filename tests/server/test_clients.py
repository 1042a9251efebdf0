"""The clients that people use, talking to a live server: on scripted answers, and on the demo model.

What the demo model says is its own affair: the tests look at the shape of answers, at tools called and at
formats kept, and give it a call or a schema where the outcome matters.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import ollama
import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from pydantic import BaseModel

import mlx_gptoss
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import ScriptedLLM
from tests.support.server_help import live

pytest_plugins = ["tests.support.server_fixtures"]

QUESTION = "What is the weather in Oslo?"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "The city."}},
    "required": ["city"],
    "additionalProperties": False,
}
CHAT_TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Get the weather in a city.", "parameters": SCHEMA},
}
RESPONSES_TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "parameters": SCHEMA,
    "strict": True,
}
KEY = "sk-test"


class Person(BaseModel):
    name: str
    age: int
    city: str


@pytest.fixture(scope="module")
def demo_url() -> Iterator[str]:
    """A live server of the demo model."""
    with (
        mlx_gptoss.load("demo", max_context=512) as llm,
        live(create_app(llm, ServerSettings(port=0, api_key=KEY))) as url,
    ):
        yield url


@pytest.fixture(scope="module")
def scripted_url(tokenizer: Tokenizer) -> Iterator[str]:
    """A live server of scripted answers."""
    app = create_app(ScriptedLLM(tokenizer), ServerSettings(port=0, api_key=KEY))  # type: ignore[arg-type]
    with live(app) as url:
        yield url


@pytest.fixture(params=["scripted", "demo"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def fits(arguments: str) -> None:
    """The arguments are those of get_weather's schema."""
    value = json.loads(arguments)
    assert list(value) == ["city"] and isinstance(value["city"], str)


def test_openai_chat_has_text_and_reasoning(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is 2 + 3?"}]
    options: Any = {"model": "any", "messages": messages, "temperature": 0, "reasoning_effort": "low"}
    whole = client.chat.completions.create(**options, max_completion_tokens=150)
    message = whole.choices[0].message
    assert message.reasoning
    stream = client.chat.completions.create(**options, max_completion_tokens=150, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.delta.content or "" for choice in chunks) == (message.content or "")
    assert chunks[-1].finish_reason == whole.choices[0].finish_reason
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=messages, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_openai_chat_runs_a_tool(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    options: Any = {"model": "any", "tools": [CHAT_TOOL], "temperature": 0}
    with client.chat.completions.stream(**options, messages=messages, tool_choice="required") as stream:
        for _ in stream:
            pass
        completion = stream.get_final_completion()
    message = completion.choices[0].message
    assert completion.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.function.name == "get_weather"
    fits(call.function.arguments)
    messages += [
        message.model_dump(exclude_none=True, exclude={"parsed": True}),
        {"role": "tool", "tool_call_id": call.id, "content": "11 degrees and cloudy"},
    ]
    answer = client.chat.completions.create(**options, messages=messages, tool_choice="none", max_tokens=100)
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage and answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens


def test_openai_parse_gives_an_object(client: openai.OpenAI) -> None:
    text = "Anna is 31 years old and lives in Rome."
    completion = client.chat.completions.parse(
        model="any", messages=[{"role": "user", "content": text}], response_format=Person, temperature=0
    )
    assert isinstance(completion.choices[0].message.parsed, Person)
    response = client.responses.parse(model="any", input=text, text_format=Person, temperature=0)
    assert isinstance(response.output_parsed, Person)


def test_openai_responses_stream_and_go_on(client: openai.OpenAI) -> None:
    tool: Any = [RESPONSES_TOOL]
    with client.responses.stream(
        model="any", input=QUESTION, tools=tool, tool_choice="required", temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        first = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.reasoning_text.delta" in kinds and "response.function_call_arguments.delta" in kinds
    call = first.output[-1]
    assert call.type == "function_call"
    fits(call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "11 degrees and cloudy"}
    second = client.responses.create(
        model="any", input=[result], previous_response_id=first.id, temperature=0, max_output_tokens=100
    )
    assert second.status in ("completed", "incomplete")
    assert second.usage and second.usage.input_tokens_details.cached_tokens
    assert client.responses.retrieve(second.id).output == second.output
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_openai_raw_completions_and_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    completion = client.completions.create(model="any", prompt="The", max_tokens=5, temperature=0)
    assert completion.usage and completion.usage.completion_tokens <= 5
    pieces = client.completions.create(model="any", prompt="The", max_tokens=5, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[0].text


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_openai_agents_run_their_tools(url: str, api: str) -> None:
    set_tracing_disabled(True)
    asked: list[str] = []

    @function_tool
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        asked.append(city)
        return "11 degrees and cloudy"

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0) as client:
            kind = OpenAIChatCompletionsModel if api == "chat" else OpenAIResponsesModel
            agent = Agent(
                name="forecaster",
                model=kind("any", client),
                tools=[get_weather],
                model_settings=ModelSettings(tool_choice="required", temperature=0, max_tokens=300),
                # The demo model need not know when it has asked enough: the tool's result ends the run.
                tool_use_behavior="stop_on_first_tool",
            )
            whole = await Runner.run(agent, QUESTION)
            streamed = Runner.run_streamed(agent, QUESTION)
            async for _ in streamed.stream_events():
                pass
            return [whole.final_output, streamed.final_output]

    assert asyncio.run(run()) == ["11 degrees and cloudy"] * 2
    assert len(asked) == 2 and all(asked)


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_openai_agents_loop_until_the_answer(scripted_url: str, api: str) -> None:
    @function_tool
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        return f"sunny in {city}"

    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=scripted_url + "/v1", api_key=KEY) as client:
            kind = OpenAIChatCompletionsModel if api == "chat" else OpenAIResponsesModel
            agent = Agent(name="forecaster", model=kind("any", client), tools=[get_weather])
            return str((await Runner.run(agent, QUESTION)).final_output)

    assert asyncio.run(run()) == "The tool says: sunny in Paris"


def test_anthropic_messages_run_a_tool(url: str) -> None:
    tool: Any = {"name": "get_weather", "description": "Get the weather in a city.", "input_schema": SCHEMA}
    greedy = {"temperature": 0}  # the newest SDKs know no such argument any more
    options: Any = {"model": "any", "max_tokens": 300, "tools": [tool], "extra_body": greedy}
    messages: Any = [{"role": "user", "content": QUESTION}]
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        with client.messages.stream(
            **options, messages=messages, tool_choice={"type": "any"}, thinking={"type": "adaptive"}
        ) as stream:
            first = stream.get_final_message()
        assert first.stop_reason == "tool_use"
        assert first.content[0].type == "thinking"
        use = first.content[-1]
        assert use.type == "tool_use"
        fits(json.dumps(use.input))
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "11 degrees and cloudy"}
        messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = client.messages.create(**options | {"max_tokens": 100}, messages=messages)
        assert second.usage.cache_read_input_tokens
        counted = client.messages.count_tokens(model="any", messages=messages[:1], tools=[tool])
        assert counted.input_tokens > 10
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(model="any", max_tokens=0, messages=messages)


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_tool_runner_completes_its_loop(scripted_url: str, stream: bool) -> None:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        return f"sunny in {city}"

    with anthropic.Anthropic(base_url=scripted_url, api_key=KEY, max_retries=0) as client:
        runner: Any = client.beta.messages.tool_runner(
            model="any",
            max_tokens=300,
            tools=[get_weather],
            messages=[{"role": "user", "content": QUESTION}],
            stream=stream,
        )
        replies = [reply.get_final_message() if stream else reply for reply in runner]
        assert [reply.stop_reason for reply in replies] == ["tool_use", "end_turn"]
        assert replies[-1].content[-1].text == "The tool says: sunny in Paris"
        assert stream or replies[-1]._request_id
        [model] = client.models.list(limit=10)
        assert client.models.retrieve(model.id) == model


def test_anthropics_parse_gives_an_object(url: str) -> None:
    text: Any = [{"role": "user", "content": "Anna is 31 years old and lives in Rome."}]
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        for messages in (client.messages, client.beta.messages):
            if not hasattr(messages, "parse"):
                continue
            parsed: Any = messages.parse(model="any", max_tokens=300, messages=text, output_format=Person)
            assert isinstance(parsed.parsed_output, Person)


def test_ollama_chats_streams_and_lists(url: str) -> None:
    client = ollama.Client(host=url, headers={"Authorization": f"Bearer {KEY}"})
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    options = {"temperature": 0, "num_predict": 150}
    whole = client.chat("gpt-oss:20b", messages, think="low", options=options)
    assert whole.message.thinking and whole.done_reason in ("stop", "length")
    assert whole.prompt_eval_count and whole.eval_count and whole.total_duration
    pieces = list(client.chat("gpt-oss:20b", messages, think="low", options=options, stream=True))
    for field in ("content", "thinking"):
        joined = "".join(getattr(piece.message, field) or "" for piece in pieces)
        assert joined == (getattr(whole.message, field) or "")
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    quiet = client.chat("gpt-oss:20b", messages, think=False, options=options)
    assert quiet.message.thinking is None
    answer = client.generate("gpt-oss:20b", "What is 2 + 3?", options=options, keep_alive="10m")
    assert answer.thinking and answer.eval_count
    raw = client.generate("gpt-oss:20b", "The", raw=True, options={"num_predict": 5, "temperature": 0})
    assert raw.eval_count and raw.eval_count <= 5
    [model] = client.list().models
    shown = client.show(str(model.model))
    assert shown.capabilities and {"tools", "thinking"} <= set(shown.capabilities)
    assert shown.modelinfo and shown.modelinfo["general.architecture"] == "gptoss"
    assert [running.model for running in client.ps().models] == [model.model]
    with pytest.raises(ollama.ResponseError, match="text only") as caught:
        client.chat("any", [{"role": "user", "content": "look", "images": ["aGk="]}])
    assert caught.value.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_ollama_runs_a_tool_until_the_answer(scripted_url: str, stream: bool) -> None:
    def get_weather(city: str) -> str:
        """Get the weather in a city.

        Args:
            city: The city.
        """
        return f"sunny in {city}"

    client = ollama.Client(host=scripted_url, headers={"Authorization": f"Bearer {KEY}"})
    messages: list[Any] = [{"role": "user", "content": QUESTION}]

    def ask() -> ollama.Message:
        if not stream:
            return client.chat("any", messages, tools=[get_weather]).message
        said = ollama.Message(role="assistant", content="", thinking="")
        for piece in client.chat("any", messages, tools=[get_weather], stream=True):
            said.content = (said.content or "") + (piece.message.content or "")
            said.thinking = (said.thinking or "") + (piece.message.thinking or "")
            said.tool_calls = [*(said.tool_calls or ()), *(piece.message.tool_calls or ())]
        return said

    first = ask()
    assert first.tool_calls
    [call] = first.tool_calls
    messages += [
        first,
        {"role": "tool", "tool_name": call.function.name, "content": get_weather(**call.function.arguments)},
    ]
    assert ask().content == "The tool says: sunny in Paris"


def test_ollama_keeps_a_format(url: str) -> None:
    client = ollama.Client(host=url, headers={"Authorization": f"Bearer {KEY}"})
    text = [{"role": "user", "content": "Anna is 31 years old and lives in Rome."}]
    answer = client.chat("any", text, format=Person.model_json_schema(), options={"temperature": 0})
    assert Person.model_validate_json(answer.message.content or "")
    anything = client.chat("any", text, format="json", options={"temperature": 0, "num_predict": 300})
    if anything.done_reason == "stop":
        assert isinstance(json.loads(anything.message.content or ""), dict)
