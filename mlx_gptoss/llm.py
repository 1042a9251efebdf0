"""Engine: a loaded model, and the only door to it for the command line, the server and scripts.

Every method may be called from any thread; the model runs on the engine's own (see engine/worker.py), many
requests at a time (engine/scheduler.py), each from the longest prefix that was computed before.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_gptoss.chat.stops import UntilStop
from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.memory import gigabytes, plan_checkpoint
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.device import available_memory, limit_memory
from mlx_gptoss.engine.options import LOOKUP, EngineOptions, plan_context
from mlx_gptoss.engine.prefix_disk import PrefixDisk, fingerprint
from mlx_gptoss.engine.request import Request, Sink, TokenStream
from mlx_gptoss.engine.scheduler import Scheduler
from mlx_gptoss.engine.speculate import DrafterFactory, ModelDrafter, PromptLookup
from mlx_gptoss.engine.worker import Worker
from mlx_gptoss.errors import BusyError, ConfigError, ContextLengthError, GptOssError, RequestError
from mlx_gptoss.model.config import ModelConfig, read_object
from mlx_gptoss.model.graph import Model, Segment
from mlx_gptoss.sampling import SamplingParams, TokenConstraint
from mlx_gptoss.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlx_gptoss.chat.generation import Generation
    from mlx_gptoss.chat.session import Session
    from mlx_gptoss.grammar import Schema, ToolChoice
    from mlx_gptoss.harmony import Conversation, Event, Message, Reply

# Bytes that the files of kept prefixes may take.
DISK_LIMIT = 16 * 2**30


@dataclass(frozen=True)
class EngineStats:
    """A moment of an engine: requests, tokens since it started, and bytes."""

    running: int
    waiting: int
    finished: int
    cancelled: int
    failed: int
    preempted: int
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    generated_tokens: int
    forwards: int
    drafted_tokens: int
    accepted_tokens: int
    drafts_given_up: int  # requests for which guessing did not pay
    live_kv_bytes: int
    prefix_bytes: int
    prefix_nodes: int
    kv_budget: int


def load(
    model: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    offline: bool = False,
    progress: Callable[[int, int], None] | None = None,
    announce: Callable[[str], None] | None = None,
    **options: Any,
) -> Engine:
    """Load a model: a folder, a Hub id (downloaded unless `offline`), or "demo".

    dtype: "bfloat16", "float16" or "float32" for activations and dense weights (default: the device's).
    progress(done, total) is called as parts are read, on another thread; announce, before that, with one line
    that tells what memory the model will take. options: see EngineOptions.

    Raises ModelNotFoundError, HubError, ConfigError, CheckpointError, MemoryLimitError or RequestError.
    """
    known = {f.name for f in fields(EngineOptions)}
    for name in options:
        if name not in known:
            raise RequestError(f"load has no option {name!r}: expected {', '.join(sorted(known))}", name)
    chosen = EngineOptions(**options)
    folder = resolve(model, revision=revision, offline=offline)
    checkpoint = Checkpoint(folder, dtype)
    if not (folder / "tokenizer.json").is_file():
        _configured_stops(folder)  # what is wrong with them is told before the weights are read
    memory = plan_checkpoint(checkpoint)
    memory.require()
    draft = None if chosen.draft in (None, LOOKUP) else _draft_checkpoint(chosen, checkpoint, offline)
    free = available_memory() - (plan_checkpoint(draft).weights if draft is not None else 0)
    budget, context = plan_context(memory, chosen, free)
    if announce is not None:
        announce(
            f"{folder.name}: weights {gigabytes(memory.weights)}, KV cache up to {gigabytes(budget)} "
            f"(context {context:,} tokens), {gigabytes(free)} free"
        )
    worker = Worker(f"engine {folder.name}")
    try:
        worker.call(partial(limit_memory, memory.weights))
        loaded = worker.call(lambda: read_model(checkpoint, progress))
        drafters: DrafterFactory | None = PromptLookup if chosen.draft == LOOKUP else None
        if draft is not None:
            second = worker.call(lambda: read_model(draft))
            drafters = partial(ModelDrafter, second, chosen.prefill_chunk)
        return Engine(worker, loaded, folder, str(model), chosen, budget, context, drafters)
    except BaseException:
        worker.close()
        raise


def _draft_checkpoint(options: EngineOptions, target: Checkpoint, offline: bool) -> Checkpoint:
    """The draft model's checkpoint. Raises RequestError when its vocabulary is another one."""
    assert options.draft is not None
    draft = Checkpoint(resolve(options.draft, offline=offline), target.dtype)
    if draft.config.vocab_size != target.config.vocab_size:
        raise RequestError(
            f"draft is {str(options.draft)!r} with {draft.config.vocab_size} tokens: a draft model needs the "
            f"vocabulary of the model it guesses for, {target.config.vocab_size} tokens",
            "draft",
        )
    return draft


class Engine:
    """A loaded model. Close it, or use it in a `with` statement; what is forgotten closes itself."""

    def __init__(
        self,
        worker: Worker,
        model: Model,
        folder: Path,
        name: str,
        options: EngineOptions,
        kv_budget: int,
        max_context: int,
        drafters: DrafterFactory | None = None,
    ) -> None:
        self.config: ModelConfig = model.config
        self.name = name
        self.folder = folder
        self.options = options
        self.kv_budget = kv_budget
        self.max_context = max_context
        self._tokenizer: Tokenizer | None = None
        self._worker = worker
        self._model: Model | None = model
        has_text = (folder / "tokenizer.json").is_file()
        tokenizer = self.tokenizer if has_text else None
        disk = None
        if options.prefix_cache is not None:
            mark = fingerprint(folder, model.dtype, options.bits)
            disk = PrefixDisk(Path(options.prefix_cache).expanduser(), mark, DISK_LIMIT)
        scheduler = Scheduler(
            model,
            budget=kv_budget,
            chunk=options.prefill_chunk,
            disk=disk,
            max_running=options.max_running,
            kv_bits=options.bits,
            drafters=drafters,
            draft_tokens=options.draft_tokens,
            message_start=tokenizer.special.start if tokenizer else None,
            pinned_tokens=partial(system_prefix, tokenizer) if tokenizer else lambda tokens: 0,
        )
        self._scheduler = scheduler
        self._default_stops = tokenizer.stop_ids if tokenizer else _configured_stops(folder)
        worker.step = scheduler.step
        # Neither the worker nor this callback holds the engine, so an engine that is dropped is collected.
        self._closer = weakref.finalize(self, worker.close, scheduler.close)

    # --- tokens

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises TokenizerError when its folder has none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_folder(self.folder)
        return self._tokenizer

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits of a text, float32 [T, vocab]: row i scores what follows token i."""
        tokens = self._checked(token_ids, room=0)
        model = self._model
        if model is None:
            raise GptOssError("the engine is closed: load the model again")
        cache = self._worker.call(self._scheduler.make_cache)

        def run(chunk: list[int]) -> np.ndarray:
            out = model(mx.array(chunk, mx.int32), [Segment(len(chunk), cache)])
            assert out is not None
            return np.array(out.astype(mx.float32))

        # One job a chunk, so that running requests go on in between.
        step = self.options.prefill_chunk
        chunks = [tokens[start : start + step] for start in range(0, len(tokens), step)]
        return np.concatenate([self._worker.call(partial(run, chunk)) for chunk in chunks])

    def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        constraint: TokenConstraint | None = None,
    ) -> Iterator[int]:
        """Generate after the given tokens: yields ids, the one that ends the generation included."""
        stream = self.submit(token_ids, params, constraint=constraint)
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
    ) -> TokenStream:
        """Queue a generation and return at once.

        With a `sink` every TokenOutput goes there, on the engine's thread, and at the end a TokensDone or a
        GptOssError; it must not block. Raises RequestError, ContextLengthError or BusyError.
        """
        params = params or SamplingParams()
        tokens = self._checked(token_ids, room=1)
        stop_text = None
        if params.stop:
            stop_text = _StopText(self.tokenizer, params.stop)
        return self._submit(tokens, params, constraint, sink, stop_text)

    def _submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        constraint: TokenConstraint | None,
        sink: Sink | None,
        stop_text: Callable[[int], bool] | None,
    ) -> TokenStream:
        if len(self._scheduler.waiting) >= max(1, self.options.max_waiting):
            raise BusyError(
                f"{len(self._scheduler.waiting)} requests are waiting, the most that queue here: try again",
                retry_after=5,
            )
        for token in params.logit_bias:
            if token >= self.config.vocab_size:
                raise RequestError(
                    f"logit_bias names token {token}: the ids are 0 to {self.config.vocab_size - 1}",
                    "logit_bias",
                )
        if params.logprobs is not None and params.logprobs > self.config.vocab_size:
            raise RequestError(
                f"logprobs is {params.logprobs}: the vocabulary has {self.config.vocab_size} tokens",
                "logprobs",
            )
        stops = params.stop_token_ids
        room = self.max_context - len(tokens)
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        request = Request(
            tokens,
            params,
            sink or items.put,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            stop_ids=self._default_stops if stops is None else frozenset(stops),
            constraint=constraint,
            stop_text=stop_text,
        )
        scheduler = self._scheduler

        def add() -> None:
            try:
                scheduler.add(request)
            except Exception as error:
                request.fail(error)

        self._worker.post(add)
        return TokenStream(request, items if sink is None else None, self._worker.wake)

    def _checked(self, token_ids: Sequence[int], room: int) -> list[int]:
        """The tokens as ints. Raises RequestError or ContextLengthError."""
        tokens = [int(t) for t in token_ids]
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token", "token_ids")
        vocab = self.config.vocab_size
        if min(tokens) < 0 or max(tokens) >= vocab:
            at, bad = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < vocab)
            raise RequestError(
                f"token_ids[{at}] is {bad}: the vocabulary has ids 0 to {vocab - 1}", "token_ids"
            )
        if len(tokens) + room > self.max_context:
            raise ContextLengthError(len(tokens), self.max_context)
        return tokens

    # --- conversations

    def start(
        self,
        conversation: Conversation,
        *,
        params: SamplingParams | None = None,
        tool_choice: ToolChoice = "auto",
        strict_tools: bool = True,
        schema: Schema | None = None,
        regex: str | None = None,
        lark: str | None = None,
        choices: Sequence[str] | None = None,
        json_object: bool = False,
        reasoning_budget: int | None = None,
        sink: Sink | None = None,
    ) -> Generation:
        """Queue the assistant's next turn of a conversation and return at once.

        schema, regex, lark, choices, json_object: what the answer must be; at most one. reasoning_budget:
        analysis tokens at most. strict_tools: False lets a call's arguments be any JSON object where the
        tool's schema cannot be enforced. With a `sink` the events go there, on the engine's thread.

        Raises RequestError (SchemaError, ToolError), ContextLengthError, TokenizerError or BusyError.
        """
        from mlx_gptoss import grammar, harmony
        from mlx_gptoss.chat.generation import Generation

        params = params or SamplingParams()
        constraint = grammar.compile_constraint(
            self.tokenizer,
            tools=conversation.tools,
            builtin=conversation.builtin,
            tool_choice=tool_choice,
            strict_tools=strict_tools,
            schema=schema,
            regex=regex,
            lark=lark,
            choices=choices,
            json_object=json_object,
            reasoning_budget=reasoning_budget,
            called=any(m.role == "assistant" and m.recipient for m in conversation.messages),
        )
        tokens = self._checked(harmony.render(conversation, self.tokenizer), room=1)
        structured = schema is not None or json_object
        generation = Generation(
            self.tokenizer,
            stop=params.stop,
            want_logprobs=params.logprobs is not None,
            parse=partial(_parse, schema) if structured else None,
            sink=sink,
            on_done=partial(self._prepare, conversation),
        )
        generation.attach(self._submit(tokens, params, constraint, generation.take, None))
        return generation

    def _prepare(self, conversation: Conversation, reply: Reply) -> None:
        """Have the history that the next turn will render, without analysis, read in a quiet moment."""
        from mlx_gptoss import harmony

        if reply.finish_reason != "stop" or not reply.usage.reasoning_tokens:
            return
        history = replace(conversation, messages=[*conversation.messages, *reply.messages])
        tokenizer, limit = self.tokenizer, self.max_context

        def request() -> Request | None:
            tokens = harmony.render(history, tokenizer, for_completion=False)
            if len(tokens) >= limit:
                return None
            nothing = SamplingParams(temperature=0.0)
            return Request(
                tokens, nothing, lambda item: None, max_tokens=0, stop_ids=frozenset(), background=True
            )

        self._scheduler.preparations.append(request)

    def respond(self, prompt: str | Sequence[Message], **request: Any) -> Reply:
        """Answer a text or a list of messages, and return the whole reply.

        Takes instructions=, tools= (Tools, functions or dicts; declared, not run), builtin=,
        reasoning_effort= ("low", "medium", "high"), current_date=, response_name=, what `start` takes
        (tool_choice, schema, regex, lark, choices, json_object, reasoning_budget), and the fields of
        SamplingParams (temperature, max_tokens, seed, stop, ..).
        """
        generation = self.stream(prompt, **request)
        *_, done = generation
        return done.reply  # type: ignore[union-attr]

    def stream(self, prompt: str | Sequence[Message], **request: Any) -> Iterator[Event]:
        """Like `respond`, as events: ReasoningDelta, TextDelta, ToolCallDelta, ToolCall, .., and last Done.

        The request is checked and started at once; leaving the iteration cancels it.
        """
        from mlx_gptoss.chat.session import as_messages, events_of, split_request

        conversation, start = split_request(as_messages(prompt), request)
        return events_of(self.start(conversation, **start))

    def chat(self, **options: Any) -> Session:
        """A conversation that keeps its timeline; see Session for what it takes."""
        from mlx_gptoss.chat.session import Session

        return Session(self, **options)

    # --- the engine itself

    def stats(self) -> EngineStats:
        """What is running, what was done, and the memory it takes."""
        s = self._scheduler

        def read() -> EngineStats:
            c = s.counters
            return EngineStats(
                running=len(s.running),
                waiting=len(s.waiting),
                finished=c.finished,
                cancelled=c.cancelled,
                failed=c.failed,
                preempted=c.preempted,
                prompt_tokens=c.prompt,
                cached_tokens=c.cached,
                computed_tokens=c.computed,
                generated_tokens=c.generated,
                forwards=c.forwards,
                drafted_tokens=c.drafted,
                accepted_tokens=c.accepted,
                drafts_given_up=c.gave_up,
                live_kv_bytes=s.live_bytes,
                prefix_bytes=s.store.nbytes,
                prefix_nodes=len(s.store),
                kv_budget=s.budget,
            )

        return self._worker.call(read)

    def close(self) -> None:
        """End what runs, free the model's memory and the thread. Safe to call again."""
        self._closer()
        self._model = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _StopText:
    """Watches tokens for a stop text; called with each, True once one is complete."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._until = UntilStop(stops)

    def __call__(self, token_id: int) -> bool:
        self._until.push(self._detokenizer.push(token_id))
        return self._until.over


def system_prefix(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """How many leading tokens of a prompt come before its first user message (0 when it has none)."""
    header = [tokenizer.special.start, *tokenizer.encode("user")]
    at = -1
    while True:
        try:
            at = list.index(list(tokens), header[0], at + 1)
        except ValueError:
            return 0
        if list(tokens[at : at + len(header)]) == header:
            return at


def _parse(schema: Schema | None, text: str) -> Any:
    from mlx_gptoss.grammar import parse_reply

    return parse_reply(text, schema)


def _configured_stops(folder: Path) -> frozenset[int]:
    """Stop ids of a folder without a tokenizer: those of its config files. Raises ConfigError."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            ids = read_object(path).get("eos_token_id")
            listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if not all(isinstance(i, int) for i in listed):
                raise ConfigError(f"{path}: eos_token_id is {ids!r}: expected a token id or a list of them")
            found.update(listed)
    return frozenset(found)
