"""The random checkpoints of tests/checkpoints.py as GGUF files, laid out as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from tests.support.random_weights import Shape, Source

_DENSE = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
}
Q8 = GGMLQuantizationType.Q8_0
MXFP4 = GGMLQuantizationType.MXFP4


def write_gguf(path: Path, shape: Shape, *, seed: int = 0, q8: bool = False) -> Path:
    """Write the checkpoint of this seed; matrices outside the experts as F32, or Q8_0 as published."""
    source, s = Source(shape, seed), shape
    writer = GGUFWriter(path, "gpt-oss")
    writer.add_block_count(s.layers)
    writer.add_embedding_length(s.hidden)
    writer.add_context_length(round(s.initial_context * s.rope_factor))
    writer.add_expert_feed_forward_length(s.intermediate)
    writer.add_expert_count(s.experts)
    writer.add_expert_used_count(s.top_k)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(s.window)
    writer.add_rope_freq_base(s.rope_theta)
    writer.add_rope_scaling_factor(s.rope_factor)
    writer.add_rope_scaling_orig_ctx_len(s.initial_context)

    def dense(name: str, values: np.ndarray) -> None:
        matrix = values.ndim == 2 and name.endswith(".weight") and not name.startswith("blk.0.ffn")
        if q8 and matrix:
            writer.add_tensor(name, quantize(values, Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))

    dense("token_embd.weight", source.array("model.embed_tokens.weight"))
    for i in range(s.layers):
        for theirs, ours in _DENSE.items():
            for suffix in ("",) if "." in ours else (".weight", ".bias"):
                dense(f"blk.{i}.{ours}{suffix}", source.array(f"model.layers.{i}.{theirs}{suffix}"))
        _add_experts(writer, source, i)
    dense("output_norm.weight", source.array("model.norm.weight"))
    dense("output.weight", source.array("lm_head.weight"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_experts(writer: GGUFWriter, source: Source, layer: int) -> None:
    halves = (("ffn_gate_exps", slice(0, None, 2)), ("ffn_up_exps", slice(1, None, 2)))
    for which, parts in (("gate_up_proj", halves), ("down_proj", (("ffn_down_exps", slice(None)),))):
        experts = [source.expert(layer, which, e) for e in range(source.shape.experts)]
        bias = source.array(f"model.layers.{layer}.mlp.experts.{which}_bias")
        for name, rows in parts:
            packed = np.stack([_ggml_blocks(blocks[rows], scales[rows]) for blocks, scales in experts])
            writer.add_tensor(f"blk.{layer}.{name}.weight", packed, raw_dtype=MXFP4)
            writer.add_tensor(f"blk.{layer}.{name}.bias", np.ascontiguousarray(bias[:, rows]))


def _ggml_blocks(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks [rows, groups, 16] and scales [rows, groups] -> ggml's bytes [rows, groups * 17]."""
    values = np.empty((*blocks.shape[:2], 32), np.uint8)
    values[..., 0::2], values[..., 1::2] = blocks & 15, blocks >> 4
    paired = values[..., :16] | (values[..., 16:] << np.uint8(4))
    return np.concatenate([scales[..., None], paired], -1).reshape(blocks.shape[0], -1)
