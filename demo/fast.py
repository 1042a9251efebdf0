"""The gpt-oss forward of transformers' own module, rearranged for training speed on a CPU.

`logits_at` computes the same function as `GptOssForCausalLM.forward` from the same parameters
(`check_same_function` compares the two), but multiplies matrices in bfloat16 (on CPUs with AVX512-BF16 or AMX
several times as fast as float32), runs one matmul per expert, and the head only on the rows that carry
loss. Parameters, residual stream, norms, softmax and router stay float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Rows of matmuls come in multiples of this.
FILL = 64


class SinkAttention(torch.autograd.Function):
    """Causal attention with one sink logit per head: out = softmax([q k^T scale + mask, sink]) [v, 0].

    q [N, R, C], k and v [N, T, C], sinks [N, R], mask [R, T + 1]: N counts sequences times KV heads, R the
    rows of all query heads of one KV head, one head's T rows after another's. A key and a value of zeros at
    the end of k and v hold the sink's place, so that both directions are plain batched matmuls.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, mask, scale):
        q = q * scale
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        scores = torch.bmm(q, k.mT).add_(mask)
        scores[..., -1] = sinks
        p = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return torch.bmm(p, v)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, p = ctx.saved_tensors
        ds = torch._softmax_backward_data(torch.bmm(grad, v.mT), p, -1, p.dtype)
        dq = torch.bmm(ds, k).mul_(ctx.scale)
        dk = torch.bmm(ds.mT, q)[:, :-1]
        dv = torch.bmm(p.mT, grad)[:, :-1]
        return dq, dk, dv, ds[..., -1], None, None


class GatedUnit(torch.autograd.Function):
    """gate * sigmoid(alpha * gate) * (up + 1) with both clamps, forward and backward in few passes."""

    @staticmethod
    def forward(ctx, gate, up, limit, alpha):
        ctx.limit, ctx.alpha = limit, alpha
        ctx.save_for_backward(gate, up)
        g = gate.clamp(max=limit)
        return g.mul(alpha).sigmoid_().mul_(g).mul_(up.clamp(-limit, limit).add_(1))

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        g = gate.clamp(max=ctx.limit)
        s = (g * ctx.alpha).sigmoid_()
        glu = g * s
        dup = grad * glu
        dup.mul_(up.abs() <= ctx.limit)
        # d(g s)/dg = s + alpha g s (1 - s)
        dg = s.mul_(1 + ctx.alpha * (g - glu))
        dg.mul_(grad).mul_(up.clamp(-ctx.limit, ctx.limit).add_(1)).mul_(gate <= ctx.limit)
        return dg, dup, None, None


def rms_norm(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def causal_mask(length: int, window: int | None, heads: int, dtype) -> torch.Tensor:
    """[heads * T, T + 1] additive mask, the same for each head: query i sees keys j <= i, of a window only
    i - window < j; the last column, the sink's, is seen by all."""
    i = torch.arange(length)
    seen = i[:, None] >= i[None, :]
    if window is not None:
        seen &= i[:, None] - i[None, :] < window
    mask = torch.zeros(length, length + 1, dtype=dtype)
    mask[:, :-1].masked_fill_(~seen, float("-inf"))
    return mask.repeat(heads, 1)


def linear(layer, x, rounding):
    """x in the dtype that matrices are multiplied in."""
    weight = layer.weight if rounding is None else rounding.dense(layer.weight)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, weight.to(x.dtype), bias)


def attention(layer, x, cos, sin, mask, rounding=None):
    """x [B, T, D] in the dtype of the matmuls -> the same."""
    batch, length, _ = x.shape
    groups, channels = layer.num_key_value_groups, layer.head_dim

    def heads(projected):
        return projected.view(batch, length, -1, channels).transpose(1, 2)

    q = rotate(heads(linear(layer.q_proj, x, rounding)).float(), cos, sin).to(x.dtype)
    k = rotate(heads(linear(layer.k_proj, x, rounding)).float(), cos, sin).to(x.dtype)
    v = heads(linear(layer.v_proj, x, rounding))
    # The query heads of one KV head are neighbours: their rows stand one after another.
    q = q.reshape(-1, groups * length, channels)
    k, v = k.reshape(-1, length, channels), v.reshape(-1, length, channels)
    sinks = layer.sinks.to(x.dtype).repeat_interleave(length).view(-1, groups * length).repeat(batch, 1)
    out = SinkAttention.apply(q, k, v, sinks, mask, layer.scaling)
    out = out.view(batch, -1, length, channels).transpose(1, 2).reshape(batch, length, -1)
    return linear(layer.o_proj, out, rounding)


def experts(mlp, x, dtype, rounding=None):
    """x float32 [N, D] -> [N, D] and the load-balancing loss of this layer (1.0 when perfectly even)."""
    router, ex = mlp.router, mlp.experts
    logits = F.linear(x, router.weight, router.bias)
    top, chosen = logits.topk(router.top_k, dim=-1)
    weights = top.softmax(-1)
    gate_up = ex.gate_up_proj if rounding is None else rounding.experts(ex.gate_up_proj)
    down = ex.down_proj if rounding is None else rounding.experts(ex.down_proj)
    # All gates, then all ups: contiguous for the elementwise part.
    gate_up = torch.cat((gate_up[..., 0::2], gate_up[..., 1::2]), -1).to(dtype)
    gate_up_bias = torch.cat((ex.gate_up_proj_bias[:, 0::2], ex.gate_up_proj_bias[:, 1::2]), -1).to(dtype)
    down, down_bias = down.to(dtype), ex.down_proj_bias.to(dtype)
    pairs = chosen.flatten()
    counts = torch.bincount(pairs, minlength=router.num_experts)
    # Each expert's rows are filled up to a multiple of FILL, so that few sizes occur: a new size costs the
    # matmul library more than the rows. `place` is where a (token, expert) pair stands in the filled table.
    sizes = (counts + FILL - 1) // FILL * FILL
    order = pairs.argsort(stable=True)
    shift = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel()) + shift[pairs[order]]
    source = torch.zeros(int(sizes.sum()), dtype=torch.long)
    source[place] = torch.arange(order.numel()) // router.top_k
    rows = x.to(dtype).index_select(0, source).split(sizes.tolist())
    outs = []
    for e, part in enumerate(rows):
        gate, up = torch.addmm(gate_up_bias[e], part, gate_up[e]).chunk(2, -1)
        outs.append(torch.addmm(down_bias[e], GatedUnit.apply(gate, up, ex.limit, ex.alpha), down[e]))
    out = torch.cat(outs).index_select(0, place).view(x.shape[0], router.top_k, -1)
    share = counts.to(x.dtype) / pairs.numel()
    balance = (logits.softmax(-1).mean(0) * share).sum() * router.num_experts
    return (out.float() * weights.unsqueeze(-1)).sum(1), balance


def hidden_states(model, ids, dtype, rounding=None):
    """ids [B, T] (rows padded on the right) -> final hidden [B, T, D], mean balance loss."""
    body, config = model.model, model.config
    table = body.embed_tokens.weight
    x = F.embedding(ids, table if rounding is None else rounding.dense(table))
    length, groups = ids.shape[1], config.num_attention_heads // config.num_key_value_heads
    cos, sin = body.rotary_emb(x, torch.arange(length)[None])
    cos, sin = cos[:, None], sin[:, None]
    masks = {window: causal_mask(length, window, groups, dtype) for window in (None, config.sliding_window)}
    balance = 0.0
    for layer in body.layers:
        rows = rms_norm(x, layer.input_layernorm.weight, config.rms_norm_eps).to(dtype)
        mask = masks[layer.self_attn.sliding_window]
        x = x + attention(layer.self_attn, rows, cos, sin, mask, rounding)
        flat = rms_norm(x, layer.post_attention_layernorm.weight, config.rms_norm_eps).flatten(0, 1)
        y, even = experts(layer.mlp, flat, dtype, rounding)
        x = x + y.view_as(x)
        balance = balance + even
    return rms_norm(x, body.norm.weight, config.rms_norm_eps), balance / len(body.layers)


def logits_at(model, ids, rows, rounding=None, dtype=torch.bfloat16):
    """Logits float32 [R, V] of the flattened positions `rows` of ids [B, T], and the balance loss."""
    hidden, balance = hidden_states(model, ids, dtype, rounding)
    picked = hidden.flatten(0, 1).index_select(0, rows).to(dtype)
    return linear(model.lm_head, picked, rounding).float(), balance


def check_same_function(model, ids, tolerance: float = 2e-4) -> float:
    """Greatest difference to transformers' eager forward on ids [B, T], all in float32; raises above
    tolerance."""
    with torch.no_grad():
        ours, _ = logits_at(model, ids, torch.arange(ids.numel()), dtype=torch.float32)
        theirs = model(ids).logits.flatten(0, 1)
    worst = (ours - theirs).abs().max().item()
    if not worst < tolerance:
        raise RuntimeError(f"fast forward differs from transformers by {worst:.2e} (limit {tolerance:.0e})")
    return worst
