"""From samples x to the entropy H and M = dH/dK, K their Gram matrix, by one of four solvers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ses_kernels import crossover, distributed, entropy, ops, torch_rows
from ses_kernels.context import without_autocast


class Options(NamedTuple):
    center: bool
    power: float
    order: float
    solver: str
    backend: str
    group: torch.distributed.ProcessGroup | None
    gradient: bool = True  # False: M is not wanted, and comes back empty


# ---- which solver, and in which precision ---------------------------------------------------


def small_values_matter(power: float, order: float) -> bool:
    """Whether an eigenvalue near 0 has more weight than p log p gives it.

    Then the Gram matrix, which keeps sigma / sigma_max only down to sqrt(eps), is taken in float64.
    """
    return power * min(order, 1.0) < 2


def needs_svd(x: Tensor, options: Options) -> bool:
    """float64 samples have no wider type for their Gram matrix, so those go to an SVD of x."""
    sensitive = small_values_matter(options.power, options.order)
    return sensitive and x.dtype == torch.float64 and options.group is None


def choose(x: Tensor, n: int, backend: str) -> str:
    """The solver that "auto" stands for at power 2 and order 1, for samples x ([b,] B, d)."""
    if backend == "torch" or ops.EXTENSION_MISSING:  # the kernels are what was measured
        return "eigh"
    device = "cpu" if x.is_cpu else x.device.type  # a string made at every call
    batch = x.shape[0] if x.dim() == 3 else 1
    return "rational" if crossover.rational_wins(device, x.dtype, n, batch) else "eigh"


def solver_for(x: Tensor, options: Options) -> str:
    """The name of the solver, the closed form of the collision entropy among them."""
    if options.power == 2 and options.order == 1:
        auto = options.solver == "auto"
        return choose(x, size(x, options), options.backend) if auto else options.solver
    if options.power == 2 and options.order == 2:
        return "collision"
    return "svd" if needs_svd(x, options) else "eigh"


def compute_dtype(x: Tensor, options: Options) -> torch.dtype:
    """That of location, scale and M."""
    sensitive = small_values_matter(options.power, options.order)
    return torch.float64 if sensitive else ops.widened(x)


# ---- the Gram matrix ------------------------------------------------------------------------


def side(x: Tensor, options: Options) -> str:
    """Samples are gathered where they are the smaller side, so a shard has the other one."""
    return "features" if options.group is not None else ops.smaller_side(x)


def size(x: Tensor, options: Options) -> int:
    """n, of the Gram matrix on that side."""
    samples, features = x.shape[-2:]
    return features if options.group is not None else min(samples, features)


def locate(x: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Location (b, 2, d): first row and mean offset from it, (b, 0, d) if uncentred; scale (b,)."""
    anchor = x[:, :1] if options.center else x[:, :0]
    dtype = compute_dtype(x, options)
    if options.group is not None:
        return distributed.location_scale(x, anchor, dtype, options.backend, options.group)
    return ops.location_scale(x, anchor, dtype, options.backend)


def gram(x: Tensor, location: Tensor, scale: Tensor, options: Options) -> Tensor:  # -> (b, n, n)
    rational = solver_for(x, options) == "rational"
    dtype = ops.rational_gram_dtype(x.device, scale.dtype) if rational else scale.dtype
    k = ops.gram(x, location, scale, side(x, options), dtype, options.backend)
    if options.group is not None:
        torch.distributed.all_reduce(k, group=options.group)
    return k


def _centers(x: Tensor, options: Options) -> bool:
    """Whether J M J, J = I - 11^T / n, is wanted for M.

    On the samples' side 1 is in the null space of K: M there is the log of rounding.
    """
    return options.center and side(x, options) == "samples"


# ---- the solvers ----------------------------------------------------------------------------


class Solved(NamedTuple):
    """Of one tensor of samples (b, B, d)."""

    h: Tensor  # (b,), in the dtype of the result
    m: Tensor  # (b, n, n), n = size(x); (b, 0, 0) where no gradient is wanted
    location: Tensor
    scale: Tensor


def by_layer(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Four of each layer, from all of one kind after all of another, as operations return them."""
    layers = len(tensors) // 4
    return [tensors[i::layers] for i in range(layers)]


@without_autocast
def solve(options: Options, *xs: Tensor) -> tuple[Tensor, ...]:  # L x (b, B, d) -> 4 L
    """H of each, then M, location and scale of each: what an autograd function can return."""
    hs, ms, locations, scales = zip(*_solve(xs, options), strict=True)
    return *hs, *ms, *locations, *scales


def _solve(xs: Sequence[Tensor], options: Options) -> list[Solved]:
    """One call of the rational solver for all tensors, one of an eigensolver for each n."""
    solved: list = [None] * len(xs)
    calls: list[tuple[tuple, list[int]]] = []
    for i, x in enumerate(xs):
        solver = solver_for(x, options)
        n = 0 if solver in ("rational", "svd") else size(x, options)
        key = solver, n, compute_dtype(x, options)
        for other, members in calls:  # a search, not a dict: n may be symbolic under torch.compile
            if other == key:
                members.append(i)
                break
        else:
            calls.append((key, [i]))
    by_name = {"rational": _solve_rational, "svd": _solve_svd}
    for (solver, *_), members in calls:
        results = by_name.get(solver, _solve_stacked)([xs[i] for i in members], options)
        for i, result in zip(members, results, strict=True):
            result.h.clamp_min_(0)  # rounding and poles go below, on a single direction
            solved[i] = result
    return solved


def _solve_rational(xs: Sequence[Tensor], options: Options) -> list[Solved]:
    if options.group is None:
        results = ops.rational_from_samples(xs, options.center, options.gradient, options.backend)
    else:  # the Gram matrix crosses between the ranks
        located = [locate(x, options) for x in xs]
        grams = [gram(x, *at, options) for x, at in zip(xs, located, strict=True)]
        center = [_centers(x, options) for x in xs]
        dtype = located[0][1].dtype
        results = ops.rational(grams, center, dtype, options.gradient, options.backend)
        results += [location for location, _ in located] + [scale for _, scale in located]
    return [Solved(*layer) for layer in by_layer(results)]


def _solve_stacked(xs: Sequence[Tensor], options: Options) -> list[Solved]:
    located = [locate(x, options) for x in xs]
    grams = [gram(x, *at, options) for x, at in zip(xs, located, strict=True)]
    stacked = grams[0] if len(grams) == 1 else torch.cat(grams)
    if options.power == 2 and options.order == 2:
        h, m = _collision(stacked)
    else:
        h, m = from_spectrum(*spectrum(stacked, options), options.power, options.order)
    parts: Iterable[tuple[Tensor, Tensor]] = [(h, m)]
    if len(grams) > 1:  # unsafe: these become outputs, so no views
        sizes = [k.shape[0] for k in grams]
        parts = zip(*(torch.unsafe_split_with_sizes(t, sizes) for t in (h, m)), strict=True)
    return [
        Solved(h.to(ops.widened(x)), _centered(m, x, options), *at)
        for x, at, (h, m) in zip(xs, located, parts, strict=True)
    ]


def _solve_svd(xs: Sequence[Tensor], options: Options) -> list[Solved]:
    solved = []
    for x in xs:
        at = locate(x, options)
        w, q, noise = singular_spectrum(x, *at, side(x, options), options.gradient)
        h, m = from_spectrum(w, q, noise, options.power, options.order)
        solved.append(Solved(h, _centered(m, x, options), *at))
    return solved


def _centered(m: Tensor, x: Tensor, options: Options) -> Tensor:
    return torch_rows.double_center(m) if options.gradient and _centers(x, options) else m


def spectrum(gram: Tensor, options: Options) -> tuple[Tensor, Tensor | None, float]:
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


def singular_spectrum(
    x: Tensor, location: Tensor, scale: Tensor, side: str, gradient: bool = True
) -> tuple[Tensor, Tensor | None, float]:
    """The same from an SVD of x (b, B, d): n eigenvalues and vectors of the side, n = min(B, d)."""
    xs = torch_rows.standardize(x, location, scale)
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
