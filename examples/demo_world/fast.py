"""The gpt-oss forward of transformers' own module, rearranged for training speed on a CPU.

`logits_at` computes the same function as `GptOssForCausalLM.forward` from the same parameters
(`check_same_function` compares the two), but keeps one flash-attention call per layer, one contiguous
matmul per expert, and runs the head only on the rows that carry loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SinkAttention(torch.autograd.Function):
    """Causal attention with one sink logit per head, on torch's CPU flash kernels.

    A sink only adds to the softmax's denominator. So the output is the plain one times
    sigmoid(lse - sink), and the plain backward kernel is exact once it is given that output and the
    log-sum-exp that includes the sink.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, mask, scale):
        out, lse = _flash(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
        # torch stores lse as [B, T, H] or [B, H, T] depending on the version: normalise to [B, H, T].
        by_head = lse if lse.shape[1] == q.shape[1] and lse.shape[2] == q.shape[2] else lse.transpose(1, 2)
        sink = sinks.view(1, -1, 1)
        keep = torch.sigmoid(by_head - sink)
        out = out * keep.unsqueeze(-1)
        total = torch.logaddexp(by_head, sink.expand_as(by_head))
        total = total if by_head is lse else total.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, total, keep, mask)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, total, keep, mask = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = _flash_backward(
            grad, q, k, v, out, total, 0.0, mask is None, attn_mask=mask, scale=ctx.scale
        )
        dot = (grad * out).sum(-1)
        dsinks = -((1 - keep) * dot).sum((0, 2))
        return dq, dk, dv, dsinks, None, None


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


def window_mask(length: int, window: int, dtype=torch.float32) -> torch.Tensor:
    """[1, 1, T, T] additive mask: query i sees keys j with i - window < j <= i."""
    i = torch.arange(length)
    seen = (i[:, None] >= i[None, :]) & (i[:, None] - i[None, :] < window)
    return torch.zeros(1, 1, length, length, dtype=dtype).masked_fill_(~seen, float("-inf"))


def linear(layer, x, rounding):
    weight = layer.weight if rounding is None else rounding.dense(layer.weight)
    return F.linear(x, weight, layer.bias)


def attention(layer, x, cos, sin, mask, rounding=None):
    batch, length, _ = x.shape
    heads = (batch, length, -1, layer.head_dim)
    q = rotate(linear(layer.q_proj, x, rounding).view(heads).transpose(1, 2), cos, sin)
    k = rotate(linear(layer.k_proj, x, rounding).view(heads).transpose(1, 2), cos, sin)
    v = linear(layer.v_proj, x, rounding).view(heads).transpose(1, 2)
    k = k.repeat_interleave(layer.num_key_value_groups, dim=1)
    v = v.repeat_interleave(layer.num_key_value_groups, dim=1)
    out = SinkAttention.apply(q, k, v, layer.sinks, mask, layer.scaling)
    return linear(layer.o_proj, out.transpose(1, 2).reshape(batch, length, -1), rounding)


def experts(mlp, x, rounding=None):
    """x [N, D] -> [N, D] and the load-balancing loss of this layer (1.0 when perfectly even)."""
    router, ex = mlp.router, mlp.experts
    logits = F.linear(x, router.weight, router.bias)
    top, chosen = logits.topk(router.top_k, dim=-1)
    weights = top.softmax(-1)
    gate_up = ex.gate_up_proj if rounding is None else rounding.experts(ex.gate_up_proj)
    down = ex.down_proj if rounding is None else rounding.experts(ex.down_proj)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=router.num_experts).tolist()
    rows = x.index_select(0, order // router.top_k).split(counts)
    outs = []
    for e, part in enumerate(rows):
        gate = torch.addmm(ex.gate_up_proj_bias[e, 0::2], part, gate_up[e, :, 0::2])
        up = torch.addmm(ex.gate_up_proj_bias[e, 1::2], part, gate_up[e, :, 1::2])
        outs.append(torch.addmm(ex.down_proj_bias[e], GatedUnit.apply(gate, up, ex.limit, ex.alpha), down[e]))
    out = torch.cat(outs)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel())
    out = out.index_select(0, back).view(x.shape[0], router.top_k, -1)
    share = torch.tensor(counts, dtype=x.dtype) / (x.shape[0] * router.top_k)
    balance = (logits.softmax(-1).mean(0) * share).sum() * router.num_experts
    return torch.einsum("nkd,nk->nd", out, weights), balance


def hidden_states(model, ids, rounding=None):
    """ids [B, T] (rows padded on the right) -> final hidden [B, T, D], mean balance loss."""
    body, config = model.model, model.config
    table = body.embed_tokens.weight
    x = F.embedding(ids, table if rounding is None else rounding.dense(table))
    length = ids.shape[1]
    cos, sin = body.rotary_emb(x, torch.arange(length)[None])
    cos, sin = cos[:, None], sin[:, None]
    sliding = window_mask(length, config.sliding_window) if length > config.sliding_window else None
    balance = 0.0
    for layer in body.layers:
        mask = sliding if layer.self_attn.sliding_window else None
        x = x + attention(
            layer.self_attn,
            rms_norm(x, layer.input_layernorm.weight, config.rms_norm_eps),
            cos,
            sin,
            mask,
            rounding,
        )
        flat = rms_norm(x, layer.post_attention_layernorm.weight, config.rms_norm_eps).flatten(0, 1)
        y, even = experts(layer.mlp, flat, rounding)
        x = x + y.view_as(x)
        balance = balance + even
    return rms_norm(x, body.norm.weight, config.rms_norm_eps), balance / len(body.layers)


def logits_at(model, ids, rows, rounding=None):
    """Logits [R, V] of the flattened positions `rows` of ids [B, T], and the balance loss."""
    hidden, balance = hidden_states(model, ids, rounding)
    return linear(model.lm_head, hidden.flatten(0, 1).index_select(0, rows), rounding), balance


def check_same_function(model, ids, tolerance: float = 2e-4) -> float:
    """Greatest difference to transformers' eager forward on ids [B, T]; raises when above tolerance."""
    with torch.no_grad():
        ours, _ = logits_at(model, ids, torch.arange(ids.numel()))
        theirs = model(ids).logits.flatten(0, 1)
    worst = (ours - theirs).abs().max().item()
    if not worst < tolerance:
        raise RuntimeError(f"fast forward differs from transformers by {worst:.2e} (limit {tolerance:.0e})")
    return worst
