"""LiteLLM over its providers: a tool loop, a stream, an object. Prints one JSON object by provider."""

import json
import os
from typing import Any

import litellm

URL, KEY = os.environ["BASE_URL"], os.environ["API_KEY"]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SHAPE = {
    "type": "json_schema",
    "json_schema": {
        "name": "place",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PROVIDERS: dict[str, dict[str, Any]] = {
    "openai": {"model": "openai/any", "api_base": f"{URL}/v1", "api_key": KEY},
    "hosted_vllm": {"model": "hosted_vllm/any", "api_base": f"{URL}/v1", "api_key": KEY},
    "anthropic": {"model": "anthropic/any", "api_base": URL, "api_key": KEY, "max_tokens": 300},
    "ollama": {"model": "ollama_chat/any", "api_base": URL, "api_key": KEY},
}


def text_of(**asked: Any) -> str:
    """A streamed answer."""
    pieces = litellm.completion(**asked, stream=True)
    return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)


told = {}
for name, provider in PROVIDERS.items():
    messages: list[Any] = [{"role": "user", "content": "weather?"}]
    first = litellm.completion(**provider, messages=messages, tools=[TOOL]).choices[0].message
    [call] = first.tool_calls
    messages += [
        first.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": "sunny"},
    ]
    asked = {**provider, "messages": [{"role": "user", "content": "where?"}], "response_format": SHAPE}
    told[name] = {
        "arguments": json.loads(call.function.arguments),
        "text": litellm.completion(**provider, messages=messages, tools=[TOOL]).choices[0].message.content,
        "streamed": text_of(**provider, messages=messages, tools=[TOOL]),
        "object": json.loads(litellm.completion(**asked).choices[0].message.content),
    }
responses = litellm.responses(
    model="openai/any", api_base=f"{URL}/v1", api_key=KEY, input="hello", reasoning={"effort": "low"}
)
told["responses"] = {"text": responses.output[-1].content[0].text}
print(json.dumps(told))
