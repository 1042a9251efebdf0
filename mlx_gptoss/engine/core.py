"""The engine: token ids in, token ids out, many requests at a time.

Every method may be called from any thread; the model runs on the engine's own (worker.py), a ragged batch at
a time (scheduler.py), each request from the longest prefix that was computed before (prefix_store.py).
"""

from __future__ import annotations

import queue
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.adapter import Adapter
from mlx_gptoss.engine.options import EngineOptions
from mlx_gptoss.engine.prefix_disk import PrefixDisk
from mlx_gptoss.engine.request import Request, Sink, TokenStream
from mlx_gptoss.engine.runner import KVCache, ModelRunner
from mlx_gptoss.engine.sampler import read_scores
from mlx_gptoss.engine.scheduler import Scheduler
from mlx_gptoss.engine.speculate import DrafterFactory
from mlx_gptoss.engine.stats import EngineStats
from mlx_gptoss.engine.worker import Worker
from mlx_gptoss.errors import BusyError, ContextLengthError, GptOssError, RequestError
from mlx_gptoss.sampling import PromptProgress, SamplingParams, TokenConstraint, TokenLogprobs

Read = TypeVar("Read")

BASE = "base"  # the name of no adapter
ADAPTER_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


class Engine:
    """A model that runs requests. What is forgotten closes itself.

    worker: the thread that made the runner's arrays. kv_budget: bytes for KV caches and kept prefixes;
    max_context: tokens of a prompt and its output. stop_ids: the tokens that end a generation unless its
    request names others. grouped_rows, message_start, pinned_tokens: see Scheduler. `scheduler` belongs
    to the worker's thread; what others ask of it goes through `worker.call`.
    """

    def __init__(
        self,
        worker: Worker,
        runner: ModelRunner,
        options: EngineOptions,
        *,
        kv_budget: int,
        max_context: int,
        stop_ids: frozenset[int],
        grouped_rows: int = 0,
        disk: PrefixDisk | None = None,
        drafters: DrafterFactory | None = None,
        message_start: int | None = None,
        pinned_tokens: Callable[[list[int]], int] = lambda tokens: 0,
    ) -> None:
        self.options = options
        self.max_context = max_context
        self.stop_ids = stop_ids
        self.worker = worker
        self.adapters: dict[str, int] = {}  # by name, their numbers; replaced as a whole
        self.default_adapter = BASE
        self._runner: ModelRunner | None = runner
        self._vocab_size = runner.vocab_size
        self._scoring = threading.Lock()
        scheduler = Scheduler(
            runner,
            budget=kv_budget,
            chunk=options.prefill_chunk,
            grouped_rows=grouped_rows,
            disk=disk,
            max_running=options.max_running,
            drafters=drafters,
            draft_tokens=options.draft_tokens,
            message_start=message_start,
            pinned_tokens=pinned_tokens,
        )
        self.scheduler = scheduler
        worker.step = scheduler.step
        # Neither the worker nor this callback holds the engine, so an engine that is dropped is collected.
        self._closer = weakref.finalize(self, worker.close, scheduler.close)

    def put_adapter(self, name: str, adapter: Adapter | None) -> None:
        """Let requests run with an adapter by its name, in place of one of that name; None frees it.

        Raises RequestError for a name that cannot be one or is not there to be freed, BusyError while
        requests run with it.
        """
        if not ADAPTER_NAME.fullmatch(name) or name == BASE:
            raise RequestError(
                f"adapter name {name!r}: expected letters, digits and any of _ . -, and not {BASE!r}",
                "adapter",
            )
        with self._scoring:  # a text ends with the adapter that it began with
            self.worker.call(partial(self._put_adapter, name, adapter))

    def _put_adapter(self, name: str, adapter: Adapter | None) -> None:
        numbers = self.adapters
        if adapter is None:
            self.scheduler.put_adapter(self._adapter_number(name), None)
            self.adapters = {n: i for n, i in numbers.items() if n != name}
            return
        free = next(i for i in range(1, len(numbers) + 2) if i not in numbers.values())
        number = numbers.get(name, free)
        self.scheduler.put_adapter(number, adapter)
        self.adapters = {**numbers, name: number}

    def _adapter_number(self, name: str | None) -> int:
        """The number of an adapter; None is the default one. Raises RequestError."""
        name = self.default_adapter if name is None else name
        if name == BASE:
            return 0
        if name not in self.adapters:
            names = ", ".join(map(repr, self.adapters)) or "none is loaded"
            raise RequestError(f"adapter is {name!r}: expected one of {names}", "adapter")
        return self.adapters[name]

    def logits(self, token_ids: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        """Teacher-forced logits of a text, float32 [T, vocab]: row i scores what follows token i."""
        tokens = self.check(token_ids, room=0)
        cache = self._cache(adapter)
        rows = self._forced(tokens, cache, lambda logits, start: np.array(logits.astype(mx.float32)))
        return np.concatenate(list(rows))

    def score(
        self,
        token_ids: Sequence[int],
        top: int = 0,
        *,
        keep: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[TokenLogprobs]:
        """The log-probabilities of a text's tokens from the second on, each after those before it.

        top: alternatives reported at each place. keep: hold what was computed for a request that goes on
        from the text. One text is scored at a time, beside the running requests; `cancelled` is asked when
        its turn comes and after each of its chunks, and True ends it with what there is.
        """
        SamplingParams(logprobs=top).check_vocabulary(self._vocab_size)
        tokens = self.check(token_ids, room=0)

        def read(logits: mx.array, start: int) -> list[TokenLogprobs]:
            following = tokens[start + 1 : start + 1 + len(logits)]
            return read_scores(logits[: len(following)], following, top)

        scores: list[TokenLogprobs] = []
        with self._scoring:
            if cancelled():
                return scores
            cache = self._cache()
            for chunk in self._forced(tokens, cache, read):
                scores += chunk
                if cancelled():
                    return scores
            if keep:
                self.worker.call(lambda: self.scheduler.keep(tokens, cache))
        return scores

    def _cache(self, adapter: str | None = None) -> KVCache:
        """Caches for a text that is no request's."""
        runner = self._runner
        if runner is None:
            raise GptOssError("the engine is closed: load the model again")
        return self.worker.call(lambda: runner.make_cache(self._adapter_number(adapter)))

    def _forced(
        self, tokens: list[int], cache: KVCache, read: Callable[[mx.array, int], Read]
    ) -> Iterator[Read]:
        """Run the model on given tokens. read: told the logits [n, vocab] of those from a place on."""

        def run(start: int, chunk: list[int]) -> Read:
            if self._runner is None:
                raise GptOssError("the engine is closed: load the model again")
            out = self._runner.forward(mx.array(chunk, mx.int32), [(len(chunk), cache)])
            assert out is not None
            return read(out, start)

        # One job a chunk, so that running requests go on in between.
        step = self.options.prefill_chunk
        for start in range(0, len(tokens), step):
            yield self.worker.call(partial(run, start, tokens[start : start + step]))

    def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        constraint: TokenConstraint | None = None,
        stop_text: Callable[[int], bool] | None = None,
        adapter: str | None = None,
    ) -> Iterator[int]:
        """Generate after the given tokens: yields ids, the one that ends the generation included."""
        stream = self.submit(token_ids, params, constraint=constraint, stop_text=stop_text, adapter=adapter)
        try:
            for output in stream:
                yield output.token_id
        finally:
            stream.cancel()

    def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        constraint: TokenConstraint | None = None,
        sink: Sink | None = None,
        stop_text: Callable[[int], bool] | None = None,
        progress: Callable[[PromptProgress], None] | None = None,
        adapter: str | None = None,
    ) -> TokenStream:
        """Queue a generation and return at once.

        With a `sink` every TokenOutput goes there, on the engine's thread, and at the end a TokensDone or a
        GptOssError; it must not block. `stop_text` is told each token, and True ends the generation.
        `progress` is told, on that thread too, how much of the prompt is read. `adapter`: the name of a
        loaded one, "base" for none (default: `default_adapter`). `params.stop` is text and means nothing
        here. Raises RequestError, ContextLengthError or BusyError.
        """
        params = params or SamplingParams()
        tokens = self.check(token_ids, room=1)
        waiting = len(self.scheduler.waiting)
        if waiting >= max(1, self.options.max_waiting):
            raise BusyError(
                f"{waiting} requests are waiting, the most that queue here: try again", retry_after=5
            )
        params.check_vocabulary(self._vocab_size)
        self._adapter_number(adapter)
        stops = params.stop_token_ids
        room = self.max_context - len(tokens)
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        request = Request(
            tokens,
            params,
            sink or items.put,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            stop_ids=self.stop_ids if stops is None else frozenset(stops),
            constraint=constraint,
            stop_text=stop_text,
            progress=progress,
        )
        scheduler = self.scheduler

        def add() -> None:
            try:
                request.adapter = self._adapter_number(adapter)  # on this thread it stays what it is
                scheduler.add(request)
            except Exception as error:
                request.fail(error)

        self.worker.post(add)
        return TokenStream(request, items if sink is None else None, self.worker.wake)

    def check(self, token_ids: Sequence[int], room: int) -> list[int]:
        """The tokens as ints, with `room` for more. Raises RequestError or ContextLengthError."""
        tokens = [int(t) for t in token_ids]
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token", "token_ids")
        vocab = self._vocab_size
        if min(tokens) < 0 or max(tokens) >= vocab:
            at, bad = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < vocab)
            raise RequestError(
                f"token_ids[{at}] is {bad}: the vocabulary has ids 0 to {vocab - 1}", "token_ids"
            )
        if len(tokens) + room > self.max_context:
            raise ContextLengthError(len(tokens), self.max_context)
        return tokens

    def prefill_when_idle(self, prompt: Callable[[], list[int]], adapter: str | None = None) -> None:
        """Read a prompt into the prefix store once nothing else is to do; too long a one is left out."""
        limit = self.max_context

        def request() -> Request | None:
            tokens = prompt()
            if len(tokens) >= limit:
                return None
            greedy = SamplingParams(temperature=0.0)
            number = self._adapter_number(adapter)
            return Request(
                *(tokens, greedy, lambda item: None),
                max_tokens=0,
                stop_ids=frozenset(),
                background=True,
                adapter=number,
            )

        self.scheduler.preparations.append(request)

    def stats(self) -> EngineStats:
        """What is running, what was done, and the memory it takes."""
        return self.worker.call(self.scheduler.stats)

    def close(self) -> None:
        """End what runs, free the model's memory and the thread. Safe to call again."""
        self._closer()
        self._runner = None
