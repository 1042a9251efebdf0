"""Answer every line of a file at once: python examples/batch.py [FILE].

The prompts run together in one batch. `MODEL = "openai/gpt-oss-20b"` runs the same on the real one.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx_gptoss as gptoss

MODEL = "demo"

path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("prompts.txt")
prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

with gptoss.load(MODEL) as llm, ThreadPoolExecutor(len(prompts)) as pool:
    began = time.perf_counter()
    replies = list(pool.map(lambda p: llm.respond(p, temperature=0.0), prompts))
    seconds = time.perf_counter() - began
    for prompt, reply in zip(prompts, replies, strict=True):
        print(f"{prompt}\n    {reply.text}")
    tokens = sum(r.usage.completion_tokens for r in replies)
    print(f"{len(prompts)} replies, {tokens} tokens in {seconds:.1f} s")
