"""Regenerates golden/*.npz: logits of small random checkpoints, computed by transformers in float32.

    python -m tests.support.make_golden            # needs torch and transformers, which the tests do not

Each file holds the shape and seed of a checkpoint (tests.support.checkpoints writes it again, bit for bit),
the tokens, the length of the prompt, and the logits [T, vocab]: the prompt's from one prefill, the rest token
by token through the cache. Seeds are advanced until no router decision is closer than ROUTER_MARGIN, where
rounding could flip it.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tests.support.checkpoints import write_checkpoint
from tests.support.oracle import forward
from tests.support.random_weights import Shape, truth

GOLDEN = Path(__file__).parent / "golden"
ROUTER_MARGIN = 3e-5


@dataclass(frozen=True)
class Case:
    """A checkpoint and a sequence: `prompt` tokens at once, then `decode` tokens one by one."""

    shape: Shape
    prompt: int
    decode: int
    kept: int | None = None  # rows of logits stored, counted from the end; None: all


CASES = {
    "two_layers_window_16": Case(Shape(layers=2, vocab=160), 40, 20),
    "three_layers_truncated": Case(
        Shape(layers=3, hidden=96, intermediate=160, window=24, truncate=True, vocab=160), 50, 14
    ),
    "six_layers_top_two": Case(
        Shape(
            layers=6,
            hidden=160,
            intermediate=64,
            heads=6,
            kv_heads=3,
            head_dim=64,
            top_k=2,
            experts=6,
            vocab=160,
        ),
        48,
        16,
    ),
    "window_128_crossed": Case(
        Shape(
            layers=4,
            hidden=64,
            intermediate=96,
            heads=4,
            kv_heads=1,
            head_dim=64,
            window=128,
            top_k=3,
            vocab=128,
        ),
        150,
        50,
    ),
    "short_context_stretched": Case(
        Shape(
            layers=2,
            hidden=64,
            intermediate=96,
            initial_context=64,
            rope_factor=8.0,
            truncate=True,
            vocab=128,
            swiglu_limit=3.0,
        ),
        140,
        20,
    ),
    "long_context": Case(
        Shape(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, window=128, vocab=96),
        2992,
        8,
        kept=40,
    ),
}


def main() -> None:
    import torch
    import transformers

    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    GOLDEN.mkdir(exist_ok=True)
    for name, case in CASES.items():
        seed, tokens, exact = _draw(case)
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, case.shape, seed=seed)
            logits = _transformers_logits(folder, tokens, case.prompt)
        kept = case.kept or len(tokens)
        error = float(np.abs(logits - exact).max())
        print(f"{name}: seed {seed}, transformers to oracle {error:.1e}")
        about = {"shape": asdict(case.shape), "seed": seed, "versions": versions, "error_to_oracle": error}
        np.savez_compressed(
            GOLDEN / f"{name}.npz",
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            tokens=tokens.astype(np.int32),
            prompt=np.int32(case.prompt),
            logits=logits[-kept:].astype(np.float32),
        )


def _draw(case: Case) -> tuple[int, np.ndarray, np.ndarray]:
    """A seed without router near-ties, its tokens, and the oracle's logits."""
    for seed in range(1000):
        tokens = np.random.default_rng(seed).integers(0, case.shape.vocab, case.prompt + case.decode)
        result = forward(case.shape, truth(case.shape, seed), tokens)
        if result.router_margin.min() >= ROUTER_MARGIN:
            return seed, tokens, result.logits
    raise SystemExit(f"no seed of 1000 gives {case} a router margin of {ROUTER_MARGIN}")


def _transformers_logits(folder: str, tokens: np.ndarray, prompt: int) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    ).eval()
    ids = torch.from_numpy(tokens[None])
    step = model(ids[:, :prompt], use_cache=True)
    rows = [step.logits[0]]
    for i in range(prompt, len(tokens)):
        step = model(ids[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
        rows.append(step.logits[0])
    logits: np.ndarray = torch.cat(rows).numpy()
    return logits


if __name__ == "__main__":
    main()
