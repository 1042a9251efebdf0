"""Fixtures that many tests share: small random checkpoints, written once a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

TINY = Shape(vocab=320)


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random checkpoint (shape TINY, seed 0) without a tokenizer. Do not change its files."""
    return write_checkpoint(tmp_path_factory.mktemp("bare"), TINY)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with the byte tokenizer. Do not change its files."""
    return write_byte_tokenizer(write_checkpoint(tmp_path_factory.mktemp("text"), TINY))
