"""Entropy of n eigenvalues and its first and second derivatives; no matrix in this file.

With a = power / 2, q = order, S = sum_j w_j^a, p_j = w_j^a / S (w: eigenvalues of the Gram matrix):

    H  = -sum_j p_j log p_j                     (q = 1)
    H  = log(sum_j p_j^q) / (1 - q)             (q != 1)
    H  = -log max_j p_j                         (q = inf)

    dH/dw_j = F(w_j) = (a / S) w_j^(a-1) g(log p_j + H)
    g(u) = -u (q = 1),  q (e^((q-1) u) - 1) / (1 - q),  1 (q = inf, where the largest has
    -a / w_max more)

F depends on the other eigenvalues only through S and H: this is what makes the second derivative a
divided difference of a scalar function plus a term along (dS, dH).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(w: Tensor, power: float, order: float, noise: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues (b, n) -> H (b,) and F = dH/dw (b, n).

    Eigenvalues up to noise * max w count as zero: they add nothing to H. There F is 0, or its limit
    with log p := 0 where power is 2 (the centred x has no component in that direction).
    """
    w, s, log_p, h = _probabilities(w, power, order, noise)
    f = _first(w, s, log_p + h[:, None], power, order)
    if order == math.inf:
        f = f - _at_largest(w, power / 2 / _positive(w))
    return h, f


def second_derivative(
    w: Tensor, dw: Tensor, power: float, order: float, noise: float
) -> tuple[Tensor, Tensor]:
    """Divided differences Gamma_ij = F[w_i, w_j] (b, n, n), and F's change by dS and dH (b, n).

    dw (b, n) are the first-order changes of the eigenvalues; Gamma_ii = F'(w_i).
    """
    a = power / 2
    w, s, log_p, h = _probabilities(w, power, order, noise)
    u = log_p + h[:, None]
    f = _first(w, s, u, power, order)

    def slope(x: Tensor) -> Tensor:  # F' at x (b, n, n), S and H held
        ux = a * x.log() - (s.log() - h)[:, None, None]
        curve = (a - 1) * _g(ux, order) + a * _dg(ux, order)
        return a / s[:, None, None] * x ** (a - 2) * curve

    wi, wj = w[:, :, None], w[:, None, :]
    low, high = torch.minimum(wi, wj), torch.maximum(wi, wj)
    close = low > 0.7 * high
    # Close pairs: F[x, y] is the mean of F' over [x, y]; eight Gauss-Legendre nodes give it to
    # round-off (w = 0 is 5.7 half-lengths away), where the difference quotient cancels.
    low, high = torch.where(close, low, 1.0), torch.where(close, high, 1.0)
    middle, half = (low + high) / 2, (high - low) / 2
    mean = sum(
        weight / 2 * (slope(middle + node * half) + slope(middle - node * half))
        for node, weight in _GAUSS_LEGENDRE
    )
    apart = torch.where(close | (wi == wj), 1.0, wi - wj)
    far = torch.where(wi == wj, 0.0, (f[:, :, None] - f[:, None, :]) / apart)
    gamma = torch.where(close, mean, far)

    x = _positive(w) ** (a - 1)
    ds = (a * x * dw).masked_fill(w == 0, 0).sum(-1, keepdim=True)
    full = f
    if order == math.inf:
        spike = _at_largest(w, -a / _positive(w))  # the largest eigenvalue's own term
        full = f + spike
        both = torch.where(wi == wj, 1.0, wi - wj)
        gamma = gamma + torch.where(wi == wj, 0.0, (spike[:, :, None] - spike[:, None, :]) / both)
        gamma = gamma + torch.diag_embed(_at_largest(w, a / _positive(w) ** 2))
    dh = (full * dw).sum(-1, keepdim=True)
    bend = (a / s[:, None]) * x * _dg(u, order)  # dF/du
    shared = -f / s[:, None] * ds + bend * (dh - ds / s[:, None])
    return gamma, shared.masked_fill((w == 0) & (a != 1), 0)


# Nodes and weights of the eight-point rule on [-1, 1] (Abramowitz & Stegun, table 25.4).
_GAUSS_LEGENDRE = (
    (0.1834346424956498, 0.3626837833783620),
    (0.5255324099163290, 0.3137066458778873),
    (0.7966664774136267, 0.2223810344533745),
    (0.9602898564975363, 0.1012285362903763),
)


def _probabilities(w, power, order, noise):
    """w with its noise set to 0, S, log p, H. No variance gives H = 0.

    In log p a zero counts as rounding where 1 < q: the limit of F, q / (q - 1), is finite but would
    multiply, near q = 1, the rounding of a direction that x does not have. Elsewhere log 0 is 0.
    """
    w = w.clamp_min(0)
    if noise:
        w = w.masked_fill(w <= noise * w.amax(-1, keepdim=True), 0)
    values = w ** (power / 2) if power != 2 else w
    s = values.sum(-1)
    s = torch.where(s == 0, 1.0, s)
    p = values / s[:, None]
    log_zero = math.log(torch.finfo(w.dtype).eps) if 1 < order < math.inf else 0.0
    log_p = torch.where(p == 0, log_zero, p.log())
    if order == 1:
        h = -(p * log_p).sum(-1)
    elif order == math.inf:
        h = -log_p.gather(-1, w.argmax(-1, keepdim=True)).squeeze(-1)
    elif abs(order - 1) < 0.5:  # sum p^q - 1 cancels in a logarithm of the sum
        h = torch.log1p((p * torch.expm1((order - 1) * log_p)).sum(-1)) / (1 - order)
    else:
        terms = torch.where(p == 0, -math.inf, order * log_p)
        h = torch.logsumexp(terms, -1) / (1 - order)
        h = torch.where(w.amax(-1) == 0, 0.0, h)
    return w, s, log_p, h


def _first(w, s, u, power, order):  # F without the largest eigenvalue's own term
    a = power / 2
    f = (a / s)[:, None] * _g(u, order)
    return f if a == 1 else torch.where(w == 0, 0.0, f * _positive(w) ** (a - 1))


def _g(u: Tensor, order: float) -> Tensor:
    if order == 1:
        return -u
    if order == math.inf:
        return torch.ones_like(u)
    return order * torch.expm1((order - 1) * u) / (1 - order)


def _dg(u: Tensor, order: float) -> Tensor:
    if order == 1:
        return torch.full_like(u, -1)
    if order == math.inf:
        return torch.zeros_like(u)
    return -order * torch.exp((order - 1) * u)


def _positive(w: Tensor) -> Tensor:
    return torch.where(w > 0, w, 1.0)


def _at_largest(w: Tensor, values: Tensor) -> Tensor:  # values where w is largest, else 0
    largest = w.argmax(-1, keepdim=True)
    return torch.zeros_like(w).scatter(-1, largest, values.gather(-1, largest))
