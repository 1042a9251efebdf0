"""Training and serving adapters: speed and memory, beside mlx-lm's tuner on the same data.

    python -m benchmarks.tune [speed] [memory] [serving] [streamed] [learning] [keeping] [preferring]
                              [--checkpoint 20B] [--json]

speed: learned tokens a second on the demo model, in float32; ours with the host's BLAS (on the CPU backend)
and with MLX's operations alone. memory: the peak beyond the weights at 20b's vocabulary, on two small layers.
serving: a decode step of 8 rows with no adapter, with four that are loaded and unused, and with all in use.
streamed: a step of 512 tokens with 20b's whole shape, each layer read from disk: of the folder --checkpoint,
or with weights of zeros. learning, keeping, preferring: what adapters teach the demo model (teaching.py).
Each engine is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.teaching import keeping, learning, preferring
from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.checkpoint.memory import plan
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.device import describe, peak_rss
from mlx_gptoss.model import cpu
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.cpu import HostExperts, HostProjection
from mlx_gptoss.model.experts import Experts, ResidentExperts
from mlx_gptoss.model.low_rank import ATTENTION, adaptable, put_adapter
from mlx_gptoss.model.projection import Dense, Projection
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.tune.base import Base
from mlx_gptoss.tune.dataset import pack
from mlx_gptoss.tune.examples import Example, examples_of
from mlx_gptoss.tune.gradient import gradient, task_of
from mlx_gptoss.tune.memory import plan_tune
from mlx_gptoss.tune.options import TuneOptions
from mlx_gptoss.tune.run import make_optimizer
from tests.support.adapters import random_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import SHAPES, Shape
from tests.support.sparse_checkpoint import write_sparse
from tests.support.tuning import style_rows

RANK, SCALE, STEPS = 16, 2.0, 12
TOKENS = 512  # a step's
PARTS = ("speed", "memory", "serving", "streamed", "learning", "keeping", "preferring")


class Plain(Checkpoint):
    """A checkpoint whose graph is MLX's operations alone."""

    def projection(self, *keys: str, layer: int = 0, bias: mx.array | None = None) -> Projection:
        made = super().projection(*keys, layer=layer, bias=bias)
        return Dense(made.matrix) if isinstance(made, HostProjection) else made

    def experts(self, layer: int) -> Experts:
        made = super().experts(layer)
        return ResidentExperts(made.weights) if isinstance(made, HostExperts) else made


def demo_examples(count: int) -> list[Example]:
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    return [e for row in style_rows("benchmark", count) for e in examples_of(row, tokenizer, "")]


def random_examples(vocab: int, count: int, length: int) -> list[Example]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        ids = rng.integers(0, vocab, length).astype(np.int32)
        rows = np.arange(length // 2, length - 1, dtype=np.int32)
        made.append(Example(ids, rows, ids[rows + 1]))
    return made


def ours(folder: Path, examples: list[Example], tokens: int, steps: int, plain: bool) -> dict[str, float]:
    """Learned tokens a second without the first two steps, and the peak beyond the weights."""
    if plain:
        cpu.leaves_mlx = lambda dtype: False
    base = Base((Plain if plain else Checkpoint)(folder, "float32"))
    tree: Any = base.new_parameters(range(base.config.num_layers), ATTENTION, RANK, 0)
    optimizer = make_optimizer(TuneOptions(rank=RANK), steps)
    optimizer.init(tree)
    packs = pack(examples, tokens, np.random.default_rng(0))
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    learned, seconds = 0, 0.0
    for step in range(steps):
        start = time.perf_counter()
        measured, grads = gradient(base, tree, SCALE, task_of(packs[step % len(packs)], base, 0.1))
        tree = optimizer.apply_gradients(grads, tree)
        mx.eval(tree, optimizer.state)
        if step >= 2:
            learned += measured.count
            seconds += time.perf_counter() - start
    return {"learned_per_second": learned / seconds, "peak": mx.get_peak_memory() - weights}


def mlx_lm(folder: Path, examples: list[Example], batch: int, steps: int) -> dict[str, float]:
    """The same by mlx-lm's trainer, whose step is compiled: its first ones are not counted."""
    import mlx.optimizers as opt
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    model.freeze()
    keys = {f"self_attn.{name}" for name in ATTENTION}
    settings = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, len(model.layers), settings)
    mx.eval(model.parameters())
    data = [(e.ids.tolist(), int(e.rows[0]) + 1) for e in examples]
    rates: list[float] = []

    class Collect(TrainingCallback):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            rates.append(info["tokens_per_second"])

    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArgs(
            batch_size=batch,
            iters=steps,
            steps_per_report=max(1, steps // 4),
            steps_per_save=10**6,
            adapter_file=f"{scratch}/adapters.safetensors",
            grad_checkpoint=True,
        )
        train(model, opt.AdamW(learning_rate=1e-4), data, None, args, training_callback=Collect())
    peak = mx.get_peak_memory() - weights
    return {"learned_per_second": float(np.median(rates[1:] or rates)), "peak": peak}


def speed() -> dict[str, Any]:
    examples = demo_examples(120)
    length = float(np.mean([len(e) for e in examples]))
    batch = max(1, round(TOKENS / length))
    rows = {
        "mlx-gptoss": isolated(ours, DEMO_FOLDER, examples, TOKENS, 3 * STEPS, False),
        "mlx-gptoss, MLX's operations": isolated(ours, DEMO_FOLDER, examples, TOKENS, STEPS, True),
        "mlx-lm": isolated(mlx_lm, DEMO_FOLDER, examples, batch, 3 * STEPS),
    }
    return {name: row["learned_per_second"] for name, row in rows.items()}


def memory() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(Path(scratch), Shape(vocab=SHAPES["20b"].vocab))
        examples = random_examples(SHAPES["20b"].vocab, 4, 128)
        rows = {
            "mlx-gptoss": isolated(ours, folder, examples, 512, 3, False),
            "mlx-lm": isolated(mlx_lm, folder, examples, 4, 2),
        }
    return {name: row["peak"] / 1e9 for name, row in rows.items()}


def serving() -> dict[str, Any]:
    """Milliseconds of a decode step of 8 rows, the median of 60, in turns."""
    model = read_model(Checkpoint(DEMO_FOLDER, "float32"))
    bare = list(model.layers)
    loaded = [adaptable(layer) for layer in bare]
    for number, rank in enumerate((4, 8, 16, 8), 1):
        adapter = random_adapter(model.config, rank, tuple(range(len(bare))), number, ATTENTION)
        for i, layer in enumerate(loaded):
            put_adapter(layer, number, adapter.parts[i], adapter.scale, interleaved=True)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (8, 100))
    cases: dict[str, tuple[list[Any], Callable[[int], int]]] = {
        "no adapter": (bare, lambda row: 0),
        "four, unused": (loaded, lambda row: 0),
        "four, in use": (loaded, lambda row: row % 5),
        "one, in use": (loaded, lambda row: 3),
    }
    caches = {name: [model.make_cache() for _ in range(8)] for name in cases}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for name, (layers, which) in cases.items():
        model.layers = layers
        segments = [Segment(100, cache, adapter=which(i)) for i, cache in enumerate(caches[name])]
        mx.eval(model(mx.array(prompts.reshape(-1).astype(np.int32)), segments, [799]))
    tokens = mx.array(prompts[:, 0].astype(np.int32))
    for _ in range(60):
        for name, (layers, which) in cases.items():
            model.layers = layers
            start = time.perf_counter()
            segments = [Segment(1, cache, adapter=which(i)) for i, cache in enumerate(caches[name])]
            mx.eval(model(tokens, segments))
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) * 1e3 for name, times in seconds.items()}


def streamed_step(folder: Path) -> dict[str, float]:
    checkpoint = Checkpoint(folder)
    options = TuneOptions(rank=RANK, tokens=TOKENS, stream=True)
    planned = plan_tune(plan(folder), options, TOKENS)
    base = Base(checkpoint, stream=True)
    tree: Any = base.new_parameters(options.layer_numbers(base.config), ATTENTION, RANK, 0)
    optimizer = make_optimizer(options, 1)
    optimizer.init(tree)
    examples = random_examples(base.config.vocab_size, 2, TOKENS // 2)
    start = time.perf_counter()
    measured, grads = gradient(base, tree, SCALE, task_of(examples, base, 0.1))
    mx.eval(optimizer.apply_gradients(grads, tree), optimizer.state)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "loss": measured.mean,
        "peak": mx.get_peak_memory() / 1e9,
        "rss": peak_rss() / 1e9,
        "planned": planned.total / 1e9,
    }


def streamed(folder: Path | None) -> dict[str, Any]:
    if folder is not None:
        return isolated(streamed_step, folder)
    with tempfile.TemporaryDirectory() as scratch:
        return isolated(streamed_step, write_sparse(Path(scratch), SHAPES["20b"]))


def isolated(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What a function measures in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, arguments)


UNITS = {
    "speed": "learned tokens/s",
    "memory": "GB beyond the weights",
    "serving": "ms a step",
    "streamed": "s, GB",
    "learning": "% of unseen questions",
    "keeping": "% of unseen prompts",
    "preferring": "% of unseen prompts",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="default: all")
    parser.add_argument("--checkpoint", type=Path, help="of 20b's shape, for `streamed`")
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "speed": speed,
        "memory": memory,
        "serving": serving,
        "streamed": partial(streamed, args.checkpoint),
        "learning": learning,
        "keeping": keeping,
        "preferring": preferring,
    }
    found = {name: measures[name]() for name in args.parts or PARTS}
    if args.as_json:
        print(json.dumps({"machine": describe(), **found}, indent=2))
        return
    print(", ".join(f"{k} {v}" for k, v in describe().items()))
    for name, rows in found.items():
        print(f"\n| {name} | {UNITS[name]} |\n|---|---:|")
        for label, value in rows.items():
            print(f"| {label} | {value:.3g} |" if value < 100 else f"| {label} | {value:,.0f} |")


if __name__ == "__main__":
    main()
