"""Losses of a batch and their gradients in the adapter, by hand: a layer at a time.

The forward keeps what goes into each layer; the backward takes the layers in reverse, each differentiated by
itself and evaluated at once. So one layer's activations are alive at a time, the graph stays small, and a
layer may be read from disk and dropped. The logits exist for the rows that are learned, some at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.graph import Layer
from mlx_gptoss.model.whole import whole_segments
from mlx_gptoss.tune.base import TRAINED, Base, Tree, flat, key_of, layers_of, pairs_of
from mlx_gptoss.tune.examples import Example, Preference

# Logits that are alive at a time, values.
HEAD_VALUES = 1 << 25


@dataclass(frozen=True)
class Read:
    """Examples end to end: tokens int32 [T], the rows that are learned and what follows them, int32 [R] each.

    sequence: the example of each learned row.
    """

    tokens: mx.array
    lengths: tuple[int, ...]
    rows: np.ndarray
    wanted: np.ndarray
    sequence: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Read:
        """Of one or more examples."""
        lengths = [len(e) for e in examples]
        starts = np.cumsum([0, *lengths[:-1]])
        return cls(
            mx.array(np.concatenate([e.ids for e in examples])),
            tuple(lengths),
            np.concatenate([e.rows + start for e, start in zip(examples, starts, strict=True)]).astype(
                np.int32
            ),
            np.concatenate([e.wanted for e in examples]),
            np.repeat(np.arange(len(examples)), [len(e.rows) for e in examples]),
        )


@dataclass(frozen=True)
class Measured:
    """What a batch came to: the summed loss, what it is divided by, and the tokens read.

    won: of preferences, how many chosen answers gained more than the rejected ones.
    """

    loss: float
    count: int
    tokens: int
    won: int = 0

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.loss + other.loss, self.count + other.count, self.tokens + other.tokens, self.won + other.won
        )

    @property
    def mean(self) -> float:
        return self.loss / max(1, self.count)


# From the last hidden states to what the batch came to, and (when asked for) the loss's gradient in them.
Head = Callable[[mx.array, bool], tuple[Measured, mx.array | None]]


@dataclass(frozen=True)
class Task:
    """A batch to run: its segments, of which the first `trained` have the adapter, and the loss."""

    tokens: mx.array
    segments: list[Segment]
    trained: int
    head: Head


def task_of(
    items: Sequence[Example] | Sequence[Preference], base: Base, beta: float, anchor: float = 0.0
) -> Task:
    """The batch of some examples, or of some pairs of answers. beta, anchor: see `_preferred`."""
    if isinstance(items[0], Example):
        read = Read.of([item for item in items if isinstance(item, Example)])
        segments = whole_segments(base.config, read.lengths, TRAINED)
        return Task(read.tokens, segments, len(segments), lambda x, back: _learned(base, x, read, back))
    pairs = [item for item in items if isinstance(item, Preference)]
    read = Read.of([e for pair in pairs for e in (pair.chosen, pair.rejected)])
    # The base reads the same in the same forward, behind the rows that are trained.
    segments = [
        *whole_segments(base.config, read.lengths, TRAINED),
        *whole_segments(base.config, read.lengths),
    ]
    tokens = mx.concatenate([read.tokens, read.tokens])
    return Task(
        tokens, segments, len(read.lengths), lambda x, back: _preferred(base, x, read, beta, anchor, back)
    )


def measure(base: Base, tree: Tree, scale: float, task: Task) -> Measured:
    """The loss alone."""
    batch = Batch(task.segments, base.config.experts_per_token)
    x = base.model.embedding(task.tokens)
    for i in range(base.config.num_layers):
        x = base.adapted(base.layer(i), pairs_of(tree, i), scale)(x, batch)
        mx.eval(x)
    return task.head(x, False)[0]


def gradient(base: Base, tree: Tree, scale: float, task: Task) -> tuple[Measured, Tree]:
    """The loss, and its gradient in the adapter's parameters."""
    config = base.config
    batch = Batch(task.segments, config.experts_per_token)
    count = sum(s.length for s in task.segments[: task.trained])
    lowest = layers_of(tree)[0]
    x, inputs = base.model.embedding(task.tokens), list[mx.array | None]()
    for i in range(config.num_layers):
        inputs.append(x[:count] if i >= lowest else None)
        x = base.adapted(base.layer(i), pairs_of(tree, i), scale)(x, batch)
        mx.eval(x, [] if inputs[-1] is None else inputs[-1])
    measured, g = task.head(x, True)
    assert g is not None
    if task.trained < len(task.segments):
        batch = Batch(task.segments[: task.trained], config.experts_per_token)
    found: Tree = {}
    for i in reversed(range(lowest, config.num_layers)):
        given, own = inputs.pop(), flat(tree.get(key_of(i), {}))
        assert given is not None
        run = partial(_layer, base, i, base.layer(i), scale, batch, [name for name, _ in own])
        _, back = mx.vjp(run, [given, *(value for _, value in own)], [g])
        mx.eval(back if i > lowest else back[1:])
        g = back[0]
        if own:
            found[key_of(i)] = cast(Any, _tree(own, back[1:]))
    return measured, found


def _layer(
    base: Base,
    index: int,
    layer: Layer,
    scale: float,
    batch: Batch,
    names: Sequence[str],
    x: mx.array,
    *values: mx.array,
) -> mx.array:
    """A layer as a function of what goes in and of its parts' values, which `names` are of."""
    parts = {key_of(index): tree_unflatten(list(zip(names, values, strict=True)))} if names else {}
    return base.adapted(layer, pairs_of(cast(Tree, parts), index), scale)(x, batch)


def _tree(own: Sequence[tuple[str, mx.array]], values: Sequence[mx.array]) -> object:
    """The values in the form of a layer's parts."""
    return tree_unflatten([(name, value) for (name, _), value in zip(own, values, strict=True)])


def _learned(base: Base, x: mx.array, read: Read, back: bool) -> tuple[Measured, mx.array | None]:
    """Cross entropy of the learned tokens, summed."""
    losses, g = _cross_entropy(
        base, x, read.rows, read.wanted, np.ones(len(read.rows), np.float32) if back else None
    )
    return Measured(float(losses.sum(dtype=np.float64)), len(read.rows), sum(read.lengths)), g


def _preferred(
    base: Base, x: mx.array, read: Read, beta: float, anchor: float, back: bool
) -> tuple[Measured, mx.array | None]:
    """DPO (Rafailov et al. 2023): -log sigmoid(beta (gain of the chosen - gain of the rejected)), summed.

    The gain is the answer's log-probability above the base's. Both answers may lose, the rejected one more,
    until neither is likely: `anchor` times the chosen answer's mean loss a token holds against that (as in
    Pang et al. 2024). x: the adapted rows, then the base's.
    """
    size, pairs = sum(read.lengths), len(read.lengths) // 2

    def log_probability(part: mx.array) -> np.ndarray:
        losses, _ = _cross_entropy(base, part, read.rows, read.wanted, None)
        return -np.bincount(read.sequence, losses, minlength=2 * pairs).reshape(pairs, 2)

    adapted = log_probability(x[:size])
    gains = adapted - log_probability(x[size:])
    margins = beta * (gains[:, 0] - gains[:, 1])
    held = anchor / np.bincount(read.sequence, minlength=2 * pairs)[::2]
    losses = np.logaddexp(0, -margins) - held * adapted[:, 0]
    measured = Measured(float(losses.sum()), pairs, 2 * size, int((margins > 0).sum()))
    if not back:
        return measured, None
    # By the loss of a chosen answer's tokens it grows by this much, by a rejected one's it falls.
    slope = beta / (1 + np.exp(margins))
    weights = np.stack([slope + held, -slope], axis=1).reshape(-1)[read.sequence].astype(np.float32)
    return measured, _cross_entropy(base, x[:size], read.rows, read.wanted, weights)[1]


def _cross_entropy(
    base: Base, x: mx.array, rows: np.ndarray, wanted: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, mx.array | None]:
    """The loss of each learned row [R], and the gradient of their sum by `weights` [R] in x [T, D]."""
    chosen = mx.array(rows)
    picked = mx.take(x, chosen, axis=0)
    step = max(16, HEAD_VALUES // base.config.vocab_size)
    losses, gradients = [], []
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        targets = mx.array(wanted[some])[:, None]

        def loss(h: mx.array, targets: mx.array = targets) -> mx.array:
            logits = base.model.logits(h)
            assert logits is not None
            logits = logits.astype(mx.float32)
            return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets, axis=-1)[:, 0]

        if weights is None:
            losses.append(np.array(loss(picked[some])))
            continue
        value, back = mx.vjp(loss, [picked[some]], [mx.array(weights[some])])
        mx.eval(value, back)
        losses.append(np.array(value[0]))
        gradients.append(back[0])
    g = None
    if weights is not None:
        g = mx.zeros_like(x).at[chosen].add(mx.concatenate(gradients))
        mx.eval(g)
    return np.concatenate(losses), g
