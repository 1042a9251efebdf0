"""Pydantic AI over both of OpenAI's APIs: a tool loop, a stream, an object. Prints one JSON object."""

import asyncio
import json
import os

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, KEY = os.environ["BASE_URL"], os.environ["API_KEY"]


class Place(BaseModel):
    """A place."""

    city: str


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return f"sunny in {city}"


async def run() -> dict[str, dict[str, str]]:
    openai = OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY)
    models = {
        "chat": OpenAIChatModel("any", provider=openai),
        "responses": OpenAIResponsesModel("any", provider=openai),
    }
    told = {}
    for name, model in models.items():
        agent = Agent(model, tools=[get_weather])
        async with agent.run_stream("weather?") as stream:
            streamed = await stream.get_output()
        place = await Agent(model, output_type=NativeOutput(Place)).run("where?")
        told[name] = {
            "text": (await agent.run("weather?")).output,
            "streamed": streamed,
            "object": place.output.city,
        }
    return told


print(json.dumps(asyncio.run(run())))
