"""Raw completion, without the chat format: what a stop text needs of the tokens."""

from __future__ import annotations

from mlx_gptoss.chat.stops import UntilStop
from mlx_gptoss.tokenizer import Tokenizer


class StopText:
    """Watches tokens for a stop text; called with each, True once one is complete."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._until = UntilStop(stops)

    def __call__(self, token_id: int) -> bool:
        self._until.push(self._detokenizer.push(token_id))
        return self._until.over
