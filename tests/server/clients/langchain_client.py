"""LangChain over both of OpenAI's APIs: a tool loop, a stream, an object. Prints one JSON object."""

import json
import os

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Place(BaseModel):
    """A place."""

    city: str


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"sunny in {city}"


told = {}
for api in ("chat", "responses"):
    model = ChatOpenAI(
        model="any",
        base_url=f"{os.environ['BASE_URL']}/v1",
        api_key=os.environ["API_KEY"],
        use_responses_api=api == "responses",
        max_retries=0,
    )
    bound = model.bind_tools([get_weather])
    messages = [HumanMessage("weather?")]
    first = bound.invoke(messages)
    messages.append(first)
    messages += [get_weather.invoke(call) for call in first.tool_calls]
    streamed = None
    for piece in bound.stream(messages):
        streamed = piece if streamed is None else streamed + piece
    told[api] = {
        "calls": len(first.tool_calls),
        "text": bound.invoke(messages).text,
        "streamed": streamed.text,
        "object": model.with_structured_output(Place, method="json_schema").invoke("where?").city,
    }
print(json.dumps(told))
