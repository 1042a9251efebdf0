"""The request of /v1/chat/completions, as OpenAI documents it, with fields that gpt-oss servers share.

Fields that change nothing here (user, store, metadata, service_tier, …) may be sent and are ignored, as are
unknown ones; what would change the answer and is not supported is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlx_gptoss.errors import RequestError
from mlx_gptoss.harmony import Tool


class Protocol(BaseModel):
    """Base of all requests: JSON types as they are, no coercion, no NaN."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class ContentPart(Protocol):
    type: str
    text: str | None = None
    refusal: str | None = None


Content = str | list[ContentPart]


class FunctionCall(Protocol):
    name: str
    arguments: str


class ChatToolCall(Protocol):
    id: str
    type: str = "function"
    function: FunctionCall | None = None


class ChatMessage(Protocol):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ChatToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class FunctionDeclaration(Protocol):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(Protocol):
    type: str
    function: FunctionDeclaration | None = None


class JsonSchemaFormat(Protocol):
    name: str = "response"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Protocol):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StreamOptions(Protocol):
    include_usage: bool | None = None


Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(ge=0, le=1)]  # 0 leaves the likeliest token
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenLimit = Annotated[int, Field(ge=1, le=2**31)]


class SamplingFields(Protocol):
    """Sampling as both completion APIs take it; top_k, min_p and repetition_penalty are common extensions."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: TokenLimit | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    model: str | None = None
    user: str | None = None


class ChatRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[ChatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        """RequestError for what is asked and cannot be done."""
        cures = {
            "audio": "gpt-oss reads and writes text only",
            "functions": "send tools instead",
            "function_call": "send tool_choice instead",
            "web_search_options": "this server has no web search; declare a tool of your own",
        }
        for name, cure in cures.items():
            if getattr(self, name) is not None:
                raise RequestError(f"{name} is not supported: {cure}", name)
        if self.modalities is not None and self.modalities != ["text"]:
            raise RequestError(
                f"modalities is {self.modalities!r:.80}: gpt-oss writes text only", "modalities"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")


@contextmanager
def naming(fields: Mapping[str, str]) -> Iterator[None]:
    """Have a RequestError from beneath name what the client sent. fields: name there -> name here."""
    try:
        yield
    except RequestError as error:
        there = error.field or ""
        if here := fields.get(there):
            message = str(error)
            if message.startswith(there):
                error.args = (here + message.removeprefix(there),)
            error.field = here
        raise


def tool_fields(offered: Sequence[Tool], declared: Sequence[str | None], part: str) -> dict[str, str]:
    """`naming` for the schemas of the offered tools. declared: the names as the client listed them, None for
    what is no function; part: where a declaration has its schema."""
    place = {name: index for index, name in enumerate(declared)}
    return {
        f"tools[{index}].parameters": f"tools[{place[tool.name]}].{part}"
        for index, tool in enumerate(offered)
    }


def text_of(content: str | Sequence[ContentPart] | None, field: str) -> str:
    """The text of a message's content; images, audio and files are refused by name."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "input_text", "output_text", "refusal"):
            raise RequestError(
                f"{field}[{index}] is of type {part.type[:40]!r}: gpt-oss reads text only",
                f"{field}[{index}].type",
            )
        if text is None:
            raise RequestError(f"{field}[{index}] has no text", f"{field}[{index}].text")
        texts.append(text)
    return "\n".join(texts)
