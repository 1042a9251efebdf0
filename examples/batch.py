"""Answer every line of a file at once: python examples/batch.py [FILE].

The prompts run together in one batch, and replies come as they end. `MODEL = "openai/gpt-oss-20b"` runs the
same on the real one.
"""

import sys
import time
from pathlib import Path

import mlx_gptoss as gptoss

MODEL = "demo"

path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("prompts.txt")
prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

with gptoss.load(MODEL) as llm:
    began, tokens = time.perf_counter(), 0
    for index, reply in llm.respond_many(prompts, temperature=0.0):
        print(f"{prompts[index]}\n    {reply.text}")
        tokens += reply.usage.completion_tokens
    print(f"{len(prompts)} replies, {tokens} tokens in {time.perf_counter() - began:.1f} s")
