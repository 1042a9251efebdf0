"""The small files beside the weights: tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gptoss.convert.sources import Source, read_json
from mlx_gptoss.errors import ConversionError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
OTHER_FILES = ("LICENSE", "LICENSE.txt", "USAGE_POLICY")
GENERATION_CONFIG = "generation_config.json"

# Tokens that end a turn. Older generation configs lack <|call|>, and a model run with them runs on after it.
STOP_TOKENS = ("<|return|>", "<|call|>", "<|endoftext|>")


@dataclass(frozen=True)
class Sidecar:
    """A file to write beside the weights: the bytes of `path`, or `text`."""

    name: str
    path: Path | None = None
    text: str | None = None

    def content(self) -> bytes:
        if self.text is not None:
            return self.text.encode()
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise ConversionError(f"{self.path}: cannot be read ({error.strerror})") from error


def find_sidecars(source: Source, tokenizer: Path | None, *, need: bool) -> list[Sidecar]:
    """What to write beside the weights, by name.

    Tokenizer files come from `tokenizer`, else from the source's folder, else (for `original/`) from the one
    above it. Raises ConversionError when there is no tokenizer.json and `need` is true.
    """
    home = source.folder if source.folder.is_dir() else source.folder.parent
    places = [home, home.parent] if home.name == "original" else [home]
    chosen = tokenizer or next((p for p in places if (p / "tokenizer.json").is_file()), None)
    if chosen is not None and not (chosen / "tokenizer.json").is_file():
        raise ConversionError(f"{chosen}: no tokenizer.json, expected a folder of tokenizer files")
    if chosen is None and need:
        raise ConversionError(
            f"{home}: no tokenizer.json; name a folder that has one with --tokenizer, or go without it "
            "(token ids only) with --no-tokenizer"
        )
    found = [Sidecar(name, chosen / name) for name in TOKENIZER_FILES if chosen and (chosen / name).is_file()]
    for name in OTHER_FILES:
        place = next((p for p in places if (p / name).is_file()), None)
        if place is not None:
            found.append(Sidecar(name, place / name))
    generation = _generation_config(places, chosen)
    if generation is not None:
        text = json.dumps(generation, indent=2, sort_keys=True) + "\n"
        found.append(Sidecar(GENERATION_CONFIG, text=text))
    return found


def _generation_config(places: list[Path], tokenizer: Path | None) -> dict[str, Any] | None:
    """The source's generation config with every stop token in it; None when neither is known."""
    path = next((p / GENERATION_CONFIG for p in places if (p / GENERATION_CONFIG).is_file()), None)
    config = read_json(path) if path is not None else {}
    if not isinstance(config, dict):
        raise ConversionError(f"{path}: holds a {type(config).__name__}, expected an object")
    special = {} if tokenizer is None else _added_tokens(tokenizer / "tokenizer.json")
    stops = [special[token] for token in STOP_TOKENS if token in special]
    if stops:
        given = config.get("eos_token_id", [])
        given = given if isinstance(given, list) else [given]
        config["eos_token_id"] = given + [token for token in stops if token not in given]
    return config or None


def _added_tokens(path: Path) -> dict[str, int]:
    """Added tokens of a tokenizer.json by text. They stand before the vocabulary: the rest is not parsed."""
    key = '"added_tokens"'
    try:
        with open(path, encoding="utf-8") as stream:
            head = stream.read(1 << 20)
        start = head.index("[", head.index(key) + len(key))
        tokens, _ = json.JSONDecoder().raw_decode(head, start)
        return {token["content"]: token["id"] for token in tokens}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{path}: its added_tokens are not readable ({error}); download it again"
        ) from None
