"""Muon for the matrices, Adam for everything else, with the work shared between data-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist


def orthogonalise(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to each of g [..., m, n], by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()  # it does not need to be exact
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """Both optimizers behind one `step(scale)`, where scale multiplies every learning rate.

    `matrices` are parameters [..., in or out, out or in] that take Muon's orthogonalised momentum; each
    rank computes the updates of its share and they are exchanged, so all ranks stay equal.
    """

    def __init__(self, matrices, others, muon_lr: float, adam_lr: float, rank: int, world: int) -> None:
        self.matrices, self.others = list(matrices), list(others)
        self.muon_lr, self.adam_lr = muon_lr, adam_lr
        self.rank, self.world = rank, world
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.Adam(self.others, lr=adam_lr, betas=(0.9, 0.95), eps=1e-8)
        # Deal the matrices out by size, so that ranks take about as long.
        order = sorted(range(len(self.matrices)), key=lambda i: -self.matrices[i].numel())
        self.owner = {i: n % world for n, i in enumerate(order)}

    def state_dict(self) -> dict:
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.momentum = state["momentum"]
        self.adam.load_state_dict(state["adam"])

    @torch.no_grad()
    def step(self, scale: float, weight_decay: float = 0.01) -> None:
        lr = self.muon_lr * scale
        updates = []
        for i, p in enumerate(self.matrices):
            self.momentum[i].lerp_(p.grad, 0.05)
            if self.owner[i] == self.rank:
                update = orthogonalise(p.grad.lerp(self.momentum[i], 0.95))
                update *= max(1.0, p.shape[-2] / p.shape[-1], p.shape[-1] / p.shape[-2]) ** 0.5
            else:
                update = torch.zeros_like(p)
            updates.append(update.contiguous())
        if self.world > 1:
            flat = torch.cat([u.flatten() for u in updates])
            dist.all_reduce(flat)
            parts = flat.split([u.numel() for u in updates])
            updates = [f.view_as(u) for f, u in zip(parts, updates, strict=True)]
        for p, u in zip(self.matrices, updates, strict=True):
            p.mul_(1 - lr * weight_decay).add_(u, alpha=-lr)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
