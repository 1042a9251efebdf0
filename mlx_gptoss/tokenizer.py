"""Text to token ids and back, straight from `tokenizer.json` through the `tokenizers` package.

This module holds the one table of special tokens. Their ids are looked up by name, because models that
share the architecture need not share the vocabulary. Ordinary text never becomes a special token, whatever
it spells: special tokens are put into a sequence by id only.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_gptoss.errors import GptOssError, RequestError, TokenizerError
from mlx_gptoss.files import read_limited

MAX_BYTES = 64 * 2**20  # of tokenizer.json; OpenAI's has 28 MB
# What a byte-level BPE tokenizer is made of. Other parts could rewrite a text, and let it grow without bound.
_PARTS: dict[str, set[str | None]] = {
    "normalizer": {None},
    "pre_tokenizer": {None, "ByteLevel", "Split", "Sequence"},
    "post_processor": {None, "ByteLevel", "TemplateProcessing", "Sequence"},
    "decoder": {None, "ByteLevel"},
    "model": {"BPE"},
}

LONG = 4096  # characters from which the backend is asked in the way that lets other threads run
SLICE = 65_536  # characters counted at a time
# What a cut inside a text may add to its tokens; no text tried has added more than two.
CUT_SLACK = 16


@dataclass(frozen=True)
class Special:
    """Ids of the special tokens; all but the two edge markers are needed by harmony."""

    startoftext: int
    endoftext: int
    return_: int
    constrain: int
    channel: int
    start: int
    end: int
    message: int
    call: int


# Field of Special -> its text in the vocabulary.
SPECIAL_TOKENS = {f.name: f"<|{f.name.rstrip('_')}|>" for f in fields(Special)}


class Tokenizer:
    """A byte-level BPE vocabulary with harmony's special tokens.

    Raises TokenizerError when the file is missing, unreadable, not byte-level, or lacks a special token.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        if not path.exists():
            raise TokenizerError(
                f"{path.parent}: no tokenizer.json: text needs one; download it into the same folder, "
                "or work on token ids"
            )
        try:
            text = read_limited(path, MAX_BYTES).decode()
            _check_parts(path, json.loads(text))
            self._backend = Backend.from_str(text)
        except GptOssError:
            raise
        except Exception as error:  # the Rust core raises plain Exception for every malformed file
            raise TokenizerError(
                f"{path}: not a usable tokenizer.json ({error}): download it again"
            ) from None
        # Text that spells a special token is ordinary text.
        self._backend.encode_special_tokens = True
        self.path = path
        ids = {k: self._backend.token_to_id(t) for k, t in SPECIAL_TOKENS.items()}
        missing = [SPECIAL_TOKENS[k] for k, i in ids.items() if i is None]
        if missing:
            raise TokenizerError(
                f"{path}: lacks the special tokens {', '.join(missing)}: this is not a gpt-oss tokenizer"
            )
        self.special = Special(**{k: i for k, i in ids.items() if i is not None})
        self._added = {i: t.content for i, t in self._backend.get_added_tokens_decoder().items()}

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of the checkpoint in `folder`."""
        return cls(Path(folder) / "tokenizer.json")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; the model's own vocabulary may be padded beyond it."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """What ends a generation: <|return|>, <|call|>, <|endoftext|>. <|end|> only ends a message."""
        return frozenset((self.special.return_, self.special.call, self.special.endoftext))

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text. Raises RequestError for text that UTF-8 cannot hold."""
        check_text(text)
        if len(text) < LONG:
            return self._backend.encode(text, add_special_tokens=False).ids
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def count_beyond(self, text: str, limit: int) -> int:
        """A number of tokens, more than `limit`, that the text surely has; 0 when it may have fewer.

        A long text is read no further than that takes, one of up to four characters a token not at all.
        Raises RequestError for text that UTF-8 cannot hold.
        """
        if len(text) <= max(4 * limit, SLICE):
            return 0
        count = 0
        for start in range(0, len(text), SLICE):
            count += max(0, len(self.encode(text[start : start + SLICE])) - CUT_SLACK)
            if count > limit:
                return count
        return 0

    def is_special(self, token_id: int) -> bool:
        """True for tokens that no text produces: markup and reserved ids."""
        return token_id in self._added

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; a special token's own name. b"" for an id without a token.

        Raises RequestError for a negative id.
        """
        if token_id in self._added:
            return self._added[token_id].encode()
        if token_id < 0:
            raise RequestError(f"token id {token_id}: expected a number >= 0", "token_ids")
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHAR[c] for c in piece)
        except KeyError:
            raise TokenizerError(
                f"{self.path}: token {token_id} is {piece!r}, which is not byte-level BPE: "
                "this is not a gpt-oss tokenizer"
            ) from None

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of the tokens, special ones spelled out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    def detokenizer(self) -> StreamDetokenizer:
        """A new incremental decoder."""
        return StreamDetokenizer(self)


class StreamDetokenizer:
    """Decodes a stream of tokens; a character is shown once all its bytes are there. O(1) a token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left at the end: U+FFFD where a character was cut, else nothing. Starts afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _check_parts(path: Path, content: dict[str, Any]) -> None:
    """Raise TokenizerError for a part that byte-level BPE does without."""
    lists = {"pre_tokenizer": "pretokenizers", "post_processor": "processors"}
    for part, kinds in _PARTS.items():
        found = content.get(part) or {}
        for one in (found, *found.get(lists.get(part, ""), ())):
            kind = one.get("type", "BPE" if part == "model" else None)
            if kind not in kinds:
                raise TokenizerError(
                    f"{path}: its {part} is of type {kind!r:.40}, which byte-level BPE does without: "
                    "download the model's own tokenizer.json"
                )


def check_text(text: str, what: str = "the text", field: str | None = None) -> None:
    """Raise RequestError for half a surrogate pair: what Python makes of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} holds U+{ord(text[error.start]):04X} at position {error.start}, half a surrogate pair: "
            "expected whole characters, read from UTF-8",
            field,
        ) from None


def _byte_characters() -> dict[str, int]:
    """GPT-2's map of bytes to printable characters, inverted; byte-level BPE vocabularies use it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    chars = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in set(printable)]
    chars.update({chr(256 + i): b for i, b in enumerate(others)})
    return chars


_BYTE_OF_CHAR = _byte_characters()
