"""An adapter does in mlx-lm, with the exact frequencies of YaRN, and in PEFT what it does here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.adapter import Adapter, read_adapter, write_adapter
from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.graph import yarn_inverse_frequencies
from mlx_gptoss.model.low_rank import ATTENTION
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tune.base import TRAINED, Base, flat
from tests.support.adapters import random_adapter

TOKENS = Tokenizer.from_folder(DEMO_FOLDER).encode("What is 17 + 25? Which word comes first: apple or pear?")
ADAPTER_LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(Checkpoint(DEMO_FOLDER, "float32"))


@pytest.fixture(scope="module")
def adapter(base: Base) -> Adapter:
    return replace(random_adapter(base.config, 4, ADAPTER_LAYERS), scale=0.25)


def ours(base: Base, adapter: Adapter | None) -> np.ndarray:
    model = base.model if adapter is None else base.with_adapter(adapter)
    number = 0 if adapter is None else TRAINED
    logits = model(mx.array(TOKENS, mx.int32), [Segment(len(TOKENS), model.make_cache(), adapter=number)])
    assert logits is not None
    return np.array(logits)


def mlx_lms(base: Base, folder: Path) -> np.ndarray:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(DEMO_FOLDER)
    model.set_dtype(mx.float32)
    load_adapters(model, str(folder))
    model.eval()
    for layer in model.layers:
        layer.self_attn.rope._freqs = 1.0 / mx.array(yarn_inverse_frequencies(base.config))
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


def test_what_is_written_for_mlx_lm_does_the_same_there(base: Base, adapter: Adapter, tmp_path: Path) -> None:
    write_adapter(tmp_path, adapter, base.config)
    expected = ours(base, adapter)
    assert np.abs(expected - ours(base, None)).max() > 0.5
    assert np.abs(mlx_lms(base, tmp_path) - expected).max() < 1e-4


def test_what_mlx_lm_writes_does_the_same_here(base: Base, tmp_path: Path) -> None:
    """Its own layers, with gate and up apart, filled with random numbers and saved as its trainer does."""
    import json

    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(DEMO_FOLDER)
    model.freeze()
    keys = [*(f"self_attn.{n}" for n in ATTENTION), "mlp.router"]
    keys += [f"mlp.experts.{n}_proj" for n in ("gate", "up", "down")]
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 3, settings)
    rng = np.random.default_rng(5)
    written = {
        name: mx.array(rng.normal(0, 0.05, value.shape).astype(np.float32))
        for name, value in flat(model.trainable_parameters())
    }
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), written)
    about = {"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    found = read_adapter(tmp_path, base.config)
    assert sorted(found.parts) == [1, 2, 3] and found.parts[1]["gate_up_proj"].rank == 8
    expected = mlx_lms(base, tmp_path)
    assert np.abs(expected - ours(base, None)).max() > 0.1
    assert np.abs(ours(base, found) - expected).max() < 1e-4


def test_what_is_written_for_peft_does_the_same_there(base: Base, adapter: Adapter, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch, transformers and peft")
    peft = pytest.importorskip("peft", reason="needs torch, transformers and peft")
    from transformers import AutoModelForCausalLM, Mxfp4Config

    write_adapter(tmp_path, adapter, base.config, format="peft")
    model = AutoModelForCausalLM.from_pretrained(
        str(DEMO_FOLDER),
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )
    model = peft.PeftModel.from_pretrained(model.float(), str(tmp_path)).eval()
    with torch.no_grad():
        found = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(found - ours(base, adapter)).max() < 1e-4
