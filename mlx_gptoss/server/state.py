"""What the routes of one server share."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.engine.request import Cancellable, Sink
from mlx_gptoss.errors import SchemaError
from mlx_gptoss.grammar import ResponseFormat
from mlx_gptoss.harmony import Conversation, Message, render
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.memory.responses import ResponseStore
from mlx_gptoss.server.memory.turns import TurnMemory
from mlx_gptoss.server.model_facts import ModelFacts
from mlx_gptoss.server.running.jobs import Job, Jobs
from mlx_gptoss.server.running.metrics import Metrics
from mlx_gptoss.server.running.residence import Residence, still_loading
from mlx_gptoss.server.settings import ServerSettings
from mlx_gptoss.server.tools.asked import Entries, read_entries
from mlx_gptoss.server.tools.loop import MAX_CALLS, ToolLoop
from mlx_gptoss.server.tools.toolbox import ServedTools, Toolbox
from mlx_gptoss.server.translate.request import naming
from mlx_gptoss.server.translate.sampling_fields import of_choices
from mlx_gptoss.server.translate.turn import TurnBuilder, TurnRequest

if TYPE_CHECKING:
    from mlx_gptoss.llm import LLM

COUNTED_CONTEXTS = 8  # a client counts to learn how much too long its conversation is


class ServerState:
    """One server: its LLM (None while it is not in memory), its jobs, and what it remembers.

    `model_name` is what clients are told: the setting, or the LLM's name (a folder's without its path).
    """

    def __init__(self, settings: ServerSettings, toolbox: Toolbox | None = None) -> None:
        self.settings = settings
        self.toolbox = toolbox or Toolbox()
        self.tool_threads = ThreadPoolExecutor(settings.max_active, "tool")
        self.model_name = ""
        self.metrics = Metrics()
        self.jobs = Jobs(settings, self.metrics)
        self.residence = Residence(settings.idle_unload, lambda: self.jobs.active > 0)
        self._facts: ModelFacts | None = None
        self.turns = TurnMemory(settings.max_turns)
        self.responses = ResponseStore(settings.max_stored_responses)

    def attach(self, llm: LLM | None, load: Callable[[], LLM] | None = None) -> None:
        """Give the server its LLM. load: makes it anew once it was unloaded; see Residence."""
        if llm is not None:
            self._facts = ModelFacts(llm.name, llm.folder, llm.config, llm.max_context, llm.adapters)
            self.model_name = self.settings.model_name or Path(llm.name).name
        self.residence.attach(llm, load)

    @property
    def llm(self) -> LLM | None:
        """The LLM where it is in memory."""
        return self.residence.llm

    async def ready(self) -> LLM:
        """The LLM, loaded if need be, or ApiError 503 while it is loading for the first time."""
        return await self.residence.get()

    def facts(self) -> ModelFacts:
        """What there is to tell of the model, or ApiError 503 while it is loading for the first time."""
        if self._facts is None:
            raise still_loading()
        return self._facts

    def new_turn(
        self, caller: str, history: Sequence[Message] = (), preface: Sequence[str] = ()
    ) -> TurnBuilder:
        """A builder for the turn that a request asks for, or for one that goes on from an earlier request."""
        recall = partial(self.turns.recall, caller)
        return TurnBuilder(self.settings, recall, self.today(), list(history), list(preface))

    async def open_tools(self, entries: Entries) -> ServedTools | None:
        """The server's own tools that a request asks for; None when it asks for none.

        Built-in tools that this server does not run are left to the API. Raises ToolError.
        """
        asked = [
            one
            for one in read_entries(entries)
            if not isinstance(one.entry, str) or one.entry in self.toolbox.builtin
        ]
        if not asked:
            return None
        return await asyncio.get_running_loop().run_in_executor(self.tool_threads, self.toolbox.open, asked)

    async def start(
        self,
        asked: TurnRequest,
        count: int = 1,
        served: ServedTools | None = None,
        max_calls: int | None = None,
    ) -> Job:
        """Start the turn that is asked for, once for each choice.

        A schema that cannot be enforced is refused where the request is strict; else the answer is some JSON
        object, and the prompt shows the schema. served: tools to run; max_calls: of them. Raises RequestError
        naming the client's field, BusyError, or ApiError while the model is loading.
        """
        llm = await self.ready()
        asked = replace(asked, options=replace(asked.options, adapter=self.adapter_of(asked.model)))

        def step(conversation: Conversation, options: TurnOptions, sink: Sink) -> Cancellable:
            return llm.start(conversation, options, sink=sink)

        def begin(params: SamplingParams, sink: Sink) -> Cancellable:
            options = replace(asked.options, params=params)
            if served is None:
                return step(asked.conversation, options, sink)
            return ToolLoop(
                step,
                asked.conversation,
                options,
                served,
                sink,
                self.tool_threads,
                approved=asked.approved,
                max_calls=min(max_calls or MAX_CALLS, MAX_CALLS),
            ).begin()

        try:
            with naming(asked.names):
                seeded = of_choices(asked.options.params, count)
                return await self.jobs.start(*(partial(begin, params) for params in seeded))
        except SchemaError as error:
            if asked.strict or error.field != asked.names.get("schema"):
                raise
        loose = replace(asked.options, response_format=ResponseFormat.of(json_object=True))
        return await self.start(replace(asked, options=loose, strict=True), count, served, max_calls)

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter in a request's `model`, "MODEL:ADAPTER" or its name alone; None for the default.

        Any other name is taken for the model's, whatever clients call it; ApiError 404 for an adapter of this
        model that is not there.
        """
        known = self.facts().adapters
        base, mark, name = (model or "").rpartition(":")
        if model in known or (mark and name in known):
            return name
        if mark and base == self.model_name and known:
            raise ApiError(
                404,
                f"There is no adapter {name[:100]!r} here: this server has {', '.join(map(repr, known))}.",
                code="model_not_found",
                param="model",
            )
        return None

    async def count(self, conversation: Conversation) -> int:
        """The tokens of a rendered conversation. Raises ContextLengthError for more than a few contexts."""
        llm = await self.ready()
        limit = COUNTED_CONTEXTS * llm.max_context
        return len(await asyncio.to_thread(render, conversation, llm.tokenizer, limit=limit))

    @staticmethod
    def today() -> str:
        """The date for the system message; local time, which is the user's."""
        return datetime.date.today().isoformat()
