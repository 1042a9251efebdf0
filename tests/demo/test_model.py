"""The demo model in the package: what it promises to a newcomer, end to end and offline."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_gptoss as gptoss
from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.errors import ConfigError
from mlx_gptoss.harmony import Tool
from mlx_gptoss.llm import LLM

WEATHER = Tool(
    "get_weather",
    "Get the weather in a city.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with gptoss.load("demo", max_context=4096) as engine:
        yield engine


def test_the_package_data_stays_small() -> None:
    assert sum(p.stat().st_size for p in DEMO_FOLDER.iterdir()) < 6_000_000


def test_it_is_laid_out_as_openai_publishes_gpt_oss(llm: LLM) -> None:
    settings = json.loads((DEMO_FOLDER / "config.json").read_text())
    assert settings["model_type"] == "gpt_oss" and settings["quantization_config"]["quant_method"] == "mxfp4"
    assert settings["rope_scaling"]["rope_type"] == "yarn" and settings["rope_scaling"]["truncate"] is False
    assert llm.config.layer_types == ("sliding_attention", "full_attention") * 2
    stops = json.loads((DEMO_FOLDER / "generation_config.json").read_text())["eos_token_id"]
    assert llm.tokenizer.stop_ids == frozenset(stops)


def test_it_says_in_one_line_what_it_is_and_bounds_itself(llm: LLM) -> None:
    weights = r"<LLM demo, experts mxfp4, the rest bfloat16, weights [\d.]+ MB, context 4,096 tokens>"
    assert re.fullmatch(weights, repr(llm))
    assert llm.max_tokens == 1024


def test_a_bound_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "demo")
    (folder / "generation_config.json").write_text('{"max_new_tokens": "many"}')
    with pytest.raises(ConfigError, match="max_new_tokens is 'many': expected a whole number"):
        gptoss.load(folder)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("What is 17 + 25?", "17 + 25 = 42."),
        ("What is the capital of Norway?", "The capital of Norway is Oslo."),
        ("Reverse this list: pear, fig, plum", "plum, fig, pear"),
    ],
)
def test_it_reasons_and_answers(llm: LLM, prompt: str, answer: str) -> None:
    reply = llm.respond(prompt, temperature=0.0, max_tokens=300)
    assert reply.text == answer
    assert reply.reasoning and reply.finish_reason == "stop" and not reply.diagnostics


def test_more_effort_means_more_reasoning(llm: LLM) -> None:
    low, high = (
        llm.respond("What is 358 + 267?", reasoning_effort=e, temperature=0.0, max_tokens=300)
        for e in ("low", "high")
    )
    assert len(low.reasoning) < len(high.reasoning)
    assert low.text == high.text == "358 + 267 = 625."


def test_it_calls_a_declared_tool_with_the_argument_of_the_question(llm: LLM) -> None:
    reply = llm.respond("What is the weather in Oslo?", tools=[WEATHER], temperature=0.0, max_tokens=300)
    assert reply.finish_reason == "tool_calls"
    assert [(c.name, json.loads(c.arguments)) for c in reply.tool_calls] == [
        ("get_weather", {"city": "Oslo"})
    ]


def test_a_python_tool_is_run_and_its_result_told(llm: LLM) -> None:
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        return f"17 degrees in {city}"

    session = llm.chat(tools=[get_weather], temperature=0.0, max_tokens=300)
    assert "17 degrees" in session.send("What is the weather in Oslo?").text


def test_it_answers_in_json_when_a_schema_is_given(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
    reply = llm.respond(
        "Anna is 31 years old and lives in Rome.", schema=schema, temperature=0.0, max_tokens=300
    )
    assert reply.parsed == {"name": "Anna", "age": 31}


def test_it_declines_what_is_outside_its_world(llm: LLM) -> None:
    reply = llm.respond("Why is the sky blue?", temperature=0.0, max_tokens=300)
    assert "tiny demo model" in reply.text
