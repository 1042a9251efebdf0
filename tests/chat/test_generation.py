"""What a caller sees of one turn: its events, its end, and the size of its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_gptoss.chat.generation import Generation
from mlx_gptoss.engine.request import TokenOutput, TokensDone
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.grammar import TurnConstraint, compile_constraint
from mlx_gptoss.harmony import Conversation, Done, Event, Message
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_model import scripted_engine, spell

ANSWER = "<|channel|>final<|message|>yes<|return|>"


def test_after_an_error_the_iteration_is_over(text_folder: Path) -> None:
    generation = Generation(Tokenizer.from_folder(text_folder))
    generation.take(GptOssError("lost"))
    with pytest.raises(GptOssError, match="lost"):
        next(generation)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(generation)


@pytest.mark.parametrize("hook", ["parse", "on_done"])
@pytest.mark.parametrize("raised", [KeyError("x"), SystemExit(3), GptOssError("not now")])
def test_what_a_hook_raises_ends_the_generation_for_its_caller(
    text_folder: Path, hook: str, raised: BaseException
) -> None:
    """Else the caller would wait for an end that never comes."""
    tokenizer = Tokenizer.from_folder(text_folder)

    def failing(_: object) -> None:
        raise raised

    def run(generation: Generation) -> Generation:
        for token in spell(tokenizer, ANSWER):
            generation.take(TokenOutput(token))
        generation.take(TokensDone("stop", 5, 0, 4))
        return generation

    hooks: dict[str, Any] = {hook: failing}
    with pytest.raises(GptOssError) as caught:
        list(run(Generation(tokenizer, **hooks)))
    assert raised in (caught.value, caught.value.__cause__)
    assert caught.value is raised or type(raised).__name__ in str(caught.value)

    sent: list[Event | Exception] = []
    generation = run(Generation(tokenizer, sink=sent.append, **hooks))
    assert isinstance(sent[-1], GptOssError) and generation.reply is None
    assert not any(isinstance(item, Done | Exception) for item in sent[:-1])


def test_the_prompts_size_is_known_once_it_is_queued(text_folder: Path) -> None:
    assert Generation(Tokenizer.from_folder(text_folder)).prompt_tokens == 0
    llm, _ = scripted_engine(lambda context: ANSWER)
    with llm:
        generation = llm.start(Conversation([Message.user("Is it?")]))
        asked = generation.prompt_tokens
        *_, done = generation
        assert isinstance(done, Done) and asked == done.usage.prompt_tokens > 0
        with pytest.raises(StopIteration):
            next(generation)


@pytest.mark.parametrize(
    ("reasoning", "limit", "prepared"), [("hm", None, 1), ("", None, 0), ("hm, let me see", 6, 0)]
)
def test_the_next_turn_is_prepared_after_a_whole_answer_with_reasoning(
    monkeypatch: pytest.MonkeyPatch, reasoning: str, limit: int | None, prepared: int
) -> None:
    thought = f"<|channel|>analysis<|message|>{reasoning}<|end|><|start|>assistant" if reasoning else ""
    llm, _ = scripted_engine(lambda context: thought + ANSWER)
    asked: list[object] = []
    monkeypatch.setattr(llm.engine, "prefill_when_idle", lambda *arguments: asked.append(arguments))
    with llm:
        reply = llm.respond("a", max_tokens=limit)
    assert reply.finish_reason == ("stop" if limit is None else "length")
    assert len(asked) == prepared


def test_a_turn_is_free_until_the_history_holds_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TurnConstraint | None] = []

    def noting(*arguments: object, **keywords: object) -> TurnConstraint | None:
        made.append(compile_constraint(*arguments, **keywords))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr("mlx_gptoss.chat.turn.compile_constraint", noting)
    llm, _ = scripted_engine(lambda context: ANSWER)
    talk = [Message.user("a"), Message.assistant("b"), Message.user("c")]
    call = [Message.tool_call("f", "{}"), Message.tool_result("1", name="functions.f"), Message.user("d")]
    with llm:
        for history in (talk, talk + call):
            list(llm.start(Conversation(history)))
    assert made[0] is None and made[1] is not None
