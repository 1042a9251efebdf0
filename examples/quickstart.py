"""Load a model, ask, follow up. `MODEL = "openai/gpt-oss-20b"` runs the same on the real one."""

import mlx_gptoss as gptoss

MODEL = "demo"

with gptoss.load(MODEL) as llm:
    reply = llm.respond("What is 17 + 25?", reasoning_effort="low", temperature=0.0)
    print(reply.text)
    print(f"({reply.usage.completion_tokens} tokens, {reply.usage.reasoning_tokens} of them reasoning)")

    chat = llm.chat(instructions="Be brief.", temperature=0.0)
    print(chat.send("What is 358 - 99?").text)
    print(chat.send("And 41 more?").text)
