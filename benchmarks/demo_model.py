"""What the demo model can do, and that this runtime runs it exactly: the figures of docs/demo-model.md.

    python -m benchmarks.demo_model                     # accuracy by task, well-formedness, speed
    python -m benchmarks.demo_model --float32 FOLDER    # also the float32 checkpoint that it was made from
    python -m benchmarks.demo_model --transformers      # also agreement with transformers (extra "train")

The prompts come from the generator that made the training data, with seeds that training never used. A reply
is right when its text, or the called function and all its arguments, equal the expected ones exactly; a tool
loop is right when every call and the answer are.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.world.mixture import sample
from demo.world.sample import Sample
from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.harmony import Conversation, Done, Message, Reply, render
from mlx_gptoss.llm import LLM, load
from mlx_gptoss.sampling import SamplingParams

GROUPS = {
    "arithmetic": ("add", "subtract", "multiply", "story", "follow_up"),
    "comparison": ("compare",),
    "letters": ("count_letter", "spell"),
    "lists": ("reverse", "sort", "pick", "say"),
    "facts": ("capital", "calendar", "about", "beyond", "date"),
    "tools": ("tool", "two_tools", "tool_follow_up", "tool_error", "no_tool"),
    "JSON": ("json",),
}
MAX_TOKENS = 400
AT_ONCE = 16


def held_out(each: int, seed: str = "benchmark") -> list[Sample]:
    """`each` samples of every task, from a seed that training does not use."""
    rng = random.Random(seed)
    wanted = {task: each for tasks in GROUPS.values() for task in tasks}
    chosen: list[Sample] = []
    while any(wanted.values()):
        made = sample(rng)
        if wanted[made.task]:
            wanted[made.task] -= 1
            chosen.append(made)
    return chosen


def replies(llm: LLM, conversations: Sequence[Conversation], temperature: float = 0.0) -> list[Reply]:
    """The replies to all conversations, AT_ONCE at a time; sampled ones with the seeds 0, 1, 2, .."""
    out: list[Reply] = []
    for start in range(0, len(conversations), AT_ONCE):
        running = [
            llm.start(
                c,
                TurnOptions(SamplingParams(temperature=temperature, max_tokens=MAX_TOKENS, seed=start + i)),
            )
            for i, c in enumerate(conversations[start : start + AT_ONCE])
        ]
        for generation in running:
            *_, done = generation
            assert isinstance(done, Done)
            out.append(done.reply)
    return out


def is_right(reply: Reply, made: Sample, step: int) -> bool:
    """Whether a reply is the expected step of a sample."""
    expected = made.steps[step]
    if expected.call is None:
        if made.conversation.response_schema is not None:
            return _json(reply.text) == _json(expected.final or "")
        return reply.finish_reason == "stop" and reply.text == expected.final
    calls = reply.tool_calls
    return (
        len(calls) == 1
        and calls[0].name == expected.call
        and _json(calls[0].arguments) == _json(expected.arguments)
    )


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def accuracy(llm: LLM, samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """By task: (right, seen). The tools' results are given as the sample has them."""
    right: Counter[str] = Counter()
    seen = Counter(s.task for s in samples)
    going = [(s, Conversation(**vars(s.conversation))) for s in samples]
    step = 0
    while going:
        answers = replies(llm, [c for _, c in going])
        after = []
        for (made, conversation), reply in zip(going, answers, strict=True):
            if not is_right(reply, made, step):
                continue
            if step + 1 == len(made.steps):
                right[made.task] += 1
                continue
            call = reply.tool_calls[0]
            result = Message.tool_result(made.steps[step].result or "", call_id=call.call_id)
            conversation.messages = [*conversation.messages, *reply.messages, result]
            after.append((made, conversation))
        going, step = after, step + 1
    return {task: (right[task], seen[task]) for task in seen}


def by_group(pairs: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Tasks summed to the groups of the model card."""
    sums = {}
    for group, tasks in GROUPS.items():
        sums[group] = (sum(pairs[t][0] for t in tasks), sum(pairs[t][1] for t in tasks))
    return sums


def well_formed(llm: LLM, samples: Sequence[Sample]) -> tuple[int, int]:
    """At temperature 1: how many first replies end by themselves without any diagnostic."""
    answers = replies(llm, [s.conversation for s in samples], temperature=1.0)
    good = sum(not r.diagnostics and r.finish_reason in ("stop", "tool_calls") for r in answers)
    return good, len(answers)


def speed(llm: LLM, samples: Sequence[Sample]) -> float:
    """Tokens a second of `llm.respond`, one prompt after another, prompts included."""
    tokens, began = 0, time.perf_counter()
    for made in samples:
        effort = made.conversation.reasoning_effort
        prompt = made.conversation.messages
        reply = llm.respond(prompt, reasoning_effort=effort, temperature=0.0, max_tokens=MAX_TOKENS)
        tokens += reply.usage.completion_tokens
    return tokens / (time.perf_counter() - began)


def against_transformers(llm: LLM, samples: Sequence[Sample]) -> dict[str, float]:
    """The same checkpoint in transformers, float32: greatest difference in logits along prompt and greedy
    reply, and how many greedy replies are its own, token by token."""
    import numpy as np
    import torch

    model = dequantised(llm.folder)
    worst, same, tightest = 0.0, 0, float("inf")
    for made in samples:
        prompt = render(made.conversation, llm.tokenizer)
        reply = list(llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)))
        ids = prompt + reply
        ours = llm.logits(ids)
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].numpy()
        worst = max(worst, float(np.abs(ours - theirs).max()))
        rows = theirs[len(prompt) - 1 : -1]
        same += bool((rows.argmax(-1) == reply).all())
        top = np.sort(rows, axis=-1)
        tightest = min(tightest, float((top[:, -1] - top[:, -2]).min()))
    return {"worst": worst, "same": same, "prompts": len(samples), "tightest": tightest}


def dequantised(folder: Path) -> Any:
    """transformers' model with the weights of a checkpoint laid out as OpenAI publishes them, in float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import GptOssConfig, GptOssForCausalLM

    from demo.quantise import mxfp4_values

    stored = load_file(folder / "model.safetensors")
    tensors = {}
    for name, value in stored.items():
        if name.endswith("_blocks"):
            codes = torch.stack((value & 15, value >> 4), -1).flatten(-3)
            whole = mxfp4_values(codes, stored[name.replace("_blocks", "_scales")])
            tensors[name.removesuffix("_blocks")] = whole.mT.contiguous()
        elif not name.endswith("_scales"):
            tensors[name] = value.float()
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("quantization_config")
    config = GptOssConfig(**settings | {"dtype": "float32"})
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config)
    model.load_state_dict(tensors)
    return model.eval()


def loads_in_mlx_lm(folder: Path) -> str:
    """What mlx-lm answers with the converted folder."""
    from mlx_lm import generate
    from mlx_lm import load as load_mlx_lm

    model, tokenizer, *_ = load_mlx_lm(str(folder))
    with load(folder) as llm:
        prompt = render(Conversation([Message.user("What is 17 + 25?")]), llm.tokenizer)
    return generate(model, tokenizer, prompt, max_tokens=80)


def main() -> None:
    """Print the figures as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--each", type=int, default=40, help="held-out samples of each task")
    parser.add_argument("--float32", type=Path, help="the float32 checkpoint that training exported")
    parser.add_argument(
        "--transformers", action="store_true", help="compare with transformers on 100 prompts"
    )
    args = parser.parse_args()
    from mlx_gptoss.checkpoint.hub import resolve
    from mlx_gptoss.convert.convert import convert
    from mlx_gptoss.convert.recipes import make_recipe

    samples = held_out(args.each)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "demo-mxfp4-q4"
        convert(resolve("demo"), target, make_recipe("mxfp4-q4"))
        models = {"converted, mxfp4-q4": target, "shipped, MXFP4 + bfloat16": resolve("demo")}
        if args.float32:
            models["trained, float32"] = args.float32
        tables = {}
        for name, where in models.items():
            with load(where, dtype="float32", max_context=4096) as llm:
                tables[name] = accuracy(llm, samples)
                if where == target:
                    good, seen = well_formed(llm, held_out(15, "temperature 1"))
                    rate = speed(llm, held_out(2, "speed"))
        print_accuracy(tables)
        print(f"\nWell-formed replies at temperature 1: {good} of {seen} ({good / seen:.1%}).")
        print(
            f"\n`llm.respond`, one prompt at a time, prompts included: {rate:.0f} tokens/s on this machine."
        )
        if args.transformers:
            with load("demo", dtype="float32", max_context=4096) as llm:
                found = against_transformers(llm, held_out(5, "agreement")[:100])
            print(
                f"\nAgainst transformers in float32 on {found['prompts']} prompts: logits differ by at most "
                f"{found['worst']:.1e}, {found['same']} greedy replies are equal token by token "
                f"(tightest decision {found['tightest']:.1e})."
            )
            print(f"\nmlx-lm, converted folder: {loads_in_mlx_lm(target)!r}")


def print_accuracy(tables: dict[str, dict[str, tuple[int, int]]]) -> None:
    """One row a group and a task, one column a model."""
    print(f"| task | prompts | {' | '.join(tables)} |")
    print(f"|---|---|{'---|' * len(tables)}")
    first = next(iter(tables.values()))
    grouped = {name: by_group(pairs) for name, pairs in tables.items()}
    for group, tasks in GROUPS.items():
        cells = [f"**{g[group][0] / g[group][1]:.1%}**" for g in grouped.values()]
        count = sum(first[t][1] for t in tasks)
        print(f"| **{group}** | {count} | {' | '.join(cells)} |")
        if len(tasks) > 1:
            for task in tasks:
                cells = [f"{p[task][0] / p[task][1]:.1%}" for p in tables.values()]
                print(f"| {task} | {first[task][1]} | {' | '.join(cells)} |")
    totals = [f"{sum(r for r, _ in p.values()) / sum(s for _, s in p.values()):.1%}" for p in tables.values()]
    print(f"| all | {sum(s for _, s in first.values())} | {' | '.join(totals)} |")


if __name__ == "__main__":
    main()
