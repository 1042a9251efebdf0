"""A ModelRunner whose layers lie on several machines, one part after the other.

Every decision is made here, on rank 0, by the caches of its own layers: where a rewind begins, whether a
window is still there, how much room there is. It is done here, and told to the other ranks, which do it to
theirs. A forward runs rank 0's layers, hands the hidden states on, and gets them back from the last rank for
the head.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise

import mlx.core as mx

from mlx_gptoss.checkpoint.adapter import Adapter
from mlx_gptoss.device import peak_rss
from mlx_gptoss.distributed.channel import Buffer
from mlx_gptoss.distributed.group import Group
from mlx_gptoss.distributed.session import Session
from mlx_gptoss.distributed.stage import Stage
from mlx_gptoss.distributed.wire import describe, from_bytes, read, to_bytes
from mlx_gptoss.engine.runner import KVCache, Pending
from mlx_gptoss.engine.stats import RankStats
from mlx_gptoss.errors import HostError, RequestError
from mlx_gptoss.model.cache import KVBits, grown, in_steps
from mlx_gptoss.model.config import FULL, SLIDING
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.sequence_cache import KVSpan, SequenceCache, WindowState
from mlx_gptoss.model.streamed import StreamCounts
from mlx_gptoss.model.sweep import Progress
from mlx_gptoss.model.trace import Write

# Forwards with logits that may be under way. Of what is measured, the weight of the newest.
MOST_UNDER_WAY = 16
NEWEST = 0.1
# Forwards whose result nobody waits for (chunks of prompts) that may be under way, for each rank.
AHEAD = 2

# What a rank tells of itself, in the order of RankStats.
RANK_FACTS = ("steps", "sent", "waited", "peak_rss", "active")
CACHES, SPANS, STATES = range(3)


class Name:
    """A number by which the ranks know something, as long as somebody holds this."""

    def __init__(self, number: int) -> None:
        self.number = number


class Life:
    """The numbers by which ranks know things in one session, and what of them nobody holds any more."""

    def __init__(self, session: Session, stage: Stage) -> None:
        self.session, self._stage = session, stage
        self._dropped: deque[tuple[int, int]] = deque()
        self._numbers = count()
        self.adapters: dict[int, Adapter] = {}

    def name(self, kind: int) -> Name:
        """A new name; what it stands for is freed once nobody holds it."""
        made = Name(next(self._numbers))
        weakref.finalize(made, self._dropped.append, (kind, made.number)).atexit = False
        return made

    def tell(self, record: list[object]) -> None:
        """Have the other ranks do something, in this order. Raises HostError when they are gone."""
        self.sweep()
        self.session.tell_all(record)

    def sweep(self) -> None:
        """Free what nobody holds any more, everywhere."""
        if self.session.loss is not None:
            raise self.session.lost()
        dropped: list[list[int]] = [[], [], []]
        while self._dropped:
            kind, number = self._dropped.popleft()
            dropped[kind].append(number)
        if any(dropped):
            self._stage.free(*dropped)
            self.session.tell_all(["free", *dropped])


class PipelineSpan(KVSpan):
    """A span whose parts lie on the ranks that made them. It holds no array itself."""

    def __init__(self, runner: PipelineRunner, life: Life, tokens: int) -> None:
        super().__init__()
        self._runner, self._life, self.tokens = runner, life, tokens
        self._name = life.name(SPANS)
        self.number = self._name.number

    @property
    def nbytes(self) -> int:
        return self.tokens * self._runner.full_bytes

    def cut(self, start: int, end: int, *, compact: bool = False) -> PipelineSpan:
        made = PipelineSpan(self._runner, self._life, end - start)
        self._runner.do(self._life, "cut", self.number, made.number, start, end, compact)
        return made

    def whole(self) -> list[mx.array]:
        here = list(self._runner.stage.spans[self.number])
        return self._runner.join_span([here, *self._runner.fetch(self._life, "fetch_span", self.number)])


@dataclass(frozen=True, eq=False)
class PipelineState(WindowState):
    """A window state of which `data` is rank 0's part."""

    runner: PipelineRunner
    life: Life
    name: Name

    @property
    def nbytes(self) -> int:
        return (self.end - self.start) * self.runner.sliding_bytes

    def whole(self) -> WindowState:
        assert self.data is not None
        parts = [[self.data], *self.runner.fetch(self.life, "fetch_state", self.name.number)]
        return WindowState(self.start, self.end, self.runner.join_state(parts))


class PipelineCache:
    """The caches of one sequence on all ranks, by those of rank 0; as engine.runner.KVCache."""

    def __init__(self, runner: PipelineRunner, life: Life, adapter: int) -> None:
        self.life, self._runner, self.adapter = life, runner, adapter
        self._name = life.name(CACHES)
        self.number = self._name.number
        runner.do(life, "make", self.number, adapter)
        self._here = runner.stage.caches[self.number]
        self._capacity = 0  # of every full layer's slab, whoever has one

    @property
    def offset(self) -> int:
        return self._here.offset

    @property
    def length(self) -> int:
        return self._here.length

    @property
    def committed(self) -> int:
        room = self._here.sliding[0].room if self._here.sliding else 0
        return self._capacity * self._runner.full_bytes + room * self._runner.sliding_bytes

    @property
    def window_history(self) -> int:
        return self._here.window_history

    def growth(self, t: int) -> int:
        more = self._here.sliding[0].growth(t) if self._here.sliding else 0
        full = grown(self._capacity, self.length, self.offset + t) - self._capacity
        return full * self._runner.full_bytes + more * self._runner.sliding_bytes

    def grow(self, t: int) -> None:
        """Note that t tokens are being appended."""
        self._capacity = grown(self._capacity, self.length, self.offset + t)

    def arrays(self) -> list[mx.array]:
        return self._here.arrays()

    def reserve(self, tokens: int) -> None:
        self._capacity = max(self._capacity, in_steps(tokens))
        self._runner.do(self.life, "reserve", self.number, tokens)

    def rewind(self, position: int, states: Iterable[WindowState] = ()) -> int:
        way = self._here.way_back(position, states)
        state = way.state.name.number if isinstance(way.state, PipelineState) else None
        self._runner.do(self.life, "go_back", self.number, position, way.at, way.kept, state)
        return way.at

    def snapshot(self, end: int | None = None, history: int | None = None) -> WindowState | None:
        made = self._here.snapshot(end, history)
        if made is None or made.data is None:
            return made
        name = self.life.name(STATES)
        self._runner.stage.states[name.number] = made
        self.life.tell(["snapshot", self.number, name.number, made.start, made.end])
        return PipelineState(made.start, made.end, made.data, self._runner, self.life, name)

    def export(self, ranges: Sequence[tuple[int, int]], *, release: bool = False) -> list[KVSpan]:
        made: list[KVSpan] = []
        numbers = []
        for start, end in ranges:
            made.append(span := PipelineSpan(self._runner, self.life, end - start))
            numbers.append(span.number)
        self._runner.do(self.life, "export", self.number, [list(r) for r in ranges], numbers, release)
        return made

    def load(self, spans: Sequence[list[mx.array]], states: Iterable[WindowState] = ()) -> int:
        numbers, total = [], 0
        for span in spans:
            assert isinstance(span, PipelineSpan)  # this runner made it
            numbers.append(span.number)
            total += span.tokens
        self._capacity = max(self._capacity, in_steps(total))
        self._runner.do(self.life, "load", self.number, numbers, total)
        return self.rewind(total, states)


class Passing(Pending):
    """A forward on its way through the ranks."""

    lazy: list[mx.array] = []  # noqa: RUF012

    def __init__(self, step: int, land: Callable[[Passing], mx.array]) -> None:
        self.step, self._land = step, land
        self.sent = time.monotonic()
        self.x: mx.array | None = None  # the wanted rows, once they are back

    def logits(self) -> mx.array:
        return self._land(self)


class PipelineRunner:
    """model: rank 0's part of it, with the embedding, the head and the layers of `stage`. ranges: the layers
    of each rank, this one first.
    """

    expert_slots = 0

    def __init__(
        self, group: Group, model: Model, stage: Stage, ranges: Sequence[range], kv_bits: KVBits
    ) -> None:
        self._group, self._model, self.stage, self._ranges = group, model, stage, ranges
        self.depth = len(ranges)
        self._held = False
        self._own = self._hops = 0.0  # seconds of a forward: in rank 0's layers, between all ranks
        self._config = model.config
        self._empty = SequenceCache(model.config, model.dtype, kv_bits)
        self.full_bytes = sum(layer.token_bytes for layer in self._empty.full)
        self.sliding_bytes = sum(layer.token_bytes for layer in self._empty.sliding)
        self._life: Life | None = None
        self._adapters: dict[int, Adapter] = {}
        self._steps = 0
        self._flying: deque[Passing] = deque()  # those that have not come back

    @property
    def session(self) -> Session:
        """The group's life that is. Raises HostError while there is none."""
        return self._group.session

    def hold_depth(self, depth: int) -> None:
        """Have so many forwards under way from now on, whatever is measured."""
        self.depth, self._held = depth, True

    # --- the engine's calls

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def experts_per_token(self) -> int:
        return self._config.experts_per_token

    def resize_experts(self, slots: int) -> None:
        """Each rank has as many in memory as the plan gave it."""

    def expert_counts(self) -> list[StreamCounts]:
        return []

    def tell_choices(self, write: Write | None) -> None:
        if write is not None:
            raise RequestError("experts can be traced where all layers are in one process: leave out hosts")

    @property
    def losses(self) -> int:
        return self._group.losses

    def rank_stats(self) -> tuple[RankStats, ...]:
        members, life = self._group.members, self._life
        sent, waited = (0, 0.0) if life is None else (life.session.sent, life.session.waited)
        here = (self._steps, sent, waited, peak_rss(), mx.get_active_memory())
        facts = [(m.facts[name] for name in RANK_FACTS) for m in members]
        return tuple(RankStats(len(r), *of) for r, of in zip(self._ranges, [here, *facts], strict=False))

    def take_loss(self) -> HostError | None:
        if self._life is not None and (loss := self._life.session.loss) is not None:
            self._life = None
            self._flying.clear()
            self.stage.clear()
            return loss
        return None

    def use_quiet_moment(self) -> bool:
        return False

    def distrust(self, error: Exception) -> bool:
        return False

    def close(self) -> None:
        self._group.close()

    def make_cache(self, adapter: int = 0) -> KVCache:
        life = self._live()
        if adapter:
            self._send_adapter(life, adapter)
        return PipelineCache(self, life, adapter)

    def put_adapter(self, number: int, adapter: Adapter | None) -> None:
        self.stage.put_adapter(number, adapter)
        if adapter is None:
            self._adapters.pop(number, None)
        else:
            self._adapters[number] = adapter
        life = self._life
        if life is not None and life.adapters.pop(number, None) is not None and adapter is None:
            life.tell(["put_adapter", number, None, [], []])

    def cache_bytes(self, tokens: int, chunk: int) -> int:
        return self._empty.nbytes_at(in_steps(tokens), chunk)

    def fits(self, tokens: int, parts: Sequence[mx.array], states: Iterable[WindowState]) -> bool:
        return self._empty.fits(tokens, parts, states)

    def adopt(
        self, parts: Sequence[mx.array], states: Mapping[int, WindowState]
    ) -> tuple[KVSpan, dict[int, WindowState]]:
        life = self._live()
        life.sweep()
        span = PipelineSpan(self, life, int(parts[0].shape[2]) if parts else 0)
        here, *others = self.divide_span(parts)
        self.stage.adopt_span(span.number, here)
        for member, theirs in zip(life.session.members, others, strict=True):
            life.session.tell(member, ["adopt_span", span.number, *_described(theirs)], _sent(theirs))
        return span, {end: self._adopt_state(life, state) for end, state in states.items()}

    def _adopt_state(self, life: Life, state: WindowState) -> WindowState:
        data = state.data
        if data is None:
            return state
        name = life.name(STATES)
        here, *others = self.divide_state(data)
        own = mx.contiguous(here[0])
        self.stage.adopt_state(name.number, state.start, state.end, own)
        for member, theirs in zip(life.session.members, others, strict=True):
            order = ["adopt_state", name.number, state.start, state.end, *_described(theirs)]
            life.session.tell(member, order, _sent(theirs))
        return PipelineState(state.start, state.end, own, self, life, name)

    def forward(
        self,
        tokens: mx.array,
        shares: Sequence[tuple[int, KVCache]],
        rows: Sequence[int] | None = None,
        progress: Progress = lambda share: None,
        *,
        awaited: bool = False,
    ) -> mx.array | None:
        pending = self._launch(tokens, shares, rows)
        return None if pending is None else pending.logits()

    def launch(
        self,
        tokens: mx.array,
        shares: Sequence[tuple[int, KVCache]],
        rows: Sequence[int],
        progress: Progress = lambda share: None,
        *,
        awaited: bool = False,
    ) -> Pending | None:
        return self._launch(tokens, shares, rows)

    def _launch(
        self, tokens: mx.array, shares: Sequence[tuple[int, KVCache]], rows: Sequence[int] | None
    ) -> Passing | None:
        """Run rank 0's layers and hand on what comes out."""
        life = self._live()
        numbers = []
        for length, cache in shares:
            assert isinstance(cache, PipelineCache)  # this runner made it
            if cache.life is not life:
                raise cache.life.session.lost()
            cache.grow(length)
            numbers.append([cache.number, length])
        life.sweep()
        session = life.session
        self._steps += 1
        x = self._model.embedding(tokens)
        mx.eval(x)  # the tokens may still be being sampled
        started = time.monotonic()
        x = self.stage.forward(x, numbers, None)
        spent = time.monotonic() - started
        for member in session.members:  # now that nothing can fail here any more
            wanted = None if rows is None or member is not session.last else list(rows)
            session.tell(member, ["forward", self._steps, numbers, wanted])
        session.send(self._steps, len(x), to_bytes(x))
        self._flying.append(made := Passing(self._steps, partial(self._logits, session)))
        if rows is None or len(rows):
            self._own += NEWEST * (spent - self._own)
            return made
        while len(self._flying) > AHEAD * len(session.members):
            self._land(session)
        return None

    def _logits(self, session: Session, wanted: Passing) -> mx.array:
        while wanted.x is None:
            self._land(session)
        logits = self._model.logits(wanted.x)
        assert logits is not None
        return logits

    def _land(self, session: Session) -> None:
        """Take in what the last rank sends next: it belongs to the oldest one under way."""
        if session.loss is not None:
            raise session.lost()
        oldest = self._flying.popleft()
        found = session.receive(oldest.step)
        oldest.x = from_bytes(found.data, self._model.dtype, (found.rows, self._config.hidden_size))
        self._hops += NEWEST * (max(0.0, found.at - oldest.sent - found.spent) - self._hops)
        if not self._held:
            # One on each rank, and those that are between them while rank 0 works on one.
            between = round(self._hops / max(self._own, 1e-6))
            self.depth = min(len(self._ranges) + between, MOST_UNDER_WAY)

    # --- what is behind them

    def _live(self) -> Life:
        """The life that is; its caches, spans and states are those that count. Raises HostError."""
        if self._life is None:
            self._life = Life(self._group.session, self.stage)
        elif self._life.session.loss is not None:
            raise self._life.session.lost()
        return self._life

    def do(self, life: Life, name: str, *values: object) -> None:
        """Have every rank do one of the stage's calls, this one first. Raises HostError."""
        life.sweep()
        getattr(self.stage, name)(*values)
        life.session.tell_all([name, *values])

    def divide_span(self, parts: Sequence[mx.array]) -> list[list[mx.array]]:
        """A span's parts, of every full layer, as the ranks hold them; this one's first."""
        each = len(self._empty.full[0].arrays()) if self._empty.full else 0
        return [list(parts[a * each : b * each]) for a, b in self._portions(FULL)]

    def divide_state(self, data: mx.array) -> list[list[mx.array]]:
        """A window state's data likewise, one array or none."""
        return [[data[2 * a : 2 * b]] if a < b else [] for a, b in self._portions(SLIDING)]

    def join_span(self, parts: list[list[mx.array]]) -> list[mx.array]:
        """What `divide_span` divides."""
        return [part for one in parts for part in one]

    def join_state(self, parts: list[list[mx.array]]) -> mx.array:
        """What `divide_state` divides."""
        return mx.concatenate([part for one in parts for part in one], axis=0)

    def _portions(self, kind: str) -> list[tuple[int, int]]:
        """Of the model's layers of a kind, counted by themselves, those [a, b) of each rank."""
        ends = [0, *(sum(k == kind for k in self._config.layer_types[: r.stop]) for r in self._ranges)]
        return list(pairwise(ends))

    def _send_adapter(self, life: Life, number: int) -> None:
        """Have the ranks know an adapter, if they do not."""
        adapter = self._adapters[number]
        if life.adapters.get(number) is adapter:
            return
        life.sweep()
        for member, layers in zip(life.session.members, self._ranges[1:], strict=True):
            pairs = [(layer, name, pair) for layer, name, pair in adapter.pairs() if layer in layers]
            arrays = [array for _, _, pair in pairs for array in (pair.a, pair.b)]
            names = [[layer, name] for layer, name, _ in pairs]
            order = ["put_adapter", number, adapter.scale, names, *_described(arrays)]
            life.session.tell(member, order, _sent(arrays))
        life.adapters[number] = adapter

    def fetch(self, life: Life, name: str, number: int) -> list[list[mx.array]]:
        """The parts of a span or a state that each of the other ranks has."""
        life.sweep()
        found = []
        for member in life.session.members:
            described, tensors = life.session.ask(member, [name, number])
            found.append([read(data, one) for data, one in zip(tensors, described, strict=True)])
        return found


def _described(arrays: Sequence[mx.array]) -> list[object]:
    return [[describe(array) for array in arrays]]


def _sent(arrays: Sequence[mx.array]) -> list[Buffer]:
    return [to_bytes(array) for array in arrays]
