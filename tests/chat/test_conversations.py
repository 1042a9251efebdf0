"""Properties of conversations through the engine: Generation, respond, stream, Session (a scripted model)."""

from __future__ import annotations

import json
import queue
from typing import Any

import pytest

from mlx_gptoss.chat.turn import MAX_TOKENS, TurnOptions
from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.harmony import (
    Conversation,
    Done,
    Message,
    MessageDone,
    ReasoningDelta,
    TextDelta,
    Tool,
    ToolCall,
    ToolCallDelta,
)
from mlx_gptoss.sampling import PromptProgress, SamplingParams
from tests.support.scripted_model import scripted_engine

ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"


def answer(text: str, reasoning: str = "") -> str:
    thought = f"{ANALYSIS}{reasoning}<|end|><|start|>assistant" if reasoning else ""
    return f"{thought}{FINAL}{text}<|return|>"


def call(name: str, arguments: object) -> str:
    body = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{body}<|call|>"


def said_last(context: str) -> str:
    """The content of the last message before the assistant's turn."""
    return context.rsplit("<|message|>", 1)[1].split("<|end|>")[0]


def echo(context: str) -> str:
    return answer(f"you said {said_last(context)}", "let me see")


def test_respond_returns_text_reasoning_and_usage() -> None:
    llm, model = scripted_engine(echo)
    with llm:
        reply = llm.respond("hello", instructions="Be kind.")
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("you said hello", "let me see", "stop")
    assert "Be kind." in model.contexts[0]
    assert reply.usage.completion_tokens == sum(len(m.token_ids or ()) for m in reply.messages) + len(
        llm.tokenizer.encode("assistant")
    ) + len(["<|start|>"])
    assert 0 < reply.usage.reasoning_tokens < reply.usage.completion_tokens


def test_stream_is_made_of_deltas_and_one_done() -> None:
    llm, _ = scripted_engine(echo)
    with llm:
        events = list(llm.stream("hé"))
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "you said hé"
    assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)) == "let me see"
    assert [type(e) for e in events].count(Done) == 1 and isinstance(events[-1], Done)


def test_stop_texts_end_the_answer_before_them_and_never_the_reasoning() -> None:
    llm, _ = scripted_engine(lambda context: answer("one two three four", "three is a number"))
    with llm:
        reply = llm.respond("count", stop=("three", "x"))
        assert (reply.text, reply.finish_reason) == ("one two ", "stop")
        assert reply.reasoning == "three is a number"
        assert reply.messages[-1].content == "one two " and reply.messages[-1].token_ids is None
        assert llm.respond("count", stop="fives").text == "one two three four"


def test_logprobs_come_with_the_text_they_belong_to() -> None:
    llm, _ = scripted_engine(lambda context: answer("héllo", "hm"))
    with llm:
        deltas = [e for e in llm.stream("x", logprobs=1) if isinstance(e, TextDelta)]
        ids = [i for d in deltas for i, _ in d.logprobs or ()]
        assert ids == llm.tokenizer.encode("héllo")
        assert all(p.logprob <= 0 and len(p.top) == 1 for d in deltas for _, p in d.logprobs or ())


def test_a_reply_has_the_logprobs_of_its_text_when_they_were_asked_for() -> None:
    llm, _ = scripted_engine(lambda context: answer("héllo", "hm"))
    with llm:
        reply = llm.respond("x", logprobs=1)
        assert [i for i, _ in reply.logprobs or ()] == llm.tokenizer.encode("héllo")
        assert llm.respond("x").logprobs is None
        nothing = llm.respond("x", logprobs=0, max_tokens=3)
        assert (nothing.text, nothing.logprobs) == ("", ())


def test_a_turn_without_max_tokens_has_its_efforts_bound_or_the_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def length(**request: Any) -> int:
        reply = llm.respond("go", **request)
        assert reply.finish_reason == "length"
        return reply.usage.completion_tokens

    assert MAX_TOKENS["low"] < MAX_TOKENS["medium"] == MAX_TOKENS[None] < MAX_TOKENS["high"]
    monkeypatch.setitem(MAX_TOKENS, "low", 20)
    monkeypatch.setitem(MAX_TOKENS, "high", 40)
    llm, _ = scripted_engine(lambda context: answer("long " * 200))
    with llm:
        assert length(reasoning_effort="low") == length(reasoning_effort="low", max_tokens=None) == 20
        assert length(reasoning_effort="high") == 40
        assert length(reasoning_effort="low", params=SamplingParams(temperature=0.0)) == 20
        assert length(reasoning_effort="low", max_tokens=60) == 60
        llm.max_tokens = 30
        assert [length(reasoning_effort=effort) for effort in ("low", "high")] == [20, 30]
        assert llm.respond("go", reasoning_effort="low", max_tokens=llm.max_context).finish_reason == "stop"


def test_calls_are_events_and_a_finish_reason() -> None:
    llm, _ = scripted_engine(lambda context: call("add", {"a": 1}))
    tool = Tool("add", "Adds.", {"type": "object", "properties": {"a": {"type": "number"}}})
    with llm:
        events = list(llm.stream("x", tools=[tool]))
    done = events[-1]
    assert isinstance(done, Done) and done.finish_reason == "tool_calls"
    (made,) = [e for e in events if isinstance(e, ToolCall)]
    assert (made.name, json.loads(made.arguments)) == ("add", {"a": 1})
    assert "".join(e.arguments for e in events if isinstance(e, ToolCallDelta)) == made.arguments


def test_a_schema_gives_parsed_data() -> None:
    llm, _ = scripted_engine(lambda context: answer('{"n": 3}'))
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    with llm:
        assert llm.respond("x", schema={**schema, "additionalProperties": False}).parsed == {"n": 3}


def test_arguments_nobody_takes_are_named() -> None:
    llm, _ = scripted_engine(echo)
    with llm:
        with pytest.raises(RequestError, match="temprature") as caught:
            llm.respond("x", temprature=1)  # type: ignore[call-overload]
        assert caught.value.field == "temprature"
        with pytest.raises(RequestError, match="max_steps is 0"):
            llm.chat(max_steps=0)
        with pytest.raises(RequestError, match="temperature is -1"):
            llm.chat(temperature=-1)
        with pytest.raises(ToolError):
            llm.chat(tools=[Tool("a"), Tool("a")])


def test_a_chat_keeps_what_was_sampled_and_computes_only_what_is_new() -> None:
    llm, model = scripted_engine(echo)
    with llm:
        chat = llm.chat(instructions="A long enough system prompt. " * 20)
        first = chat.send("one")
        second = chat.send("two")
        assert second.text == "you said two"
        # The reasoning of the first turn is gone, and all before it was reused.
        assert "let me see" not in model.contexts[1] and "you said one<|end|>" in model.contexts[1]
        assert second.usage.cached_tokens >= first.usage.prompt_tokens
        assert [m.role for m in chat.history] == ["user", "assistant", "assistant"] * 2
        assert repr(chat) == f"<Session of 6 messages, {chat.usage.completion_tokens} tokens generated>"
        assert chat.tokens == chat.tokens and len(chat.tokens) > second.usage.prompt_tokens
        alone = llm.respond("one").usage
        assert (first.usage.completion_tokens, first.usage.reasoning_tokens) == (
            alone.completion_tokens,
            alone.reasoning_tokens,
        )
        for kind in ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"):
            each = [getattr(reply.usage, kind) for reply in (first, second)]
            assert getattr(chat.usage, kind) == sum(each) and each[1] > 0


def test_the_next_turn_is_prepared_while_nothing_else_runs() -> None:
    llm, _ = scripted_engine(lambda context: answer("a long answer " * 20, "thought " * 20))
    with llm:
        chat = llm.chat()
        chat.send("one")
        scheduler = llm.engine.scheduler

        def idle() -> None:
            while scheduler.step():
                pass

        llm.engine.worker.call(idle)
        known = len(chat.tokens)
        assert chat.send("two").usage.cached_tokens >= known - 1


def test_undo_and_rewind_go_back_and_reuse() -> None:
    llm, model = scripted_engine(echo)
    with llm:
        chat = llm.chat()
        chat.send("one")
        length = len(chat.history)
        chat.send("two")
        removed = chat.undo()
        assert removed[0].content == "two" and len(chat.history) == length
        reply = chat.send("three")
        assert "two" not in model.contexts[-1] and reply.usage.cached_tokens > 0
        chat.rewind(0)
        assert chat.history == [] and chat.undo() == []
        with pytest.raises(RequestError, match="position is 1"):
            chat.rewind(1)


def test_functions_are_run_and_their_results_go_back() -> None:
    def script(context: str) -> str:
        if "<|start|>functions.add" not in context:
            return call("add", {"a": 2, "b": 3})
        return answer(f"it is {said_last(context)}")

    def add(a: int, b: int) -> int:
        """Adds two numbers.

        Args:
            a: one of them
            b: the other
        """
        return a + b

    llm, _ = scripted_engine(script)
    with llm:
        chat = llm.chat(tools=[add])
        events = list(chat.stream("2 + 3?"))
        done = events[-1]
        assert isinstance(done, Done) and done.reply.text == "it is 5"
        results = [e.message for e in events if isinstance(e, MessageDone) and e.message.role == "tool"]
        assert [m.content for m in results] == ["5"]
        assert [m.role for m in chat.history] == ["user", "assistant", "tool", "assistant"]
        # Nothing of the loop was computed twice: the call's tokens are kept as they were sampled.
        assert done.usage.cached_tokens > 0


def test_a_tool_that_raises_tells_the_model() -> None:
    def script(context: str) -> str:
        return answer(said_last(context)) if "<|start|>functions.fail" in context else call("fail", {})

    def fail() -> None:
        """Fails."""
        raise KeyError("nothing here")

    llm, _ = scripted_engine(script)
    with llm:
        assert llm.chat(tools=[fail]).send("go").text == "error: KeyError: 'nothing here'"


def test_a_loop_of_calls_ends_after_max_steps() -> None:
    def again() -> str:
        """Goes on."""
        return "more"

    llm, model = scripted_engine(lambda context: call("again", {}))
    with llm:
        reply = llm.chat(tools=[again], max_steps=3).send("go")
    assert reply.finish_reason == "tool_calls" and len(model.contexts) == 3


def test_tools_that_are_no_functions_are_left_to_the_caller() -> None:
    def script(context: str) -> str:
        return answer(said_last(context)) if "<|start|>functions.ask" in context else call("ask", {})

    llm, _ = scripted_engine(script)
    with llm:
        chat = llm.chat(tools=[Tool("ask", "Asks.")])
        (made,) = chat.send("go").tool_calls
        assert chat.send([Message.tool_result("fine", call_id=made.call_id)]).text == "fine"


def test_leaving_a_stream_leaves_the_history() -> None:
    llm, _ = scripted_engine(lambda context: answer("long " * 200))
    with llm:
        chat = llm.chat()
        for event in chat.stream("go"):
            if isinstance(event, TextDelta):
                break
        assert chat.history == []


def test_a_cancelled_generation_says_so() -> None:
    llm, _ = scripted_engine(lambda context: answer("long " * 500))
    with llm:
        generation = llm.start(Conversation([Message.user("go")]))
        next(generation)
        generation.cancel()
        *_, done = generation
    assert isinstance(done, Done) and done.finish_reason == "cancelled"


def test_a_long_prompt_tells_its_progress_before_the_first_event() -> None:
    llm, _ = scripted_engine(echo)
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    conversation = Conversation([Message.user("word " * 250)])
    with llm:
        for progress in (True, False):
            llm.start(conversation, TurnOptions(progress=progress), sink=items.put)
            events: list[Any] = []
            while not events or not isinstance(events[-1], Done):
                events.append(items.get(timeout=20))
            told = [event for event in events if isinstance(event, PromptProgress)]
            assert events[: len(told)] == told and bool(told) == progress
            if progress:
                assert told[0].read_tokens == 0 and 0 < told[-1].read_tokens < told[-1].prompt_tokens
                assert told[-1].prompt_tokens == events[-1].usage.prompt_tokens
