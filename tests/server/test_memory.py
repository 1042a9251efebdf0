"""Turns that come back as history: whose tokens are rendered again, and whose are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from mlx_gptoss.harmony import Conversation, Message
from mlx_gptoss.server import create_app
from mlx_gptoss.server.memory.turns import TurnMemory
from mlx_gptoss.server.translate.conversation import AssistantTurn, Call, after, digest, opening
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM

pytest_plugins = ["tests.support.server_fixtures"]

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
ASKED = {"role": "user", "content": "Is it done?"}
MORE = {"role": "user", "content": "go on"}
ENDS_IN_OK = Script(reasoning="The secret is 7.", preamble="Looking.", text="OK.")


def chat(client: TestClient, messages: list[Any], **fields: Any) -> Any:
    response = client.post("/v1/chat/completions", json={"messages": messages, **fields})
    assert response.status_code == 200, response.text
    message = response.json()["choices"][0]["message"]
    return {name: message[name] for name in ("role", "content", "tool_calls") if name in message}


def anthropic(client: TestClient, messages: list[Any], **fields: Any) -> Any:
    response = client.post("/v1/messages", json={"max_tokens": 99, "messages": messages, **fields})
    assert response.status_code == 200, response.text
    return {"role": "assistant", "content": response.json()["content"]}


def responses(client: TestClient, items: list[Any], **fields: Any) -> Any:
    response = client.post("/v1/responses", json={"input": items, "store": False, **fields})
    assert response.status_code == 200, response.text
    return response.json()["output"]


Ask = Callable[..., Any]
APIS = pytest.mark.parametrize("ask", [chat, anthropic, responses])


def as_list(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else [answer]


def tool(ask: Ask) -> dict[str, Any]:
    function = {"name": "look", "parameters": SCHEMA}
    if ask is chat:
        return {"type": "function", "function": function}
    return {"name": "look", "input_schema": SCHEMA} if ask is anthropic else {"type": "function", **function}


def result_of(ask: Ask, answer: Any) -> dict[str, Any]:
    if ask is chat:
        return {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "sunny"}
    if ask is anthropic:
        use = {"type": "tool_result", "tool_use_id": answer["content"][-1]["id"], "content": "sunny"}
        return {"role": "user", "content": [use]}
    return {"type": "function_call_output", "call_id": answer[-1]["call_id"], "output": "sunny"}


@pytest.fixture
def fresh(tokenizer: Tokenizer) -> tuple[ScriptedLLM, TestClient]:
    """An application that remembers nothing yet."""
    llm = ScriptedLLM(tokenizer)
    return llm, TestClient(create_app(llm), base_url="http://localhost")  # type: ignore[arg-type]


def sent(llm: ScriptedLLM) -> list[Message]:
    return llm.seen[-1][0].messages


@pytest.mark.parametrize("other", [chat, anthropic, responses])
@APIS
def test_nothing_of_a_conversation_gets_into_another_that_says_the_same(
    fresh: tuple[ScriptedLLM, TestClient], ask: Ask, other: Ask
) -> None:
    llm, client = fresh
    llm.write = lambda *_: ENDS_IN_OK
    ask(client, [ASKED])
    for content in ("OK.", "Looking.\n\nOK.", "Looking.OK."):
        other(client, [{"role": "user", "content": "Mine?"}, {"role": "assistant", "content": content}, MORE])
        assert [m.content for m in sent(llm)] == ["Mine?", content, "go on"]


def test_the_same_messages_under_other_instructions_are_another_conversation(
    fresh: tuple[ScriptedLLM, TestClient],
) -> None:
    llm, client = fresh
    llm.write = lambda *_: Script(reasoning="My instructions have the secret 7.", text="Hello!")
    said = chat(client, [{"role": "system", "content": "The secret is 7."}, ASKED])
    chat(client, [ASKED, said, MORE])
    assert [m.content for m in sent(llm)] == ["Is it done?", "Hello!", "go on"]


@APIS
def test_a_conversation_that_goes_on_keeps_all_its_tokens(
    fresh: tuple[ScriptedLLM, TestClient], ask: Ask
) -> None:
    llm, client = fresh
    llm.write = lambda *_: ENDS_IN_OK
    history: list[Any] = []
    for turn in range(3):
        history.append({"role": "user", "content": f"question {turn}"})
        history += as_list(ask(client, history))
    for _ in range(2):  # and again, as after a retry
        ask(client, [*history, MORE])
        turns = [m for m in sent(llm) if m.role == "assistant"]
        assert [m.channel for m in turns] == ["analysis", "commentary", "final"] * 3
        assert all(m.token_ids for m in turns)


def test_an_answer_cut_at_a_stop_text_stays_in_the_history(
    fresh: tuple[ScriptedLLM, TestClient],
) -> None:
    llm, client = fresh
    llm.write = lambda *_: Script(text="One, two", cut=True)
    said = chat(client, [ASKED], stop=["three"])
    chat(client, [ASKED, said, MORE])
    assert [m.content for m in sent(llm)] == ["Is it done?", "One, two", "go on"]


@pytest.mark.parametrize("edited", [False, True])
@APIS
def test_text_beside_calls_is_the_clients_when_it_was_edited(
    fresh: tuple[ScriptedLLM, TestClient], ask: Ask, edited: bool
) -> None:
    llm, client = fresh
    llm.write = lambda *_: Script(preamble="Let me look.", calls=[("look", "{}")])
    said = ask(client, [ASKED], tools=[tool(ask)])
    text = "I was told not to."
    if edited and ask is chat:
        said["content"] = text
    elif edited and ask is anthropic:
        said["content"][0]["text"] = text
    elif edited:
        said[1]["content"][0]["text"] = text
    ask(client, [ASKED, *as_list(said), result_of(ask, said)], tools=[tool(ask)])
    preamble = next(m for m in sent(llm) if m.channel == "commentary")
    assert preamble.content == (text if edited else "Let me look.")
    assert bool(preamble.token_ids) is not edited


def test_an_edit_before_a_turn_makes_another_history() -> None:
    def conversation(*texts: str, **fields: Any) -> Conversation:
        return Conversation([Message.user(text) for text in texts], **fields)

    said = Message("assistant", "b", channel="final", token_ids=(1, 2))
    memory = TurnMemory(9)
    memory.remember("", [said], "b", digest(conversation("a")))
    turn = AssistantTurn(text="b")
    assert memory.recall("", turn, digest(conversation("a"))) == [said]
    others = (conversation(), conversation("A"), conversation("a", "a"), conversation("a", instructions="x"))
    for other in others:
        assert memory.recall("", turn, digest(other)) is None
    assert memory.recall("", turn) is None


def test_a_history_is_digested_message_by_message_and_without_reasoning() -> None:
    call = Message.tool_call("f", "{}", "c")
    messages = [Message.user("a"), Message.reasoning("hm"), call, Message.tool_result("r", call_id="c")]
    history = opening(conversation := Conversation(list(messages)))
    for message in messages:
        history = after(history, [message])
    assert history == digest(conversation)
    del conversation.messages[1]
    assert history == digest(conversation)


def test_a_turn_with_calls_needs_no_history() -> None:
    memory = TurnMemory(9)
    call = Message("assistant", "{}", "commentary", "functions.f", call_id="c", token_ids=(1,))
    memory.remember("", [call], "", b"some history")
    assert memory.recall("", AssistantTurn(calls=[Call("c", "f", "{}")])) == [call]


def test_a_preamble_may_come_back_as_content_as_its_own_part_or_as_reasoning() -> None:
    said = [Message.reasoning("r"), Message.preamble("p"), Message.assistant("t")]
    sampled = [Message(**{**vars(message), "token_ids": (1,)}) for message in said]
    memory = TurnMemory(9)
    for text in ("p\n\nt", "pt", "t"):  # as chat, Anthropic's API and a request with a format answer it
        memory.remember("", sampled, text)
    for turn in (
        AssistantTurn("r", text="p\n\nt"),
        AssistantTurn(text="pt"),
        AssistantTurn("r", preamble="p", text="t"),
        AssistantTurn("rp", text="t"),
    ):
        assert memory.recall("", turn) == sampled
    for turn in (AssistantTurn("x", text="t"), AssistantTurn(preamble="x", text="t")):
        assert memory.recall("", turn) is None


def sampled(text: str, call_id: str | None = None) -> Message:
    message = Message.tool_call("f", text, call_id) if call_id else Message.assistant(text)
    return Message(**{**vars(message), "token_ids": (1, 2, 3)})


def test_turns_are_bounded_in_number_and_in_tokens() -> None:
    memory = TurnMemory(max_turns=2, max_tokens=100)
    for text in ("a", "b"):
        memory.remember("", [sampled(text)], text)
    assert memory.recall("", AssistantTurn(text="a"))
    memory.remember("", [sampled("c")], "c")
    assert memory.recall("", AssistantTurn(text="b")) is None
    assert memory.recall("", AssistantTurn(text="a"))
    small = TurnMemory(max_turns=100, max_tokens=5)
    for text in ("a", "b"):
        small.remember("", [sampled(text)], text)
    assert len(small) == 1


def test_a_turn_is_recalled_by_each_call_and_never_when_changed() -> None:
    memory = TurnMemory(max_turns=9)
    memory.remember("", [sampled("{}", "c1"), sampled("{}", "c2")], "")
    both = [Call("c1", "f", "{}"), Call("c2", "f", "{ }")]
    assert memory.recall("", AssistantTurn(calls=both))
    for calls in (both[:1], both[::-1], [Call("c1", "g", "{}"), both[1]], [Call("c1", "f", "[]"), both[1]]):
        assert memory.recall("", AssistantTurn(calls=calls)) is None


def test_what_was_sampled_for_one_caller_is_not_recalled_for_another() -> None:
    memory = TurnMemory(9)
    memory.remember("alice", [sampled("{}", "c1")], "")
    memory.remember("alice", [sampled("a")], "a")
    for turn in (AssistantTurn(calls=[Call("c1", "f", "{}")]), AssistantTurn(text="a")):
        assert memory.recall("alice", turn)
        for other in ("bob", "", "alice:call"):
            assert memory.recall(other, turn) is None
