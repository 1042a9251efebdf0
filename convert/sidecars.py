"""The small files beside the weights: tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_gptoss.checkpoint.hub import TERMS, TOKENIZER_FILES
from mlx_gptoss.convert.sources import Source
from mlx_gptoss.errors import ConversionError
from mlx_gptoss.files import open_regular, read_limited
from mlx_gptoss.model.config import read_object
from mlx_gptoss.tokenizer import MAX_BYTES

GENERATION_CONFIG = "generation_config.json"

# Tokens that end a turn. Older generation configs lack <|call|>, and a model run with them runs on after it.
STOP_TOKENS = ("<|return|>", "<|call|>", "<|endoftext|>")


def find_sidecars(source: Source, tokenizer: Path | None, *, need: bool) -> dict[str, bytes]:
    """What to write beside the weights: name -> content.

    Tokenizer files come from `tokenizer`, else from the source's folder, else (for `original/`) from the one
    above it. Raises ConversionError when there is no tokenizer.json and `need` is true, ConfigError for a
    generation config that cannot be used.
    """
    home = source.folder
    places = [home, home.parent] if home.name == "original" else [home]
    chosen = tokenizer or next((p for p in places if (p / "tokenizer.json").is_file()), None)
    if chosen is not None and not (chosen / "tokenizer.json").is_file():
        raise ConversionError(f"{chosen}: no tokenizer.json, expected a folder of tokenizer files")
    if chosen is None and need:
        raise ConversionError(
            f"{home}: no tokenizer.json; name a folder that has one with --tokenizer, or go without it "
            "(token ids only) with --no-tokenizer"
        )
    found = {} if chosen is None else _read([chosen], TOKENIZER_FILES)
    found |= _read(places, TERMS)
    generation = _generation_config(places, chosen)
    if generation:
        found[GENERATION_CONFIG] = (json.dumps(generation, indent=2, sort_keys=True) + "\n").encode()
    return found


def _read(places: list[Path], names: tuple[str, ...]) -> dict[str, bytes]:
    """Those of the files that are there, each from the first of the places that has it."""
    found = {}
    for name in names:
        path = next((p / name for p in places if (p / name).is_file()), None)
        if path is not None:
            try:
                found[name] = read_limited(path, MAX_BYTES)
            except OSError as error:
                raise ConversionError(f"{path}: cannot be read ({error.strerror})") from error
    return found


def _generation_config(places: list[Path], tokenizer: Path | None) -> dict[str, Any]:
    """The source's generation config with every stop token in it; empty when neither is known."""
    path = next((p / GENERATION_CONFIG for p in places if (p / GENERATION_CONFIG).is_file()), None)
    config = {} if path is None else read_object(path)
    special = {} if tokenizer is None else _added_tokens(tokenizer / "tokenizer.json")
    stops = [special[token] for token in STOP_TOKENS if token in special]
    if stops:
        given = config.get("eos_token_id", [])
        given = given if isinstance(given, list) else [given]
        config["eos_token_id"] = given + [token for token in stops if token not in given]
    return config


def _added_tokens(path: Path) -> dict[str, int]:
    """Added tokens of a tokenizer.json by text. They stand before the vocabulary: the rest is not parsed."""
    key = '"added_tokens"'
    try:
        with open_regular(path) as stream:
            head = stream.read(1 << 20).decode("utf-8", "ignore")
        start = head.index("[", head.index(key) + len(key))
        tokens, _ = json.JSONDecoder().raw_decode(head, start)
        return {token["content"]: token["id"] for token in tokens}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{path}: its added_tokens are not readable ({error}); download it again"
        ) from None
