"""What a decoded token costs in each layer: kernels launched, and Python's time to build the graph.

    python -m benchmarks.primitives [--json]

Hardware-independent: one decode step is built as for a GPU, and its primitives are counted. RMSNorm, RoPE and
attention are one each (the CPU backend would write them out), compiled functions are one, and views are none.
The count of a layer is the difference between checkpoints of 4 and of 2 layers, halved: the mean of a sliding
and a full layer. Each engine is counted in a process of its own, ours also with all of its own Metal kernels
in use, whether or not they pay on some chip.

The time is that of building the same step, for one sequence and for eight, both engines by turns in one
process; the least of many tries, as nothing but noise adds to it. A fast kernel costs both the same stand-in.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Primitives that only describe the same memory anew, or that exist once in the program.
VIEWS = {
    "AsStrided",
    "Broadcast",
    "BroadcastAxes",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
    "View",
}
WARM_TOKENS = 8
TIMED_LAYERS, TIMED_STEPS = 24, 4
SEQUENCES = (1, 8)


def fused(name: str) -> Any:
    """A stand-in for a fast kernel: an output like its first argument that depends on all the others."""
    import mlx.core as mx

    def stand_in(x: Any, *args: Any, **kwargs: Any) -> Any:
        others = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]
        return mx.depends(x, others)

    stand_in.__name__ = name
    return stand_in


def pretend_gpu() -> None:
    """Build graphs as on a GPU: fast kernels whole, elementwise pieces compiled, no CPU detours."""
    import mlx.core as mx

    from mlx_gptoss import device as platform

    for name in ("rms_norm", "rope", "scaled_dot_product_attention"):
        setattr(mx.fast, name, fused(name))
    platform.on_gpu = lambda: True  # type: ignore[assignment]


def pretend_metal() -> None:
    """Launch Metal kernels of our own as stand-ins: outputs of their shapes that depend on all inputs."""
    from functools import cache

    import mlx.core as mx

    from mlx_gptoss.model.kernels import kernel

    @cache
    def output(shape: tuple[int, ...], dtype: Any) -> Any:
        made = mx.zeros(shape, dtype)
        mx.eval(made)
        return made

    def run(program: Any, inputs: Any, launch: Any) -> list[Any]:
        return list(mx.depends([output(*out) for out in launch.outputs], list(inputs)))

    kernel.run = run


def count(output: Any) -> Counter[str]:
    """The non-view primitives of the graph that computes `output`, by name."""
    import mlx.core as mx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), output)
        names = re.findall(r'\[label ="([^"]+)", shape=rectangle\]', path.read_text())
    return Counter(n for n in names if n not in VIEWS)


def second_step(step: Callable[[], Any]) -> Counter[str]:
    """The count of a step after a first one has computed what is constant (RoPE's frequencies, say)."""
    import mlx.core as mx

    mx.disable_compile()  # the CPU backend would start a C++ compiler
    mx.eval(step())
    mx.enable_compile()
    return count(step())


# Makes caches of so many sequences as a prompt leaves them, without running one, and gives their next step.
Steps = Callable[[int], Callable[[], Any]]


def with_kernels(folder: Path, dtype: str) -> Steps:
    """Decode steps of this package with its own Metal kernels."""
    return ours(folder, dtype, kernels=True)


def ours(folder: Path, dtype: str, *, kernels: bool = False) -> Steps:
    """Decode steps of this package."""
    pretend_gpu()
    import mlx.core as mx

    from mlx_gptoss.checkpoint.reader import load_model
    from mlx_gptoss.model.batch import Segment

    model = load_model(folder, dtype)
    if kernels:
        from mlx_gptoss.model.kernels.decode import DecodeKernels
        from mlx_gptoss.model.kernels.record import Record

        pretend_metal()
        DecodeKernels(model, "on", Record("any", folder / "machines.json"))
    new = mx.zeros((1, model.config.num_kv_heads, WARM_TOKENS, model.config.head_dim), model.dtype)

    def steps(sequences: int) -> Callable[[], Any]:
        caches = [model.make_cache() for _ in range(sequences)]
        for cache in caches:
            for layer in cache.layers:
                layer.update_and_fetch(new, new)
            cache.advance(WARM_TOKENS)
            mx.eval(cache.arrays())
        tokens = mx.array([1] * sequences, mx.int32)
        return lambda: model(tokens, [Segment(1, cache) for cache in caches])

    return steps


def mlx_lm(folder: Path, dtype: str) -> Steps:
    """Decode steps of mlx-lm."""
    pretend_gpu()
    import mlx.core as mx
    from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, RotatingKVCache, make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(getattr(mx, dtype))
    args = model.args

    def steps(sequences: int) -> Callable[[], Any]:
        caches = make_prompt_cache(model)
        if sequences > 1:
            padding = [0] * sequences
            caches = [
                BatchRotatingKVCache(c.max_size, padding)
                if isinstance(c, RotatingKVCache)
                else BatchKVCache(padding)
                for c in caches
            ]
        new = mx.zeros((sequences, args.num_key_value_heads, WARM_TOKENS, args.head_dim), getattr(mx, dtype))
        for cache in caches:
            cache.update_and_fetch(new, new)
        mx.eval([c.state for c in caches])
        tokens = mx.array([[1]] * sequences)
        return lambda: model(tokens, cache=caches)

    return steps


ENGINES = {"ours": ours, "mlx-lm": mlx_lm}
COUNTED = {"ours": ours, "kernels": with_kernels, "mlx-lm": mlx_lm}


def per_layer(engine: str, bits: int | None, dtype: str) -> dict[str, Any]:
    """Primitives of a layer, and what stands around the layers."""
    from tests.support.checkpoints import write_checkpoint
    from tests.support.random_weights import MlxRecipe, Shape

    counts = []
    with tempfile.TemporaryDirectory() as work:
        for layers in (2, 4):
            folder = Path(work) / str(layers)
            shape = replace(Shape(), layers=layers)
            # Large enough in every matrix that nothing is special for being small.
            write_checkpoint(folder, shape, layout="mlx", recipe=MlxRecipe(bits))
            counts.append(second_step(COUNTED[engine](folder, dtype)(1)))
    few, many = counts
    layer = {n: (many[n] - few[n]) / 2 for n in sorted(many) if many[n] != few[n]}
    return {
        "per_layer": sum(layer.values()),
        "around": sum(few.values()) - 2 * sum(layer.values()),
        "primitives": layer,
    }


def host_time(bits: int | None, dtype: str, tries: int = 30) -> dict[str, dict[int, float]]:
    """Microseconds a layer to build the graph of one decode step, by engine and number of sequences."""
    from tests.support.checkpoints import write_checkpoint
    from tests.support.random_weights import MlxRecipe, Shape

    shape = replace(Shape(), layers=TIMED_LAYERS)
    with tempfile.TemporaryDirectory() as work:
        folder = write_checkpoint(Path(work), shape, layout="mlx", recipe=MlxRecipe(bits))
        engines = {name: steps(folder, dtype) for name, steps in ENGINES.items()}
    times: dict[str, dict[int, float]] = {name: dict.fromkeys(SEQUENCES, math.inf) for name in engines}
    for _ in range(tries):
        for name, steps in engines.items():
            for sequences in SEQUENCES:
                step = steps(sequences)
                for _ in range(TIMED_STEPS):
                    start = time.perf_counter()
                    step()
                    seconds = time.perf_counter() - start
                    times[name][sequences] = min(times[name][sequences], seconds * 1e6 / TIMED_LAYERS)
    return times


def measure(engine: str, bits: int | None, dtype: str = "bfloat16") -> dict[str, Any]:
    """`per_layer` in a process of its own."""
    return _apart(f"per_layer({engine!r}, {bits!r}, {dtype!r})")


def measure_host_time(bits: int | None, dtype: str = "bfloat16") -> dict[str, dict[str, float]]:
    """`host_time` in a process of its own; sequences as text."""
    return _apart(f"host_time({bits!r}, {dtype!r})")


def _apart(call: str) -> dict[str, Any]:
    code = f"import json; from benchmarks.primitives import *; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    cases = {"dense parts in bfloat16": None, "dense parts in 8 bits": 8}
    results = {c: {e: measure(e, bits) for e in COUNTED} for c, bits in cases.items()}
    times = {c: measure_host_time(bits) for c, bits in cases.items()}
    if as_json:
        print(json.dumps({"primitives": results, "host_time_us": times}, indent=2))
        return
    for case, engines in results.items():
        print(f"{case}: primitives per layer per decoded token")
        for engine, result in engines.items():
            parts = ", ".join(f"{n} {c:g}" for n, c in result["primitives"].items())
            print(f"  {engine:7} {result['per_layer']:5.1f}  (+{result['around']:g} around)   {parts}")
    for case, engines in times.items():
        print(f"{case}: microseconds per layer to build the graph of one decode step")
        for engine, found in engines.items():
            told = ", ".join(f"{us:.0f} with {n}" for n, us in found.items())
            print(f"  {engine:7} {told} sequences")


if __name__ == "__main__":
    main()
