"""Inputs for the kernels, drawn or chosen, and how outputs are compared with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.kernels.attention import attention
from mlx_gptoss.model.kernels.down import down
from mlx_gptoss.model.kernels.gate_up import gate_up
from mlx_gptoss.model.kernels.kernel import Kernel
from mlx_gptoss.model.kernels.router import router
from tests.metal.emulator import Report

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
# Of the largest value, for what float32 sums in another order; of each value, for one rounding.
ABSOLUTE = 1e-5
ROUNDING = {mx.float32: 0.0, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-10}


@dataclass(frozen=True)
class Case:
    """A kernel, its inputs, and what is odd about them."""

    kernel: Kernel
    inputs: tuple[mx.array, ...]
    about: str

    def problem(self, outputs: Sequence[mx.array]) -> str:
        """What is wrong with a kernel's outputs; "" when they are those of the reference."""
        with mx.stream(mx.cpu):  # where float32 is float32
            expected = self.kernel.in_float32(*self.inputs)
            mx.eval(expected)
        if self.kernel.name == "router":
            return _routed(outputs, expected, self.inputs)
        return differs(outputs[0], expected[0])

    def run(self) -> str:
        """`problem` of the kernel's own outputs."""
        assert self.kernel.accepts(*self.inputs), self.about
        problem = self.problem(self.kernel(*self.inputs))
        return f"{self.kernel.name}, {self.about}: {problem}" if problem else ""


def floats(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def differs(found: mx.array, expected: mx.array) -> str:
    """Where an output is not the reference's in float32, but for one rounding to its dtype."""
    a, b = floats(found), floats(expected)
    if a.shape != b.shape:
        return f"shape {a.shape}, expected {b.shape}"
    if not (np.isnan(a) == np.isnan(b)).all():
        return f"{np.isnan(a).sum()} NaN, expected {np.isnan(b).sum()}"
    infinite = np.isinf(b) | np.isinf(a)
    if not (a[infinite] == b[infinite]).all():
        return "infinities differ"
    usual = ~(np.isnan(b) | infinite)
    a, b = a[usual], b[usual]
    if not a.size:
        return ""
    allowed = ABSOLUTE * max(1.0, np.abs(b).max()) + ROUNDING[found.dtype] * np.abs(b)
    worst = (np.abs(a - b) / allowed).max()
    return f"{worst:.3g} times as far off as allowed" if worst > 1 else ""


def _routed(outputs: Sequence[mx.array], expected: Sequence[mx.array], inputs: Sequence[mx.array]) -> str:
    """Experts that tie may be chosen by either; the scores of the chosen must be the best there are."""
    rows, chosen, weights = outputs
    if problem := differs(rows, expected[0]):
        return f"rows: {problem}"
    picked = np.array(chosen)
    if picked.max() >= len(inputs[2]) or any(len(set(row)) < len(row) for row in picked.tolist()):
        return f"chosen: {picked.tolist()}"
    scores = floats(rows) @ floats(inputs[2]).T + floats(inputs[3])
    own = np.take_along_axis(scores, picked.astype(np.int64), -1)
    best = np.sort(np.where(np.isnan(scores), np.inf, scores), -1)[:, -picked.shape[1] :]
    if problem := differs(mx.array(np.sort(np.where(np.isnan(own), np.inf, own), -1)), mx.array(best)):
        return f"chosen: {problem}"
    softmax = mx.softmax(mx.array(own), axis=-1, precise=True)
    if problem := differs(weights, softmax):
        return f"weights: {problem}"
    return ""


# --------------------------------------------------------------------------------------- single cases


class Draw:
    """Random arrays from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> mx.array:
        return mx.array(self.rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)

    def of(self, options: Sequence[int]) -> int:
        return int(self.rng.choice(options))

    def stack(self, experts: int, outputs: int, inputs: int, used: np.ndarray) -> tuple[mx.array, mx.array]:
        """Weights and scales of a stack in MXFP4; experts that are not used are zeros."""
        words = np.zeros((experts, outputs, inputs // 8), np.uint32)
        scales = np.zeros((experts, outputs, inputs // 32), np.uint8)
        for e in np.unique(used):
            words[e] = np.frombuffer(self.rng.bytes(outputs * inputs // 2), np.uint32).reshape(outputs, -1)
            scales[e] = self.rng.integers(116, 123, (outputs, inputs // 32))
        return mx.array(words), mx.array(scales)

    def chosen(self, tokens: int, k: int, experts: int) -> np.ndarray:
        return np.stack([self.rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.uint32)


def gate_up_case(
    seed: int,
    dtype: mx.Dtype,
    *,
    hidden: int,
    outputs: int,
    experts: int,
    k: int,
    tokens: int = 1,
    interleaved: bool = True,
    scale: float = 1.0,
) -> Case:
    draw = Draw(seed)
    chosen = draw.chosen(tokens, k, experts)
    weight, scales = draw.stack(experts, 2 * outputs, hidden, chosen)
    inputs = (
        draw.normal(tokens, hidden, dtype=dtype, scale=scale),
        weight,
        scales,
        draw.normal(experts, 2 * outputs + hidden, dtype=dtype),
        mx.array(chosen),
    )
    about = (
        f"seed {seed}, {dtype}, {tokens} x {hidden} -> {outputs}, {k} of {experts} experts, {interleaved=}"
    )
    return Case(gate_up(limit=7.0, alpha=1.702, interleaved=interleaved), inputs, about)


def down_case(
    seed: int, dtype: mx.Dtype, *, hidden: int, outputs: int, experts: int, k: int, tokens: int = 1
) -> Case:
    """hidden: of the residual stream, what it makes; outputs: gate_up's, what it takes."""
    draw = Draw(seed)
    chosen = draw.chosen(tokens, k, experts)
    weight, scales = draw.stack(experts, hidden, outputs, chosen)
    inputs = (
        draw.normal(tokens, k, outputs, dtype=dtype),
        weight,
        scales,
        draw.normal(experts, 2 * outputs + hidden, dtype=dtype),
        mx.array(chosen),
        mx.softmax(draw.normal(tokens, k), axis=-1).astype(dtype),
        draw.normal(tokens, hidden, dtype=dtype),
    )
    about = f"seed {seed}, {dtype}, {tokens} x {outputs} -> {hidden}, {k} of {experts} experts"
    return Case(down(), inputs, about)


def router_case(
    seed: int, dtype: mx.Dtype, *, hidden: int, experts: int, k: int, tokens: int = 1, scale: float = 1.0
) -> Case:
    draw = Draw(seed)
    inputs = (
        draw.normal(tokens, hidden, dtype=dtype, scale=scale),
        draw.normal(hidden, dtype=dtype),
        draw.normal(experts, hidden, dtype=dtype, scale=hidden**-0.5),
        draw.normal(experts, dtype=dtype),
    )
    about = f"seed {seed}, {dtype}, {tokens} x {hidden}, {k} of {experts} experts"
    return Case(router(eps=1e-5, k=k), inputs, about)


def attention_case(
    seed: int,
    dtype: mx.Dtype,
    *,
    keys: int,
    window: int,
    queries: int = 1,
    kv_heads: int = 8,
    group: int = 8,
    channels: int = 64,
    scale: float = 1.0,
    bits: KVBits = (None, None),
) -> Case:
    """Keys and values are views into slabs, queries are laid out as the graph has them."""
    draw = Draw(seed)
    before, after = draw.of(range(4)), draw.of(range(3))
    slabs = [draw.normal(1, kv_heads, before + keys + after, channels, dtype=dtype) for _ in range(2)]
    q = draw.normal(queries, group * kv_heads, 1, channels, dtype=dtype, scale=scale).transpose(2, 1, 0, 3)
    group_size = 64 if channels % 64 == 0 else 32
    stored = [
        array
        for slab, b in zip(slabs, bits, strict=True)
        for array in ([slab] if b is None else mx.quantize(slab, group_size=group_size, bits=b))
    ]
    views = [array[:, :, before : before + keys] for array in stored]
    inputs = (q, *views, draw.normal(group * kv_heads, dtype=dtype))
    about = (
        f"seed {seed}, {dtype}, {queries} queries of {group} x {kv_heads} heads, {keys} keys, {window=}, "
        f"{channels} channels, {bits=}"
    )
    return Case(attention(scale=channels**-0.5, window=window, bits=bits), inputs, about)


# ---------------------------------------------------------------------------------------- many of them

# Each line is compiled once for each dtype, so shapes that the text is compiled for come from short lists.
EXPERT_SHAPES = ((64, 64, 4), (160, 96, 2), (192, 33, 3), (1056, 31, 1), (96, 160, 4))  # D, F, k
ROUTER_SHAPES = ((64, 8, 4), (160, 1, 1), (192, 33, 2), (132, 128, 4), (2880, 32, 4))  # D, E, k
ATTENTION_SHAPES: tuple[tuple[int, int, int, int, KVBits], ...] = (
    # queries, query heads a KV head, channels, window, bits of keys and values
    (1, 8, 64, 0, (None, None)),
    (1, 8, 64, 128, (None, None)),
    (4, 8, 64, 128, (None, None)),
    (3, 8, 64, 0, (None, None)),
    (2, 1, 32, 16, (None, None)),
    (1, 4, 96, 0, (None, None)),
    (4, 3, 64, 5, (None, None)),
    (1, 8, 64, 0, (8, 8)),
    (3, 2, 96, 0, (8, 8)),
    (1, 8, 64, 0, (8, 4)),
    (1, 3, 64, 0, (None, 8)),
)


def drawn(seed: int) -> Case:
    """One of the kernels on something random, out of a seed."""
    draw = Draw(seed)
    dtype = DTYPES[draw.of(range(3))]
    kind = seed % 4
    if kind == 0:
        queries, group, channels, window, bits = ATTENTION_SHAPES[draw.of(range(len(ATTENTION_SHAPES)))]
        most = draw.of((8, 33, 300, 1100))
        return attention_case(
            seed,
            dtype,
            keys=draw.of(range(queries, max(queries, most) + 1)),
            window=window,
            queries=queries,
            kv_heads=draw.of((1, 2, 3)),
            group=group,
            channels=channels,
            scale=draw.of((1, 1, 20)),
            bits=bits,
        )
    if kind == 1:
        hidden, experts, k = ROUTER_SHAPES[draw.of(range(len(ROUTER_SHAPES)))]
        tokens = draw.of((1, 2, 4))
        return router_case(
            seed, dtype, hidden=hidden, experts=experts, k=k, tokens=tokens, scale=draw.of((1, 30))
        )
    hidden, outputs, k = EXPERT_SHAPES[draw.of(range(len(EXPERT_SHAPES)))]
    experts, tokens = k + draw.of((0, 1, 5)), draw.of((1, 2, 3))
    if kind == 2:
        return gate_up_case(
            seed,
            dtype,
            hidden=hidden,
            outputs=outputs,
            experts=experts,
            k=k,
            tokens=tokens,
            interleaved=bool(draw.of((0, 1))),
            scale=draw.of((1, 8)),
        )
    if outputs % 32:
        hidden, outputs = outputs, hidden
    return down_case(seed, dtype, hidden=hidden, outputs=outputs, experts=experts, k=k, tokens=tokens)


def true_shapes(dtype: mx.Dtype, experts: int) -> Iterator[Case]:
    """Of gpt-oss-20b (32 experts) and -120b (128)."""
    yield gate_up_case(1, dtype, hidden=2880, outputs=2880, experts=experts, k=4)
    yield down_case(2, dtype, hidden=2880, outputs=2880, experts=experts, k=4)
    yield router_case(3, dtype, hidden=2880, experts=experts, k=4)
    for n in (1, 128, 2048):
        for window in (0, 128):
            yield attention_case(4, dtype, keys=n, window=window)
        yield attention_case(4, dtype, keys=n, window=0, bits=(8, 8))


def read_once(hidden: int, experts: int, keys: int = 40) -> Iterator[tuple[Case, dict[str, np.ndarray]]]:
    """Cases of a decoded token, and how often each part of some of their inputs is to be read.

    A part is an expert, a row of the router's matrix, or a key: each byte of it as often, however many lanes.
    """
    for case in (
        gate_up_case(1, mx.float32, hidden=hidden, outputs=hidden, experts=experts, k=4),
        down_case(2, mx.float32, hidden=hidden, outputs=hidden, experts=experts, k=4),
    ):
        chosen = np.bincount(np.array(case.inputs[4]).reshape(-1), minlength=experts)
        yield case, {"weight": chosen, "scales": chosen}
    case = router_case(3, mx.float32, hidden=hidden, experts=experts, k=4)
    yield case, {"weight": np.ones(experts)}
    for bits in ((None, None), (8, 8)):
        case = attention_case(4, mx.float32, keys=keys, window=0, kv_heads=1, bits=bits)
        whole = tuple(map(mx.contiguous, case.inputs))
        yield Case(case.kernel, whole, case.about), {"k": np.ones(keys), "v": np.ones(keys)}


def read_otherwise(reports: Sequence[Report], expected: dict[str, np.ndarray]) -> list[str]:
    """The inputs of which any byte is loaded more or less often than expected of its part."""
    loads = {name: n for report in reports for name, n in report.loads.items()}
    return [name for name, n in expected.items() if (loads[name].reshape(len(n), -1) != n[:, None]).any()]


WINDOW_EDGES = (1, 127, 128, 129, 131)
EDGES = (*WINDOW_EDGES, 2, 31, 32, 33, 126, 130, 159, 160, 161, 255, 256, 257, 512, 513)


def edges(dtype: mx.Dtype, lengths: Sequence[int] = EDGES) -> Iterator[Case]:
    """Lengths around the window, a tile and a stretch; and three stretches of one head, a small array."""
    for n in lengths:
        yield attention_case(n, dtype, keys=n, window=128, kv_heads=2)
        yield attention_case(n, dtype, keys=n, window=0, kv_heads=2)
        if n >= 4:
            yield attention_case(n, dtype, keys=n, window=128, queries=4, kv_heads=2)
    yield attention_case(600, dtype, keys=600, window=0, kv_heads=1, group=1)
    yield attention_case(257, dtype, keys=257, window=0, kv_heads=2, bits=(8, 8))


def equals(dtype: mx.Dtype) -> Iterator[Case]:
    """All experts alike, or alike by pairs."""
    for experts in (8, 32, 128):
        case = router_case(5, dtype, hidden=64, experts=experts, k=4)
        x, norm, weight, bias = case.inputs
        same = (x, norm, mx.broadcast_to(weight[:1], weight.shape), mx.zeros_like(bias))
        yield Case(case.kernel, same, f"{experts} equal experts")
        pairs = mx.repeat(weight[::2], 2, axis=0)
        yield Case(case.kernel, (x, norm, pairs, mx.zeros_like(bias)), f"{experts} experts, equal by pairs")


def not_finite(dtype: mx.Dtype) -> Iterator[Case]:
    """NaN or an infinity in one input at a time: the reference tells where they come out."""
    for value in (float("nan"), float("inf"), float("-inf")):
        for make, places in _PLACES:
            case = make(dtype)
            for place in places:
                if case.kernel.name == "down" and place == 5 and value == value:
                    continue  # routing weights are a softmax, which may be NaN and never infinite
                inputs = list(case.inputs)
                array = inputs[place]
                flat = np.zeros(array.size, bool)
                flat[array.size // 3] = True
                hit = mx.array(flat.reshape(array.shape))
                inputs[place] = mx.where(hit, mx.array(value, array.dtype), array)
                yield Case(case.kernel, tuple(inputs), f"{case.about}, {value} in input {place}")


_PLACES: tuple[tuple[Callable[[mx.Dtype], Case], tuple[int, ...]], ...] = (
    (lambda t: gate_up_case(6, t, hidden=64, outputs=64, experts=4, k=4), (0, 3)),
    (lambda t: down_case(7, t, hidden=64, outputs=64, experts=4, k=4), (0, 3, 5, 6)),
    (lambda t: router_case(8, t, hidden=64, experts=8, k=4), (0, 1, 2, 3)),
    (lambda t: attention_case(9, t, keys=40, window=0, kv_heads=1), (0, 1, 2, 3)),
    (lambda t: attention_case(9, t, keys=600, window=0, kv_heads=1), (0, 1, 2, 3)),
)
