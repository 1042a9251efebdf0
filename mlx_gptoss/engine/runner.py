"""What runs a forward: the few calls that the scheduler makes on a model and on a sequence's caches.

LocalRunner is a model in this process. A model whose layers lie on several machines is another ModelRunner:
its caches stand for those that the other machines hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx

from mlx_gptoss.checkpoint.adapter import Adapter
from mlx_gptoss.device import on_metal
from mlx_gptoss.engine.expert_usage import ExpertUsage
from mlx_gptoss.engine.stats import RankStats
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.cache import KVBits, in_steps
from mlx_gptoss.model.graph import Layer, Model
from mlx_gptoss.model.kernels.decode import DecodeKernels
from mlx_gptoss.model.kernels.verified import UNFINISHED
from mlx_gptoss.model.low_rank import AdaptedProjection, adaptable, adapter_arrays, put_adapter
from mlx_gptoss.model.sequence_cache import KVSpan, SequenceCache, WindowState
from mlx_gptoss.model.streamed import StreamCounts, StreamedExperts
from mlx_gptoss.model.sweep import Progress, sweep
from mlx_gptoss.model.trace import Write, tell_choices
from mlx_gptoss.model.tuning import keep, tune


class KVCache(Protocol):
    """The caches of one sequence; see SequenceCache for what the calls promise."""

    @property
    def adapter(self) -> int: ...

    @property
    def offset(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def committed(self) -> int: ...

    @property
    def window_history(self) -> int: ...

    def growth(self, t: int) -> int: ...

    def reserve(self, tokens: int) -> None: ...

    def rewind(self, position: int, states: Iterable[WindowState] = ()) -> int: ...

    def snapshot(self, end: int | None = None, history: int | None = None) -> WindowState | None: ...

    def export(self, ranges: Sequence[tuple[int, int]], *, release: bool = False) -> list[KVSpan]: ...

    def load(self, spans: Sequence[KVSpan], states: Iterable[WindowState] = ()) -> int: ...

    def arrays(self) -> list[mx.array]: ...


class Pending(Protocol):
    """A forward that was launched."""

    @property
    def lazy(self) -> list[mx.array]:
        """What has to be evaluated for it, unless that is under way already."""
        ...

    def logits(self) -> mx.array:
        """The logits of the wanted rows, [R, vocab]; waits where they come from another machine."""
        ...


@dataclass(frozen=True)
class Launched:
    """One whose logits are computed here, as they are evaluated."""

    value: mx.array

    @property
    def lazy(self) -> list[mx.array]:
        return [self.value]

    def logits(self) -> mx.array:
        return self.value


class ModelRunner(Protocol):
    """A model to the engine. Used by the engine's thread only."""

    @property
    def depth(self) -> int:
        """How many forwards are worth having under way at a time: one for each machine."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def make_cache(self, adapter: int = 0) -> KVCache:
        """Empty caches for one sequence, which runs with an adapter (see `put_adapter`)."""
        ...

    def put_adapter(self, number: int, adapter: Adapter | None) -> None:
        """Let sequences run with an adapter by its number > 0; None frees it."""
        ...

    def cache_bytes(self, tokens: int, chunk: int) -> int:
        """Bytes of one sequence's caches with room for `tokens` tokens that come in chunks of `chunk`."""
        ...

    def fits(self, tokens: int, parts: Sequence[mx.array], states: Iterable[WindowState]) -> bool:
        """Whether exported parts of so many tokens, and window states, are of this model's caches."""
        ...

    def adopt(
        self, parts: Sequence[mx.array], states: Mapping[int, WindowState]
    ) -> tuple[KVSpan, dict[int, WindowState]]:
        """Parts and states that fit, read from a file, as its caches take them."""
        ...

    def forward(
        self,
        tokens: mx.array,
        shares: Sequence[tuple[int, KVCache]],
        rows: Sequence[int] | None = None,
        progress: Progress = lambda share: None,
        *,
        awaited: bool = False,
    ) -> mx.array | None:
        """Run the next tokens of each sequence, int32 [T] end to end, and move their caches.

        shares: how many of the tokens are each sequence's, and its caches. rows: those whose logits are
        wanted (None: all). progress: told what share of a long forward is done, while it runs. awaited: the
        result is read before anything else is launched. Returns logits [R, vocab], None when R is 0; not
        evaluated yet.
        """
        ...

    def launch(
        self,
        tokens: mx.array,
        shares: Sequence[tuple[int, KVCache]],
        rows: Sequence[int],
        progress: Progress = lambda share: None,
        *,
        awaited: bool = False,
    ) -> Pending | None:
        """`forward` without its result, which comes with others' before and after it; None when R is 0."""
        ...

    def tell_choices(self, write: Write | None) -> None:
        """From now on `write` is told which experts every step chose in each layer; None ends it."""
        ...

    @property
    def experts_per_token(self) -> int: ...

    @property
    def expert_slots(self) -> int:
        """How many experts of a layer are in memory where not all are; else 0."""
        ...

    def resize_experts(self, slots: int) -> None:
        """Have so many in memory from now on. Between two forwards."""
        ...

    def expert_counts(self) -> list[StreamCounts]:
        """What the layers did whose experts are not all in memory."""
        ...

    def rank_stats(self) -> tuple[RankStats, ...]:
        """What each of several machines has done; none for a model in one process."""
        ...

    @property
    def losses(self) -> int:
        """How often one of them was lost."""
        ...

    def take_loss(self) -> GptOssError | None:
        """What has taken away every cache, span and state since the last call; None where they are there."""
        ...

    def use_quiet_moment(self) -> bool:
        """Do a small piece of work that can wait; False when there is none."""
        ...

    def distrust(self, error: Exception) -> bool:
        """Told that a forward failed: whether it may go well now, as it will be computed another way."""
        ...

    def close(self) -> None:
        """The last call: keep what the next process can use."""
        ...


class LocalRunner:
    """A model in this process.

    streamed: those of its layers' experts that are not all in memory; with them a forward of more than
    `block` tokens goes layer by layer through all of them. usage: where it is kept what they are asked for.
    interleaved: as low_rank.put_adapter wants to know. kernels: those of our own that its layers may use.
    """

    depth = 1
    losses = 0

    def __init__(
        self,
        model: Model,
        kv_bits: KVBits = (None, None),
        streamed: Sequence[StreamedExperts] = (),
        block: int = 512,
        usage: ExpertUsage | None = None,
        *,
        interleaved: bool = True,
        kernels: DecodeKernels | None = None,
    ) -> None:
        self._model = model
        self.kernels = kernels
        self._usage = usage
        self._interleaved = interleaved
        self._kv_bits = kv_bits
        self._block = block
        self.streamed = streamed
        self._empty = self.make_cache()
        if usage is not None and streamed:
            usage.warm(streamed)

    def rank_stats(self) -> tuple[RankStats, ...]:
        return ()

    def take_loss(self) -> GptOssError | None:
        return None

    def use_quiet_moment(self) -> bool:
        return self.kernels is not None and self.kernels.examine_next()

    def tune(self) -> list[str]:
        """Measure on this machine what is otherwise assumed, keep it and use it; tells what came of it.

        Takes some seconds. Between two forwards.
        """
        kernels, model = self.kernels, self._model
        if not on_metal() or kernels is None:
            return ["nothing to tune: command buffers and kernels of our own are Metal's"]
        if self.streamed:
            return ["nothing to tune: with experts on the disk, that decides"]
        tuned = tune(model)
        keep(tuned.paces, model, kernels.record)
        model.paces = tuned.paces
        told = [
            f"{name}: launched every {getattr(tuned.paces, name) or len(model.layers)} layers ("
            + ", ".join(f"{n or 'all'}: {1e3 * s:.2f} ms" for n, s in seconds.items())
            + ")"
            for name, seconds in tuned.seconds.items()
        ]
        for name, verdict in list(kernels.verdicts.items()):
            # One that took its process down is not tried again.
            found = verdict if verdict == UNFINISHED else kernels.examine(name)
            told.append(f"{name}: {'on' if found.on else 'off'}, {found.why}")
        return told

    def distrust(self, error: Exception) -> bool:
        return self.kernels is not None and self.kernels.distrust(error)

    def close(self) -> None:
        if self._usage is not None and self.streamed:
            self._usage.save(self.streamed)

    @property
    def experts_per_token(self) -> int:
        return self._model.config.experts_per_token

    @property
    def expert_slots(self) -> int:
        return self.streamed[0].slots.count if self.streamed else 0

    def resize_experts(self, slots: int) -> None:
        for experts in self.streamed:
            experts.resize(slots)

    def tell_choices(self, write: Write | None) -> None:
        tell_choices(self._model, write)

    def expert_counts(self) -> list[StreamCounts]:
        return [replace(experts.counts) for experts in self.streamed]

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    def make_cache(self, adapter: int = 0) -> SequenceCache:
        return SequenceCache(self._model.config, self._model.dtype, self._kv_bits, adapter)

    def put_adapter(self, number: int, adapter: Adapter | None) -> None:
        adapt_layers(self._model.layers, number, adapter, interleaved=self._interleaved)

    def cache_bytes(self, tokens: int, chunk: int) -> int:
        if self.streamed:
            chunk = min(chunk, self._block)
        return self._empty.nbytes_at(in_steps(tokens), chunk)

    def fits(self, tokens: int, parts: Sequence[mx.array], states: Iterable[WindowState]) -> bool:
        return self._empty.fits(tokens, parts, states)

    def adopt(
        self, parts: Sequence[mx.array], states: Mapping[int, WindowState]
    ) -> tuple[KVSpan, dict[int, WindowState]]:
        return KVSpan(parts), dict(states)

    def forward(
        self,
        tokens: mx.array,
        shares: Sequence[tuple[int, KVCache]],
        rows: Sequence[int] | None = None,
        progress: Progress = lambda share: None,
        *,
        awaited: bool = False,
    ) -> mx.array | None:
        segments = []
        for length, cache in shares:
            assert isinstance(cache, SequenceCache)  # this runner made it
            segments.append(Segment(length, cache, adapter=cache.adapter))
        if self.streamed and len(tokens) > self._block:
            return sweep(self._model, tokens, segments, rows, self._block, progress)
        return self._model(tokens, segments, rows, awaited=awaited)

    def launch(
        self,
        tokens: mx.array,
        shares: Sequence[tuple[int, KVCache]],
        rows: Sequence[int],
        progress: Progress = lambda share: None,
        *,
        awaited: bool = False,
    ) -> Pending | None:
        logits = self.forward(tokens, shares, rows, progress, awaited=awaited)
        return None if logits is None else Launched(logits)


def adapt_layers(
    layers: list[Layer], number: int, adapter: Adapter | None, *, interleaved: bool, first: int = 0
) -> None:
    """Put an adapter beside the weights of these layers, of which the first is the model's layer `first`;
    None frees it.
    """
    for index, layer in enumerate(layers):
        if not isinstance(layer.attention.qkv, AdaptedProjection):
            layer = layers[index] = adaptable(layer)
        parts, scale = ({}, 1.0) if adapter is None else (adapter.parts.get(first + index, {}), adapter.scale)
        put_adapter(layer, number, parts, scale, interleaved=interleaved)
    mx.eval(adapter_arrays(layers))


def streamed_experts(model: Model) -> list[StreamedExperts]:
    """The experts of those layers that do not have all of them in memory."""
    return [e for layer in model.layers if isinstance(e := layer.moe.experts, StreamedExperts)]
