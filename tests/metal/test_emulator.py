"""The emulator itself: it sees what no kernel may do, and runs MLX's own kernels right."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.model.kernels.kernel import Launch, Program
from tests.metal.emulator import Emulator, KernelError, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

# Reverses each 32 elements and adds their sum.
RIGHT = """
  threadgroup float shared[32];
  uint lane = thread_index_in_simdgroup;
  uint i = thread_position_in_grid.x;
  shared[lane] = float(x[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = simd_sum(float(x[i]));
  y[i] = shared[31 - lane] + sum;
"""
X = mx.arange(64).astype(mx.float32)


def ran(source: str, *, header: str = "", seed: int = 0, traced: bool = True) -> np.ndarray:
    program = Program("probe", ("x",), ("y",), source, header)
    launch = Launch((64, 1, 1), (32, 1, 1), (((64,), mx.float32),))
    return np.array(Emulator(traced=traced, seed=seed).run(program, [X], launch)[0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_threads_of_a_simdgroup_exchange_values(seed: int) -> None:
    groups = np.array(X).reshape(2, 32)
    expected = groups[:, ::-1] + groups.sum(-1, keepdims=True)
    assert (ran(RIGHT, seed=seed) == expected.reshape(-1)).all()
    assert (ran(RIGHT, seed=seed, traced=False) == expected.reshape(-1)).all()


WRONG = {
    "no barrier": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "",
        "without a barrier|before it is written",
    ),
    "a barrier that orders nothing": ("mem_threadgroup)", "mem_none)", "without a barrier"),
    "past the end": ("y[i] =", "y[i + 16 * thread_position_in_grid.y + 40] =", "outside of every buffer"),
    "before the start": ("float(x[i]);\n  thr", "float(x[int(i) - 1]);\n  thr", "outside of every buffer"),
    "an array's end": ("shared[31 - lane]", "shared[32 - lane]", "outside of its array"),
    "never written": ("shared[lane] =", "if (lane != 7) shared[lane] =", "read before it is written"),
    "a row left out": ("y[i] =", "if (i != 17) y[i] =", "4 of 256 bytes of y are never written"),
    "a row written twice": ("y[i] =", "y[0] = 1.0f; y[i] =", "written twice"),
    "lanes apart": ("float sum = simd", "float sum = 0; if (lane < 8) sum = simd", "inactive lanes"),
    "not all at the barrier": ("threadgroup_b", "if (lane < 8) threadgroup_b", "inactive lanes"),
    "an output read": ("y[i] =", "y[i] = y[63 - i] +", "an output is read"),
    "overflow": ("uint lane =", "uint far = 3000000000u + x_far; uint lane = far * 0u +", "overflow"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_kernel_may_do_is_found_and_named(name: str) -> None:
    old, new, found = WRONG[name]
    assert old in RIGHT
    source = RIGHT.replace(old, new)
    header = "#define x_far uint(x[63]) * 1000000000u\n" if "x_far" in source else ""
    with pytest.raises(KernelError, match=found):
        ran(source, header=header)


REFUSED = {
    "a double": ("float(x[i]);\n  thr", "double(x[i]);\n  thr", ""),
    "no address space": ("uint lane", "const float* p = x; uint lane", ""),
    "another address space": ("uint lane", "const threadgroup float* p = x; uint lane", ""),
    "an input written": ("shared[lane] =", "x[i] = 0.0f; shared[lane] =", ""),
    "two types to max": ("shared[31 - lane]", "metal::max(shared[31 - lane], 0)", ""),
    "the standard library": ("shared[31 - lane]", "std::max(shared[31 - lane], 0.0f)", ""),
    "a function Metal lacks": ("shared[31 - lane]", "metal::expm1(shared[31 - lane])", ""),
    "uninitialised": ("uint lane", "float none; float sum = none + 1.0f; uint lane", ""),
    "recursion": ("uint lane", "f(3); uint lane", "inline float f(int n) { return n ? f(n - 1) : 0.0f; }\n"),
    "a global": ("uint lane", "shared[0] = table[0]; uint lane", "const float table[2] = {1.0f, 2.0f};\n"),
    "a cast of spaces": ("uint lane", "auto p = (const threadgroup float*)x; uint lane", ""),
    "memory in a helper": (
        "uint lane",
        "f(); uint lane",
        "inline void f() { threadgroup float t[2]; t[0] = 0; }\n",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_metal_is_refused(name: str) -> None:
    old, new, header = REFUSED[name]
    assert old in RIGHT
    with pytest.raises(KernelError) as refusal:
        ran(RIGHT.replace(old, new), header=header)
    assert refusal.value.stage in ("lint", "check")


def test_views_are_read_where_they_are_and_nothing_between_their_rows() -> None:
    program = Program(
        "rows",
        ("x",),
        ("y",),
        "uint3 t = thread_position_in_grid; y[t.y * 32 + t.x] = x[t.y * x_strides[0] + t.x + SHIFT];",
        "#define SHIFT 0\n",
        contiguous=False,
    )
    launch = Launch((32, 3, 1), (32, 1, 1), (((3, 32), mx.float32),))
    view = mx.arange(4 * 64).reshape(4, 64).astype(mx.float32)[:3, 5:37]
    assert (Emulator(traced=True).run(program, [view], launch)[0] == view).all().item()
    shifted = Program("shifted", ("x",), ("y",), program.source, "#define SHIFT 1\n", contiguous=False)
    with pytest.raises(KernelError, match="between the rows"):
        Emulator(traced=True).run(shifted, [view], launch)


def test_loads_are_counted_byte_by_byte() -> None:
    emulator = Emulator(traced=True)
    program = Program("probe", ("x",), ("y",), RIGHT)
    emulator.run(program, [X], Launch((32, 1, 1), (32, 1, 1), (((32,), mx.float32),)))
    loads = emulator.reports[0].loads["x"]
    assert set(loads[:128]) <= {1, 2} and not loads[128:].any()


# ---------------------------------------------------------------------- MLX's own kernels as a control

MLX_KERNELS = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"


def mlx_text(*names: str) -> str:
    lines = [line for n in names for line in (MLX_KERNELS / n).read_text(encoding="utf-8").splitlines()]
    return (
        "\n".join(x for x in lines if not x.startswith(("#include", "#pragma once")))
        .encode("ascii", "ignore")
        .decode()
        + "\n"
    )


@pytest.mark.parametrize("n", [5, 77])
def test_mlx_attention_with_sinks_runs_and_agrees_with_mlx(n: int) -> None:
    """Its text has barriers, threadgroup memory and both reductions; function constants choose sinks."""
    text = mlx_text("sdpa_vector.h")
    start = text.index("template <typename T, int D, int V = D, int TK")
    header = text[:start].replace("[[kernel]] void", "inline void")
    header = header.replace("threadgroup U outputs[BN * BD];", "threadgroup U* outputs = shared;")
    header = header.replace("threadgroup U max_scores[BN];", "threadgroup U* max_scores = shared + 1024;")
    header = header.replace(
        "threadgroup U sum_exp_scores[BN];", "threadgroup U* sum_exp_scores = shared + 1056;"
    )
    header = header.replace(
        "uint simd_lid [[thread_index_in_simdgroup]])", "uint simd_lid, threadgroup float* shared)"
    )
    source = """
      threadgroup float shared[1088];
      sdpa_vector<float, 64>(q, k, v, out, 8, N, size_t(N) * 64, 64, size_t(N) * 64, 64, 0.125f, nullptr,
        nullptr, 0, 0, 0, sinks, 64, threadgroup_position_in_grid, threadgroups_per_grid,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup, shared);
    """
    program = Program("mlx_sdpa", ("q", "k", "v", "sinks"), ("out",), source, header)
    q, sinks = mx.random.normal((1, 64, 1, 64), key=mx.random.key(n)), mx.random.normal((64,))
    k, v = (mx.random.normal((1, 8, n, 64), key=mx.random.key(n + i)) for i in (1, 2))
    launch = Launch((64 * 1024, 1, 1), (1024, 1, 1), (((1, 64, 1, 64), mx.float32),), (("N", n),))
    emulator = Emulator(traced=False, seed=3, checked=False)
    emulator.constants = {
        20: "false",
        21: "false",
        22: "false",
        23: "false",
        24: "false",
        25: "true",
        26: "1",
    }
    found = emulator.run(program, [q, k, v, sinks], launch)[0]
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, sinks=sinks)
    assert np.abs(np.array(found - expected)).max() < 2e-6


def test_mlx_product_of_an_mxfp4_matrix_runs_and_agrees_with_mlx() -> None:
    header = mlx_text("fp4.h", "fp8.h", "fp_quantized.h")
    header = header.replace("static_cast<bfloat16_t>(this", "static_cast<bfloat16_t>((float)this")
    header = header[: header.index("template <", header.index("METAL_FUNC void fp_qmv_impl"))]
    rows, columns = 40, 2880
    source = """
      fp_qmv_impl<T, 32, 4, false>(w, s, nullptr, x, y, COLUMNS, ROWS, threadgroup_position_in_grid,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """
    program = Program("mlx_qmv", ("w", "s", "x"), ("y",), source, header)
    w, s, *_ = mx.quantize(
        mx.random.normal((rows, columns), key=mx.random.key(0)), mode="mxfp4", group_size=32, bits=4
    )
    x = mx.random.normal((1, columns), key=mx.random.key(1))
    launch = Launch(
        (32, 2 * rows // 8, 1),
        (32, 2, 1),
        (((1, rows), mx.float32),),
        (("T", mx.float32), ("ROWS", rows), ("COLUMNS", columns)),
    )
    emulator = Emulator(traced=False, seed=4, checked=False)
    emulator.constants = {200: "true", 201: "true", 202: "true"}
    found = emulator.run(program, [w, s, x], launch)[0]
    expected = mx.quantized_matmul(x, w, s, transpose=True, group_size=32, bits=4, mode="mxfp4")
    assert np.abs(np.array(found - expected)).max() < 2e-5 * np.abs(np.array(expected)).max()
