"""Responses kept for `previous_response_id` and GET: the last ones, in memory only."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from mlx_gptoss.harmony import Message
from mlx_gptoss.server.errors import ApiError

MAX_CHARACTERS = 64_000_000  # of all messages kept; histories that share messages count them each time


@dataclass(frozen=True)
class StoredResponse:
    """A finished response.

    `history` is its whole conversation in harmony, its own output included; `preface` the system and
    developer messages before the first turn (the request's `instructions` are not carried over, these are).
    """

    body: dict[str, Any]
    input_items: list[dict[str, Any]]
    history: tuple[Message, ...]
    preface: tuple[str, ...] = ()


class ResponseStore:
    """Bounded in number and in characters; the response used longest ago goes first."""

    def __init__(self, max_responses: int, max_characters: int = MAX_CHARACTERS) -> None:
        self._max_responses = max_responses
        self._max_characters = max_characters
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._characters = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, response: StoredResponse) -> None:
        self._kept[response.body["id"]] = response
        self._characters += _characters(response)
        while len(self._kept) > self._max_responses or (
            self._characters > self._max_characters and len(self._kept) > 1
        ):
            _, oldest = self._kept.popitem(last=False)
            self._characters -= _characters(oldest)

    def get(self, response_id: str, param: str = "response_id") -> StoredResponse:
        """The response, or ApiError 404."""
        found = self._kept.get(response_id)
        if found is None:
            raise ApiError(
                404,
                f"Response {response_id[:80]!r} is not stored: it was asked for with store=false, was "
                "deleted, or made room for newer ones.",
                code="previous_response_not_found" if param == "previous_response_id" else "not_found",
                param=param,
            )
        self._kept.move_to_end(response_id)
        return found

    def delete(self, response_id: str) -> None:
        """Forget a response; ApiError 404 when there is none."""
        self._characters -= _characters(self.get(response_id))
        del self._kept[response_id]


def _characters(response: StoredResponse) -> int:
    return sum(len(message.content) for message in response.history)
