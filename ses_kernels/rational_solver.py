"""The rational solver in PyTorch operations: log x ~ c - sum_j w_j / (x + t_j) by Cholesky.

With P = K / tr K, L = c I - sum_j w_j (P + t_j I)^{-1}: no eigenvectors and a fixed amount of work.
H = -tr(P L) and M = dH/dK = -(L + H I) / tr K use the same L: that gradient is nearer to the true
one than the derivative of the approximation would be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ses_kernels.rational_coefficients import POLES


def entropy(gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gram matrices (b, n, n) -> H (b,) and M (b, n, n), for a result of type ``dtype``."""
    c, poles = POLES[gram.dtype, dtype]
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    valid = trace.isfinite() & (trace > 0)
    t = torch.where(valid, trace, 1.0)[:, None, None]
    p = torch.where(valid[:, None, None], gram / t, 0.0)
    scale = _pole_scale(p, poles[0][0])
    log_p = torch.zeros_like(p)
    log_p.diagonal(dim1=-2, dim2=-1).add_((c + scale.log())[:, None])
    for t_j, w_j in poles:
        factor, _ = torch.linalg.cholesky_ex(_shift(p, t_j * scale))
        log_p -= (w_j * scale)[:, None, None] * torch.cholesky_inverse(factor)
    h = -(p * log_p).sum((-2, -1))
    outcome = torch.where(trace == 0, 0.0, torch.where(valid, 1.0, torch.nan))  # no variance, NaN
    m = log_p
    m.diagonal(dim1=-2, dim2=-1).add_(h[:, None])
    return h * outcome, m * (-outcome[:, None, None] / t)


def _pole_scale(p: Tensor, smallest: float) -> Tensor:
    """1, 4 or 16 where rounding left P + t_1 I indefinite; NaN where 16 will not do.

    log x = log(x / s) + log s moves every pole to s t_j exactly; no look on the host is needed.
    """
    scale = torch.ones(p.shape[0], dtype=p.dtype, device=p.device)
    for factor in (4, 4, math.nan):
        _, info = torch.linalg.cholesky_ex(_shift(p, smallest * scale))
        scale = torch.where(info > 0, factor * scale, scale)
    return scale


def _shift(p: Tensor, t: Tensor) -> Tensor:
    shifted = p.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(t[:, None])
    return shifted
