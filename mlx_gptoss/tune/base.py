"""The frozen model that is adapted: in memory, or with each layer read from disk when it is needed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_gptoss.checkpoint.adapter import Adapter, Parts
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.model.graph import Layer, Model
from mlx_gptoss.model.low_rank import EXPERTS, Pair, adaptable, part_sizes, put_adapter

# Trainable parameters: layer -> part -> "a" and "b".
Tree = dict[str, dict[str, dict[str, mx.array]]]
# The adapter's number in the segments of a training batch.
TRAINED = 1


class Base:
    """The parts of a frozen model. `layer(i)` may be kept no longer than it is used when it is streamed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        stream: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config = checkpoint.config
        self.interleaved = checkpoint.layout.interleaved
        self._checkpoint = checkpoint if stream else None
        if stream:
            embedding, norm, head = checkpoint.embedding(), checkpoint.norm(), checkpoint.head()
            mx.eval(embedding.arrays(), norm, head.arrays())
            checkpoint.check_finite()
            self.model = Model(self.config, embedding=embedding, layers=[], norm=norm, head=head)
        else:
            self.model = read_model(checkpoint, progress)

    @property
    def streamed(self) -> bool:
        return self._checkpoint is not None

    def layer(self, index: int) -> Layer:
        """A layer, its weights in memory."""
        if self._checkpoint is None:
            return self.model.layers[index]
        layer = self._checkpoint.layer(index)
        mx.eval(layer.arrays())
        self._checkpoint.check_finite()
        return layer

    def adapted(self, layer: Layer, parts: Mapping[str, Pair], scale: float) -> Layer:
        """The layer with an adapter's parts, for the rows of segments with the adapter TRAINED."""
        if not parts:
            return layer
        made = adaptable(layer)
        put_adapter(made, TRAINED, parts, scale, interleaved=self.interleaved)
        return made

    def with_adapter(self, adapter: Adapter) -> Model:
        """The whole model with an adapter, sharing every weight. Not for a streamed one."""
        model = copy.copy(self.model)
        model.layers = [
            self.adapted(layer, adapter.parts.get(i, {}), adapter.scale)
            for i, layer in enumerate(model.layers)
        ]
        return model

    def new_parameters(self, layers: Iterable[int], names: Sequence[str], rank: int, seed: int) -> Tree:
        """Where training starts: a uniform in +-1/sqrt(inputs), b zero, so that the model is the base."""
        sizes, key = part_sizes(self.config), mx.random.key(seed)
        tree: Tree = {}
        for layer in layers:
            tree[key_of(layer)] = {}
            for name in names:
                outputs, inputs = sizes[name]
                lead = (self.config.num_experts,) if name in EXPERTS else ()
                key, own = mx.random.split(key)
                bound = 1 / math.sqrt(inputs)
                a = mx.random.uniform(-bound, bound, (*lead, rank, inputs), key=own)
                tree[key_of(layer)][name] = {"a": a, "b": mx.zeros((*lead, outputs, rank))}
        mx.eval(tree)
        return tree


def key_of(layer: int) -> str:
    """A layer's key. Numbers alone would become places in lists, where mlx.utils rebuilds a tree."""
    return f"layer{layer}"


def layers_of(tree: Tree) -> list[int]:
    """The layers that are adapted, in order."""
    return sorted(int(key.removeprefix("layer")) for key in tree)


def pairs_of(tree: Tree, layer: int) -> dict[str, Pair]:
    """A layer's trainable parts."""
    return {name: Pair(part["a"], part["b"]) for name, part in tree.get(key_of(layer), {}).items()}


def parts_of(tree: Tree) -> Parts:
    """All of them, as an adapter has them."""
    return {layer: pairs_of(tree, layer) for layer in layers_of(tree)}


def flat(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a tree with their paths."""
    return [(str(name), value) for name, value in cast(Any, tree_flatten(tree))]
