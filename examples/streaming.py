"""Stream a reply, the reasoning dimmed. `MODEL = "openai/gpt-oss-20b"` runs the same on the real one."""

import mlx_gptoss as gptoss

MODEL = "demo"
DIM, PLAIN = "\033[2m", "\033[0m"

with gptoss.load(MODEL) as llm:
    for event in llm.stream("What is 358 + 267?", reasoning_effort="high", temperature=0.0):
        match event:
            case gptoss.ReasoningDelta(text=text):
                print(f"{DIM}{text}{PLAIN}", end="", flush=True)
            case gptoss.TextDelta(text=text):
                print(text, end="", flush=True)
            case gptoss.Done(usage=usage, finish_reason=reason):
                print(f"\n{DIM}{usage.completion_tokens} tokens, finished by {reason}{PLAIN}")
