"""Stochastic Lanczos quadrature of H and dH/dx: a candidate, measured by bench.large.

With A = Xc / |Xc|_F and G = A^T A, H = -tr(G log G) and dH/dx = -(2 / |Xc|_F) A (log G + H I). For
probes w of random signs E[w w^T] = I, so that with y = -log(A A^T) A w

    H = E[w^T A^T y],   dH/dx = (2 / |Xc|_F) E[(y - H A w) w^T],

and y ~ |A w| V (-log T) e_1, where V and T are the basis and the tridiagonal matrix of Lanczos's
method on A A^T, from A w. It starts there, and not from signs, to keep the logarithm away from the
directions that have no variance.

Two known ways to a smaller variance, neither of which adds a bias. The trace of G is 1: what the
probes estimate is H - c tr G and log G + c I, with c near the mean of -log G, which is taken from
the other probes. And deflation (Hutch++): the leading directions of G, from a random start and one
product with G, take part one by one, and the probes have the complement only.

Sources: trace by signs: Hutchinson, Comm. Stat. Simul. 19 (1990). Quadrature: Ubaru, Chen & Saad,
SIAM J. Matrix Anal. Appl. 38 (2017). Deflation: Meyer, Musco, Musco & Woodruff, "Hutch++" (SOSA
2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """What a method does not tell is None."""

    entropy: Tensor  # ()
    gradient: Tensor | None  # dH/dx (B, d)
    standard_error: Tensor | None  # () of the entropy, from the spread over the probes


def estimate(
    x: Tensor, probes: int, steps: int, generator: torch.Generator, deflated: int = 0
) -> Estimate:  # (B, d)
    """From at least two probes, and so many leading directions; 4 B d flops a step and each.

    Unbiased up to what the Lanczos steps leave out.
    """
    d = x.shape[1]
    x = x - x.mean(0)
    # A float32 sum of so many squares would be right to four digits.
    norm = torch.linalg.vector_norm(x, dtype=torch.float64).to(x.dtype)
    a = x / norm
    w = torch.randint(0, 2, (probes, d), generator=generator, device=x.device).to(x.dtype) * 2 - 1
    leading = w[:0]
    if deflated:
        start = torch.randn(deflated, d, generator=generator, device=x.device, dtype=x.dtype)
        leading = torch.linalg.qr((start @ a.mT @ a).mT)[0].mT.contiguous()
        w = w - w @ leading.mT @ leading
    w = torch.cat([leading, w])
    aw = w @ a.mT  # (deflated + probes, B): row i is A w_i
    y = minus_log_times(a, aw, steps)

    exact, sampled = slice(deflated), slice(deflated, None)
    h = torch.linalg.vecdot(aw, y).double()  # w^T (-G log G) w
    trace = aw.square().sum(-1, dtype=torch.float64)  # w^T G w
    rest = 1 - trace[exact].sum()  # its expectation over the probes
    c = (h[sampled].sum() - h[sampled]) / (trace[sampled].sum() - trace[sampled])
    entropies = h[exact].sum() + h[sampled] - c * (trace[sampled] - rest)
    entropy = entropies.mean()

    # dH/dx |Xc| / 2 = sum_exact (y - H A w) w^T + mean_sampled (y - c A w) w^T
    #                  + (c - H) A (I - sum_exact w w^T)
    c_mean = c.mean()
    shift = torch.cat([c_mean.expand(deflated), c]).to(x.dtype)
    left = y - shift[:, None] * aw
    left[sampled] /= probes
    gradient = torch.addmm(a, left.mT, w, beta=(c_mean - entropy).item()) * (2 / norm)
    return Estimate(entropy, gradient, entropies.std() / probes**0.5)


def minus_log_times(a: Tensor, b: Tensor, steps: int) -> Tensor:  # (B, d), (k, B) -> (k, B)
    """-log(A A^T) b_i for every row of b, by Lanczos's method, fully reorthogonalised."""
    k, rows = b.shape
    eps = torch.finfo(b.dtype).eps
    basis = b.new_zeros(k, steps, rows)
    diagonal, beside = b.new_zeros(k, steps), b.new_zeros(k, steps - 1)
    norms = b.norm(dim=-1, keepdim=True)
    basis[:, 0] = _over(b, norms)
    for j in range(steps):
        v = basis[:, j] @ a @ a.mT
        diagonal[:, j] = torch.linalg.vecdot(v, basis[:, j])
        if j + 1 == steps:
            break
        for _ in range(2):  # once leaves rounding where v nearly is in the span
            v = torch.baddbmm(
                v[:, None], v[:, None] @ basis[:, : j + 1].mT, basis[:, : j + 1], alpha=-1
            )[:, 0]
        length = v.norm(dim=-1, keepdim=True)
        # An exhausted Krylov space goes on with zeros: T falls apart, and e_1 sees its first part.
        length = torch.where(length > eps * diagonal[:, :1], length, 0.0)
        beside[:, j] = length[:, 0]
        basis[:, j + 1] = _over(v, length)
    t = torch.diag_embed(diagonal.double())
    t += torch.diag_embed(beside.double(), 1) + torch.diag_embed(beside.double(), -1)
    theta, s = torch.linalg.eigh(t)
    minus_log = -theta.clamp_min(eps).log()  # a Ritz value below that is rounding
    f = s @ (minus_log * s[:, 0])[..., None]  # (-log T) e_1 (k, steps, 1)
    return norms * (f.to(b.dtype).mT @ basis)[:, 0]


def _over(v: Tensor, norm: Tensor) -> Tensor:
    return torch.where(norm > 0, v / torch.where(norm > 0, norm, 1.0), 0.0)
