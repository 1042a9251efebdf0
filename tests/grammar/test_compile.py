"""The constraint of a turn: which token may follow, from the first header to the end token."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.constrained import SCHEMAS, one_sample
from mlx_gptoss.engine.sampler import unpack_bits
from mlx_gptoss.errors import RequestError, SchemaError, ToolError
from mlx_gptoss.grammar import TurnConstraint
from mlx_gptoss.grammar.matcher import vocabulary_of
from mlx_gptoss.harmony import PYTHON, Tool, ToolNamespace
from mlx_gptoss.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.constraints import constrain
from tests.support.real_vocabulary import require_tokenizer

WEATHER = Tool(
    "get_weather",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
GET = Tool("get")
BROWSER = ToolNamespace(
    "browser",
    tools=(Tool("find", parameters={"type": "object", "properties": {"pattern": {"type": "string"}}}),),
)
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
NEXT_FINAL = "<|end|><|start|>assistant" + FINAL
CALL = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ids_of(tok: Tokenizer, text: str) -> list[int]:
    """Token ids of text in which special tokens are spelled out."""
    ids: list[int] = []
    while text:
        field = next((f for f, t in SPECIAL_TOKENS.items() if text.startswith(t)), None)
        if field is not None:
            ids.append(getattr(tok.special, field))
            text = text[len(SPECIAL_TOKENS[field]) :]
        else:
            plain = text[: text.index("<|")] if "<|" in text else text
            ids += tok.encode(plain)
            text = text[len(plain) :]
    return ids


def options(tok: Tokenizer, constraint: TurnConstraint) -> set[int] | None:
    mask = constraint.allowed()
    if mask is None:
        return None
    assert mask.dtype == np.uint32
    assert mask.shape == ((tok.vocab_size + 31) // 32,)
    return set(np.flatnonzero(np.array(unpack_bits(mask, tok.vocab_size))).tolist())


def walk(tok: Tokenizer, constraint: TurnConstraint | None, text: str) -> TurnConstraint:
    """Accept the tokens of `text`, each of which must be allowed."""
    assert constraint is not None
    for i, token in enumerate(ids := ids_of(tok, text)):
        allowed = options(tok, constraint)
        assert allowed is None or token in allowed, f"{tok.decode([token])!r} after {tok.decode(ids[:i])!r}"
        constraint.accept(token)
    return constraint


def refused(tok: Tokenizer, constraint: TurnConstraint | None, text: str) -> str:
    """Accept the tokens of `text` up to the first that is not allowed; its text."""
    assert constraint is not None
    for token in ids_of(tok, text):
        allowed = options(tok, constraint)
        if allowed is not None and token not in allowed:
            return tok.decode([token])
        constraint.accept(token)
    raise AssertionError("everything was allowed")


def spelled(tok: Tokenizer, **request: object) -> set[str]:
    """Every header that the masks let a model write, by trying every allowed token at every step."""
    texts: set[str] = set()
    prefixes: list[list[int]] = [[]]
    while prefixes:
        prefix = prefixes.pop()
        constraint = constrain(tok, **request)
        assert constraint is not None
        for token in prefix:
            constraint.accept(token)
        for token in options(tok, constraint) or ():
            if token == tok.special.message:
                texts.add(tok.decode([*prefix, token]))
            else:
                prefixes.append([*prefix, token])
    return texts


def test_a_request_that_constrains_nothing_has_no_constraint(tok: Tokenizer) -> None:
    assert constrain(tok) is None
    assert constrain(tok, tool_choice="none") is None


def test_the_vocabulary_is_prepared_once(tok: Tokenizer) -> None:
    assert vocabulary_of(tok) is vocabulary_of(tok)


def test_headers_can_name_declared_tools_only(tok: Tokenizer) -> None:
    recipients = {
        text.split(" to=")[1].split("<|")[0].split(" ")[0]
        for text in spelled(tok, tools=[WEATHER, GET])
        if " to=" in text
    }
    assert recipients == {"functions.get_weather", "functions.get"}


def test_without_tools_a_schema_leaves_reasoning_and_the_answer(tok: Tokenizer) -> None:
    assert spelled(tok, schema=NUMBER) == {ANALYSIS, FINAL, "<|channel|>final <|constrain|>json<|message|>"}


def test_tool_choice_none_leaves_no_call(tok: Tokenizer) -> None:
    assert spelled(tok, tools=[WEATHER], builtin=[PYTHON], tool_choice="none") == {ANALYSIS, FINAL}


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_after_earlier_calls_a_request_without_tools_leaves_no_call(tok: Tokenizer, choice: str) -> None:
    assert spelled(tok, tool_choice=choice, called=True) == {ANALYSIS, FINAL}


def test_tool_choice_required_leaves_no_answer(tok: Tokenizer) -> None:
    texts = spelled(tok, tools=[WEATHER], tool_choice="required")
    assert not any("final" in text for text in texts)
    assert CALL in texts


def test_a_named_tool_is_the_only_one(tok: Tokenizer) -> None:
    for name in ("get", "functions.get"):
        texts = spelled(tok, tools=[WEATHER, GET], tool_choice=("named", name))
        assert {t for t in texts if "to=" in t and "get_weather" in t} == set()
        assert any("to=functions.get" in text for text in texts)
        assert not any("final" in text for text in texts)


def test_the_recipient_may_stand_before_the_channel(tok: Tokenizer) -> None:
    call = (
        ' to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{"city": "Rome"}<|call|>'
    )
    walk(tok, constrain(tok, tools=[WEATHER]), call)


def test_builtin_tools_are_called_from_reasoning_and_code_is_free_text(tok: Tokenizer) -> None:
    constraint = constrain(tok, builtin=[PYTHON, BROWSER])
    walk(tok, constraint, "<|channel|>analysis to=python code<|message|>print('<é>')\n<|call|>")
    constraint = constrain(tok, builtin=[PYTHON, BROWSER])
    header = "<|channel|>analysis to=browser.find code<|message|>"
    walk(tok, constraint, header + '{"pattern": "x"}<|call|>')
    constraint = constrain(tok, builtin=[PYTHON])
    assert refused(tok, constraint, "<|channel|>analysis to=browser.find") == "b"


def test_code_can_end_with_a_call_only(tok: Tokenizer) -> None:
    constraint = walk(tok, constrain(tok, builtin=[PYTHON]), "<|channel|>analysis to=python<|message|>1")
    allowed = options(tok, constraint)
    assert allowed is not None
    assert {t for t in allowed if tok.is_special(t)} == {tok.special.call}


def test_reasoning_is_free_and_costs_no_mask_with_auto_tools(tok: Tokenizer) -> None:
    constraint = walk(tok, constrain(tok, tools=[WEATHER]), ANALYSIS + "any \x00 ünïcode")
    assert constraint.allowed() is None
    walk(tok, constraint, NEXT_FINAL + "free answer")
    assert constraint.allowed() is None
    walk(tok, constraint, "<|return|>")


def test_where_an_answer_is_due_reasoning_can_end_only_with_end(tok: Tokenizer) -> None:
    constraint = walk(tok, constrain(tok, schema=NUMBER), ANALYSIS + "hm")
    allowed = options(tok, constraint)
    assert allowed is not None
    assert {t for t in allowed if tok.is_special(t)} == {tok.special.end}
    assert len(allowed) == sum(not tok.is_special(t) for t in range(tok.vocab_size)) + 1


def test_the_answer_follows_the_schema_and_ends_with_return_alone(tok: Tokenizer) -> None:
    constraint = walk(tok, constrain(tok, schema=NUMBER), ANALYSIS + "hm" + NEXT_FINAL)
    assert tok.special.return_ not in (options(tok, constraint) or ())
    walk(tok, constraint, '{"n": 12')
    assert tok.special.return_ not in (options(tok, constraint) or ())
    walk(tok, constraint, ', "m": null}')
    assert options(tok, constraint) == {tok.special.return_}
    walk(tok, constraint, "<|return|>")


def test_a_complete_answer_that_could_go_on_may_end_or_go_on(tok: Tokenizer) -> None:
    constraint = walk(tok, constrain(tok, regex="[0-9]{1,4}"), FINAL + "12")
    digits = {ord(c) for c in "0123456789"}
    assert options(tok, constraint) == digits | {tok.special.return_}


def test_arguments_follow_the_tool_schema_and_end_with_call(tok: Tokenizer) -> None:
    assert refused(tok, constrain(tok, tools=[WEATHER]), CALL + '{"town"') == "t"
    constraint = walk(tok, constrain(tok, tools=[WEATHER]), CALL + '{"city": "Zürich"}')
    assert options(tok, constraint) == {tok.special.call}


def test_a_tool_without_parameters_takes_an_empty_object(tok: Tokenizer) -> None:
    header = "<|channel|>commentary to=functions.get <|constrain|>json<|message|>"
    walk(tok, constrain(tok, tools=[GET]), header + "{}<|call|>")
    assert refused(tok, constrain(tok, tools=[GET]), header + '{"x": 1}') == '"'


def test_a_preamble_may_come_before_a_call(tok: Tokenizer) -> None:
    text = "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant" + CALL
    walk(tok, constrain(tok, tools=[WEATHER], tool_choice="required"), text + '{"city":""}<|call|>')


def test_after_an_ended_answer_the_turn_is_over(tok: Tokenizer) -> None:
    constraint = walk(tok, constrain(tok, tools=[WEATHER]), FINAL + "Hello.<|end|>")
    assert options(tok, constraint) == {tok.special.return_}
    walk(tok, constraint, "<|return|>")
    assert constraint.allowed() is None


@pytest.mark.parametrize("opening", ["<|start|>assistant<|channel|>", "<|channel|>"])
def test_a_message_that_was_not_ended_leads_to_a_constrained_header(tok: Tokenizer, opening: str) -> None:
    constraint = constrain(tok, tools=[WEATHER])
    assert refused(tok, constraint, ANALYSIS + "hm" + opening + "commentary to=functions.rm") == "r"


def test_the_reasoning_budget_closes_the_reasoning_and_opens_the_answer(tok: Tokenizer) -> None:
    constraint = walk(tok, constrain(tok, reasoning_budget=4), ANALYSIS + "abcd")
    forced: list[int] = []
    for _ in range(4):
        allowed = options(tok, constraint)
        assert allowed is not None
        assert len(allowed) == 1
        forced += allowed
        constraint.accept(forced[-1])
    assert tok.decode(forced) == "<|end|><|start|>assistant<|channel|>"
    walk(tok, constraint, "final<|message|>free")
    assert constraint.allowed() is None


def test_a_spent_budget_leaves_the_answer_and_the_calls(tok: Tokenizer) -> None:
    texts = spelled(tok, tools=[GET], reasoning_budget=0)
    assert FINAL in texts
    assert ANALYSIS not in texts
    assert "<|channel|>commentary<|message|>" not in texts
    assert "<|channel|>commentary to=functions.get<|message|>" in texts
    assert all(
        "final" not in t for t in spelled(tok, tools=[GET], tool_choice="required", reasoning_budget=0)
    )


def test_a_budget_is_shared_by_all_reasoning_of_the_turn(tok: Tokenizer) -> None:
    constraint = constrain(tok, reasoning_budget=4)
    walk(tok, constraint, ANALYSIS + "ab<|end|><|start|>assistant" + ANALYSIS + "cd")
    assert constraint is not None
    assert options(tok, constraint) == {tok.special.end}


def test_a_budget_never_splits_a_character(tok: Tokenizer) -> None:
    constraint = walk(tok, constrain(tok, reasoning_budget=2), ANALYSIS + "a")
    for byte in "🙂".encode():  # a token of the test vocabulary is a byte
        assert constraint.allowed() is None
        constraint.accept(byte)
    assert options(tok, constraint) == {tok.special.end}


def test_a_character_that_never_ends_cannot_hold_a_budget_open(tok: Tokenizer) -> None:
    constraint = walk(tok, constrain(tok, reasoning_budget=1), ANALYSIS)
    steps = 0
    while constraint.allowed() is None:
        constraint.accept(0xF0)
        steps += 1
    assert steps <= 4


def test_regex_choices_and_lark_shape_the_answer(tok: Tokenizer) -> None:
    walk(tok, constrain(tok, regex=r"[a-c]+\d"), FINAL + "abc7<|return|>")
    assert refused(tok, constrain(tok, regex=r"[a-c]+\d"), FINAL + "abd") == "d"
    choices = ['ja "so"', "nein", "vielleicht\né"]
    for choice in choices:
        walk(tok, constrain(tok, choices=choices), FINAL + choice + "<|return|>")
    assert refused(tok, constrain(tok, choices=choices), FINAL + "neun") == "u"
    lark = 'start: "(" start ")" | "x"'
    walk(tok, constrain(tok, lark=lark), FINAL + "((x))<|return|>")
    assert refused(tok, constrain(tok, lark=lark), FINAL + "((x)<|return|>") == "<|return|>"


def test_json_object_admits_any_object_and_nothing_else(tok: Tokenizer) -> None:
    walk(tok, constrain(tok, json_object=True), FINAL + '{"a": [1, {"b": null}]}<|return|>')
    assert refused(tok, constrain(tok, json_object=True), FINAL + "[") == "["


def test_white_space_between_json_parts_is_bounded(tok: Tokenizer) -> None:
    walk(tok, constrain(tok, schema=NUMBER), FINAL + '{\n    "n" : 1\n}<|return|>')
    assert refused(tok, constrain(tok, schema=NUMBER), FINAL + "{" + "\n" * 100) == "\n"


def test_an_escaped_key_cannot_dodge_the_schema_of_a_declared_one(tok: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert refused(tok, constrain(tok, schema=schema), FINAL + '{"\\u0061": "x"}') == "u"


def test_markup_spelled_as_text_is_text(tok: Tokenizer) -> None:
    constraint = constrain(tok, schema={"type": "string"})
    walk(tok, constraint, FINAL + '"')
    assert constraint is not None
    for token in tok.encode("<|return|>"):
        constraint.accept(token)
    assert tok.special.return_ not in (options(tok, constraint) or ())
    walk(tok, constraint, '"<|return|>')


def test_masks_that_are_shared_cannot_be_written_to(tok: Tokenizer) -> None:
    constraint = walk(tok, constrain(tok, schema=NUMBER), ANALYSIS)
    mask = constraint.allowed()
    assert mask is not None
    with pytest.raises(ValueError, match="read-only"):
        mask[0] = 0


def test_a_token_the_mask_forbade_is_an_error(tok: Tokenizer) -> None:
    constraint = walk(tok, constrain(tok, schema=NUMBER), FINAL)
    with pytest.raises(SchemaError, match="cannot go on"):
        constraint.accept(ord("x"))


def test_constraints_of_one_request_do_not_share_state(tok: Tokenizer) -> None:
    first = walk(tok, constrain(tok, schema=NUMBER), FINAL + '{"n": 1')
    second = walk(tok, constrain(tok, schema=NUMBER), FINAL)
    assert options(tok, second) == {ord("{")}
    walk(tok, first, "}<|return|>")


@pytest.mark.parametrize("kind", [{"schema": NUMBER}, {"regex": "a"}, {"choices": ["a"]}])
def test_a_reply_has_one_shape(tok: Tokenizer, kind: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="given together"):
        constrain(tok, lark='start: "a"', **kind)


def test_a_tool_choice_that_does_not_fit_the_tools_is_an_error(tok: Tokenizer) -> None:
    with pytest.raises(ToolError, match="there are no tools"):
        constrain(tok, tool_choice="required")
    with pytest.raises(ToolError, match="names 'rm': the declared tools are get_weather, get"):
        constrain(tok, tools=[WEATHER, GET], tool_choice=("named", "rm"))
    for choice in ("always", ("named",), ("any", "get"), ("named", "get", "rm"), ["named", "get"]):
        with pytest.raises(ToolError, match="expected 'auto'"):
            constrain(tok, tools=[WEATHER, GET], tool_choice=choice)


@pytest.mark.parametrize("budget", [-1, 1.5, True, "7"])
def test_a_wrong_budget_is_an_error(tok: Tokenizer, budget: object) -> None:
    with pytest.raises(RequestError, match="reasoning_budget"):
        constrain(tok, reasoning_budget=budget)


def test_a_hundred_tools_are_told_apart(tok: Tokenizer) -> None:
    tools = [
        Tool(f"t{i}", parameters={"type": "object", "properties": {"i": {"const": i}}}) for i in range(100)
    ]
    for i in (0, 10, 99):
        call = f'<|channel|>commentary to=functions.t{i} <|constrain|>json<|message|>{{"i":{i}}}<|call|>'
        walk(tok, constrain(tok, tools=tools), call)


def test_the_words_the_model_was_trained_on_are_allowed_in_its_own_vocabulary() -> None:
    real = require_tokenizer()
    reasoning = "<|channel|>analysis<|message|>The user wants the weather – 天気.<|end|><|start|>assistant"
    call = reasoning + CALL + '{"city":"Zürich, 瑞士"}<|call|>'
    walk(real, constrain(real, tools=[WEATHER], builtin=[PYTHON]), call)
    walk(real, constrain(real, schema=NUMBER), reasoning + FINAL + '{\n  "n": 12345\n}<|return|>')


@pytest.mark.parametrize("start", range(0, 78, 39))
def test_a_model_that_knows_nothing_writes_valid_replies(tok: Tokenizer, start: int) -> None:
    """All schemas, answers and calls; benchmarks/constrained.py does the same ten thousand times."""
    assert len(SCHEMAS) >= 30
    for number in range(start, start + len(SCHEMAS)):
        turn, name = one_sample(tok, number)
        assert not turn.cut, name
