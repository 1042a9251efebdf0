"""An answer of the model as it is being trained: greedy, through the serving graph and its caches."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_gptoss.harmony import Conversation, render
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.graph import Model
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tune.base import TRAINED

MAX_TOKENS = 160


def answer(model: Model, tokenizer: Tokenizer, conversation: Conversation, limit: int = MAX_TOKENS) -> str:
    """What the adapted model writes next, special tokens spelled out, `limit` tokens at most."""
    tokens, cache = render(conversation, tokenizer), model.make_cache()
    written: list[int] = []
    while len(written) < limit:
        segment = Segment(len(tokens), cache, adapter=TRAINED)
        logits = model(mx.array(tokens, mx.int32), [segment], [len(tokens) - 1])
        assert logits is not None
        tokens = [int(np.asarray(mx.argmax(logits[0])))]
        written += tokens
        if tokens[0] in tokenizer.stop_ids:
            break
    return tokenizer.decode(written)
