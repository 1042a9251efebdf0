"""Fixtures that many tests share: small random checkpoints, written once a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

TINY = Shape(vocab=320)


@pytest.fixture(autouse=True, scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the program keeps between runs lies in a folder of the test run, not in the user's."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random checkpoint (shape TINY, seed 0) without a tokenizer. Do not change its files."""
    return write_checkpoint(tmp_path_factory.mktemp("bare"), TINY)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with the byte tokenizer. Do not change its files."""
    return write_byte_tokenizer(write_checkpoint(tmp_path_factory.mktemp("text"), TINY))
