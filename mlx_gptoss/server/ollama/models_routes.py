"""GET /api/version, /api/tags and /api/ps, POST /api/show: what Ollama's clients ask about the model."""

from __future__ import annotations

import datetime
import re
from typing import Any

from mlx_gptoss.server.http.api import ApiRouter
from mlx_gptoss.server.model_facts import FAMILY, ModelFacts
from mlx_gptoss.server.ollama.writer import ollama_error
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.request import RequestModel

# The release of Ollama whose API this is; clients compare it with what they need.
VERSION = "0.13.5"
CAPABILITIES = ["completion", "tools", "thinking"]
_OPENAI_NAME = re.compile(r"(gpt-oss(?:-safeguard)?)-(\d+b)(?![a-z0-9])")


class ShowRequest(RequestModel):
    """Which model to tell of: there is one, whatever it is called."""

    model: str | None = None
    name: str | None = None  # the older spelling
    verbose: bool | None = None


def ollama_name(name: str) -> str:
    """A model's name as Ollama has it: gpt-oss:20b for openai/gpt-oss-20b, NAME:latest for others."""
    found = _OPENAI_NAME.match(name)
    if found is not None:
        return f"{found[1]}:{found[2]}"
    return name if ":" in name else f"{name}:latest"


def details(facts: ModelFacts) -> dict[str, Any]:
    """What kind of model it is."""
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": FAMILY,
        "families": [FAMILY],
        "parameter_size": facts.parameter_size,
        "quantization_level": facts.quantization,
    }


def model_info(facts: ModelFacts) -> dict[str, Any]:
    """The model's shape under the names of GGUF's metadata, which Ollama tells."""
    c = facts.config
    shape = {
        "context_length": facts.max_context,
        "block_count": c.num_layers,
        "embedding_length": c.hidden_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.sliding_window": c.sliding_window,
        "expert_count": c.num_experts,
        "expert_used_count": c.experts_per_token,
        "expert_feed_forward_length": c.intermediate_size,
        "rope.freq_base": c.rope_theta,
    }
    general = {"general.architecture": FAMILY, "general.parameter_count": c.parameters}
    return general | {f"{FAMILY}.{name}": value for name, value in shape.items()}


def router(state: ServerState) -> ApiRouter:
    """The routes, bound to a server."""
    routes = ApiRouter("/api", "Ollama", ollama_error, always_json=True)

    def summary() -> dict[str, Any]:
        facts, name = state.facts(), ollama_name(state.model_name)
        return {
            "name": name,
            "model": name,
            "size": facts.size,
            "digest": facts.digest,
            "details": details(facts),
        }

    @routes.get("/version")
    async def version() -> dict[str, Any]:
        """The release of Ollama whose API this is."""
        return {"version": VERSION}

    @routes.get("/tags")
    def tags() -> dict[str, Any]:
        """The models of this server: one."""
        return {"models": [summary() | {"modified_at": state.facts().modified}]}

    @routes.get("/ps")
    def running() -> dict[str, Any]:
        """The models in memory: one, or none while it is unloaded."""
        facts = state.facts()
        if state.llm is None:
            return {"models": []}
        left = state.residence.idle_left
        ever = datetime.datetime.max.replace(year=2318, tzinfo=datetime.UTC)  # Ollama's "until stopped"
        until = ever if left is None else now_plus(left)
        loaded = {"expires_at": until, "size_vram": facts.size, "context_length": facts.max_context}
        return {"models": [summary() | loaded]}

    @routes.post("/show")
    def show(body: ShowRequest) -> dict[str, Any]:
        """What the model is and can do."""
        facts = state.facts()
        return {
            "modelfile": f"FROM {ollama_name(state.model_name)}",
            "parameters": "",
            "template": "{{ .Prompt }}",
            "details": details(facts),
            "model_info": model_info(facts),
            "capabilities": CAPABILITIES,
            "modified_at": facts.modified,
        }

    return routes


def now_plus(seconds: float) -> datetime.datetime:
    """A moment to come."""
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
