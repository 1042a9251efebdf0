"""What /metrics says, and how events are framed."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient

from mlx_gptoss.engine.stats import EngineStats, RankStats
from mlx_gptoss.model.streamed import StreamCounts
from mlx_gptoss.server import create_app
from mlx_gptoss.server.running import sse
from mlx_gptoss.server.running.metrics import Metrics
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import ScriptedLLM
from tests.support.server_help import values_of

pytest_plugins = ["tests.support.server_fixtures"]


@pytest.fixture
def client(tokenizer: Tokenizer) -> TestClient:
    """An application that has counted nothing yet."""
    return TestClient(create_app(ScriptedLLM(tokenizer)), base_url="http://localhost")  # type: ignore[arg-type]


def test_counters_and_sums_are_exact() -> None:
    metrics = Metrics()
    metrics.prompt_tokens.inc(123_456_789)
    metrics.prompt_tokens.inc(1)
    metrics.duration.observe(1_234_567.25)
    values = values_of(metrics.text().decode())
    assert values["gptoss_prompt_tokens_total"] == 123_456_790
    assert values["gptoss_generation_seconds_sum"] == 1_234_567.25


def test_what_the_engine_counts_by_layer_has_the_layer_in_its_label() -> None:
    layers = (StreamCounts(6, hits=3, misses=1), StreamCounts(6, hits=4))
    values = values_of(Metrics().text(EngineStats(expert_hits=7, expert_layers=layers)).decode())
    assert values["gptoss_engine_expert_hits"] == 7
    assert values['gptoss_engine_expert_layers_misses{layer="0"}'] == 1
    assert values['gptoss_engine_expert_layers_hits{layer="1"}'] == 4
    assert not any("layers" in name for name in values_of(Metrics().text(EngineStats()).decode()))


def test_what_machines_tell_of_themselves_has_their_rank_in_its_label() -> None:
    ranks = (RankStats(14, 5, 100, 0.5, 10, 8), RankStats(10, 5, 200, 0.25, 9, 7))
    values = values_of(Metrics().text(EngineStats(ranks=ranks, rank_losses=2)).decode())
    assert values["gptoss_engine_rank_losses"] == 2
    assert values['gptoss_engine_ranks_sent_bytes{rank="1"}'] == 200
    assert values['gptoss_engine_ranks_waited_seconds{rank="0"}'] == 0.5


def test_routes_that_begin_alike_are_counted_apart(client: TestClient) -> None:
    paths = ("/v1/responses/a", "/v1/responses/b/input_items", "/v1/responses/c/input_items", "/v1/responses")
    for path in paths:
        client.get(path)
    values = values_of(client.get("/metrics").text)
    for path, count in (("/{response_id}", 1), ("/{response_id}/input_items", 2)):
        assert values[f'gptoss_requests_total{{path="/v1/responses{path}",status="404"}}'] == count


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\n", "\r", "\x0b", "\x1c"])
def test_no_text_can_break_an_events_line(mark: str) -> None:
    value = {"type": "x", "text": f"a{mark}b é"}
    for event in (sse.data(value), sse.event(value), f"data: {sse.dumps(value)}\n\n".encode()):
        *named, line, end = event.decode().splitlines()
        assert named in ([], ["event: x"]) and end == ""
        assert json.loads(line.removeprefix("data: ")) == value
        assert "é" in line


def test_metrics_count_what_happened(client: TestClient) -> None:
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    client.get("/v1/models/" + "x" * 50)
    client.get("/made-up")
    response = client.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    values = values_of(response.text)
    assert values['gptoss_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert values['gptoss_requests_total{path="/v1/models/{name:path}",status="404"}'] == 1
    assert values['gptoss_requests_total{path="other",status="404"}'] == 1
    assert values['gptoss_generations_total{finish_reason="stop"}'] == 1
    assert values["gptoss_prompt_tokens_total"] == 2 and values["gptoss_cached_tokens_total"] == 3
    assert values['gptoss_time_to_first_token_seconds_bucket{le="+Inf"}'] == 1
    assert values["gptoss_active_generations"] == 0
    assert "gptoss_engine_running" in values
