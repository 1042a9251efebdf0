"""A hermetic tokenizer for tests: the 256 bytes, a few merges, and harmony's special tokens.

`write_byte_tokenizer(folder)` writes an ordinary `tokenizer.json` (and the two small files that lie beside
it in a checkpoint), so that everything which reads a model's folder reads this one too. A byte's id is its
value; the merged tokens follow, then the special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

from mlx_gptoss.tokenizer import SPECIAL_TOKENS, Tokenizer

# Words that a test wants to see as one token; each is merged from left to right.
WORDS = ("assistant", "user", "final", "analysis", "commentary", "functions", " to", "json")
FIRST_MERGED = 256


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE files."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def write_byte_tokenizer(folder: Path | str) -> Path:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json; return the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chars = _byte_characters()
    vocabulary = {c: i for i, c in enumerate(chars)}
    merges: list[list[str]] = []
    for word in WORDS:
        pieces = [chars[b] for b in word.encode()]
        left = pieces[0]
        for right in pieces[1:]:
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append([left, right])
            left += right
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": len(vocabulary) + i, "content": text, **flags}
        for i, text in enumerate(SPECIAL_TOKENS.values())
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    # Words and single characters: enough of a pre-tokeniser for merges to stay inside a word.
    split = {
        "type": "Split",
        "pattern": {"Regex": r" ?\p{L}+|[^\p{L}]"},
        "behavior": "Isolated",
        "invert": False,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": True},
    }
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072, **ends}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(ends), encoding="utf-8")
    return folder


def byte_tokenizer(folder: Path | str) -> Tokenizer:
    """Write the files into `folder` and load them."""
    return Tokenizer.from_folder(write_byte_tokenizer(folder))
