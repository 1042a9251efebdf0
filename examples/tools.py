"""Python functions as tools, run in a loop. `MODEL = "openai/gpt-oss-20b"` runs the same on the real one."""

import mlx_gptoss as gptoss

MODEL = "demo"


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return {"Oslo": "4 degrees and snowy", "Rome": "21 degrees and sunny"}.get(city, "12 degrees and cloudy")


with gptoss.load(MODEL) as llm:
    chat = llm.chat(tools=[get_weather], temperature=0.0)
    for prompt in ("What is the weather in Oslo?", "And in Rome?"):
        reply = chat.send(prompt)
        print(f"> {prompt}")
        for message in reply.messages:
            if message.channel == "commentary":
                print(f"  {message.role}: {message.content}")
        print(f"  {reply.text}")
