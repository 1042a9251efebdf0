"""Continuous batching: which tokens of which sequences go into the next forward.

Every step runs one ragged forward over one token of each decoding sequence and a chunk of prompt, shared
evenly among the sequences that still read theirs. A step is launched before the last one's tokens are read,
so the device never waits for Python; masks of constrained requests are computed while the forward runs. Where
the layers lie on several machines, each has a forward of its own part of the sequences to work on.

Used by the engine's thread only.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.adapter import Adapter
from mlx_gptoss.device import is_out_of_memory, memory_is_short, on_gpu
from mlx_gptoss.engine.prefix_disk import PrefixDisk
from mlx_gptoss.engine.prefix_store import Match, PrefixStore, common_prefix
from mlx_gptoss.engine.pressure import Pressure
from mlx_gptoss.engine.request import FinishReason, Request, TokenOutput
from mlx_gptoss.engine.runner import KVCache, ModelRunner, Pending
from mlx_gptoss.engine.sampler import Sampler, logprob_arrays, read_logprobs, unpack_bits
from mlx_gptoss.engine.sequence import Flight, Piece, Sequence
from mlx_gptoss.engine.speculate import DrafterFactory, Speculation
from mlx_gptoss.engine.states import STATE_SLACK, take_states
from mlx_gptoss.engine.stats import Counters, EngineStats, expert_totals, hit_rate
from mlx_gptoss.errors import BusyError, GptOssError, MemoryLimitError
from mlx_gptoss.model.sequence_cache import WindowState

logger = logging.getLogger("mlx_gptoss.engine")

# A request waits for another one that is computing at least so many tokens more of their common prefix.
WORTH_WAITING = 16
# Tokens of output that admission counts on; beyond it a sequence grows while there is room.
EXPECTED_OUTPUT = 512
# With experts on the disk, drafts are made while at least so many of those chosen are in memory.
DRAFT_HITS = 0.95


class Scheduler:
    """Runs requests to their ends, one `step` after the other.

    budget: bytes for the KV of running sequences and the prefix store together. chunk: prompt tokens a step.
    grouped_rows: from so many rows on a forward reads each expert once, not once a row (0: always).
    message_start: id of the token that begins a message, where window states are worth taking.
    pinned_tokens: how many leading tokens of a prompt (system message and tools) to keep longest.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        budget: int,
        chunk: int,
        grouped_rows: int = 0,
        disk: PrefixDisk | None = None,
        max_running: int,
        drafters: DrafterFactory | None = None,
        draft_tokens: int = 4,
        message_start: int | None = None,
        pinned_tokens: Callable[[list[int]], int] = lambda tokens: 0,
    ) -> None:
        self.runner = runner
        self.budget = budget
        self.chunk = chunk
        self._grouped_rows = grouped_rows
        self.max_running = max_running
        self.store = PrefixStore(budget, disk, runner.fits, runner.adopt)
        # What to do when there is nothing to do: each gives a background request, or None.
        self.preparations: deque[Callable[[], Request | None]] = deque(maxlen=8)
        self.counters = Counters()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._message_start = message_start
        self._pinned_tokens = pinned_tokens
        self._drafters = drafters
        self._draft_tokens = draft_tokens
        self._pressure = Pressure(memory_is_short, self.store, runner)
        self._started = 0.0  # when the step began
        self._flights: deque[Flight] = deque()  # forwards whose logits have not been read, oldest first

    @property
    def live_bytes(self) -> int:
        """Bytes of the running sequences' caches."""
        drafts = sum(r.speculation.drafter.nbytes for r in self.running if r.speculation is not None)
        return drafts + sum(r.live.committed for r in self.running)

    def stats(self) -> EngineStats:
        """What there is at this moment."""
        return EngineStats(
            **asdict(self.counters),
            running=len(self.running),
            waiting=len(self.waiting),
            live_kv_bytes=self.live_bytes,
            prefix_bytes=self.store.nbytes,
            prefix_nodes=len(self.store),
            kv_budget=self.budget,
            ranks=self.runner.rank_stats(),
            rank_losses=self.runner.losses,
            **expert_totals(self.runner.expert_counts()),
        )

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError for sampling values that do not fit the vocabulary."""
        prompt = np.array(request.prompt, np.int32)
        sampler = Sampler(request.params, self.runner.vocab_size, prompt)
        self.waiting.append(Sequence(request, sampler))
        if not request.background:
            self.counters.prompt_tokens += len(request.prompt)

    def put_adapter(self, number: int, adapter: Adapter | None) -> None:
        """Put an adapter in the place of a number, None to free it. Raises BusyError while it is in use."""
        using = sum(r.request.adapter == number for r in (*self.running, *self.waiting))
        if using:
            raise BusyError(f"the adapter is in use by {using} requests: wait for their end", retry_after=5)
        self.store.forget(number)
        self.runner.put_adapter(number, adapter)
        if adapter is not None and self.store.on_disk:
            self.store.open(number, adapter.digest())

    def step(self) -> bool:
        """Run one forward and deliver what the one before sampled; False when there is nothing to do."""
        self._started = time.perf_counter()
        try:
            if (loss := self.runner.take_loss()) is not None:
                self._start_over(loss)
            self._pressure.relieve()
            self._drop_cancelled()
            self._admit()
            if self._reads_first():
                self._read(self.running)
            pieces = self._plan()
            if not pieces and not self._flights and not any(r.decoding for r in self.running):
                return bool(self.waiting) or self._idle()
            self._launch(pieces)
            self._read(self.running)
            ready = len(self._flights) - self.runner.depth + 1 if pieces else 1
            for _ in range(min(ready, len(self._flights))):
                self._land(self._flights.popleft())
            self._tell_progress(pieces)
        except Exception as error:
            self._recover(error)
        return True

    def _reads_first(self) -> bool:
        """True when the last step's tokens are wanted before the next forward is launched.

        Guesses go on from tokens that are known; and the CPU backend works on a chunk of prompt while it
        launches it, which would hold up the tokens that are ready.
        """
        reading = any(not r.decoding and r.flight is None for r in self.running)
        return self._guesses() or (reading and not on_gpu())

    def _guesses(self) -> bool:
        return any(r.speculation is not None and r.speculation.on for r in self.running)

    def _idle(self) -> bool:
        """A piece of work that can wait for a quiet moment; False when there is none."""
        if self.preparations:
            request = self.preparations.popleft()()
            if request is not None:
                self.add(request)
            return True
        # Never before the first answer: its first token would wait.
        return (self.counters.finished > 0 and self.runner.use_quiet_moment()) or self.store.save()

    def close(self) -> None:
        """End every request with an error, write what is to be kept, and free all memory."""
        for r in [*self.running, *self.waiting]:
            self._fail(r, GptOssError("the engine was closed"))
        self.waiting.clear()
        try:
            while self.store.save():
                pass
        except GptOssError as error:  # what is to be kept is on a machine that is lost
            logger.warning("some prefixes are not kept on disk: %s", error)
        self.store.clear()
        self.runner.close()
        del self.runner, self._pressure
        self._drafters = None
        mx.clear_cache()

    # --- who runs

    def _drop_cancelled(self) -> None:
        for r in [r for r in self.waiting if r.request.cancelled]:
            self.waiting.remove(r)
            self._close(r, "cancelled")
        for r in [r for r in self.running if r.request.cancelled]:
            self._finish(r, "cancelled")

    def _admit(self) -> None:
        """Let waiting sequences in, first come first served, as far as places and memory go."""
        foreground = [r for r in (*self.running, *self.waiting) if not r.request.background]
        if foreground:
            for r in [r for r in self.running if r.request.background]:
                self._finish(r, "cancelled")
        for r in list(self.waiting):
            if len(self.running) >= self.max_running or any(x.alone for x in self.running):
                return
            if r.request.background and foreground:
                continue
            if r.alone and self.running:
                return  # nobody overtakes it, so its moment comes
            tokens = np.array(r.tokens, np.int32)
            if self._soon_computed(tokens, r.request.adapter):
                continue
            rest = min(EXPECTED_OUTPUT, r.request.max_tokens - r.sampled)
            need = self.runner.cache_bytes(len(tokens) + rest, self.chunk)
            if need > self.budget - self.live_bytes and self.running:
                return
            self.waiting.remove(r)
            try:
                self._wake(r, tokens)
            except Exception as error:
                self._fail(r, error)

    def _soon_computed(self, tokens: np.ndarray, adapter: int) -> bool:
        """True while a running sequence is computing much of the same prompt: waiting is cheaper."""
        alike = [r for r in self.running if r.request.adapter == adapter]
        reading = [r for r in alike if r.live.offset < len(r.prompt)]
        if not reading:
            return False
        held = self.store.common(tokens, adapter)
        return any(
            common_prefix(tokens, r.prompt) - max(held, r.live.length) >= WORTH_WAITING for r in reading
        )

    def _wake(self, r: Sequence, tokens: np.ndarray) -> None:
        """Give a sequence its caches, filled with the longest prefix that anything holds of it."""
        known = self._best_match(tokens[:-1], r.request.adapter)
        cache = self.runner.make_cache(r.request.adapter)
        self.store.shrink(self.budget - self.live_bytes - self.runner.cache_bytes(len(tokens), self.chunk))
        cache.reserve(len(tokens))
        start = cache.load(known.spans, known.states)
        mx.eval(cache.arrays())
        r.cache, r.branch, r.last_state = cache, known.length, start
        if start == known.length > 0:
            # Others may branch off here as well; the state this one started from lies elsewhere.
            here = cache.snapshot(start, cache.window_history + STATE_SLACK)
            r.states = [] if here is None else [here]
        if not r.sampled and not r.request.background:
            # Again, if it was sent back before its first token.
            self.counters.cached_tokens += start - r.request.cached_tokens
            r.request.cached_tokens = start
        r.request.tell_progress(start)
        plain = r.request.constraint is None and not r.request.background
        if self._drafters is not None and plain and self._drafts_pay():
            r.speculation = Speculation(self._drafters(), self._draft_tokens)
        self.running.append(r)

    def _drafts_pay(self) -> bool:
        """Guesses want experts of their own: reading those costs more than a right guess saves."""
        layers = self.runner.expert_counts()
        return not layers or (hit_rate(layers) or 0) >= DRAFT_HITS

    def _best_match(self, tokens: np.ndarray, adapter: int) -> Match:
        """The longest common prefix in the store or in a running sequence, computed with the same adapter."""
        match = self.store.match(tokens, adapter)
        for r in [r for r in self.running if r.request.adapter == adapter]:
            n = min(common_prefix(tokens, np.array(r.tokens, np.int32)), r.live.length)
            if n > match.length:
                here = r.live.snapshot(n)
                # States of the store that end beyond its own match belong to other branches.
                shared = [s for s in match.states if s.end <= match.length]
                states = [*shared, *r.states, *([here] if here is not None else [])]
                match = Match(n, r.live.export([(0, n)]), states)
        return match

    # --- one forward

    def _plan(self) -> list[Piece]:
        """A token of each decoding sequence, and the chunk shared evenly among those reading prompts."""
        pieces, ready = [], self._ready()
        for r in ready:
            if r.next is not None and r.sampled < r.request.max_tokens:
                pieces.append(Piece(r, r.next, 1, True))
        reading = [r for r in ready if r.next is None]
        left = self._share(sum(len(r.tokens) - r.live.offset for r in reading))
        # Those who need least first: what they leave is shared among the others.
        for i, r in enumerate(sorted(reading, key=lambda r: len(r.tokens) - r.live.offset)):
            start = r.live.offset
            n = min(len(r.tokens) - start, max(1, left // (len(reading) - i)))
            left -= n
            ends = start + n == len(r.tokens) and r.request.max_tokens > 0
            tokens, draft = r.tokens[start : start + n], tuple[int, ...]()
            if n == 1 and ends and r.speculation is not None:
                room = r.request.max_tokens - r.sampled - 1
                draft = tuple(r.speculation.propose(r.tokens, room))
            pieces.append(Piece(r, mx.array([*tokens, *draft], mx.int32), n + len(draft), ends, draft))
        return self._make_room(pieces)

    def _ready(self) -> list[Sequence]:
        """Who goes into the next forward: of those in none, the part that leaves one to each machine."""
        if self.runner.depth == 1:
            return self.running
        free = sorted((r for r in self.running if r.flight is None), key=lambda r: r.launched)
        return free[: -(-len(self.running) // self.runner.depth)]

    def _share(self, unread: int) -> int:
        """How many of the unread prompt tokens this forward takes: it leaves the last one enough."""
        share = min(self.chunk, unread - self._grouped_rows)
        return share if share >= max(1, self._grouped_rows) and self.chunk < unread else self.chunk

    def _make_room(self, pieces: list[Piece]) -> list[Piece]:
        """Shrink the store, and then send the youngest sequences back to wait, until the forward fits."""
        while True:
            live = self.live_bytes + sum(p.sequence.live.growth(p.length) for p in pieces)
            if live + self.store.nbytes > self.budget:
                self.store.shrink(self.budget - live)
            if live <= self.budget or len(self.running) <= 1:
                return pieces
            youngest = self.running[-1]
            self._read([youngest])
            pieces = [p for p in pieces if p.sequence is not youngest]
            if youngest in self.running:
                self._send_back(youngest)
                self.counters.preempted += 1

    def _send_back(self, r: Sequence) -> None:
        """Free a sequence's caches; it will read its timeline again."""
        self.running.remove(r)
        if r.next is not None:
            # Drawn and never read: it is drawn again.
            r.sampler.state = r.undrawn
            r.sampled -= 1
        r.cache, r.next, r.logprobs, r.states, r.speculation = None, None, None, [], None
        r.flight = None
        self.waiting.appendleft(r)

    def _launch(self, pieces: list[Piece]) -> None:
        """Launch a forward, to `_land` later where logits are wanted."""
        pending = self._forward(pieces) if pieces else None
        for p in pieces:
            p.sequence.launched = self.counters.forwards
        if pending is None:
            self._end_reading(pieces)
            return
        self._flights.append(flight := Flight(pieces, pending))
        for p in pieces:
            p.sequence.flight = flight if p.wants else None

    def _land(self, flight: Flight) -> None:
        """Sample what a forward was for."""
        logits = flight.pending.logits()
        self._end_reading(flight.pieces)
        self._sample(flight, logits)

    def _end_reading(self, pieces: list[Piece]) -> None:
        """End those that only wanted their prompt read."""
        for r in (p.sequence for p in pieces if not p.wants):
            if r in self.running and r.request.max_tokens == 0 and r.live.offset == len(r.tokens):
                self._finish(r, "length")

    def _forward(self, pieces: list[Piece]) -> Pending | None:
        """Launch the forward; its logits [R, vocab], of the rows wanted, are not evaluated yet."""
        rows: list[int] = []
        at = 0
        for p in pieces:
            at += p.length
            rows += range(at - p.rows, at)
        tokens = [p.tokens for p in pieces]
        shares = [(p.length, p.sequence.live) for p in pieces]
        flat = tokens[0] if len(tokens) == 1 else mx.concatenate(tokens)
        reading = [
            (p.sequence.request, p.sequence.live.offset, p.length) for p in pieces if not p.sequence.decoding
        ]

        def tell(share: float) -> None:
            for request, start, length in reading:
                request.tell_progress(start + int(share * length))

        pending = self.runner.launch(flat, shares, rows, tell, awaited=self._guesses())
        self.counters.forwards += 1
        launched = [] if pending is None else pending.lazy
        for p in pieces:
            self.counters.computed_tokens += p.length
            p.sequence.request.computed_tokens += p.length
            launched += take_states(p, self._message_start)
            if not p.wants:
                launched += p.sequence.live.arrays()
        mx.async_eval(launched)
        return pending

    def _sample(self, flight: Flight, logits: mx.array) -> None:
        """Sample the next token of every sequence that has come to its end, and launch that."""
        greedy: mx.array | None = None
        row, launched = 0, []
        for p in flight.pieces:
            r = p.sequence
            at, row = row, row + p.rows
            if r.flight is not flight:  # it wants nothing, or is not there any more
                continue
            r.flight = None
            params = r.request.params
            r.undrawn = r.sampler.state
            try:
                if r.speculation is not None and (r.speculation.on or p.draft):
                    self._verify(p, logits[at : at + p.rows])
                    continue
                if params.plain_greedy and r.request.constraint is None and params.logprobs is None:
                    if greedy is None:
                        greedy = mx.argmax(logits, axis=-1).astype(mx.int32)
                    r.next = greedy[at : at + 1]
                else:
                    self._draw(r, logits[at : at + 1].squeeze(0))
            except Exception as error:
                self._fail(r, error)
                continue
            r.alone = False
            r.sampled += 1
            launched += [a for a in (r.next, *(r.logprobs or ())) if a is not None]
        mx.async_eval(launched)

    def _tell_progress(self, pieces: list[Piece]) -> None:
        """Tell those who ask how far their prompts are read, by the steps before the one that now runs."""
        for p in pieces:
            r = p.sequence
            if r.request.progress is None or r.decoding or r not in self.running:
                continue
            start = r.live.offset - p.length
            # A forward is launched long before it ends; that its window state is there shows that it has.
            read = next((s for s in reversed(r.states) if s.end <= start), None)
            if read is not None and read.data is not None:
                mx.eval(read.data)
                r.request.tell_progress(read.end)

    def _draw(self, r: Sequence, logits: mx.array) -> None:
        """Sample from logits [vocab] as the request wants it."""
        constraint, top = r.request.constraint, r.request.params.logprobs
        allowed = None if constraint is None else constraint.allowed()
        r.next = r.sampler.sample(logits, allowed)
        if top is not None:
            if allowed is not None:
                logits = mx.where(unpack_bits(allowed, logits.shape[-1]), logits, -mx.inf)
            r.logprobs = logprob_arrays(logits, r.next, top)

    def _verify(self, piece: Piece, logits: mx.array) -> None:
        """Draw a token for each row of logits [1 + draft, vocab], up to the first unlike its guess."""
        r, speculation = piece.sequence, piece.sequence.speculation
        assert speculation is not None
        drawn: list[mx.array] = []
        logprobs, states = [], []
        for i in range(len(piece.draft) + 1):
            self._draw(r, logits[i : i + 1].squeeze(0))
            assert r.next is not None
            drawn.append(r.next)
            logprobs.append(r.logprobs)
            states.append(r.sampler.state)
        r.next = r.logprobs = None
        tokens: list[int] = np.array(mx.concatenate(drawn)).tolist()
        accepted = 0
        while accepted < len(piece.draft) and tokens[accepted] == piece.draft[accepted]:
            accepted += 1
        r.sampler.state = states[accepted]
        r.alone = False
        if piece.draft:
            r.live.rewind(len(r.tokens) + accepted)
            self.counters.drafted_tokens += len(piece.draft)
            self.counters.accepted_tokens += accepted
        if piece.length == len(piece.draft) + 1:
            seconds = time.perf_counter() - self._started
            self.counters.drafts_given_up += speculation.record(len(piece.draft), accepted, seconds)
        for token, row in zip(tokens[: accepted + 1], logprobs, strict=False):
            r.sampled += 1
            self._deliver(r, TokenOutput(token, None if row is None else read_logprobs(row)))
            if r not in self.running:
                return

    # --- what came out

    def _read(self, sequences: Iterable[Sequence]) -> None:
        """Read the tokens sampled before this forward was launched, and deliver them."""
        for r in list(sequences):
            if r.next is None:
                continue
            token = int(r.next.item())  # type: ignore[arg-type]
            logprobs = None if r.logprobs is None else read_logprobs(r.logprobs)
            r.next = r.logprobs = None
            self._deliver(r, TokenOutput(token, logprobs))

    def _deliver(self, r: Sequence, output: TokenOutput) -> None:
        request = r.request
        r.tokens.append(output.token_id)
        self.counters.generated_tokens += 1
        try:
            if request.constraint is not None:
                request.constraint.accept(output.token_id)
            stopped = request.stop_text is not None and request.stop_text(output.token_id)
        except Exception as error:
            self._fail(r, error)
            return
        request.emit(output)
        if stopped or output.token_id in request.stop_ids:
            self._finish(r, "stop")
        elif request.completion_tokens >= request.max_tokens:
            self._finish(r, "length")
        elif request.cancelled:
            self._finish(r, "cancelled")

    def _finish(self, r: Sequence, reason: FinishReason) -> None:
        """Keep what was computed, free the caches, and tell the caller."""
        self.running.remove(r)
        cache, r.cache, r.next, r.flight = r.live, None, None, None
        try:
            self._keep(r, cache)
        except Exception as error:
            expected = isinstance(error, GptOssError)
            logger.warning("what a request computed is not kept: %s", error, exc_info=not expected)
            self.store.reset()  # it may be half written
        r.states = []
        self._close(r, reason)

    def _keep(self, r: Sequence, cache: KVCache) -> None:
        """Move what a sequence's caches hold to the store."""
        n = min(cache.offset, len(r.tokens))
        if n == cache.length or n == len(r.tokens):
            self.keep(r.tokens[:n], cache, r.states, min(n, self._pinned_tokens(r.request.prompt)))

    def keep(
        self, tokens: list[int], cache: KVCache, states: Iterable[WindowState] = (), pinned: int = 0
    ) -> None:
        """Move what a cache holds of these tokens to the store, with window states taken on the way."""
        n = len(tokens)
        last = cache.snapshot(n, cache.window_history + STATE_SLACK)
        states = [s for s in (*states, last) if s is not None and s.end <= n]
        self.store.insert(np.array(tokens, np.int32), cache, states, pinned, cache.adapter)
        self.store.shrink(self.budget - self.live_bytes)

    def _close(self, r: Sequence, reason: FinishReason) -> None:
        if not r.request.background:
            if reason == "cancelled":
                self.counters.cancelled += 1
            else:
                self.counters.finished += 1
        r.request.end(reason)

    def _fail(self, r: Sequence, error: Exception) -> None:
        """End one sequence with an error; its caches are dropped, as they may be half written."""
        if r in self.running:
            self.running.remove(r)
        r.cache, r.next, r.states, r.speculation, r.flight = None, None, [], None, None
        self.counters.failed += 1
        r.request.fail(error)

    def _start_over(self, loss: GptOssError) -> None:
        """Every cache is gone, and what is in memory of prefixes: end who had one; the disk has the rest."""
        self._flights.clear()
        for r in list(self.running):
            self._fail(r, loss)
        self.store.reset()

    def _recover(self, error: Exception) -> None:
        """A whole forward failed. All start again if it may go well another way; else any of its sequences
        may be the cause, and each starts again alone.
        """
        if (loss := self.runner.take_loss()) is not None:
            self._start_over(loss)
            return
        self._flights.clear()
        running = list(self.running)
        if not running:
            # It was no forward, then; whoever comes next must not meet it again for ever.
            logger.warning("what was no forward failed", exc_info=error)
            if self.waiting:
                self._fail(self.waiting.popleft(), error)
            return
        otherwise = self.runner.distrust(error)
        if len(running) == 1 and not otherwise:
            if is_out_of_memory(error):
                error = MemoryLimitError(f"the device is out of memory: lower --kv-budget ({error})")
            self._fail(running[0], error)
            return
        logger.warning(
            "a forward of %d sequences failed; each starts again%s",
            len(running),
            "" if otherwise else " alone",
            exc_info=error,
        )
        for r in reversed(running):
            r.alone = r.alone or not otherwise
            self._send_back(r)
        self.store.reset()
