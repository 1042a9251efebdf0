"""Random gpt-oss checkpoints of any size in every layout, written tensor by tensor.

    python -m tests.support.checkpoints --shape 20b --out DIR [--layers 4] [--layout hf|original|bf16|mlx]

The values come from tests/random_weights.py: the four layouts of one seed hold the same ones, and nothing
larger than one chunk (a few tens of MB) is ever in memory.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.random_weights import (
    SHAPES,
    MlxRecipe,
    Shape,
    Source,
    affine_parts,
    dense_bits_of,
    from_bf16,
    mxfp4_values,
    pack,
    to_bf16,
)


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: `chunks()` yields its bytes in order, as arrays of any shape."""

    name: str
    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * {"BF16": 2, "U8": 1, "U32": 4}[self.dtype]


# ------------------------------------------------------------------------------------------ layouts


def hf_tensors(source: Source) -> Iterator[Tensor]:
    """OpenAI's Hugging Face layout: MXFP4 experts, everything else bfloat16."""
    yield from _plain(
        source, lambda i, which: _mxfp4_pair(source, i, which, f"model.layers.{i}.mlp.experts.{which}_")
    )


def bf16_tensors(source: Source) -> Iterator[Tensor]:
    """What transformers saves after fine-tuning: experts unquantised and transposed, [E, in, out]."""

    def experts(i: int, which: str) -> Iterator[Tensor]:
        rows, columns, _ = source.expert_specs[which]
        count = source.shape.experts

        def chunks() -> Iterator[np.ndarray]:
            return (to_bf16(mxfp4_values(*source.expert(i, which, e)).T) for e in range(count))

        yield Tensor(f"model.layers.{i}.mlp.experts.{which}", "BF16", (count, columns, rows), chunks)

    yield from _plain(source, experts)


def streaming_tensors(source: Source) -> Iterator[Tensor]:
    """Hugging Face's layout with all that an expert has side by side: blocks, then scales, then padding."""

    def experts(i: int, which: str) -> Iterator[Tensor]:
        if which == "gate_up_proj":
            name = f"model.layers.{i}.mlp.experts.records"
            yield Tensor(name, "U8", (source.shape.experts, size), records(i))

    def records(i: int) -> Callable[[], Iterable[np.ndarray]]:
        return lambda: (record(i, e) for e in range(source.shape.experts))

    def record(i: int, e: int) -> np.ndarray:
        parts = [source.expert(i, which, e) for which in ("gate_up_proj", "down_proj")]
        joined = np.concatenate([parts[m][kind].reshape(-1) for kind in (0, 1) for m in (0, 1)])
        return np.concatenate([joined, np.zeros(size - len(joined), np.uint8)])

    values = 3 * source.shape.intermediate * source.shape.hidden
    size = -(-values * 17 // 32 // 16384) * 16384
    yield from _plain(source, experts)


def original_tensors(source: Source) -> Iterator[Tensor]:
    """OpenAI's `original/` layout: q, k and v in one matrix, other names."""
    yield _dense(source, "embedding.weight", "model.embed_tokens.weight")
    for i in range(source.shape.layers):
        new, old = f"block.{i}.", f"model.layers.{i}."
        yield _dense(source, new + "attn.norm.scale", old + "input_layernorm.weight")
        for part in ("weight", "bias"):
            yield _dense(
                source, new + f"attn.qkv.{part}", *(old + f"self_attn.{x}_proj.{part}" for x in "qkv")
            )
            yield _dense(source, new + f"attn.out.{part}", old + f"self_attn.o_proj.{part}")
        yield _dense(source, new + "attn.sinks", old + "self_attn.sinks")
        yield _dense(source, new + "mlp.norm.scale", old + "post_attention_layernorm.weight")
        for part in ("weight", "bias"):
            yield _dense(source, new + f"mlp.gate.{part}", old + f"mlp.router.{part}")
        for name, which in (("mlp1", "gate_up_proj"), ("mlp2", "down_proj")):
            yield from _mxfp4_pair(source, i, which, new + f"mlp.{name}_weight.")
            yield _dense(source, new + f"mlp.{name}_bias", old + f"mlp.experts.{which}_bias")
    yield _dense(source, "norm.scale", "model.norm.weight")
    yield _dense(source, "unembedding.weight", "lm_head.weight")


def mlx_tensors(source: Source, recipe: MlxRecipe) -> Iterator[Tensor]:
    """An mlx-lm conversion: gate and up split, `.weight` words with `.scales` (and `.biases` when affine)."""
    for tensor in _plain(source, lambda i, which: _mlx_experts(source, recipe, i, which)):
        bits = dense_bits_of(tensor.name, recipe)
        if tensor.name.endswith("gate_up_proj_bias"):
            base = tensor.name.removesuffix("gate_up_proj_bias")
            shape = (source.shape.experts, source.shape.intermediate)
            for parity, name in enumerate(("gate_proj", "up_proj")):
                yield Tensor(base + name + ".bias", "BF16", shape, _strided(tensor, parity))
        elif tensor.name.endswith("down_proj_bias"):
            yield replace(tensor, name=tensor.name.removesuffix("_bias") + ".bias")
        elif bits is None:
            yield tensor
        else:
            matrices = _once(tensor)
            yield from _affine(
                tensor.name.removesuffix(".weight"), tensor.shape, matrices, bits, recipe.group
            )


def _plain(source: Source, experts: Callable[[int, str], Iterable[Tensor]]) -> Iterator[Tensor]:
    """Hugging Face's order and names; `experts(layer, which)` gives the tensors of an expert matrix."""
    yield _dense(source, "model.embed_tokens.weight", "model.embed_tokens.weight")
    for i in range(source.shape.layers):
        for name in source.layer_specs:
            full = f"model.layers.{i}.{name}"
            yield _dense(source, full, full)
        for which in source.expert_specs:
            yield from experts(i, which)
    for name in ("model.norm.weight", "lm_head.weight"):
        yield _dense(source, name, name)


def _dense(source: Source, name: str, *parts: str) -> Tensor:
    shapes = [source.spec(p)[0] for p in parts]
    shape = (sum(s[0] for s in shapes), *shapes[0][1:])
    return Tensor(name, "BF16", shape, lambda: (chunk for p in parts for chunk in source.dense(p)))


def _mxfp4_pair(source: Source, layer: int, which: str, prefix: str) -> Iterator[Tensor]:
    rows, columns, _ = source.expert_specs[which]
    count = source.shape.experts

    def part(index: int) -> Callable[[], Iterable[np.ndarray]]:
        return lambda: (source.expert(layer, which, e)[index] for e in range(count))

    yield Tensor(prefix + "blocks", "U8", (count, rows, columns // 32, 16), part(0))
    yield Tensor(prefix + "scales", "U8", (count, rows, columns // 32), part(1))


def _mlx_experts(source: Source, recipe: MlxRecipe, layer: int, which: str) -> Iterator[Tensor]:
    rows, columns, _ = source.expert_specs[which]
    count, base = source.shape.experts, f"model.layers.{layer}.mlp.experts."
    halves = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    for name, take in halves.items() if which == "gate_up_proj" else {"down_proj": slice(None)}.items():
        height = len(range(rows)[take])
        if recipe.expert_bits is None:

            def part(index: int, take: slice = take) -> Callable[[], Iterable[np.ndarray]]:
                return lambda: (source.expert(layer, which, e)[index][take] for e in range(count))

            yield Tensor(base + name + ".weight", "U32", (count, height, columns // 8), part(0))
            yield Tensor(base + name + ".scales", "U8", (count, height, columns // 32), part(1))
        else:

            def values(take: slice = take) -> Iterable[np.ndarray]:
                return (mxfp4_values(*source.expert(layer, which, e))[take] for e in range(count))

            yield from _affine(
                base + name, (count, height, columns), values, recipe.expert_bits, recipe.group
            )


def _affine(
    path: str, shape: tuple[int, ...], values: Callable[[], Iterable[np.ndarray]], bits: int, group: int
) -> Iterator[Tensor]:
    def part(index: int) -> Callable[[], Iterable[np.ndarray]]:
        return lambda: (affine_parts(v, bits, group)[index] for v in values())

    columns = shape[-1]
    words = (*shape[:-1], columns * bits // 32)
    yield Tensor(path + ".weight", "U32", words, lambda: (pack(codes, bits) for codes in part(0)()))
    yield Tensor(path + ".scales", "BF16", (*shape[:-1], columns // group), part(1))
    yield Tensor(path + ".biases", "BF16", (*shape[:-1], columns // group), part(2))


def _once(tensor: Tensor) -> Callable[[], Iterable[np.ndarray]]:
    return lambda: (from_bf16(chunk) for chunk in tensor.chunks())


def _strided(tensor: Tensor, parity: int) -> Callable[[], Iterable[np.ndarray]]:
    return lambda: (chunk[..., parity::2] for chunk in tensor.chunks())


# ------------------------------------------------------------------------------------------ configs


def hf_config(shape: Shape, *, quantized: bool = True, rope_parameters: bool = False) -> dict[str, Any]:
    """config.json with Hugging Face's keys, in the older or (rope_parameters) transformers 5's spelling."""
    s = shape
    yarn: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": s.rope_factor,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": s.initial_context,
        "truncate": s.truncate,
    }
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "num_hidden_layers": s.layers,
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_local_experts": s.experts,
        "num_experts_per_tok": s.top_k,
        "experts_per_token": s.top_k,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "sliding_window": s.window,
        "layer_types": s.layer_types,
        "vocab_size": s.vocab,
        "rms_norm_eps": 1e-5,
        "swiglu_limit": s.swiglu_limit,
        "tie_word_embeddings": False,
        "use_cache": True,
        "initial_context_length": s.initial_context,
        "initializer_range": 0.02,
        "max_position_embeddings": round(s.initial_context * s.rope_factor),
        "router_aux_loss_coef": 0.9,
        "output_router_logits": False,
        "eos_token_id": min(200002, s.vocab - 1),
        "pad_token_id": min(199999, s.vocab - 1),
    }
    if rope_parameters:
        config["rope_parameters"] = yarn | {"rope_theta": s.rope_theta}
    else:
        config |= {"rope_scaling": yarn, "rope_theta": s.rope_theta}
    if quantized:
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    else:
        config["dtype"] = "bfloat16"
    return config


def original_config(shape: Shape) -> dict[str, Any]:
    """`original/config.json`: OpenAI's own keys; it cannot say `truncate`."""
    s = shape
    return {
        "num_hidden_layers": s.layers,
        "num_experts": s.experts,
        "experts_per_token": s.top_k,
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "swiglu_limit": s.swiglu_limit,
        "head_dim": s.head_dim,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "sliding_window": s.window,
        "rope_theta": s.rope_theta,
        "initial_context_length": s.initial_context,
        "rope_scaling_factor": s.rope_factor,
        "rope_ntk_alpha": 1.0,
        "rope_ntk_beta": 32.0,
    }


def mlx_config(shape: Shape, recipe: MlxRecipe) -> dict[str, Any]:
    """An mlx-lm conversion's config.json: a default quantization, and what differs from it by path."""
    mxfp4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    config = hf_config(shape, quantized=False)
    if recipe.dense_bits is None:
        config["quantization"] = dict(mxfp4)
    else:
        config["quantization"] = {"group_size": recipe.group, "bits": recipe.dense_bits, "mode": "affine"}
    by_path: dict[str, Any] = config["quantization"]
    for i in range(shape.layers):
        mlp = f"model.layers.{i}.mlp."
        for name in ("gate_proj", "up_proj", "down_proj"):
            bits = recipe.expert_bits
            affine = {"group_size": recipe.group, "bits": bits}
            by_path[f"{mlp}experts.{name}"] = dict(mxfp4) if bits is None else affine
        if recipe.dense_bits is not None:
            by_path[mlp + "router"] = {"group_size": recipe.group, "bits": 8}
    config["quantization_config"] = config["quantization"]
    return config


# ------------------------------------------------------------------------------------------- writing


def write_safetensors(path: Path, tensors: list[Tensor], metadata: dict[str, str] | None = None) -> None:
    """Header first, then each tensor's chunks as they are made."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for t in tensors:
        header[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for t in tensors:
            before = file.tell()
            for chunk in t.chunks():
                file.write(np.ascontiguousarray(chunk).data)
            assert file.tell() - before == t.nbytes, t.name


def write_checkpoint(
    folder: str | Path,
    shape: Shape | None = None,
    *,
    seed: int = 0,
    layout: str = "hf",
    recipe: MlxRecipe | None = None,
    shards: int | None = None,
    rope_parameters: bool = False,
) -> Path:
    """Write a checkpoint of `layout` (hf, original, bf16, mlx or streaming) into `folder`; return the folder.

    `shards` defaults to OpenAI's three for "hf" and one file otherwise.
    """
    folder, shape, recipe = Path(folder), shape or Shape(), recipe or MlxRecipe()
    source = Source(shape, seed)
    if layout == "original" and shape.truncate:
        raise ValueError("the original layout cannot say truncate: true")
    tensors, config = {
        "hf": lambda: (hf_tensors(source), hf_config(shape, rope_parameters=rope_parameters)),
        "bf16": lambda: (
            bf16_tensors(source),
            hf_config(shape, quantized=False, rope_parameters=rope_parameters),
        ),
        "original": lambda: (original_tensors(source), original_config(shape)),
        "streaming": lambda: (streaming_tensors(source), hf_config(shape, rope_parameters=rope_parameters)),
        "mlx": lambda: (mlx_tensors(source, recipe), mlx_config(shape, recipe)),
    }[layout]()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if layout != "original":
        stops = [200002, 199999, 200012] if shape.vocab > 200012 else [shape.vocab - 1]
        (folder / "generation_config.json").write_text(
            json.dumps({"do_sample": True, "eos_token_id": stops}) + "\n"
        )
    _write_shards(folder, list(tensors), shards or (3 if layout == "hf" else 1), layout)
    return folder


def _write_shards(folder: Path, tensors: list[Tensor], shards: int, layout: str) -> None:
    metadata = {"format": "mlx" if layout == "mlx" else "pt"}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, metadata)
        return
    total, done = sum(t.nbytes for t in tensors), 0
    parts: list[list[Tensor]] = [[] for _ in range(shards)]
    for t in tensors:
        parts[(2 * done + t.nbytes) * shards // (2 * total)].append(t)  # by where its middle falls
        done += t.nbytes
    # OpenAI counts its shards from 0 and names the last index as if it were the number of files.
    first, last = (0, shards - 1) if layout == "hf" else (1, shards)
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        name = f"model-{i + first:05d}-of-{last:05d}.safetensors"
        write_safetensors(folder / name, part, metadata)
        weight_map |= {t.name: name for t in part}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="20b")
    parser.add_argument("--layout", choices=["hf", "original", "bf16", "mlx", "streaming"], default="hf")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int)
    parser.add_argument(
        "--dense-bits", type=int, choices=[4, 8], help="mlx layout: affine bits (default: bfloat16)"
    )
    parser.add_argument(
        "--expert-bits", type=int, choices=[4, 8], help="mlx layout: affine bits (default: MXFP4)"
    )
    args = parser.parse_args()
    changes = {n: getattr(args, n) for n in ("layers", "experts", "vocab") if getattr(args, n) is not None}
    write_checkpoint(
        args.out,
        replace(SHAPES[args.shape], **changes),
        seed=args.seed,
        layout=args.layout,
        shards=args.shards,
        recipe=MlxRecipe(args.dense_bits, args.expert_bits),
    )
    print(f"{args.out}: {sum(f.stat().st_size for f in args.out.glob('*.safetensors')):,} bytes")


if __name__ == "__main__":
    main()
