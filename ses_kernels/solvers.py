"""From a Gram matrix K to the entropy H and M = dH/dK, by one of three solvers."""

from __future__ import annotations

import torch
from torch import Tensor

from ses_kernels import entropy, ops
from ses_kernels.rational import POLES


def small_values_matter(power: float, order: float) -> bool:
    """Whether an eigenvalue near 0 has more weight than p log p gives it.

    Then the Gram matrix, which keeps sigma / sigma_max only down to sqrt(eps), is taken in float64.
    """
    return power * min(order, 1.0) < 2


def needs_svd(x: Tensor, options) -> bool:
    """float64 samples have no wider type for their Gram matrix, so those go to an SVD of x."""
    sensitive = small_values_matter(options.power, options.order)
    return sensitive and x.dtype == torch.float64 and options.group is None


def choose(device: torch.device, dtype: torch.dtype, n: int) -> str:
    """The solver that "auto" stands for at power 2 and order 1.

    On the CPU Cholesky factorisations for twelve poles take 2 to 15 times as long as the spectrum
    (bench/results); no GPU has been measured yet.
    """
    return "eigh"


def solve(gram: Tensor, options) -> tuple[Tensor, Tensor]:  # (b, n, n) -> (b,), (b, n, n)
    if options.power == 2 and options.order == 2:
        return _collision(gram)
    solver = options.solver
    if solver == "auto":
        solver = choose(gram.device, gram.dtype, gram.shape[-1])
    if solver == "rational":
        return _rational(gram, options.backend)
    return from_spectrum(*spectrum(gram, options), options.power, options.order)


def spectrum(gram: Tensor, options) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues (b, n), eigenvectors (b, n, n), and what of them, relative, is rounding.

    No eigenvectors, None, where no gradient is wanted.
    """
    if options.gradient:
        w, q = ops.eigh(gram, options.backend)
    else:
        w, q = ops.eigvalsh(gram, options.backend), None
    sensitive = small_values_matter(options.power, options.order)
    noise = gram.shape[-1] * torch.finfo(gram.dtype).eps if sensitive else 0.0
    return w, q, noise


def singular_spectrum(x, location, scale, side, gradient=True):
    """The same from an SVD of x (b, B, d): n eigenvalues and vectors of the side, n = min(B, d)."""
    xs = ops.standardize(x, location, scale)
    if side == "features":
        xs = xs.mT
    finite = xs.isfinite().all(-1).all(-1)[:, None, None]  # LAPACK rejects NaN for the whole batch
    xs = torch.where(finite, xs, 0.0)
    if gradient:
        q, sigma, _ = torch.linalg.svd(xs, full_matrices=False)
    else:
        q, sigma = None, torch.linalg.svdvals(xs)
    noise = (max(xs.shape[-2:]) * torch.finfo(xs.dtype).eps) ** 2
    return torch.where(finite[..., 0], sigma**2, torch.nan), q, noise


def from_spectrum(w, q, noise, power, order) -> tuple[Tensor, Tensor]:
    h, f = entropy.entropy(w, power, order, noise)
    if q is None:
        return h, h.new_empty(h.shape[0], 0, 0)
    # M = Q diag(dH/dw) Q^T
    return h, (q * f[:, None, :]) @ q.mT


def _collision(gram: Tensor) -> tuple[Tensor, Tensor]:
    """H = -log tr P^2 = 2 log tr K - log |K|^2 needs no eigenvalue."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    t = torch.where(trace == 0, 1.0, trace)[:, None, None]
    p = gram / t
    purity = (p * p).sum((-2, -1))
    purity = torch.where(trace == 0, 1.0, purity)
    # dH/dK = (2 / tr K) (I - P / tr P^2)
    m = -p / purity[:, None, None]
    m.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return -purity.log(), m * (2 / t)


def _rational(gram: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """log x ~ c - sum_j w_j / (x + t_j): L = c I - sum_j w_j (P + t_j I)^{-1}, by Cholesky.

    H = -tr(P L) and M = -(L + H I) / tr K use the same L, so that the gradient is consistent.
    """
    if backend == "fused":
        raise RuntimeError(
            'backend="fused": solver="rational" has no kernel yet; use backend="auto" or "torch"'
        )
    c, poles = POLES[gram.dtype]
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
    m = log_p
    m.diagonal(dim1=-2, dim2=-1).add_(h[:, None])
    outcome = torch.where(trace == 0, 0.0, torch.where(valid, 1.0, torch.nan))  # no variance, NaN
    return h * outcome, m * (-outcome[:, None, None] / t)


def _pole_scale(p: Tensor, smallest: float) -> Tensor:
    """1, or 4 or 16 where rounding left P + t_1 I indefinite.

    log x = log(x / s) + log s moves every pole to s t_j exactly; no look on the host is needed.
    """
    scale = torch.ones(p.shape[0], dtype=p.dtype, device=p.device)
    for _ in range(2):
        _, info = torch.linalg.cholesky_ex(_shift(p, smallest * scale))
        scale = torch.where(info > 0, 4 * scale, scale)
    return scale


def _shift(p: Tensor, t: Tensor) -> Tensor:
    shifted = p.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(t[:, None])
    return shifted
