"""Losses of a batch and their gradients in the adapter, by hand: a layer at a time.

The forward keeps what goes into each layer; the backward takes the layers in reverse, each differentiated by
itself and evaluated at once. So one layer's activations are alive at a time, the graph stays small, and a
layer may be read from disk and dropped. The logits exist for the rows that are learned, some at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_gptoss.model.batch import Batch, Segment
from mlx_gptoss.model.graph import Layer
from mlx_gptoss.model.whole import whole_segments
from mlx_gptoss.tune.base import TRAINED, Base, Tree, flat, key_of, layers_of, pairs_of
from mlx_gptoss.tune.examples import Example, Kept, Preference

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

    won: of preferences, how many chosen answers gained more than the rejected ones. strayed: of what is kept,
    the summed divergence from the base over `kept` tokens.
    """

    loss: float
    count: int
    tokens: int
    won: int = 0
    strayed: float = 0.0
    kept: int = 0

    def __add__(self, other: Measured) -> Measured:
        return Measured(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def mean(self) -> float:
        return self.loss / max(1, self.count)

    @property
    def mean_strayed(self) -> float:
        return self.strayed / max(1, self.kept)


# From the last hidden states to what the batch came to, and (when asked for) the loss's gradient in them.
Head = Callable[[mx.array, bool], tuple[Measured, mx.array | None]]
# From the logits of some rows, float32 [N, V], and which of all rows they are, to their losses [N].
Loss = Callable[[mx.array, slice], mx.array]


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
    """The batch of some examples, or of some pairs of answers. beta, anchor: see `_preferred`.

    What is compared with the base is read by it in the same forward, behind the rows that are trained.
    """
    if isinstance(items[0], Example):
        examples = sorted((item for item in items if isinstance(item, Example)), key=_is_kept)
        kept = [len(e) for e in examples if _is_kept(e)]
        learned = sum(len(e.rows) for e in examples if not _is_kept(e))
        read = Read.of(examples)
        segments = whole_segments(base.config, read.lengths, TRAINED)
        return Task(
            mx.concatenate([read.tokens, read.tokens[len(read.tokens) - sum(kept) :]]),
            [*segments, *whole_segments(base.config, kept)],
            len(segments),
            lambda x, back: _learned(base, x, read, learned, back),
        )
    pairs = [item for item in items if isinstance(item, Preference)]
    read = Read.of([e for pair in pairs for e in (pair.chosen, pair.rejected)])
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


def _is_kept(item: Example) -> bool:
    return isinstance(item, Kept)


def _learned(
    base: Base, x: mx.array, read: Read, learned: int, back: bool
) -> tuple[Measured, mx.array | None]:
    """Cross entropy of the first `learned` rows, and how far the others, of what is kept, are from the base.

    x: the adapted rows, then the base's of what is kept.
    """
    size, rows, sums = sum(read.lengths), read.rows, [0.0, 0.0]
    # The base's logits are alive beside the others: half as many rows at a time.
    parts = (
        (rows[:learned], HEAD_VALUES, _surprise(read.wanted[:learned])),
        (rows[learned:], HEAD_VALUES // 2, _divergence(base, x, rows[learned:] + (len(x) - size))),
    )
    g = None
    for which, (some, values, loss) in enumerate(parts):
        if not len(some):
            continue
        weights = np.ones(len(some), np.float32) if back else None
        losses, more = _losses(base, x[:size], some, loss, weights, values)
        sums[which] = float(losses.sum(dtype=np.float64))
        g = more if g is None or more is None else g + more
    return Measured(sums[0], learned, len(x), strayed=sums[1], kept=len(rows) - learned), g


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
        losses, _ = _losses(base, part, read.rows, _surprise(read.wanted), None, HEAD_VALUES)
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
    return measured, _losses(base, x[:size], read.rows, _surprise(read.wanted), weights, HEAD_VALUES)[1]


def _surprise(wanted: np.ndarray) -> Loss:
    """Cross entropy with the tokens that are wanted [R]."""

    def loss(logits: mx.array, some: slice) -> mx.array:
        targets = mx.array(wanted[some])[:, None]
        return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets, axis=-1)[:, 0]

    return loss


def _divergence(base: Base, x: mx.array, rows: np.ndarray) -> Loss:
    """Kullback-Leibler divergence from what the base says at `rows` [R] of x (Li & Hoiem 2016)."""

    def loss(logits: mx.array, some: slice) -> mx.array:
        said = _logits(base, mx.take(x, mx.array(rows[some]), axis=0))
        said = said - mx.logsumexp(said, axis=-1, keepdims=True)
        says = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return (mx.exp(said) * (said - says)).sum(axis=-1)

    return loss


def _logits(base: Base, h: mx.array) -> mx.array:
    logits = base.model.logits(h)
    assert logits is not None
    return logits.astype(mx.float32)


def _losses(
    base: Base, x: mx.array, rows: np.ndarray, loss: Loss, weights: np.ndarray | None, values: int
) -> tuple[np.ndarray, mx.array | None]:
    """The loss of some rows [R], and the gradient of their sum by `weights` [R] in x [T, D]. values: of
    logits that are alive at a time.
    """
    chosen = mx.array(rows)
    picked = mx.take(x, chosen, axis=0)
    step = max(16, values // base.config.vocab_size)
    losses, gradients = [], []
    for start in range(0, len(rows), step):
        some = slice(start, start + step)

        def of(h: mx.array, some: slice = some) -> mx.array:
            return loss(_logits(base, h), some)

        if weights is None:
            losses.append(np.array(of(picked[some])))
            continue
        value, back = mx.vjp(of, [picked[some]], [mx.array(weights[some])])
        mx.eval(value, back)
        losses.append(np.array(value[0]))
        gradients.append(back[0])
    g = None
    if weights is not None:
        g = mx.zeros_like(x).at[chosen].add(mx.concatenate(gradients))
        mx.eval(g)
    return np.concatenate(losses), g
