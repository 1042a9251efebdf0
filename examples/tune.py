"""Teach the demo model another form of answer, and compare: python examples/tune.py

A few steps are enough to see the loss fall; docs/tune.md tells what more of them do.
"""

import json
import tempfile
from pathlib import Path

import mlx_gptoss as gptoss
from mlx_gptoss.tune import TuneOptions, tune
from mlx_gptoss.tune.run import Check

MODEL = "demo"
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Egypt": "Cairo",
    "Japan": "Tokyo",
    "Peru": "Lima",
}

folder = Path(tempfile.mkdtemp())
with (folder / "train.jsonl").open("w") as file:
    for country, capital in CAPITALS.items():
        question = {"role": "user", "content": f"What is the capital of {country}?"}
        answer = {"role": "assistant", "reasoning": f"{capital}.", "content": f"= {capital} ="}
        file.write(json.dumps({"messages": [question, answer]}) + "\n")


def show(event):
    if isinstance(event, Check) and event.samples:
        print(f"step {event.step}: {event.samples[0][1]}")


options = TuneOptions(rank=8, scale=4, lr=3e-3, steps=10, every=5, tokens=512, valid="none", samples=1)
tune(MODEL, folder, folder / "adapter", options, on_event=show)

with gptoss.load(MODEL, adapters={"short": folder / "adapter"}) as llm:
    for adapter in ("base", "short"):
        reply = llm.respond("What is the capital of Kenya?", adapter=adapter, temperature=0.0, max_tokens=80)
        print(f"{adapter}: {reply.text}")
