"""What the routes of one server share."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_gptoss.server.http.errors import ApiError
from mlx_gptoss.server.memory.responses import ResponseStore
from mlx_gptoss.server.memory.turns import TurnMemory
from mlx_gptoss.server.running.jobs import Jobs
from mlx_gptoss.server.running.metrics import Metrics
from mlx_gptoss.server.settings import ServerSettings

if TYPE_CHECKING:
    from mlx_gptoss.llm import LLM


@dataclass
class ServerState:
    """One server: its engine (None while the model is loading), its jobs, and what it remembers.

    `model_name` is what clients are told: the setting, or the engine's name (a folder's without its path).
    """

    settings: ServerSettings
    engine: LLM | None = field(default=None, init=False)
    model_name: str = field(default="", init=False)
    metrics: Metrics = field(default_factory=Metrics)
    jobs: Jobs = field(init=False)
    turns: TurnMemory = field(init=False)
    responses: ResponseStore = field(init=False)

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.settings, self.metrics)
        self.turns = TurnMemory(self.settings.max_turns)
        self.responses = ResponseStore(self.settings.max_stored_responses)

    def attach(self, engine: LLM | None) -> None:
        """Give the server its engine."""
        self.engine = engine
        if engine is not None:
            self.model_name = self.settings.model_name or Path(engine.name).name

    def ready(self) -> LLM:
        """The engine, or ApiError 503 while it is loading."""
        if self.engine is None:
            raise ApiError(
                503, "The model is still loading.", code="model_loading", headers={"Retry-After": "5"}
            )
        return self.engine

    @staticmethod
    def today() -> str:
        """The date for the system message; local time, which is the user's."""
        return datetime.date.today().isoformat()
