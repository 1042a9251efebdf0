"""The demo model with every kernel in place of the operations it replaces: the same logits and reply."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.doctor import answers
from tests.metal.emulator import missing
from tests.metal.whole_model import as_on_metal, compare

TOKENS = 12


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_reply_of_the_demo_model_is_the_same(tmp_path: Path) -> None:
    """`make metal` decodes all stored replies, and a cut of 20b's width."""
    stored = answers.stored().replies[answers.WALKED]
    found = compare(as_on_metal(DEMO_FOLDER), stored.prompt, TOKENS, tmp_path / "record.json")
    assert found.plain.tokens == found.emulated.tokens == stored.reply[:TOKENS]
    assert 0 < found.difference < 1e-4
    decoded = 4 * (TOKENS - 1)  # of four layers, the prompt's forward aside
    assert found.launches == dict.fromkeys(("attention", "router", "gate_up", "down"), decoded)


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_keys_and_values_in_eight_bits_are_attended_to_as_they_are_stored(tmp_path: Path) -> None:
    stored = answers.stored().replies[answers.WALKED]
    model, record = as_on_metal(DEMO_FOLDER), tmp_path / "record.json"
    found = compare(model, stored.prompt, 5, record, kv_bits=(8, 8))
    assert found.plain.tokens == found.emulated.tokens
    assert 0 < found.difference < 1e-4
    assert found.launches["attention_8_8"] == found.launches["attention"] == 2 * 4
    other = compare(model, stored.prompt, 5, record)
    assert np.abs(found.plain.logits - other.plain.logits).max() > 1e-3
