"""LlamaIndex's OpenAILike: a tool loop, a stream, an object. Prints one JSON object."""

import json
import os

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Place(BaseModel):
    """A place."""

    city: str


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"sunny in {city}"


llm = OpenAILike(
    model="any",
    api_base=f"{os.environ['BASE_URL']}/v1",
    api_key=os.environ["API_KEY"],
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=4096,
    max_retries=0,
)
weather = FunctionTool.from_defaults(get_weather)
history = [ChatMessage(role="user", content="weather?")]
first = llm.chat_with_tools([weather], chat_history=history)
[call] = llm.get_tool_calls_from_response(first)
history += [
    first.message,
    ChatMessage(
        role="tool",
        content=str(weather(**call.tool_kwargs)),
        additional_kwargs={"tool_call_id": call.tool_id},
    ),
]
pieces = [piece.delta or "" for piece in llm.stream_chat(history)]
place = llm.predict_and_call([get_function_tool(Place)], "where?")
print(
    json.dumps(
        {
            "text": llm.chat(history).message.content,
            "streamed": "".join(pieces),
            "object": place.sources[0].raw_output.city,
        }
    )
)
