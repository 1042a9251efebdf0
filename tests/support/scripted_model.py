"""A model that says what a script tells it to: hermetic tests of everything above the graph.

It has real caches and puts each token's id into the keys, and it reads its context back from there. So what
it answers depends on the caches alone, as with a real model: a prefix reused wrongly gives a wrong context.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.engine.core import Engine
from mlx_gptoss.engine.options import EngineOptions
from mlx_gptoss.engine.runner import LocalRunner
from mlx_gptoss.engine.worker import Worker
from mlx_gptoss.llm import LLM, system_prefix
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.config import FULL, SLIDING, ModelConfig, YarnConfig
from mlx_gptoss.model.sequence_cache import SequenceCache
from mlx_gptoss.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.support.byte_tokenizer import write_byte_tokenizer

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=8,
    intermediate_size=8,
    num_experts=2,
    experts_per_token=1,
    head_dim=4,
    num_attention_heads=1,
    num_kv_heads=1,
    vocab_size=512,
    sliding_window=16,
    layer_types=(SLIDING, FULL),
    rms_norm_eps=1e-5,
    rope_theta=150000.0,
    rope=YarnConfig(32.0, 32.0, 1.0, 4096, False),
    swiglu_limit=7.0,
    max_position=131072,
)

# The whole context as text, ending in <|start|>assistant -> what follows, markup and end token included.
Script = Callable[[str], str]


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text in which special tokens are written out."""
    ids: list[int] = []
    names = {name: getattr(tokenizer.special, key) for key, name in SPECIAL_TOKENS.items()}
    for part in re.split(f"({'|'.join(map(re.escape, names))})", text):
        ids += [names[part]] if part in names else tokenizer.encode(part)
    return ids


class ScriptedModel:
    """Stands in for mlx_gptoss.model.graph.Model. `contexts` collects what the script was asked for."""

    def __init__(self, tokenizer: Tokenizer, script: Script) -> None:
        self.config = CONFIG
        self.dtype = mx.float32
        self.contexts: list[str] = []
        self._tokenizer = tokenizer
        self._script = script
        self._replies: dict[tuple[int, ...], list[int]] = {}

    def make_cache(self) -> SequenceCache:
        return SequenceCache(self.config, self.dtype)

    def __call__(
        self,
        tokens: mx.array,
        segments: Sequence[Segment],
        rows: Sequence[int] | None = None,
        *,
        awaited: bool = False,
    ) -> mx.array | None:
        logits = np.zeros((tokens.size, self.config.vocab_size), np.float32)
        at = 0
        for segment in segments:
            ids = tokens[at : at + segment.length]
            keys = mx.broadcast_to(ids.astype(mx.float32)[None, None, :, None], (1, 1, segment.length, 4))
            assert isinstance(segment.cache, SequenceCache)
            known = [layer.update_and_fetch(keys, keys)[0] for layer in segment.cache.layers]
            segment.cache.advance(segment.length)
            context = np.array(known[1][0, 0, :, 0]).astype(int).tolist()
            for i in range(segment.length):
                row = at + i
                if rows is None or row in rows:
                    upto = context[: len(context) - segment.length + i + 1]
                    logits[row, self._next(upto)] = 40.0
            at += segment.length
        wanted = list(range(at)) if rows is None else list(rows)
        return mx.array(logits[wanted]) if wanted else None

    def _next(self, context: list[int]) -> int:
        """The token of the script's reply that comes after this context."""
        special = self._tokenizer.special
        header = [special.start, *self._tokenizer.encode("assistant")]
        n = len(header)
        # The turn begins after the first assistant header behind the last message of anyone else.
        heads = [i for i, t in enumerate(context) if t == special.start]
        begin = len(context)
        for i in reversed(heads):
            if context[i : i + n] == header:
                begin = i + n
            elif i + n <= len(context):
                break
        key = tuple(context[:begin])
        if key not in self._replies:
            text = self._tokenizer.decode(key)
            self.contexts.append(text)
            self._replies[key] = spell(self._tokenizer, self._script(text))
        reply = self._replies[key]
        said = context[begin:]
        if said == reply[: len(said)] and len(said) < len(reply):
            return reply[len(said)]
        return special.return_


def scripted_engine(script: Script, **options: Any) -> tuple[LLM, ScriptedModel]:
    """An engine over a scripted model and the byte tokenizer."""
    folder = Path(tempfile.mkdtemp())
    write_byte_tokenizer(folder)
    model = ScriptedModel(Tokenizer.from_folder(folder), script)
    chosen = EngineOptions(max_context=20000, kv_budget=64 * 2**20, **options)
    tokenizer = Tokenizer.from_folder(folder)
    engine = Engine(
        Worker("scripted"),
        LocalRunner(model),  # type: ignore[arg-type]
        chosen,
        kv_budget=64 * 2**20,
        max_context=20000,
        stop_ids=tokenizer.stop_ids,
        message_start=tokenizer.special.start,
        pinned_tokens=partial(system_prefix, tokenizer),
    )
    return LLM(engine, model.config, folder, "scripted", tokenizer), model
