"""MXFP4 and 4-bit affine rounding in torch: straight-through for training, packed for saving."""

from __future__ import annotations

import torch

_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MIDDLES = (_VALUES[1:] + _VALUES[:-1]) / 2


def mxfp4_codes(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [..., K] -> 4-bit codes [..., K] uint8 and scale bytes [..., K / 32] uint8.

    The scale is the power of two that brings the block's greatest magnitude into (3.5, 7]: what rounds up
    past 6 is clipped by less than a step, and the grid's finer half is used more than with the plain floor.
    """
    groups = w.unflatten(-1, (-1, 32)).float()
    peak = groups.abs().amax(-1).clamp(min=2.0**-100)
    exponent = torch.ceil(torch.log2(peak / 7.0)).clamp(-126, 127)
    scaled = groups / torch.exp2(exponent).unsqueeze(-1)
    codes = torch.bucketize(scaled.abs(), _MIDDLES).to(torch.uint8)
    codes = codes | ((scaled < 0) & (codes > 0)).to(torch.uint8) << 3
    return codes.flatten(-2), (exponent + 127).to(torch.uint8)


def mxfp4_values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 weights that codes [..., K] and scales [..., K / 32] stand for."""
    table = torch.cat((_VALUES, -_VALUES))
    values = table[codes.long()].unflatten(-1, (-1, 32))
    return (values * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., K] -> blocks [..., K / 32, 16] uint8; the low nibble is the even index."""
    pairs = codes.unflatten(-1, (-1, 16, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def fake_mxfp4(w: torch.Tensor) -> torch.Tensor:
    """Expert weights [E, in, out] rounded in groups along `in`, with the gradient of the identity."""
    with torch.no_grad():
        rounded = mxfp4_values(*mxfp4_codes(w.detach().mT.contiguous())).mT
    return w + (rounded - w).detach()


def fake_affine4(w: torch.Tensor, group: int = 64) -> torch.Tensor:
    """A matrix [out, in] rounded to 16 levels per group along `in`, with the gradient of the identity."""
    with torch.no_grad():
        groups = w.detach().unflatten(-1, (-1, group))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = ((high - low) / 15).clamp(min=1e-8)
        rounded = (torch.round((groups - low) / step) * step + low).flatten(-2)
    return w + (rounded - w).detach()


class Rounding:
    """What quantisation-aware training puts in place of the weights, once per step and parameter."""

    def __init__(self) -> None:
        self._made: dict[int, torch.Tensor] = {}

    def experts(self, w: torch.Tensor) -> torch.Tensor:
        """Expert weights as MXFP4 holds them."""
        return self._once(w, fake_mxfp4)

    def dense(self, w: torch.Tensor) -> torch.Tensor:
        """A dense matrix as 4-bit affine quantisation holds it."""
        return self._once(w, fake_affine4)

    def _once(self, w: torch.Tensor, rounding) -> torch.Tensor:
        if id(w) not in self._made:
            self._made[id(w)] = (rounding(w) - w).detach()
        return w + self._made[id(w)]
