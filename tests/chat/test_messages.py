"""Prompts: texts, Messages and OpenAI's dicts become the same conversation; what is wrong is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mlx_gptoss.chat.messages import read_prompt
from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.harmony import Message
from tests.chat.test_conversations import answer, echo, said_last
from tests.support.scripted_model import scripted_engine


def test_a_text_is_what_the_user_says() -> None:
    assert read_prompt("hi") == (None, [Message.user("hi")])


def test_dicts_are_the_messages_they_describe() -> None:
    said: list[Message | Mapping[str, Any]] = [
        {"role": "user", "content": "Oslo?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "A tool.",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'},
                },
                {
                    "id": "c2",
                    "type": "function",
                    "function": {"name": "get_time", "arguments": {"zone": "é"}},
                },
            ],
            "refusal": None,
        },
        {"role": "tool", "tool_call_id": "c1", "name": "get_weather", "content": "4 degrees"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}, "sharp"]},
        {"role": "assistant", "content": "4 degrees at noon."},
        {"role": "system", "content": "Be brief."},
        Message.user("And Rome?"),
    ]
    assert read_prompt(said) == (
        None,
        [
            Message.user("Oslo?"),
            Message.reasoning("A tool."),
            Message.preamble("I look."),
            Message.tool_call("get_weather", '{"city":"Oslo"}', "c1"),
            Message.tool_call("get_time", '{"zone": "é"}', "c2"),
            Message.tool_result("4 degrees", call_id="c1"),
            Message.tool_result("noon\nsharp", call_id="c2"),
            Message.assistant("4 degrees at noon."),
            Message("developer", "Be brief."),
            Message.user("And Rome?"),
        ],
    )


def test_a_tools_result_may_go_by_its_name() -> None:
    for name, full in (("add", "functions.add"), ("browser.open", "browser.open")):
        _, (message,) = read_prompt([{"role": "tool", "name": name, "content": "3"}])
        assert message == Message.tool_result("3", name=full)


def test_system_messages_before_the_first_turn_are_instructions() -> None:
    llm, model = scripted_engine(echo)
    said = [
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    with llm:
        assert llm.respond(said, instructions="Be true.").text == "you said hi"
        assert "# Instructions\n\nBe true.\n\nBe kind.\n\nBe brief.<|end|>" in model.contexts[0]
        chat = llm.chat()
        chat.send(said)
        chat.send([{"role": "system", "content": "Be loud."}, {"role": "user", "content": "again"}])
    assert [m.role for m in chat.history] == [
        "user",
        *["assistant"] * 2,
        "developer",
        "user",
        *["assistant"] * 2,
    ]
    assert "# Instructions\n\nBe kind.\n\nBe brief.<|end|>" in model.contexts[2]
    assert "<|start|>developer<|message|>Be loud.<|end|><|start|>user<|message|>again" in model.contexts[2]


def test_a_loop_of_ones_own_goes_on_in_dicts() -> None:
    def script(context: str) -> str:
        if "functions.ask to=assistant" in context:
            return answer(said_last(context))
        return "<|channel|>commentary to=functions.ask <|constrain|>json<|message|>{}<|call|>"

    ask = {"type": "function", "function": {"name": "ask", "description": "Asks."}}
    llm, _ = scripted_engine(script)
    with llm:
        said: list[Any] = [{"role": "user", "content": "go"}]
        (made,) = llm.respond(said, tools=[ask]).tool_calls
        call = {
            "id": made.call_id,
            "type": "function",
            "function": {"name": made.name, "arguments": made.arguments},
        }
        said += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": made.call_id, "content": "fine"},
        ]
        assert llm.respond(said, tools=[ask]).text == "fine"


CALL = {"id": "c", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (5, "the prompt is a int: expected text, or a list of messages"),
        (None, "the prompt is a NoneType"),
        ({"role": "user", "content": "x"}, "the prompt is a dict: expected text, or a list"),
        (Message.user("x"), "the prompt is a Message: expected text, or a list"),
        ([], "holds no messages"),
        ([{"role": "system", "content": "x"}], "holds no messages"),
        (["x"], r"messages\[0\] is a str: expected a Message, or a dict with role and content"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        (
            [{"role": "asistant", "content": "x"}],
            r"messages\[0\].role is 'asistant': .*did you mean assistant\?",
        ),
        ([{"role": "human", "content": "x"}], r"did you mean user\?"),
        (
            [{"role": "user", "contents": "x"}],
            r"messages\[0\] has no content: expected text; did you mean content\?",
        ),
        ([{"role": "assistant"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is a int: expected text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"content\[0\] is of type 'image_url': .* text only",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            r"content\[0\].text is a NoneType: expected text",
        ),
        ([{"role": "user", "content": [5]}], r"content\[0\] is no part of a content"),
        ([{"role": "assistant", "tool_calls": CALL}], "tool_calls is a dict: expected a list of calls"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], r"tool_calls\[0\] is no call of a function"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\] has no tool_call_id"),
        ([{"role": "tool", "content": "x", "tool_call_id": 5}], r"messages\[0\].tool_call_id is a int"),
    ],
)
def test_what_is_no_prompt_is_told_in_one_line(prompt: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        read_prompt(prompt)
    assert "\n" not in str(caught.value) and caught.value.field


def test_a_result_without_its_call_is_refused() -> None:
    llm, _ = scripted_engine(echo)
    with llm, pytest.raises(ToolError, match="call id 'c9', which no earlier assistant message holds"):
        llm.respond([{"role": "tool", "tool_call_id": "c9", "content": "x"}])


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"system": "x"}, "system is not an argument of a request; did you mean instructions?"),
        ({"max_new_tokens": 5}, "did you mean max_tokens?"),
        ({"temprature": 1}, "did you mean temperature?"),
        ({"response_format": {}}, "did you mean schema?"),
        ({"zzz": 1}, "zzz is not an argument of a request: expected adapter, builtin, choices"),
        ({"params": {"temperature": 1}}, "params is a dict: expected a SamplingParams"),
        ({"instructions": 5}, "instructions is a int: expected text, or None"),
        ({"tools": echo}, "expected a list, also of one tool"),
        ({"tools": "echo"}, "tools is 'echo': expected a list"),
        ({"tools": [5]}, "5 cannot be a tool"),
        ({"schema": 5}, "schema is 5: expected a JSON schema as a dict, or a type"),
        ({"temperature": "hot"}, "temperature is 'hot': expected a number"),
        ({"reasoning_effort": "max"}, "reasoning effort 'max': expected one of low, medium, high"),
        ({"choices": "yes"}, "choices is 'yes': expected a list"),
    ],
)
def test_what_is_no_request_is_told_in_one_line(request_: dict[str, Any], said: str) -> None:
    llm, _ = scripted_engine(echo)
    with llm, pytest.raises(RequestError) as caught:
        llm.respond("x", **request_)
    assert said in str(caught.value) and "\n" not in str(caught.value)
