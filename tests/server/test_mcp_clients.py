"""OpenAI's clients with tools that the server runs: openai, and openai-agents' hosted MCP servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    HostedMCPTool,
    MCPToolApprovalFunctionResult,
    MCPToolApprovalRequest,
    OpenAIResponsesModel,
    Runner,
    set_tracing_disabled,
)

from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.server.test_server_tools import NOTE, WEATHER, calls
from tests.support.scripted_llm import ScriptedLLM
from tests.support.served_tools import served_tools
from tests.support.server_help import live

pytest_plugins = ["tests.support.server_fixtures"]


@pytest.fixture(scope="module")
def llm(tokenizer: Tokenizer) -> ScriptedLLM:
    return ScriptedLLM(tokenizer)


@pytest.fixture(scope="module")
def url(llm: ScriptedLLM) -> Iterator[str]:
    with (
        served_tools() as toolbox,
        live(create_app(llm, ServerSettings(port=0), toolbox)) as url,  # type: ignore[arg-type]
    ):
        yield url + "/v1"


TOOL: Any = {"type": "mcp", "server_label": "toy", "require_approval": "never"}


def test_openai_responses_stream_a_call(url: str, llm: ScriptedLLM) -> None:
    llm.write = calls(WEATHER)
    with openai.OpenAI(base_url=url, api_key="x") as client:
        with client.responses.stream(model="any", input="?", tools=[TOOL]) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert "response.mcp_call.completed" in kinds and "response.mcp_list_tools.completed" in kinds
        assert final.output_text == "It says: sunny in Rome"
        llm.write = calls(NOTE)
        first = client.responses.create(model="any", input="?", tools=[TOOL])
        asked = first.output[-1]
        assert asked.type == "mcp_approval_request" and asked.name == "note"
        second = client.responses.create(
            model="any",
            previous_response_id=first.id,
            input=[{"type": "mcp_approval_response", "approval_request_id": asked.id, "approve": True}],
            tools=[TOOL],
        )
        assert second.output_text == "It says: noted: a"
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="any", input="?", tools=[TOOL | {"server_label": "none"}])
        assert caught.value.param == "tools[0].server_label"


def test_openai_chat_tells_what_was_run(url: str, llm: ScriptedLLM) -> None:
    llm.write = calls(WEATHER)
    with openai.OpenAI(base_url=url, api_key="x") as client:
        messages: Any = [{"role": "user", "content": "?"}]
        message = (
            client.chat.completions.create(model="any", messages=messages, tools=[TOOL]).choices[0].message
        )
    extra: Any = message.model_extra
    assert message.content == "It says: sunny in Rome"
    assert extra["executed_tools"][0]["output"] == "sunny in Rome"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("approve", [True, False])
def test_openai_agents_use_a_hosted_server(url: str, llm: ScriptedLLM, approve: bool, streamed: bool) -> None:
    set_tracing_disabled(True)
    llm.write = calls(NOTE)
    asked: list[str] = []

    def decide(request: MCPToolApprovalRequest) -> MCPToolApprovalFunctionResult:
        asked.append(request.data.name)
        return {"approve": approve} if approve else {"approve": False, "reason": "not today"}

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key="x") as client:
            agent = Agent(
                name="helper",
                model=OpenAIResponsesModel("any", client),
                tools=[HostedMCPTool(tool_config=TOOL, on_approval_request=decide)],
            )
            if not streamed:
                return (await Runner.run(agent, "?")).final_output
            result = Runner.run_streamed(agent, "?")
            async for _ in result.stream_events():
                pass
            return result.final_output

    answer = asyncio.run(run())
    assert asked == ["note"]
    if approve:
        assert answer == "It says: noted: a"
    else:
        assert answer == "It says: error: the user did not allow this call: not today"
