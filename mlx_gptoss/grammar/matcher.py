"""Grammars as token masks: one llguidance tokenizer per vocabulary, compiled grammars kept, masks out.

A mask is uint32 [ceil(vocab / 32)], bit i % 32 of word i // 32 set when token i may follow.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.grammar.guard import GUARD
from mlx_gptoss.tokenizer import Tokenizer

KEPT_GRAMMARS = 512  # compiled grammars kept per vocabulary: a request's tools and headers are used again
# Of all that are kept, the time it took to compile them: what takes long takes up to hundreds of MB, too.
KEPT_SECONDS = 0.5


class Vocabulary:
    """A tokenizer as llguidance sees it, and the grammars compiled for it. Shared by threads.

    llguidance lets its end-of-text token follow where a grammar is complete. It is told that this is
    <|endoftext|>; `Matcher.mask` puts the end token that fits the channel in its place.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.special = tokenizer.special
        self.size = tokenizer.vocab_size
        text = tokenizer.path.read_text(encoding="utf-8")
        self._ll = LLTokenizer(text, n_vocab=self.size, eos_token=tokenizer.special.endoftext)
        self._compiled: OrderedDict[str, tuple[LLMatcher, float]] = OrderedDict()
        self._lock = threading.Lock()
        bits = np.ones(self.words * 32, bool)
        bits[[i for i in range(bits.size) if i >= self.size or tokenizer.is_special(i)]] = False
        self._text = np.packbits(bits, bitorder="little").view(np.uint32)

    @property
    def words(self) -> int:
        """Length of a mask."""
        return (self.size + 31) // 32

    def text_or(self, token_id: int) -> np.ndarray:
        """The mask of all ordinary tokens and a special one. Read-only."""
        mask = self._text.copy()
        mask[token_id >> 5] |= _bit(token_id)
        mask.flags.writeable = False
        return mask

    def only(self, token_id: int) -> np.ndarray:
        """The mask that forces one token. Read-only."""
        mask = np.zeros(self.words, np.uint32)
        mask[token_id >> 5] = _bit(token_id)
        mask.flags.writeable = False
        return mask

    def admit(self, grammar: str) -> None:
        """Compile a grammar that came from outside, once another process has shown that this does no harm.

        Raises ValueError with llguidance's words, or the guard's, when the grammar cannot be used.
        """
        with self._lock:
            known = grammar in self._compiled
        if not known:
            GUARD.check(grammar)
            self.matcher(grammar)

    def matcher(self, grammar: str) -> Matcher:
        """A fresh matcher of a grammar (Lark, or what `LLMatcher.grammar_from_*` returned).

        Raises ValueError with llguidance's words when the grammar cannot be used.
        """
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return Matcher(self, self._compiled[grammar][0].deep_copy())
        began = time.perf_counter()
        prototype = LLMatcher(self._ll, grammar, log_level=0)
        if prototype.is_error():
            raise ValueError(prototype.get_error())
        probe = prototype.deep_copy()
        if not any(probe.compute_bitmask()) or probe.is_error():
            raise ValueError("it matches no text at all")
        with self._lock:
            self._compiled[grammar] = prototype, time.perf_counter() - began
            seconds = sum(spent for _, spent in self._compiled.values())
            while len(self._compiled) > 1 and (len(self._compiled) > KEPT_GRAMMARS or seconds > KEPT_SECONDS):
                seconds -= self._compiled.popitem(last=False)[1][1]
            return Matcher(self, prototype.deep_copy())


class Matcher:
    """One walk through a grammar."""

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher

    def mask(self, end: int) -> np.ndarray:
        """What may follow; `end` is allowed where the text so far is complete. A new array."""
        mask = np.zeros(self._vocabulary.words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        complete = self._vocabulary.special.endoftext
        if mask[complete >> 5] & _bit(complete):
            mask[complete >> 5] ^= _bit(complete)
            mask[end >> 5] |= _bit(end)
        return mask

    def accept(self, token_id: int) -> None:
        """Go on by one token. Raises SchemaError where the grammar does not allow it."""
        if not self._matcher.consume_token(token_id):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            line = self._matcher.get_error().split("\n<state>")[0].splitlines()[0]
            raise SchemaError(f"the grammar cannot go on ({line}): use a simpler schema or grammar")


def _bit(token_id: int) -> np.uint32:
    """Its bit, in its word of a mask."""
    return np.uint32(1 << (token_id & 31))


_vocabularies: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()
_building = threading.Lock()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer's Vocabulary; built at first use (a second or two for 200,000 tokens), then kept."""
    with _building:
        vocabulary = _vocabularies.get(tokenizer)
        if vocabulary is None:
            vocabulary = _vocabularies[tokenizer] = Vocabulary(tokenizer)
        return vocabulary
