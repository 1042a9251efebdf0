"""Rows of a data set become the tokens that the model reads and writes at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.errors import TuneError
from mlx_gptoss.harmony import Conversation, Message, render
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tune.dataset import encode, pack, read_data, read_jsonl
from mlx_gptoss.tune.examples import Example, examples_of, preference_of
from tests.support.tuning import write_rows

TOKENIZER = Tokenizer.from_folder(DEMO_FOLDER)
USER = {"role": "user", "content": "What is 2 + 2?"}
AGAIN = {"role": "user", "content": "And 3 + 3?"}
ANSWER = {"role": "assistant", "content": "4"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}
CALL = {
    "role": "assistant",
    "reasoning": "I add.",
    "tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": '{"a":2}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "4"}


def learned(example: Example) -> list[str]:
    """What is learned, a piece for each run of rows."""
    cuts = np.flatnonzero(np.diff(example.rows) != 1) + 1
    return [TOKENIZER.decode(part.tolist()) for part in np.split(example.wanted, cuts)]


def made(*messages: dict[str, Any], **row: Any) -> list[Example]:
    return examples_of({"messages": list(messages), **row}, TOKENIZER, "x.jsonl, line 1")


def test_an_answer_is_learned_from_what_follows_the_prompt_to_its_end() -> None:
    (example,) = made(USER, {**ANSWER, "reasoning": "2 + 2 = 4"})
    prompt = render(Conversation([Message.user("What is 2 + 2?")]), TOKENIZER)
    assert example.ids[: len(prompt)].tolist() == prompt and example.rows[0] == len(prompt) - 1
    assert learned(example) == [
        "<|channel|>analysis<|message|>2 + 2 = "
        "4<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    ]


def test_a_call_and_what_comes_after_its_result_are_learned_and_the_result_is_not() -> None:
    (example,) = made(USER, CALL, RESULT, {**ANSWER, "reasoning": "It says 4."}, tools=[TOOL])
    first, second = learned(example)
    assert first == (
        "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
        '<|constrain|>json<|message|>{"a":2}<|call|>'
    )
    assert second.endswith("<|channel|>final<|message|>4<|return|>") and "It says 4." in second
    assert "namespace functions" in TOKENIZER.decode(example.ids.tolist())


def test_every_answer_of_a_conversation_is_learned_with_the_end_that_is_sampled() -> None:
    (example,) = made(USER, ANSWER, AGAIN, {"role": "assistant", "content": "6"})
    assert learned(example) == [
        "<|channel|>final<|message|>4<|return|>",
        "<|channel|>final<|message|>6<|return|>",
    ]
    shown = TOKENIZER.decode(example.ids.tolist())
    assert ("<|message|>4<|end|>" in shown and shown.count("<|return|>") == 0) or shown.endswith("<|return|>")


def test_reasoning_that_later_turns_do_not_see_is_learned_where_it_is_seen() -> None:
    first, whole = made(
        *(USER, {**ANSWER, "thinking": "I think."}, AGAIN),
        {"role": "assistant", "content": "6", "reasoning_content": "3 and 3."},
    )
    assert learned(first) == [
        "<|channel|>analysis<|message|>I "
        "think.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    ]
    assert "I think." not in TOKENIZER.decode(whole.ids.tolist())
    assert len(learned(whole)) == 1 and "3 and 3." in learned(whole)[0]
    history = [Message.user("What is 2 + 2?"), Message.reasoning("I think."), Message.assistant("4")]
    prompt = render(Conversation([*history, Message.user("And 3 + 3?")]), TOKENIZER)
    assert whole.ids[: len(prompt)].tolist() == prompt


def test_a_tool_loop_in_a_later_turn_is_learned_behind_the_prompts_that_it_will_see() -> None:
    """While the assistant calls tools the renderer shows the reasoning of the first turn again."""
    last = {**ANSWER, "reasoning": "It says 4."}
    whole, shorter = made(USER, {**ANSWER, "thinking": "I think."}, AGAIN, CALL, RESULT, last, tools=[TOOL])
    assert [part.count("<|call|>") for part in learned(whole)] == [0, 0] and "It says" in learned(whole)[1]
    assert "I think." in TOKENIZER.decode(whole.ids.tolist())
    assert "I think." not in TOKENIZER.decode(shorter.ids.tolist())
    (call,) = learned(shorter)
    assert "I add." in call and call.endswith("<|call|>")


def test_a_message_of_weight_0_is_read_and_not_learned() -> None:
    (example,) = made(USER, {**ANSWER, "weight": 0}, AGAIN, {"role": "assistant", "content": "6"})
    assert learned(example) == ["<|channel|>final<|message|>6<|return|>"]


def test_the_system_message_of_a_row_is_the_instructions() -> None:
    (example,) = made({"role": "system", "content": "Be brief."}, USER, ANSWER, reasoning_effort="low")
    shown = TOKENIZER.decode(example.ids.tolist())
    assert "# Instructions\n\nBe brief." in shown and "Reasoning: low" in shown


def test_completions_and_texts_are_rows_too() -> None:
    (pair,) = examples_of({"prompt": "What is 2 + 2?", "completion": "4"}, TOKENIZER, "")
    assert learned(pair) == learned(made(USER, ANSWER)[0])
    (text,) = examples_of({"text": "one two"}, TOKENIZER, "")
    assert len(text.rows) == len(text.ids) - 1 and text.wanted[-1] == TOKENIZER.special.endoftext


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"},
        {"messages": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "5"}]},
        {
            "prompt": [USER],
            "chosen": [USER, ANSWER],
            "rejected": [USER, {"role": "assistant", "content": "5"}],
        },
    ],
)
def test_a_preference_is_two_answers_to_one_prompt(row: dict[str, Any]) -> None:
    pair = preference_of(row, TOKENIZER, "")
    assert learned(pair.chosen) == ["<|channel|>final<|message|>4<|return|>"]
    assert learned(pair.rejected) == ["<|channel|>final<|message|>5<|return|>"]
    start = int(pair.chosen.rows[0])
    assert pair.chosen.ids[:start].tolist() == pair.rejected.ids[:start].tolist()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([], "expected an object"),
        ({}, "holds nothing"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [USER]}, "nothing to learn: no assistant message"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "nothing to learn"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "messages[1].weight is 2"),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            "messages[0].role is 'human': expected one of system",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content is a int"),
        ({"messages": [USER, RESULT]}, "no earlier assistant message"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [1]}]}, "tool_calls holds 1"),
        ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "'tools' is a dict"),
        ({"messages": [USER, ANSWER], "reasoning_effort": "huge"}, "reasoning effort 'huge'"),
        ({"prompt": "x", "completion": ""}, "must be texts"),
    ],
)
def test_a_row_that_cannot_be_used_is_told_with_its_line(row: object, told: str) -> None:
    with pytest.raises(TuneError) as caught:
        examples_of(row, TOKENIZER, "x.jsonl, line 7")
    assert str(caught.value).startswith("x.jsonl, line 7: ") and told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        (b"\n\n", "holds no examples"),
        (b'{"text": "\xff"}', "line 1: not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_its_line(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(TuneError, match=told):
        read_jsonl(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("source", "told"),
    [("nowhere", "no file or folder"), (".", "no train.jsonl"), ("a/b", "pip install datasets")],
)
def test_a_data_set_that_is_not_there_is_told(
    source: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(TuneError, match=told):
        read_data(source, None, None, 0)


def test_tables_are_read_by_the_package_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of parquet, as data sets of the Hub are. Its rows have each other's keys, which are null."""
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows: list[dict[str, Any]] = [{"messages": [USER, ANSWER], "tools": None, "reasoning_effort": None}]
    rows.append({"messages": [USER, CALL, RESULT, ANSWER], "tools": [TOOL]})
    rows.append({"messages": [USER, {**ANSWER, "weight": 0}, AGAIN, ANSWER], "reasoning_effort": "low"})
    for name, some in (("train", rows), ("validation", rows[:1])):
        datasets.Dataset.from_list(some).to_parquet(tmp_path / "set" / f"{name}-00000-of-00001.parquet")
    found = read_data(str(tmp_path / "set"), None, None, 0)
    assert found.valid is not None and (len(found.train.rows), len(found.valid.rows)) == (3, 1)
    for (where, row), expected in zip(found.train.rows, rows, strict=True):
        made, wanted = examples_of(row, TOKENIZER, where), examples_of(expected, TOKENIZER, "")
        assert [learned(e) for e in made] == [learned(e) for e in wanted]
        assert all(np.array_equal(e.ids, w.ids) for e, w in zip(made, wanted, strict=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TuneError, match="no train.jsonl, nor what datasets reads"):
        read_data(str(tmp_path / "empty"), None, None, 0)


def test_a_share_is_set_aside_for_validation_and_a_folders_own_file_is_taken(tmp_path: Path) -> None:
    rows = [{"text": f"number {i}"} for i in range(40)]
    data = read_data(str(write_rows(tmp_path / "train.jsonl", rows)), None, None, 0)
    assert data.valid is not None and (len(data.train.rows), len(data.valid.rows)) == (38, 2)
    assert not {w for w, _ in data.train.rows} & {w for w, _ in data.valid.rows}
    assert read_data(str(tmp_path / "train.jsonl"), "none", None, 0).valid is None
    write_rows(tmp_path / "valid.jsonl", rows[:3])
    found = read_data(str(tmp_path), None, None, 0)
    assert found.valid is not None and (len(found.train.rows), len(found.valid.rows)) == (40, 3)


def test_long_examples_are_refused_or_left_out(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "one two three " * 40}, {"text": "b"}]
    data = read_data(str(write_rows(tmp_path / "x.jsonl", rows)), "none", None, 0)
    with pytest.raises(TuneError, match=r"line 2: \d+ tokens, and a step takes 16 .* --skip-long"):
        encode(data, TOKENIZER, 16, skip_long=False, preferences=False)
    found = encode(data, TOKENIZER, 16, skip_long=True, preferences=False)
    assert (len(found.train), found.left_out) == (2, 1)


def test_packs_hold_every_example_once_whole_and_within_the_limit() -> None:
    rng = np.random.default_rng(3)
    items = [Example(np.zeros(n, np.int32), np.zeros(0), np.zeros(0)) for n in rng.integers(1, 90, 200)]
    groups = pack(items, 100, np.random.default_rng([0, 1]))
    assert sorted(id(e) for g in groups for e in g) == sorted(map(id, items))
    assert max(sum(map(len, g)) for g in groups) <= 100
    assert sum(map(len, items)) / (100 * len(groups)) > 0.95
    again = pack(items, 100, np.random.default_rng([0, 1]))
    assert [[id(e) for e in g] for g in groups] == [[id(e) for e in g] for g in again]
    assert groups != pack(items, 100, np.random.default_rng([0, 2]))
