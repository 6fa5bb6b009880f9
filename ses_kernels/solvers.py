"""From Gram matrices K to the entropy H and M = dH/dK, by one of three solvers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ses_kernels import crossover, entropy, ops


def small_values_matter(power: float, order: float) -> bool:
    """Whether an eigenvalue near 0 has more weight than p log p gives it.

    Then the Gram matrix, which keeps sigma / sigma_max only down to sqrt(eps), is taken in float64.
    """
    return power * min(order, 1.0) < 2


def needs_svd(x: Tensor, options) -> bool:
    """float64 samples have no wider type for their Gram matrix, so those go to an SVD of x."""
    sensitive = small_values_matter(options.power, options.order)
    return sensitive and x.dtype == torch.float64 and options.group is None


def choose(x: Tensor, n: int, backend: str) -> str:
    """The solver that "auto" stands for at power 2 and order 1, for samples x (b, B, d)."""
    if backend == "torch" or ops.EXTENSION_MISSING:  # the kernels are what was measured
        return "eigh"
    wins = crossover.rational_wins(x.device.type, x.dtype, n, x.shape[0])
    return "rational" if wins else "eigh"


def solver_for(x: Tensor, n: int, options) -> str:
    """The name of the solver, the closed form of the collision entropy among them."""
    if options.power == 2 and options.order == 2:
        return "collision"
    if options.solver == "auto" and options.power == 2 and options.order == 1:
        return choose(x, n, options.backend)
    return "rational" if options.solver == "rational" else "eigh"


def gram_dtype(x: Tensor, compute: torch.dtype, n: int, options) -> torch.dtype:
    """The rational solver takes float64 Gram matrices where float64 costs as little as on a CPU.

    Rounding in a float32 Gram matrix is what limits the gradient on steep spectra, not the solver.
    """
    double = solver_for(x, n, options) == "rational" and ops.float64_is_cheap(x.device)
    return torch.float64 if double else compute


class Layer(NamedTuple):
    """One tensor of samples with its Gram matrices (b, n, n), or without them for an SVD."""

    x: Tensor  # (b, B, d)
    location: Tensor
    scale: Tensor  # (b,); its dtype is that of M
    side: str
    gram: Tensor | None
    center: bool  # J M J instead of M, J = I - 11^T / n


def solve(layers: list[Layer], options) -> list[tuple[Tensor, Tensor]]:
    """(H (b,), M (b, n, n)) of each layer.

    One call of the rational solver for all layers, one of an eigensolver for each n.
    """
    solved: list = [None] * len(layers)
    calls: list[tuple[tuple, list[int]]] = []
    for i, layer in enumerate(layers):
        if layer.gram is None:
            solved[i] = _solve_svd(layer, options)
            continue
        solver = solver_for(layer.x, layer.gram.shape[-1], options)
        size = 0 if solver == "rational" else layer.gram.shape[-1]
        key = solver, size, layer.gram.dtype, layer.scale.dtype
        for other, members in calls:  # a search, not a dict: n may be symbolic under torch.compile
            if other == key:
                members.append(i)
                break
        else:
            calls.append((key, [i]))
    for (solver, *_), members in calls:
        chosen = [layers[i] for i in members]
        solve_all = _solve_rational if solver == "rational" else _solve_stacked
        for i, result in zip(members, solve_all(chosen, options), strict=True):
            solved[i] = result
    return solved


def _solve_rational(layers, options):
    results = ops.rational(
        [layer.gram for layer in layers],
        [layer.center for layer in layers],
        layers[0].scale.dtype,
        options.gradient,
        options.backend,
    )
    return zip(results[: len(layers)], results[len(layers) :], strict=True)


def _solve_stacked(layers, options):
    grams = [layer.gram for layer in layers]
    stacked = grams[0] if len(grams) == 1 else torch.cat(grams)
    if options.power == 2 and options.order == 2:
        h, m = _collision(stacked)
    else:
        h, m = from_spectrum(*spectrum(stacked, options), options.power, options.order)
    sizes = [gram.shape[0] for gram in grams]
    if len(grams) == 1:
        parts = [(h, m)]
    else:  # unsafe: these become outputs, so no views
        parts = zip(*(torch.unsafe_split_with_sizes(t, sizes) for t in (h, m)), strict=True)
    return [_centered(h, m, layer, options) for layer, (h, m) in zip(layers, parts, strict=True)]


def _solve_svd(layer, options):
    x, location, scale, side, _, _ = layer
    spectrum = singular_spectrum(x, location, scale, side, options.gradient)
    return _centered(*from_spectrum(*spectrum, options.power, options.order), layer, options)


def _centered(h, m, layer, options):
    return h, ops.double_center(m) if layer.center and options.gradient else m


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
