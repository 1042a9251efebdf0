"""LLM: a loaded model, and the only door to it for scripts, the command line and the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Unpack

import mlx.core as mx
import numpy as np

from mlx_gptoss.chat.completion import StopText
from mlx_gptoss.chat.generation import Generation
from mlx_gptoss.chat.respond import Responder
from mlx_gptoss.chat.turn import TurnOptions, start_turn
from mlx_gptoss.checkpoint.adapter import Adapter, read_adapter
from mlx_gptoss.checkpoint.expert_file import ExpertFiles
from mlx_gptoss.checkpoint.hub import resolve, resolve_adapter
from mlx_gptoss.checkpoint.memory import MemoryPlan, gigabytes, plan_checkpoint, plan_experts
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.device import available_memory, identity, kernel_mode, limit_memory, on_gpu
from mlx_gptoss.distributed.group import Group, Patience
from mlx_gptoss.distributed.hosts import read_hosts
from mlx_gptoss.distributed.launch import Parallel, Source, Spread, load_spread, spread, spread_tensor
from mlx_gptoss.distributed.ssh import require_here, starter_of
from mlx_gptoss.engine.core import Engine
from mlx_gptoss.engine.expert_usage import ExpertUsage
from mlx_gptoss.engine.options import LOOKUP, MIN_CONTEXT, EngineKeywords, EngineOptions
from mlx_gptoss.engine.prefix_disk import PrefixDisk, fingerprint
from mlx_gptoss.engine.request import Sink, TokenStream
from mlx_gptoss.engine.runner import LocalRunner, ModelRunner, streamed_experts
from mlx_gptoss.engine.speculate import DrafterFactory, ModelDrafter, PromptLookup
from mlx_gptoss.engine.stats import EngineStats
from mlx_gptoss.engine.worker import Worker
from mlx_gptoss.errors import ConfigError, MemoryLimitError, RequestError, did_you_mean
from mlx_gptoss.harmony import Conversation
from mlx_gptoss.model import tuning
from mlx_gptoss.model.cache import GROW_MAX, GROW_MIN
from mlx_gptoss.model.config import ModelConfig, read_object
from mlx_gptoss.model.experts import grouped_rows
from mlx_gptoss.model.kernels.decode import DecodeKernels
from mlx_gptoss.model.kernels.record import Record
from mlx_gptoss.model.sequence_cache import SequenceCache
from mlx_gptoss.model.sweep import rows_at_once
from mlx_gptoss.sampling import PromptProgress, SamplingParams, TokenConstraint, TokenLogprobs
from mlx_gptoss.tokenizer import Tokenizer

# Bytes that the files of kept prefixes may take.
DISK_LIMIT = 16 * 2**30
# Left for activations, logits and allocations in flight, bytes, when the KV budget is chosen here.
SCRATCH = 512 * 2**20
# Of the memory that the weights leave, the share that KV caches and the prefix store may take.
KV_SHARE = 0.6
# What other libraries call max_context.
CONTEXT_NAMES = dict.fromkeys(
    ("n_ctx", "num_ctx", "context_length", "max_model_len", "max_seq_len"), "max_context"
)
# Where experts and context share what is too little for both, context comes first up to so many tokens.
COMFORTABLE_CONTEXT = 4096
# The name of the adapter that `load(adapter=)` gives.
DEFAULT_ADAPTER = "default"


def load(
    model: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    offline: bool = False,
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    hosts: str | Path | Sequence[str] | None = None,
    split: Sequence[int] | None = None,
    parallel: Parallel = "pipeline",
    force: bool = False,
    patience: Patience | None = None,
    progress: Callable[[int, int], None] | None = None,
    announce: Callable[[str], None] | None = None,
    **options: Unpack[EngineKeywords],
) -> LLM:
    """Load a model: a folder, a Hub id (downloaded unless `offline`), or "demo".

    dtype: "bfloat16", "float16" or "float32" for activations and dense weights (default: the device's).
    adapter: a folder or Hub id of an adapter that answers whatever does not name another. adapters: by name,
    for requests that name one (`adapter="sql"`); see LLM.load_adapter. hosts: machines that share the layers,
    this one first: their names, or the hostfile of `mlx.launch`; "localhost" may repeat, for trials. split:
    how many layers each has (default: by its memory). parallel: "tensor" for a part of every layer on each
    instead, which links of microseconds alone make faster, and for which split counts groups of the experts'
    columns; it is refused where it is measured to be slower, unless `force`. patience: how long the others
    are waited for. progress(done, total) is called as parts are read, on another thread; announce, before
    that, with what tells the memory the model will take: one line, and one for each of several hosts.
    options: see EngineOptions.

    Raises ModelNotFoundError, HubError, ConfigError, CheckpointError (AdapterError), MemoryLimitError,
    HostError or RequestError.
    """
    chosen = _checked(options)
    kernel_mode()  # a value that makes no sense is told at once
    folder = resolve(model, revision=revision, offline=offline)
    checkpoint = Checkpoint(folder, dtype)
    has_text = (folder / "tokenizer.json").exists()
    # What is wrong with them is told before the weights are read.
    stops = frozenset[int]() if has_text else configured_stops(folder)
    bound = configured_bound(folder)
    draft = None if chosen.draft in (None, LOOKUP) else _draft_checkpoint(chosen, checkpoint, offline)
    wanted = dict(adapters or {}) | ({} if adapter is None else {DEFAULT_ADAPTER: adapter})
    found = {name: _read_adapter(at, checkpoint.config, offline) for name, at in wanted.items()}
    free = available_memory() - (plan_checkpoint(draft).weights if draft is not None else 0)
    # Beside the copy that runs, all of them padded to one rank for batches of several.
    free -= 2 * sum(one.parameters for one in found.values()) * checkpoint.dtype.size
    if split is not None and hosts is None:
        raise RequestError("split tells how many layers each of several hosts has: give hosts", "split")
    group = None if hosts is None else _group(hosts, parallel, patience)
    worker = Worker(f"engine {folder.name}")
    try:
        if group is None:
            plan = _plan(checkpoint, chosen, free)
        else:
            source = Source.of(str(model), folder, offline)
            plan = _plan_group(checkpoint, chosen, free, group, source, split, force)
        if announce is not None:
            announce(f"{folder.name}: {plan}")
        worker.call(partial(limit_memory, plan.memory.weights))
        tokenizer = Tokenizer.from_folder(folder) if has_text else None
        engine = _engine(worker, checkpoint, plan, draft, tokenizer, stops, progress)
        for name, one in found.items():
            engine.put_adapter(name, one)
        if adapter is not None:
            engine.default_adapter = DEFAULT_ADAPTER
        return LLM(
            engine, checkpoint.config, folder, str(model), tokenizer, memory=plan.memory, max_tokens=bound
        )
    except BaseException:
        worker.close()
        if group is not None:
            group.close()
        raise


def _group(hosts: str | Path | Sequence[str], parallel: Parallel, patience: Patience | None) -> Group:
    known = read_hosts(hosts)
    require_here(known.hosts)
    variables = known.variables(known.collective if parallel == "tensor" else "")
    starter = partial(starter_of, environment=variables)
    if parallel == "pipeline":
        return Group(known.hosts, starter, patience)
    if parallel != "tensor":
        raise RequestError(f"parallel is {parallel!r}: expected 'pipeline' or 'tensor'", "parallel")
    # Embedding and head stand by themselves, beside this machine's part.
    return Group([known.hosts[0], *known.hosts], starter, patience, known.collective)


def _checked(options: EngineKeywords) -> EngineOptions:
    known = {f.name for f in fields(EngineOptions)}
    for name in options:
        if name not in known:
            near = did_you_mean(name, known, CONTEXT_NAMES) or f": expected {', '.join(sorted(known))}"
            raise RequestError(f"load has no option {name!r}{near}", name)
    return EngineOptions(**options)


@dataclass(frozen=True)
class _Plan:
    """How a model runs in the memory there is: its own, that of keys and values, and what was free; bytes."""

    memory: MemoryPlan
    options: EngineOptions
    kv_budget: int
    max_context: int
    free: int
    hosts: tuple[Group, Spread, Source] | None = None  # where its layers are not all here

    def __str__(self) -> str:
        unpacked = " and ".join(self.memory.unpacked)
        return (
            f"{self.memory.streamed}weights {gigabytes(self.memory.weights)}"
            f"{f' ({unpacked} unpacked)' if unpacked else ''}, KV cache up to {gigabytes(self.kv_budget)} "
            f"(context {self.max_context:,} tokens), {gigabytes(self.free)} free"
            f"{'' if self.hosts is None else self.hosts[1]}"
        )


def _plan(checkpoint: Checkpoint, options: EngineOptions, free: int) -> _Plan:
    """The plan, and the checkpoint set to be read by it."""
    memory = plan_experts(
        checkpoint,
        options.expert_memory if options.expert_bytes is None else options.expert_bytes,
        free,
        beside=SCRATCH + wanted_kv(checkpoint, options),
    )
    checkpoint.unpacked = memory.unpacked
    if memory.slots is not None:
        checkpoint.streaming = ExpertFiles(checkpoint, memory.slots)
        # The experts of so many sequences find places at the same time, whichever they are.
        fitting = memory.slots // checkpoint.config.experts_per_token
        options = replace(options, max_running=min(options.max_running, fitting))
    return _Plan(memory, options, *plan_context(memory, options, free), free)


def _plan_group(
    checkpoint: Checkpoint,
    options: EngineOptions,
    free: int,
    group: Group,
    source: Source,
    split: Sequence[int] | None,
    force: bool,
) -> _Plan:
    """The plan over several machines, which are started for it: they know how much memory they have."""
    if options.expert_bytes is not None:
        raise RequestError("expert_memory is for a model on one machine: leave out hosts, or it", "hosts")
    machines = group.gather()
    machines[0] = replace(machines[0], room=min(machines[0].room, free))
    plan = spread if group.collective is None else spread_tensor
    made = plan(checkpoint, machines, wanted_kv(checkpoint, options), SCRATCH, split)
    made = replace(made, forced=force)
    all_free = made.memory.total() + SCRATCH + made.left  # of one machine that leaves as much to caches
    context = plan_context(made.memory, options, all_free)
    room = sum(machine.room for machine in machines)
    if made.max_running is not None:
        options = replace(options, max_running=min(options.max_running, made.max_running))
    return _Plan(made.memory, options, *context, room, (group, made, source))


def _engine(
    worker: Worker,
    checkpoint: Checkpoint,
    plan: _Plan,
    draft: Checkpoint | None,
    tokenizer: Tokenizer | None,
    stops: frozenset[int],
    progress: Callable[[int, int], None] | None,
) -> Engine:
    """Read the weights, on the worker's thread, and put an engine on them."""
    options, block = plan.options, plan.options.prefill_chunk
    disk, usage = None, None
    if options.prefix_cache is not None:
        mark = fingerprint(checkpoint.folder, checkpoint.dtype, options.bits)
        disk = PrefixDisk(Path(options.prefix_cache).expanduser(), mark, DISK_LIMIT)
        usage = ExpertUsage(disk.folder)

    def read() -> LocalRunner:
        loaded, interleaved = read_model(checkpoint, progress), checkpoint.layout.interleaved
        streamed = streamed_experts(loaded)
        record = Record(identity())
        loaded.paces = tuning.known(loaded, record)
        kernels = DecodeKernels(loaded, kernel_mode(), record, kv_bits=options.bits)
        return LocalRunner(
            loaded, options.bits, streamed, block, usage, interleaved=interleaved, kernels=kernels
        )

    runner: ModelRunner
    if plan.hosts is None:
        runner = worker.call(read)
    else:
        group, made, source = plan.hosts
        runner = load_spread(worker.call, group, checkpoint, made, source, options.bits, progress)
    drafters: DrafterFactory | None = PromptLookup if options.draft == LOOKUP else None
    if draft is not None:
        second = worker.call(lambda: LocalRunner(read_model(draft)))
        drafters = partial(ModelDrafter, second, options.prefill_chunk)
    return Engine(
        worker,
        runner,
        replace(options, prefill_chunk=rows_at_once(checkpoint.config, checkpoint.dtype, block))
        if runner.expert_slots
        else options,
        kv_budget=plan.kv_budget,
        max_context=plan.max_context,
        stop_ids=tokenizer.stop_ids if tokenizer else stops,
        grouped_rows=grouped_rows(checkpoint.config) if on_gpu() and not runner.expert_slots else 0,
        disk=disk,
        drafters=drafters,
        message_start=tokenizer.special.start if tokenizer else None,
        pinned_tokens=partial(system_prefix, tokenizer) if tokenizer else lambda tokens: 0,
    )


class LLM(Responder):
    """A loaded model. Close it, or use it in a `with` statement; what is forgotten closes itself.

    Answers, streams and chats, plain and async, are those of Responder.

    config: the model's shape. max_context: tokens of a prompt and its output. name: as it was asked for.
    memory: its bytes by part, where they are known. max_tokens: the model's own bound on a turn without one.
    engine: what runs the requests, on token ids.
    """

    def __init__(
        self,
        engine: Engine,
        config: ModelConfig,
        folder: Path,
        name: str,
        tokenizer: Tokenizer | None,
        *,
        memory: MemoryPlan | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.name = name
        self.max_context = engine.max_context
        self.max_tokens = max_tokens
        self.memory = memory
        self.engine = engine
        self._tokenizer = tokenizer

    def __repr__(self) -> str:
        stored = "" if self.memory is None else f", {self.memory.summary()}"
        return f"<LLM {self.name}{stored}, context {self.max_context:,} tokens>"

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises TokenizerError when its folder has none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_folder(self.folder)
        return self._tokenizer

    # --- tokens

    def logits(self, token_ids: Sequence[int], *, adapter: str | None = None) -> np.ndarray:
        """Teacher-forced logits of a text, float32 [T, vocab]: row i scores what follows token i."""
        return self.engine.logits(token_ids, adapter=adapter)

    def score(
        self,
        token_ids: Sequence[int],
        top: int = 0,
        *,
        keep: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[TokenLogprobs]:
        """The log-probabilities of a text's tokens from the second on, each after those before it.

        top: alternatives reported at each place. keep: hold what was computed for a generation that goes on
        from the text. `cancelled` is asked now and then, and True ends it early. Raises RequestError or
        ContextLengthError.
        """
        return self.engine.score(token_ids, top, keep=keep, cancelled=cancelled)

    def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        constraint: TokenConstraint | None = None,
        adapter: str | None = None,
    ) -> Iterator[int]:
        """Generate after the given tokens: yields ids, the one that ends the generation included."""
        yield from self.engine.generate(
            token_ids, params, constraint=constraint, stop_text=self._stop_text(params), adapter=adapter
        )

    def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        constraint: TokenConstraint | None = None,
        sink: Sink | None = None,
        progress: Callable[[PromptProgress], None] | None = None,
        adapter: str | None = None,
    ) -> TokenStream:
        """Queue a generation and return at once.

        With a `sink` every TokenOutput goes there, on the engine's thread, and at the end a TokensDone or a
        GptOssError; it must not block. `progress` is told, on that thread too, how much of the prompt is
        read. adapter: see TurnOptions. Raises RequestError, ContextLengthError, TokenizerError (for stop
        texts without a tokenizer) or BusyError.
        """
        return self.engine.submit(
            token_ids,
            params,
            constraint=constraint,
            sink=sink,
            progress=progress,
            stop_text=self._stop_text(params),
            adapter=adapter,
        )

    def _stop_text(self, params: SamplingParams | None) -> StopText | None:
        return StopText(self.tokenizer, params.stop) if params is not None and params.stop else None

    def start(
        self, conversation: Conversation, options: TurnOptions | None = None, *, sink: Sink | None = None
    ) -> Generation:
        """Queue the assistant's next turn of a conversation and return at once.

        With a `sink` the events go there, on the engine's thread. Raises RequestError (SchemaError,
        ToolError), ContextLengthError, TokenizerError or BusyError.
        """
        options = options or TurnOptions()
        return start_turn(
            self.engine, self.tokenizer, conversation, options, sink, max_tokens=self.max_tokens
        )

    # --- adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are loaded."""
        return tuple(self.engine.adapters)

    def load_adapter(self, name: str, adapter: str | Path, *, offline: bool = False) -> None:
        """Let requests run with an adapter, a folder or a Hub id, by a name; in place of one of that name.

        Raises AdapterError, HubError, RequestError for the name, or BusyError while requests run with that
        one.
        """
        self.engine.put_adapter(name, _read_adapter(adapter, self.config, offline))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises RequestError when there is none, BusyError while requests run with it."""
        self.engine.put_adapter(name, None)

    # --- the model itself

    def stats(self) -> EngineStats:
        """What is running, what was done, and the memory it takes."""
        return self.engine.stats()

    def close(self) -> None:
        """End what runs, free the model's memory and the thread. Safe to call again."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _read_adapter(adapter: str | Path, config: ModelConfig, offline: bool) -> Adapter:
    return read_adapter(resolve_adapter(adapter, offline=offline), config)


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


def wanted_kv(checkpoint: Checkpoint, options: EngineOptions) -> int:
    """Bytes that keys and values shall have before experts do."""
    if options.kv_budget is not None:
        return options.kv_budget
    tokens = options.max_context or min(COMFORTABLE_CONTEXT, checkpoint.config.max_position)
    probe = SequenceCache(checkpoint.config, checkpoint.dtype)
    return int(probe.nbytes_at(tokens + _step(tokens), options.prefill_chunk) / KV_SHARE)


def plan_context(memory: MemoryPlan, options: EngineOptions, free: int) -> tuple[int, int]:
    """(KV budget in bytes, longest context in tokens) for a model on a machine with `free` bytes.

    Raises MemoryLimitError when what is asked for cannot fit, with the numbers.
    """
    config = memory.config
    left = free - memory.total() - SCRATCH
    if options.kv_budget is not None and options.kv_budget > max(left, 0):
        raise MemoryLimitError(
            f"kv_budget is {gigabytes(options.kv_budget)}: the weights leave {gigabytes(max(left, 0))} of "
            f"{gigabytes(free)} free; ask for less, or close other programs",
            needed=options.kv_budget,
            available=max(left, 0),
        )
    budget = options.kv_budget if options.kv_budget is not None else int(left * KV_SHARE)
    if options.bits != (None, None) and config.head_dim % 32:
        raise RequestError(
            f"kv_bits needs heads of a multiple of 32 channels, and this model's have {config.head_dim}",
            "kv_bits",
        )
    probe = SequenceCache(config, memory.dtype, options.bits)
    holds = (budget - probe.nbytes_at(0, options.prefill_chunk)) // max(
        1, probe.nbytes_at(1) - probe.nbytes_at(0)
    )
    # A slab grows in steps, so a sequence of the longest context must not need all of it: what is left is the
    # longest n with n + _step(n) <= holds.
    holds -= min(max(holds // 2 + GROW_MIN // 2, 2 * GROW_MIN), GROW_MAX + GROW_MIN)
    wanted = config.max_position if options.max_context is None else options.max_context
    if wanted > config.max_position:
        raise RequestError(
            f"max_context is {wanted}: the model's own limit is {config.max_position} tokens", "max_context"
        )
    context = min(wanted, holds)
    if context < (wanted if options.max_context is not None else MIN_CONTEXT):
        asked = options.max_context or MIN_CONTEXT
        needed = probe.nbytes_at(asked + _step(asked), options.prefill_chunk)
        raise MemoryLimitError(
            f"a context of {asked} tokens needs {gigabytes(needed)} for KV and the steps it grows in, and "
            f"the budget is {gigabytes(max(budget, 0))}: lower max_context or raise kv_budget",
            needed=needed,
            available=max(budget, 0),
        )
    return budget, context


def _step(tokens: int) -> int:
    """The most room, tokens, that a slab of so many tokens has beyond them (see FullCache.capacity_for)."""
    return min(max(tokens, GROW_MIN), GROW_MAX) + GROW_MIN


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


def configured_stops(folder: Path) -> frozenset[int]:
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


def configured_bound(folder: Path) -> int | None:
    """`max_new_tokens` of the model's generation config, if it has one. Raises ConfigError."""
    path = folder / "generation_config.json"
    bound = read_object(path).get("max_new_tokens") if path.is_file() else None
    if bound is not None and (not isinstance(bound, int) or isinstance(bound, bool) or bound < 1):
        raise ConfigError(f"{path}: max_new_tokens is {bound!r}: expected a whole number >= 1")
    return bound
