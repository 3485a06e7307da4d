"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024), with the update
scaled to the size AdamW's would have (Liu et al., 2025). Experts are batches of matrices."""

import torch

# Quintic that drives singular values towards 1.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonal(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """update: [..., m, n] -> about U V^T of each matrix, in bfloat16."""
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    def __init__(self, params: list[torch.Tensor], momentum: float = 0.95, weight_decay: float = 0.05):
        self.momentum, self.weight_decay = momentum, weight_decay
        by_shape: dict[torch.Size, list] = {}
        for param in params:
            by_shape.setdefault(param.shape, []).append(param)
        self.groups = [(group, [torch.zeros_like(p) for p in group]) for group in by_shape.values()]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for params, moments in self.groups:
            grads = [p.grad for p in params]
            torch._foreach_lerp_(moments, grads, 1 - self.momentum)
            ahead = torch._foreach_lerp(grads, moments, self.momentum)
            update = orthogonal(torch.stack(ahead))
            size = 0.2 * max(params[0].shape[-2:]) ** 0.5
            torch._foreach_mul_(params, 1 - rate * self.weight_decay)
            torch._foreach_add_(params, [u.float() for u in update.unbind()], alpha=-rate * size)
