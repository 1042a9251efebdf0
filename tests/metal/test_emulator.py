"""The emulator itself: it sees what no kernel may do, and runs MLX's own kernels right."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.model.kernels.kernel import Launch, Program
from tests.metal.emulator import Emulator, KernelError, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

# Reverses each 32 elements and adds their sum. `wrong` chooses what it does that no kernel may.
RIGHT = """
  threadgroup float shared[32];
  uint lane = thread_index_in_simdgroup;
  uint i = thread_position_in_grid.x;
  uint w = wrong;
  if (w != 1 || lane != 7) {
    shared[lane] = float(x[w == 2 ? i - 32 * (i / 32) + 64 : i]);
  }
  if (w == 3) {
    threadgroup_barrier(mem_flags::mem_none);
  } else if (w != 4 && (w != 5 || lane < 8)) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  float sum = 0.0f;
  if (w != 6 || lane < 8) {
    sum = simd_sum(float(x[w == 7 ? i + 3000000000u * (w - 5u) : i]));
  }
  float other = shared[w == 8 ? 32 - lane : 31 - lane];
  if (w == 9) {
    other = y[63 - i];
  }
  if (w == 10) {
    y[0] = other;
  }
  if (w != 11 || i != 17) {
    y[w == 12 ? i + 8 : i] = other + sum;
  }
  if (w == 13) {
    shared[lane] = other;
  }
  if (w == 14) {
    y[i + 64] = other;
  }
"""
FOUND = {
    1: "threadgroup memory is read before it is written",
    2: "outside of every buffer",
    3: "without a barrier|before it is written",
    4: "without a barrier|before it is written",
    5: "inactive lanes",
    6: "inactive lanes",
    7: "an overflow",
    8: "an index outside of its array",
    9: "an output is read",
    10: "written twice",
    11: "4 of 256 bytes of y are never written",
    12: "outside of every buffer",
    13: "while another thread may still read it|without a barrier",
    14: "outside of every buffer",
}
X = mx.arange(64).astype(mx.float32)


def ran(
    source: str = RIGHT, *, header: str = "", wrong: int = 0, seed: int = 0, traced: bool = True
) -> np.ndarray:
    program = Program("probe", ("x", "wrong"), ("y",), source, header)
    launch = Launch((64, 1, 1), (32, 1, 1), (((64,), mx.float32),))
    inputs = [X, mx.array(wrong, mx.uint32)]
    return np.array(Emulator(traced=traced, seed=seed).run(program, inputs, launch)[0])


@pytest.mark.parametrize("traced", [True, False])
def test_threads_of_a_simdgroup_exchange_values(traced: bool) -> None:
    groups = np.array(X).reshape(2, 32)
    expected = groups[:, ::-1] + groups.sum(-1, keepdims=True)
    for seed in range(5):
        assert (ran(seed=seed, traced=traced) == expected.reshape(-1)).all()


@pytest.mark.parametrize("wrong", FOUND)
def test_what_no_kernel_may_do_is_found_and_named(wrong: int) -> None:
    for seed in (0, 1):
        with pytest.raises(KernelError, match=FOUND[wrong]):
            ran(wrong=wrong, seed=seed)


def test_pages_around_buffers_end_a_kernel_that_is_not_traced() -> None:
    with pytest.raises(KernelError, match="a page is touched that lies outside of every buffer"):
        ran(wrong=14, traced=False)


REFUSED = {
    "a double": ("uint lane", "double d = 1.0; uint lane", ""),
    "no address space": ("uint lane", "const float* p = x; uint lane", ""),
    "another address space": ("uint lane", "const threadgroup float* p = x; uint lane", ""),
    "an input written": ("shared[lane] =", "x[0] = 0.0f; shared[lane] =", ""),
    "two types to max": ("= other + sum", "= metal::max(other, 0)", ""),
    "the standard library": ("= other + sum", "= std::max(other, 0.0f)", ""),
    "a function Metal lacks": ("= other + sum", "= metal::expm1(other)", ""),
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
    source = "uint i = thread_position_in_grid.x; y[i] = x[i] + x[5];"
    program = Program("counted", ("x",), ("y",), source)
    emulator.run(program, [X], Launch((32, 1, 1), (32, 1, 1), (((32,), mx.float32),)))
    loads = emulator.reports[0].loads["x"].reshape(64, 4)
    assert loads[5].tolist() == [33] * 4 and (loads[[0, 4, 31]] == 1).all() and not loads[32:].any()


# ---------------------------------------------------------------------- MLX's own kernels as a control

# The tests below name pieces of its text.
MLX_READ = "0.32.4"
control = pytest.mark.skipif(version("mlx") != MLX_READ, reason=f"reads the kernels of MLX {MLX_READ}")
MLX_KERNELS = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"


def mlx_text(*names: str) -> str:
    lines = [line for n in names for line in (MLX_KERNELS / n).read_text(encoding="utf-8").splitlines()]
    return (
        "\n".join(x for x in lines if not x.startswith(("#include", "#pragma once")))
        .encode("ascii", "ignore")
        .decode()
        + "\n"
    )


@control
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


@control
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
