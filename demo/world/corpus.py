"""Conversations as token ids with a mask of the tokens to learn, and the vocabulary they are written in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from demo.world.mixture import samples
from demo.world.sample import Sample, Step
from demo.world.words import words_of
from mlx_gptoss.harmony import render_text
from mlx_gptoss.harmony.types import Message
from mlx_gptoss.tokenizer import SPECIAL_TOKENS

# Text that every prompt repeats: one token each, as the merges reach across its words.
_PHRASES = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n",
    "Current date: ",
    "\n\nReasoning: ",
    "\nReasoning: ",
    "\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    "\nCalls to these tools must go to the commentary channel: 'functions'.",
    "# Instructions\n\n",
    "# Tools\n\n## functions\n\nnamespace functions {\n\n",
    "}) => any;\n\n",
    "} // namespace functions",
    "# Response Formats\n\n## ",
    " = () => any;\n\n",
    " = (_: {\n",
    ": string,\n",
    ": number,\n",
    "?: string,\n",
    "?: number,\n",
    "\ntype ",
    ",\n",
    "// ",
    '" | "',
    '": "',
    '?: "',
    ': "',
    '",\n',
    " to=functions.",
    "functions.",
    '"type":"object"',
    '"type":"string"',
    '"type":"integer"',
    '"type":"boolean"',
    '"type":"array"',
    '"items":{',
    '"properties":{"',
    '"required":["',
    '"additionalProperties":false',
    '"title":"',
    '{"',
    '":"',
    '":{',
    '","',
    '":',
    '"}',
    '"},"',
    "You are a helpful assistant.",
    ", ",
    ". ",
    "The user wants ",
    "The tool answered.",
    " Call ",
    "JSON: ",
    "Tools: ",
    "I am a tiny demo model and do not know that. Ask me for a sum, a list, a capital or a tool.",
    "I am the demo model of mlx_gptoss: a tiny gpt-oss, trained from scratch on a small world.",
    "I can do small sums, letters, lists, capitals, days and months, call tools and answer in JSON.",
    "None of my tools can do that.",
    "No tool fits.",
    "That is outside my small world. I say so.",
    "I say so.",
    "The user talks to me. I answer plainly.",
    "I answer plainly.",
    "It agrees.",
    " is the capital of ",
    "The capital of ",
)
# Words that are never copied from the prompt keep their leading space; all others are written without one,
# so that a name is the same tokens in a question, in a declaration and in JSON.
_FUNCTION_WORDS = words_of(
    "the is of and to in a an are you it what for how do does my me I tool has have that this from by "
    "with many times which who number letter letters list items word days months month day after before "
    "current given called minus plus or than was there these between on can be at user wants world small"
)


def _pattern() -> str:
    def quote(text: str) -> str:
        return "".join("\\" + c if c in ".+*?()[]{}|^$\\/#-" else {"\n": "\\n"}.get(c, c) for c in text)

    phrases = "|".join(quote(p) for p in sorted(_PHRASES, key=len, reverse=True))
    words = "|".join(sorted(_FUNCTION_WORDS, key=len, reverse=True))
    return rf"{phrases}| (?:{words})(?![\p{{L}}\p{{N}}_])|\p{{N}}|\p{{L}}+|[^\s\p{{L}}\p{{N}}]|\n+|\s"


def segments(sample: Sample, rng: random.Random) -> list[tuple[str, bool]]:
    """The sample as (text with special tokens, is it to be learned) pieces.

    History of a tool loop stands as it was sampled, or now and then as a stateless client sends it back:
    rendered anew, with or without its reasoning; then only the last step is learned.
    """
    steps, conversation = sample.steps, sample.conversation
    if len(steps) > 1 and rng.random() < 0.35:
        upto = rng.randrange(1, len(steps))
        keep = rng.random() < 0.5
        added: list[Message] = []
        for step in steps[:upto]:
            assert step.call is not None and step.result is not None
            added += [Message.reasoning(step.analysis)] if keep else []
            added += [
                Message.tool_call(step.call, step.arguments),
                Message.tool_result(step.result, name=f"functions.{step.call}"),
            ]
        before = list(conversation.messages)
        conversation.messages = [*before, *added]
        prompt = render_text(conversation)
        conversation.messages = before
        return [(prompt, False), (steps[upto].text(), True)]
    out = [(render_text(conversation), False)]
    for step in steps:
        out.append((step.text(), True))
        if step.call is not None:
            out.append((_result_text(step), False))
    return out


def _result_text(step: Step) -> str:
    return (
        f"<|start|>functions.{step.call} to=assistant<|channel|>commentary<|message|>{step.result}<|end|>"
        "<|start|>assistant"
    )


def train_tokenizer(path: Path, vocab_size: int, seed: int, count: int) -> None:
    """Byte-level BPE on `count` samples, with harmony's special tokens at the end, written to `path`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_pattern()), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        rng = random.Random(seed)
        for sample, _ in zip(samples(seed), range(count), strict=False):
            text = "".join(t for t, _ in segments(sample, rng))
            for token in SPECIAL_TOKENS.values():
                text = text.replace(token, "\x00")
            yield from text.split("\x00")

    backend.train_from_iterator(texts(), trainer)
    backend.add_special_tokens(list(SPECIAL_TOKENS.values()))
    backend.save(str(path))


class Encoder:
    """Samples to (token ids, mask)."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_file(str(path))

    def encode(self, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        """Token ids of all pieces, and which of them are to be learned."""
        ids: list[int] = []
        mask: list[bool] = []
        for text, learned in pieces:
            part = self.backend.encode(text, add_special_tokens=False).ids
            ids += part
            mask += [learned] * len(part)
        return ids, mask
