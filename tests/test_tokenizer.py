"""Text and tokens: ordinary text stays ordinary, streams never show half a character."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest

from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.errors import RequestError, TokenizerError
from mlx_gptoss.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.support.byte_tokenizer import write_byte_tokenizer

TEXTS = [
    "plain",
    "  spaces \n\n\ttabs",
    "naïve café",
    "漢字かな交じり",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "a\u0301",
    "\ufeffx",
    "0",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_way_to_tokens_and_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("spelled", SPECIAL_TOKENS.values())
def test_text_that_spells_markup_is_ordinary_text(tokenizer: Tokenizer, spelled: str) -> None:
    ids = tokenizer.encode(f"a{spelled}b")
    assert not any(tokenizer.is_special(i) for i in ids)
    assert tokenizer.decode(ids) == f"a{spelled}b"


def test_special_tokens_are_found_by_name(tokenizer: Tokenizer) -> None:
    for field, text in SPECIAL_TOKENS.items():
        token = getattr(tokenizer.special, field)
        assert tokenizer.token_bytes(token) == text.encode()
        assert tokenizer.is_special(token)
    assert tokenizer.special.end not in tokenizer.stop_ids
    assert {tokenizer.special.return_, tokenizer.special.call} <= tokenizer.stop_ids


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_shows_whole_characters_only(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.detokenizer()
    shown = [stream.push(i) for i in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) + stream.finish() == text


def test_a_cut_character_shows_as_a_replacement_once(tokenizer: Tokenizer) -> None:
    stream = tokenizer.detokenizer()
    shown = [stream.push(b) for b in "é".encode()[:1]]
    assert shown == [""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_half_a_surrogate_pair_is_refused_by_its_position(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"U\+DCFF at position 3.*expected"):
        tokenizer.encode("abc\udcffd")


def test_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    with pytest.raises(RequestError, match="token id -1"):
        tokenizer.token_bytes(-1)


def test_a_missing_or_broken_tokenizer_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not a usable tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_foreign_vocabulary_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    path = write_byte_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|channel|>"]
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"lacks the special tokens <\|channel\|>"):
        Tokenizer.from_folder(tmp_path)


def texts_that_are_hard_to_cut() -> list[str]:
    rng = random.Random(0)
    words = " ".join("".join(rng.choices("abcdeXYZ", k=rng.randint(1, 9))) for _ in range(30_000))
    return [
        words,
        "a" * 200_000,
        " " * 200_000,
        "1234567890" * 20_000,
        "\n \r" * 70_000,
        "\U0001f600" * 100_000,
        "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(150_000)),
        "!?;--" * 40_000,
    ]


@pytest.mark.parametrize("index", range(8))
def test_counting_in_slices_never_claims_more_than_there_is(index: int) -> None:
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)  # it has merges
    text = texts_that_are_hard_to_cut()[index]
    total = len(tokenizer.encode(text))
    assert tokenizer.count_beyond(text, total) == 0
    for limit in (0, 1000, total // 2, total * 9 // 10):
        count = tokenizer.count_beyond(text, limit)
        assert count == 0 or limit < count <= total
    assert tokenizer.count_beyond(text, 1000)
    assert tokenizer.count_beyond(text[:60_000], 1000) == 0, "so little is tokenised at once"


def test_a_long_text_has_the_same_tokens_as_a_short_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a b" * 5000) == tokenizer.encode("a b" * 1000) * 5


def test_tokenising_a_long_text_lets_other_threads_run(tokenizer: Tokenizer) -> None:
    """A thread that wakes again and again does so meanwhile, if not each time on a busy machine."""
    text = "What is the meaning of all this? " * 60_000
    over, woken = threading.Event(), 0

    def watch() -> None:
        nonlocal woken
        while not over.wait(0.001):
            woken += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(20):
            before = woken
            tokenizer.encode(text)
            if woken - before > 20:
                break
        else:
            raise AssertionError("no other thread ran")
    finally:
        over.set()
        watcher.join()
