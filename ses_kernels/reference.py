"""The definition in float64, by svdvals and torch autograd: another route, for tests and bench."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spectral_entropy(x: Tensor, *, center=True, power=2, order=1.0) -> Tensor:
    """(..., B, d) -> (...): entropy of the normalised singular values, by svdvals and autograd."""
    x = x.double()
    if center:
        x = x - x[..., :1, :]  # equal rows become exactly zero
        x = x - x.mean(-2, keepdim=True)
    x = x / x.detach().abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)
    sigma = torch.linalg.svdvals(x)
    # Below round-off a singular value is zero; sigma ** power then has no finite slope.
    zero = sigma <= max(x.shape[-2:]) * torch.finfo(x.dtype).eps * sigma.amax(-1, keepdim=True)
    values = torch.where(zero, 0.0, torch.where(zero, 1.0, sigma) ** power)
    p = values / values.sum(-1, keepdim=True).clamp_min(1e-300)
    if order == 1:
        return torch.special.entr(p.where(p > 0, 1.0)).sum(-1)
    varies = p.sum(-1) > 0.5
    if math.isinf(order):
        return -torch.where(varies, p.amax(-1), 1.0).log()
    total = torch.where(p > 0, p.where(p > 0, 1.0) ** order, 0.0).sum(-1)
    return torch.where(varies, total, 1.0).log() / (1 - order)
