"""Responses kept for `previous_response_id` and GET: the last ones, in memory only, each for its caller."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_gptoss.harmony import Message
from mlx_gptoss.server.http.errors import ApiError

MAX_BYTES = 64 * 2**20  # of all that is kept; histories that share messages count them each time
_OBJECT_BYTES = 600  # of a response or a message beside its text
_TOKEN_BYTES = 36  # of a sampled token id, and its place in a tuple


@dataclass(frozen=True)
class StoredResponse:
    """A finished response. What clients read of it is kept as JSON: so its size is known.

    `history` is its whole conversation in harmony, its own output included; `preface` the system and
    developer messages before the first turn (the request's `instructions` are not carried over, these are).
    """

    id: str
    body_json: bytes
    input_json: bytes
    item_ids: frozenset[str]
    history: tuple[Message, ...]
    preface: tuple[str, ...]

    @classmethod
    def of(
        cls,
        body: dict[str, Any],
        input_items: Sequence[dict[str, Any]],
        history: Iterable[Message],
        preface: Iterable[str] = (),
    ) -> StoredResponse:
        """A response of its body and of its input's items, which have ids."""
        ids = frozenset(item["id"] for item in (*input_items, *body.get("output", ())))
        return cls(body["id"], _packed(body), _packed(input_items), ids, tuple(history), tuple(preface))

    @property
    def body(self) -> dict[str, Any]:
        """The response object."""
        body: dict[str, Any] = json.loads(self.body_json)
        return body

    @property
    def input_items(self) -> list[dict[str, Any]]:
        """What it answered, as it is listed."""
        items: list[dict[str, Any]] = json.loads(self.input_json)
        return items

    def item(self, item_id: str) -> dict[str, Any]:
        """One of its items, by one of `item_ids`."""
        items = (*self.input_items, *self.body.get("output", ()))
        return next(item for item in items if item["id"] == item_id)

    @cached_property
    def size(self) -> int:
        """The bytes of memory it takes."""
        texts = [self.body_json, self.input_json, *self.item_ids, *self.preface]
        size = _OBJECT_BYTES + sum(map(sys.getsizeof, texts))
        for message in self.history:
            size += (
                _OBJECT_BYTES + sys.getsizeof(message.content) + _TOKEN_BYTES * len(message.token_ids or ())
            )
        return size


def _packed(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class ResponseStore:
    """Bounded in number and bytes; the one used longest ago goes first. Callers see only their own."""

    def __init__(self, max_responses: int, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, caller: str, response: StoredResponse) -> None:
        """Keep a response, and forget as many others as need be."""
        self._kept[caller, response.id] = response
        self._bytes += response.size
        while len(self._kept) > self._max_responses or (
            self._bytes > self._max_bytes and len(self._kept) > 1
        ):
            self.delete(*next(iter(self._kept)))

    def get(self, caller: str, response_id: str, param: str = "response_id") -> StoredResponse:
        """The response, or ApiError 404."""
        found = self._kept.get((caller, response_id))
        if found is None:
            raise ApiError(
                404,
                f"Response {response_id[:80]!r} is not stored: it was asked for with store=false, was "
                "deleted, or made room for newer ones.",
                code="previous_response_not_found" if param == "previous_response_id" else "not_found",
                param=param,
            )
        self._kept.move_to_end((caller, response_id))
        return found

    def delete(self, caller: str, response_id: str) -> None:
        """Forget a response; ApiError 404 when there is none."""
        self._bytes -= self.get(caller, response_id).size
        del self._kept[caller, response_id]

    def item(self, caller: str, item_id: str | None, param: str) -> dict[str, Any]:
        """An item that a stored response of the caller answered or holds, or ApiError 404."""
        for (owner, response_id), response in reversed(self._kept.items()):
            if owner == caller and item_id in response.item_ids:
                self._kept.move_to_end((owner, response_id))
                return response.item(item_id)
        raise ApiError(
            404,
            f"Item {str(item_id)[:80]!r} is not stored: send the item itself instead of a reference.",
            code="not_found",
            param=param,
        )
