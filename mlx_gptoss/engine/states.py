"""Where window states are taken on a sequence's way."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_gptoss.engine.sequence import Piece

# Window states are taken at the prompt's end, at message starts this many tokens apart, and in long messages.
STATE_MIN_DISTANCE = 128
STATE_MAX_DISTANCE = 512
# Keys kept beyond the window in a state: a sequence can resume up to so many tokens before its end.
STATE_SLACK = 32


def take_states(piece: Piece, message_start: int | None) -> list[mx.array]:
    """Copy the sliding windows where a later request may branch off; the arrays to evaluate.

    message_start: the token that begins a message. Called when the piece's forward is launched.
    """
    r = piece.sequence
    if piece.draft:
        return []  # part of it may be taken back
    end = r.live.offset
    start = end - piece.length
    places = set()
    if not r.decoding:
        if start < r.branch <= end:
            places.add(r.branch)
        if end == len(r.tokens):
            places.add(end)
        if message_start is not None:
            inside = np.array(r.tokens[start + 1 : end + 1], np.int32)
            places.update((np.flatnonzero(inside == message_start) + start + 1).tolist())
    must = {r.branch, len(r.prompt)}
    taken = []
    for place in sorted({*places, end}):
        distance = place - r.last_state
        if place in must or distance >= (STATE_MIN_DISTANCE if place in places else STATE_MAX_DISTANCE):
            state = r.live.snapshot(place, r.live.window_history + STATE_SLACK)
            if state is not None:
                r.states.append(state)
                r.last_state = place
                taken += [] if state.data is None else [state.data]
    return taken
