"""Responses kept for `previous_response_id` and GET: the last ones, in memory only."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_gptoss.harmony import Message
from mlx_gptoss.server.http.errors import ApiError

MAX_CHARACTERS = 64_000_000  # of all that is kept; histories that share messages count them each time


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

    @cached_property
    def items(self) -> dict[str, dict[str, Any]]:
        """What it answered, and what it holds itself, by their ids."""
        return {item["id"]: item for item in (*self.input_items, *self.body.get("output", ()))}

    @cached_property
    def characters(self) -> int:
        """About the memory it takes."""
        items = sum(len(json.dumps(item)) for item in self.input_items)
        return items + sum(len(message.content) for message in self.history)


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
        """Keep a response, and forget as many others as need be."""
        self._kept[response.body["id"]] = response
        self._characters += response.characters
        while len(self._kept) > self._max_responses or (
            self._characters > self._max_characters and len(self._kept) > 1
        ):
            self.delete(next(iter(self._kept)))

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
        self._characters -= self.get(response_id).characters
        del self._kept[response_id]

    def item(self, item_id: str | None, param: str) -> dict[str, Any]:
        """An item that a stored response answered or holds, or ApiError 404."""
        for response_id, response in reversed(self._kept.items()):
            if item_id in response.items:
                self._kept.move_to_end(response_id)
                return response.items[item_id]
        raise ApiError(
            404,
            f"Item {str(item_id)[:80]!r} is not stored: send the item itself instead of a reference.",
            code="not_found",
            param=param,
        )
