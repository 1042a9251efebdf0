"""The demo model's answers: what is as it was passes, and whatever was tampered with is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss import device
from mlx_gptoss.checkpoint import hub, reader
from mlx_gptoss.checkpoint.reader import load_model
from mlx_gptoss.doctor import Finding, answers, walk
from mlx_gptoss.doctor.answers import Answer, Answers, tolerance
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.llm import load
from mlx_gptoss.model import graph
from mlx_gptoss.model.cache import SlidingCache
from mlx_gptoss.model.experts import ExpertWeights
from mlx_gptoss.model.graph import Attention
from tests.support.checkpoints import write_checkpoint


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


@cache
def computed() -> Answers:
    """This machine's answers."""
    return answers.compute([answer.prompt for answer in answers.stored().replies])


def walked(folder: Path = hub.DEMO_FOLDER) -> walk.Operations:
    answer = answers.stored().replies[answers.WALKED]
    return walk.operations(load_model(folder, "float32"), answer.prompt + answer.reply)


def first(now: walk.Operations) -> str | None:
    """The first operation that is not as stored."""
    found = walk.first_difference(answers.stored().operations, now, tolerance())
    return None if found is None else found.operation


def edited(folder: Path, name: str, change: Callable[[mx.array], mx.array]) -> Path:
    """A copy of the demo model with one tensor changed."""
    copy = shutil.copytree(hub.DEMO_FOLDER, folder / "demo")
    weights = str(copy / "model.safetensors")
    tensors, metadata = cast(
        tuple[dict[str, mx.array], dict[str, str]], mx.load(weights, return_metadata=True)
    )
    tensors[name] = change(tensors[name])
    mx.eval(tensors)
    mx.save_safetensors(weights, tensors, metadata)
    return copy


# ------------------------------------------------------------------------------------- what is right


def test_the_demo_model_answers_as_stored() -> None:
    found = by_name(list(answers.judge(computed(), {"stored": answers.stored()}, tolerance())))
    assert set(found) == {"weights", "greedy replies", "logits", "operations"}
    assert {finding.verdict for finding in found.values()} == {"ok"}
    assert found["operations"].detail == "all 110 as stored"


def test_the_stored_answers_are_long_enough_to_tell() -> None:
    kept = answers.stored()
    assert len(kept.replies) == len(answers.PROMPTS) == len({tuple(a.reply) for a in kept.replies})
    assert all(len(answer.logits) > 5 for answer in kept.replies)
    config = load_model(hub.DEMO_FOLDER, "float32").config
    walk_through = kept.replies[answers.WALKED]
    assert len(walk_through.prompt + walk_through.reply) - 1 > config.sliding_window


def test_no_router_decides_the_walk_by_a_hair(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's rounding could choose another expert there, and everything after it would differ."""
    scores: list[np.ndarray] = []
    real = mx.argpartition

    def argpartition(x: mx.array, **rest: Any) -> mx.array:
        scores.append(np.sort(np.asarray(x), axis=-1))
        return real(x, **rest)

    monkeypatch.setattr(mx, "argpartition", argpartition)
    walked()
    k = load_model(hub.DEMO_FOLDER, "float32").config.experts_per_token
    margins = [(s[:, -k] - s[:, -k - 1]).min() / np.sqrt((s**2).mean()) for s in scores]
    assert len(margins) == 8 and min(margins) > 1e-3


def test_a_cpu_process_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PATIENCE", 3600.0)  # however busy the machine is
    there, here = answers.on_cpu(), computed()
    found = answers.judge(here, {"stored": answers.stored(), "on the CPU": there}, tolerance())
    assert {finding.name: finding.verdict for finding in found} == dict.fromkeys(
        ("weights", "greedy replies", "logits", "operations"), "ok"
    )


def test_the_order_in_which_a_gpu_takes_experts_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's pairs sorted by expert, a decoded token's as they come, in layers that would be replayed."""
    for module in (reader, graph):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    sorted_pairs: list[int] = []
    real = mx.argsort

    def argsort(x: mx.array) -> mx.array:
        sorted_pairs.append(x.size)
        return real(x)

    monkeypatch.setattr(mx, "argsort", argsort)
    assert first(walked()) is None
    assert len(sorted_pairs) == 8 and min(sorted_pairs) > 100  # in the prompt, there and back in each layer


def test_every_part_of_a_random_model_is_heard_in_both_ways_of_its_experts(tmp_path: Path) -> None:
    model = load_model(write_checkpoint(tmp_path), "float32")
    layers = model.config.num_layers
    names = list(walk.operations(model, list(range(40))))
    assert len(names) == 2 * (3 + 13 * layers)
    assert names[0] == "embedding (prompt)" and names[-1] == "head (decode)"
    assert f"layer {layers - 1}: bias and SwiGLU (decode)" in names


# ------------------------------------------------------------------------------ what was tampered with


def wrong_reply(kept: Answers) -> Answers:
    one, *others = kept.replies
    return replace(kept, replies=[replace(one, reply=[*one.reply[:-2], 5, one.reply[-1]]), *others])


def wrong_logits(kept: Answers) -> Answers:
    one, *others = kept.replies
    return replace(kept, replies=[replace(one, logits=[one.logits[0] + 0.1, *one.logits[1:]]), *others])


def wrong_vector(kept: Answers) -> Answers:
    name = "layer 2: attention (prompt)"
    vector = [*kept.operations[name][:-1], kept.operations[name][-1] + 0.1]
    return replace(kept, operations=kept.operations | {name: vector})


def wrong_checksum(kept: Answers) -> Answers:
    return replace(kept, weights=kept.weights | {"lm_head.weight": 1})


@pytest.mark.parametrize(
    ("tamper", "name", "told"),
    [
        (wrong_reply, "greedy replies", "5 of 6"),
        (wrong_logits, "logits", "0.1 from those stored"),
        (wrong_vector, "operations", "layer 2: attention (prompt) alone is not as stored"),
        (wrong_checksum, "weights", "lm_head.weight"),
    ],
)
def test_a_stored_value_that_was_changed_is_found_and_named(
    tamper: Callable[[Answers], Answers], name: str, told: str
) -> None:
    found = list(answers.judge(computed(), {"stored": tamper(answers.stored())}, tolerance()))
    (failed,) = (finding for finding in found if finding.verdict == "failed")
    assert failed.name == name and told in failed.detail


def test_values_that_are_no_numbers_never_pass() -> None:
    kept = answers.stored()
    one, *others = kept.replies
    nan = replace(kept, replies=[replace(one, logits=[float("nan")] * len(one.logits)), *others])
    nan = replace(nan, operations=kept.operations | {"final norm (decode)": [float("nan")] * 5})
    found = by_name(list(answers.judge(nan, {"stored": kept}, tolerance())))
    assert found["logits"].verdict == found["operations"].verdict == "failed"
    assert "final norm (decode)" in found["operations"].detail


def test_without_a_reply_as_stored_no_logits_pass() -> None:
    kept = answers.stored()
    others = replace(kept, replies=[replace(answer, reply=[1]) for answer in kept.replies])
    found = by_name(list(answers.judge(others, {"stored": kept}, tolerance())))
    assert found["greedy replies"].verdict == found["logits"].verdict == "failed"
    assert found["greedy replies"].detail == "0 of 6 as stored"


def test_what_is_just_allowed_is_no_difference() -> None:
    kept = answers.stored().operations
    assert walk.first_difference(kept, kept, 0.0) is None
    found = walk.first_difference(kept, kept | {"embedding (prompt)": [9.0] * 5}, 0.0)
    assert found is not None and found.operation == "embedding (prompt)"


def test_an_operation_that_is_missing_is_named() -> None:
    kept = answers.stored().operations
    without = {name: values for name, values in kept.items() if name != "layer 1: router (prompt)"}
    for was, now in ((kept, without), (without, kept)):
        found = walk.first_difference(was, now, tolerance())
        assert found is not None and found.operation == "layer 1: router (prompt)"


LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("tensor", "operation"),
    [
        ("model.embed_tokens.weight", "embedding"),
        (f"{LAYER}input_layernorm.weight", "layer 1: norm"),
        (f"{LAYER}self_attn.k_proj.weight", "layer 1: q|k|v"),
        (f"{LAYER}self_attn.v_proj.bias", "layer 1: bias and RoPE"),
        (f"{LAYER}self_attn.sinks", "layer 1: attention"),
        (f"{LAYER}self_attn.o_proj.weight", "layer 1: projection"),
        (f"{LAYER}self_attn.o_proj.bias", "layer 1: bias and residual"),
        (f"{LAYER}post_attention_layernorm.weight", "layer 1: norm of the experts"),
        (f"{LAYER}mlp.router.weight", "layer 1: router"),
        (f"{LAYER}mlp.experts.gate_up_proj_blocks", "layer 1: gate_up"),
        (f"{LAYER}mlp.experts.gate_up_proj_bias", "layer 1: bias and SwiGLU"),
        (f"{LAYER}mlp.experts.down_proj_blocks", "layer 1: down"),
        (f"{LAYER}mlp.experts.down_proj_bias", "layer 1: bias and sum of experts"),
        ("model.norm.weight", "final norm"),
        ("lm_head.weight", "head"),
    ],
)
def test_a_weight_that_was_changed_is_found_by_the_operation_that_reads_it(
    tmp_path: Path, tensor: str, operation: str
) -> None:
    def change(x: mx.array) -> mx.array:
        return (x ^ 0x11).astype(x.dtype) if x.dtype == mx.uint8 else x * 1.5

    assert first(walked(edited(tmp_path, tensor, change))) == f"{operation} (prompt)"


def test_one_number_of_one_weight_is_named_by_its_tensor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensor = f"{LAYER}mlp.experts.down_proj_scales"
    folder = edited(tmp_path, tensor, lambda x: mx.concatenate([x[:-1], x[-1:] + 1]).astype(x.dtype))
    changed = replace(computed(), weights=answers.checksums(folder))
    found = by_name(list(answers.judge(changed, {"stored": answers.stored()}, tolerance())))
    assert found["weights"].verdict == "failed" and tensor in found["weights"].detail


def wrong(function: Callable[..., Any], when: Callable[..., bool] = lambda *a: True) -> Any:
    """The same function, its result half as much again where `when` holds of its arguments."""

    def call(*args: Any, **rest: Any) -> Any:
        result = function(*args, **rest)
        return result * 1.5 if when(*args) else result

    return call


@pytest.mark.parametrize(
    ("owner", "name", "when", "operation"),
    [
        (mx.fast, "rms_norm", lambda *a: True, "layer 0: norm (prompt)"),
        (mx.fast, "rope", lambda *a: True, "layer 0: bias and RoPE (prompt)"),
        (mx.fast, "scaled_dot_product_attention", lambda *a: True, "layer 0: attention (prompt)"),
        (mx, "addmm", lambda *a: a[1].shape[-1] == 2, "layer 0: bias and sum of experts (prompt)"),
        (ExpertWeights, "activate", lambda *a: True, "layer 0: bias and SwiGLU (prompt)"),
        (SlidingCache, "attend", lambda *a: a[1].shape[2] == 1, "layer 0: attention (decode)"),
        (Attention, "add", lambda *a: a[0].index == 3, "layer 3: bias and residual (prompt)"),
    ],
)
def test_an_operation_that_is_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool], operation: str
) -> None:
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name), when))
    assert first(walked()) == operation


def test_a_wrong_choice_of_experts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mx.argpartition
    monkeypatch.setattr(mx, "argpartition", lambda x, **rest: real(-x, **rest))
    assert first(walked()) == "layer 0: top experts (prompt)"


def test_replies_that_differ_though_each_operation_is_right_point_to_what_joins_them() -> None:
    found = by_name(list(answers.judge(wrong_reply(computed()), {"stored": answers.stored()}, tolerance())))
    assert found["operations"].verdict == "ok" and "compiled or scheduled" in found["operations"].detail


def test_bfloat16_is_held_to_the_float32_that_is_stored() -> None:
    kept = answers.stored()
    shortest = min(kept.replies, key=lambda answer: len(answer.prompt + answer.reply))
    short = replace(shortest, reply=shortest.reply[:4], logits=computed_logits(shortest, 4))
    told = answers.in_bfloat16(replace(kept, replies=[short]))
    assert told.verdict == "ok" and told.detail.endswith("4 of 4 tokens")
    wrong = replace(short, logits=[x + 1 for x in short.logits])
    assert answers.in_bfloat16(replace(kept, replies=[wrong])).verdict == "failed"


def computed_logits(answer: Answer, tokens: int) -> list[float]:
    with load("demo", dtype="float32") as llm:
        rows = llm.logits(answer.prompt + answer.reply[:tokens])
    return [float(x) for x in rows[-1, :: answers.STRIDE]]


# --------------------------------------------------------------------------------- what does not run


def test_a_model_that_does_not_load_is_one_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "DEMO_FOLDER", tmp_path / "gone")
    (found,) = answers.findings()
    assert found.verdict == "failed" and "\n" not in found.detail


def test_on_a_gpu_the_cpu_backend_is_asked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    there = wrong_vector(computed())
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(answers, "compute", lambda prompts: there)
    monkeypatch.setattr(answers, "on_cpu", lambda: there)
    monkeypatch.setattr(answers, "in_bfloat16", lambda known: Finding("demo model", "bfloat16", "ok", ""))
    told = by_name(list(answers.findings()))["operations"]
    assert told.verdict == "failed" and told.detail.endswith("; all 110 as on the CPU")
    assert "layer 2: attention (prompt) alone is not as stored" in told.detail


def test_a_cpu_backend_that_dies_is_told_and_the_stored_answers_still_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die() -> Answers:
        raise GptOssError("gave no answers: killed")

    here = computed()
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(answers, "compute", lambda prompts: here)
    monkeypatch.setattr(answers, "on_cpu", die)
    monkeypatch.setattr(answers, "in_bfloat16", lambda known: Finding("demo model", "bfloat16", "ok", ""))
    found = by_name(list(answers.findings()))
    assert found["CPU backend"].verdict == "failed" and found["operations"].verdict == "ok"


def test_the_reference_process_says_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = subprocess.CompletedProcess([], 1, "", "Traceback\n  line 1\nValueError: no good")
    monkeypatch.setattr(subprocess, "run", lambda *a, **b: failing)
    with pytest.raises(GptOssError, match="ValueError: no good"):
        answers.on_cpu()

    def slow(*args: Any, **rest: Any) -> None:
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(GptOssError, match="120 s"):
        answers.on_cpu()


def test_answers_come_back_from_their_json() -> None:
    kept = answers.stored()
    again = json.loads(kept.as_json())
    assert Answer(**again["replies"][0]) == kept.replies[0] and again["operations"] == kept.operations
