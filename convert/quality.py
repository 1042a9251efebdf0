"""How much a conversion changes what the model says: both sets of weights read the same text, side by side.

Both graphs advance one layer at a time over the whole text, and a layer's weights are dropped before the next
are read: what is alive is one layer, the two output heads, and the hidden states, never a second model. The
figures are computed in float32, so that they speak of the weights and not of an activation format's rounding.

KL divergence is sum p (log p - log q) over the vocabulary, in nats, p from the source and q from the
conversion, averaged over positions (Kullback and Leibler 1951); perplexity is exp of the mean negative log
probability of the next token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.adapter import Adapter, read_adapter
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.convert.manifest import Quality, read_manifest
from mlx_gptoss.errors import ConversionError
from mlx_gptoss.files import read_limited
from mlx_gptoss.model.batch import Batch
from mlx_gptoss.model.low_rank import adaptable, put_adapter
from mlx_gptoss.model.projection import Projection
from mlx_gptoss.model.whole import whole_segments
from mlx_gptoss.tokenizer import Tokenizer

DEFAULT_TEXT = "Alice's Adventures in Wonderland, chapter I (Lewis Carroll, 1865)"
MAX_TEXT = 64 * 2**20  # bytes of a text to compare on
WINDOW = 512  # tokens of context that a prediction sees at most
HEAD_ROWS = 64  # positions whose logits are in memory at once: 64 x 201,088 x 4 bytes = 51 MB a model


def default_text() -> str:
    """The passage that ships with the package (public domain)."""
    return (files("mlx_gptoss.convert") / "data" / "default_text.txt").read_text(encoding="utf-8")


def compare_on_text(
    folder: str | Path,
    source: str | Path,
    text_file: str | Path | None = None,
    *,
    adapter: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """`compare` on a text file, or on the default passage, with the tokenizer of either folder.

    Raises TokenizerError when neither has one, ConversionError for a text that cannot be read.
    """
    home = next((f for f in (folder, source) if (Path(f) / "tokenizer.json").exists()), folder)
    if text_file is None:
        text, name = default_text(), DEFAULT_TEXT
    else:
        try:
            text, name = read_limited(Path(text_file), MAX_TEXT).decode(), Path(text_file).name
        except (OSError, UnicodeDecodeError) as error:
            raise ConversionError(f"{text_file}: cannot be read as UTF-8 text ({error})") from error
    tokens = Tokenizer.from_folder(home).encode(text)
    return compare(folder, source, tokens, name=name, adapter=adapter, progress=progress)


def compare(
    folder: str | Path,
    source: str | Path,
    tokens: Sequence[int],
    *,
    name: str = "tokens",
    window: int = WINDOW,
    adapter: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Run `tokens`, in windows of `window`, through the source's weights and the conversion's.

    adapter: a folder with the adapter that is merged into the conversion; the source runs with it beside its
    weights. `progress(done, total)` counts layers.

    Raises ConversionError when the two are different models, there are fewer than two tokens, one that the
    models do not know, or predictions that are not finite, CheckpointError and ConfigError when a folder
    cannot be read.
    """
    if len(tokens) < 2:
        raise ConversionError(
            f"the text has {len(tokens)} tokens, expected at least 2 to predict one from another"
        )
    if not (Path(source) / "config.json").exists():
        raise ConversionError(f"{source}: predictions need a source in safetensors with its config.json")
    sides = [Checkpoint(Path(source), mx.float32), Checkpoint(Path(folder), mx.float32)]
    _check_same_model(*sides)
    vocabulary = sides[0].config.vocab_size
    if max(tokens) >= vocabulary:
        raise ConversionError(
            f"the text has token {max(tokens)}, the model knows {vocabulary}; "
            "expected the model's own tokenizer.json beside its weights"
        )
    windows = [np.array(tokens[i : i + window], dtype=np.int32) for i in range(0, len(tokens), window)]
    windows = [w for w in windows if len(w) > 1]
    beside = [None if adapter is None else read_adapter(adapter, sides[0].config), None]
    hidden = [
        _hidden_states(side, windows, progress or (lambda done, total: None), i, beside[i])
        for i, side in enumerate(sides)
    ]
    norms, heads = [s.norm() for s in sides], [s.head() for s in sides]
    for norm, head in zip(norms, heads, strict=True):
        mx.eval(norm, head.arrays())
    kl: list[np.ndarray] = []
    same: list[np.ndarray] = []
    losses: list[list[np.ndarray]] = [[], []]
    for w, tokens_here in enumerate(windows):
        for start in range(0, len(tokens_here), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logs = [_log_probabilities(sides[i], hidden[i][w][rows], norms[i], heads[i]) for i in range(2)]
            targets = tokens_here[start + 1 : start + HEAD_ROWS + 1]
            kl.append(np.array((mx.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1)))
            same.append(np.array(mx.argmax(logs[0], axis=-1) == mx.argmax(logs[1], axis=-1)))
            for loss, log in zip(losses, logs, strict=True):
                if len(targets):  # a window's last token predicts nothing in it
                    picked = mx.take_along_axis(log[: len(targets)], mx.array(targets)[:, None], axis=-1)
                    loss.append(-np.array(picked))
    divergence = np.maximum(np.concatenate(kl), 0.0)  # rounding may leave -1e-9
    perplexities = [float(np.exp(np.concatenate(loss).mean(dtype=np.float64))) for loss in losses]
    if not np.isfinite([*divergence, *perplexities]).all():
        raise ConversionError(
            f"{folder}: its predictions or those of {source} are not finite; run `mlx-gptoss verify` on both"
        )
    return Quality(
        text=name,
        tokens=len(divergence),
        kl=float(divergence.mean()),
        kl_p99=float(np.quantile(divergence, 0.99)),
        top1=float(np.concatenate(same).mean()),
        perplexity_source=perplexities[0],
        perplexity=perplexities[1],
    )


def record(folder: str | Path, quality: Quality) -> None:
    """Note the figures in the folder's manifest, from which the model card takes them."""
    dataclasses.replace(read_manifest(folder), quality=quality).write(folder)


def _check_same_model(source: Checkpoint, converted: Checkpoint) -> None:
    """The shapes must agree; where they do, a difference in the predictions is the weights'."""
    for field in ("num_layers", "hidden_size", "intermediate_size", "num_experts", "vocab_size"):
        a, b = getattr(source.config, field), getattr(converted.config, field)
        if a != b:
            raise ConversionError(
                f"{converted.folder} has {field} {b}, {source.folder} has {a}; "
                "expected the source that the folder was converted from"
            )


def _hidden_states(
    side: Checkpoint,
    windows: list[np.ndarray],
    tell: Callable[[int, int], None],
    place: int,
    adapter: Adapter | None,
) -> list[mx.array]:
    """The last layer's output for each window, [t, hidden] float32, with one layer in memory at a time."""
    config, total = side.config, 2 * side.config.num_layers
    embedding = side.embedding()
    states = [embedding(mx.array(w)) for w in windows]
    mx.eval(states)
    del embedding
    for i in range(config.num_layers):
        layer = side.layer(i)
        mx.eval(layer.arrays())
        if adapter is not None:
            layer = adaptable(layer)
            parts = adapter.parts.get(i, {})
            put_adapter(layer, 1, parts, adapter.scale, interleaved=side.layout.interleaved)
        for w, x in enumerate(states):
            segments = whole_segments(config, [x.shape[0]], 0 if adapter is None else 1)
            states[w] = layer(x, Batch(segments, config.experts_per_token))
            mx.eval(states[w])
        del layer
        mx.clear_cache()
        tell(place * config.num_layers + i + 1, total)
    return states


def _log_probabilities(side: Checkpoint, x: mx.array, norm: mx.array, head: Projection) -> mx.array:
    """Hidden states [t, hidden] -> log probabilities [t, vocab], float32."""
    logits = head(mx.fast.rms_norm(x, norm, side.config.rms_norm_eps))
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
