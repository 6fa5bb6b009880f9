"""Spectra of weights: entropy, stable rank, norms and power-law tails of every matrix of a model.

Which matrices those are is said in :mod:`ses_lab.weights`. WeightWatcher (Martin, Peng & Mahoney,
Nature Communications 12, 2021) takes a k x k convolution as k * k matrices (out, in) and pools
their eigenvalues instead, and leaves fused projections whole: for these layers the numbers differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ses_kernels import spectral_entropies
from ses_lab.weights import Source, matrices


@dataclass(frozen=True)
class PowerLaw:
    """A fit of p(x) ~ x^-alpha on the ``tail`` values from ``xmin`` up, at KS distance ``ks``."""

    alpha: float
    xmin: float
    ks: float
    tail: int


def singular_values(source: Source) -> dict[str, np.ndarray]:
    """Layer -> its min(rows, columns) singular values, float64, descending; NaN if not finite.

    Raises as :func:`matrices`. Cost: an SVD of each matrix in float64, on the tensor's device.
    """
    return {layer: _svdvals(w) for layer, w in matrices(source).items()}


def _svdvals(w: Tensor) -> np.ndarray:
    if not w.isfinite().all():  # LAPACK would raise, and a diverged run has to be looked at
        return np.full(min(w.shape), np.nan)
    tall = w if w.shape[0] >= w.shape[1] else w.mT  # five times faster in LAPACK than wide
    return torch.linalg.svdvals(tall.double().contiguous()).cpu().numpy()


def _eigenvalues(w: Tensor, sigma: np.ndarray) -> np.ndarray:  # of W^T W, above round-off, or NaN
    floor = sigma[0] * max(w.shape) * torch.finfo(w.dtype).eps
    return sigma[~(sigma <= floor)] ** 2


def power_law(values: np.ndarray) -> PowerLaw:
    """Continuous power law from the xmin that gives the least Kolmogorov-Smirnov distance.

    For each xmin alpha is that of maximum likelihood, 1 + n / sum log(x / xmin) over the n values
    x >= xmin, without an upper bound. The distance is taken to (i - 1) / n at the i-th value, as in
    the authors' code, WeightWatcher and the ``powerlaw`` package. The latter agrees when its range
    is widened (``parameter_ranges={"alpha": [1.001, 1000]}``); by default it caps alpha at 3.
    WeightWatcher agrees from 20 values on; for fewer it corrects the bias of alpha and favours long
    tails. No fit says that there is a power law: look at ``ks``, ``tail`` and the CCDF.

    Args:
        values: (n,), positive; fewer than 3 distinct ones, or NaN, give NaN.

    Cost: O(n^2). Source: Clauset, Shalizi & Newman, SIAM Review 51 (2009), sections 3.1 and 3.3.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    starts = np.unique(x, return_index=True)[1]
    if len(starts) < 3 or np.isnan(x).any():
        return PowerLaw(np.nan, np.nan, np.nan, 0)
    best = PowerLaw(np.nan, np.nan, np.inf, 0)
    for start in starts[:-1]:  # the largest value alone has no tail
        tail = x[start:] / x[start]
        n = len(tail)
        alpha = 1 + n / np.log(tail).sum()
        ks = np.abs(1 - tail ** (1 - alpha) - np.arange(n) / n).max()
        if ks < best.ks:
            best = PowerLaw(float(alpha), float(x[start]), float(ks), n)
    return best


def hill(values: np.ndarray, k: int | None = None) -> float:
    """Hill's estimate of the exponent alpha of p(x) ~ x^-alpha, from the k largest values.

    1 + k / sum_{i <= k} log(x_(i) / x_(k + 1)), x descending; k is half of the values unless given.
    NaN where fewer than k + 1 are there. The spread with k is what the choice of k costs.

    Sources: Hill, Annals of Statistics 3 (1975); on eigenvalues of weights with k = n / 2, Zhou et
    al., "Temperature Balancing" (NeurIPS 2023).
    """
    x = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    k = len(x) // 2 if k is None else k
    if not 0 < k < len(x) or x[0] == x[k]:
        return np.nan
    return float(1 + k / np.log(x[:k] / x[k]).sum())


def hill_top(values: np.ndarray) -> float:
    """1 + k / sum_{i <= k} log(x_(i) / x_(k)) of the largest tenth, x descending, at least 5.

    As in mgrts/vision-spectra (metrics/spectral.py), which takes the k-th value for the threshold:
    by (k - 1) / k nearer to 1 than :func:`hill` of k - 1. NaN for fewer than 8 values.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    k = max(5, len(x) // 10)
    if len(x) < 8 or x[0] == x[k - 1]:
        return np.nan
    return float(1 + k / np.log(x[:k] / x[k - 1]).sum())


def decay(sigma: np.ndarray) -> float:
    """The exponent a of sigma_i ~ i^-a, by least squares over the ranks from 10 to 60 %.

    That of mgrts/vision-spectra, there called alpha. NaN for fewer than two ranks, and where one of
    them has the value 0.

    Args:
        sigma: (n,) descending.
    """
    n = len(sigma)
    ranks = np.arange(max(1, n // 10), max(1, n * 6 // 10))  # from 0
    if len(ranks) < 2 or not sigma[ranks[-1]] > 0:
        return np.nan
    return float(-np.polyfit(np.log(ranks + 1), np.log(sigma[ranks]), 1)[0])


def table(source: Source) -> list[dict[str, Any]]:
    """One row for each matrix of a model, state dict or checkpoint.

    ``layer``, ``rows``, ``columns``; ``entropy``: of p_i = sigma_i / sum sigma, in nats, mean not
    removed; ``stable_rank``: |W|_F^2 / |W|_2^2; ``alpha``, ``xmin``, ``ks``, ``tail``
    (:func:`power_law`), ``hill`` and ``hill_top`` of the eigenvalues sigma_i^2 of W^T W; ``decay``
    of the sigma_i (:func:`decay`); ``frobenius`` and ``spectral`` norms. Eigenvalues that are
    round-off (numpy's ``matrix_rank`` rule, eps of the weight's dtype) are left out of the fits.

    WeightWatcher has the same stable rank and the same alpha (see :func:`power_law`); its ``norm``
    and ``spectral_norm`` are the squares of ours, and its ``entropy`` is that of sigma_i^2 over the
    logarithm of the rank. An exponent alpha of sigma^2 is 2 alpha - 1 for sigma.

    Raises as :func:`matrices`. Cost: two decompositions and O(n^2) a matrix, n its smaller side.
    """
    ws = matrices(source)
    entropies = spectral_entropies(list(ws.values()), center=False, power=1).tolist()
    rows = []
    for (layer, w), entropy in zip(ws.items(), entropies, strict=True):
        sigma = _svdvals(w)
        eigenvalues = _eigenvalues(w, sigma)
        fit = power_law(eigenvalues)
        rows.append(
            {
                "layer": layer,
                "rows": w.shape[0],
                "columns": w.shape[1],
                "entropy": entropy,
                "stable_rank": float((sigma**2).sum() / sigma[0] ** 2) if sigma[0] else np.nan,
                "alpha": fit.alpha,
                "xmin": fit.xmin,
                "ks": fit.ks,
                "tail": fit.tail,
                "hill": hill(eigenvalues),
                "hill_top": hill_top(eigenvalues),
                "decay": decay(sigma),
                "frobenius": float(np.linalg.norm(sigma)),
                "spectral": float(sigma[0]),
            }
        )
    return rows


def gradient_alignment(model: nn.Module, k: int = 10) -> dict[str, float]:
    """Layer -> the share of its gradient's energy in the k leading singular directions of W.

    |U_k^T G V_k|_F^2 / |G|_F^2 in [0, 1], for W = U S V^T and the gradient G that ``backward()``
    left; NaN where G is 0. A G without regard to W gives k^2 / (rows * columns) on average, and a
    step along the directions that W has already grown gives 1. The definition is ours, in the
    spirit of the "tiny subspace" of Gur-Ari, Roberts & Dyer (2018), who project on the Hessian's.

    Raises:
        ValueError: no weight has a gradient.

    Cost: an SVD of each matrix in float64.
    """
    # A direction of weight norm has a gradient of its own, which is not that of the weight.
    normed = ("original0", "original1", "_g", "_v")
    gradients = {n: p.grad for n, p in model.named_parameters()
                 if p.grad is not None and not n.endswith(normed)}  # fmt: skip
    ws, gs = matrices(model), matrices(gradients)
    shares = {}
    for layer, g in gs.items():
        g = g.double()
        u, _, vh = torch.linalg.svd(ws[layer].double(), full_matrices=False)
        within = u[:, :k].mT @ g @ vh[:k].mT
        shares[layer] = float(within.square().sum() / g.square().sum())
    return shares


def save(file: str | Path | BinaryIO, source: Source) -> None:
    """An ``.npz`` of :func:`singular_values`, one array per layer, for ``numpy.load``."""
    np.savez(file, **singular_values(source))


def plot(source: Source) -> Figure:
    """Eigenvalues of W^T W, one row of panels per layer: histogram and CCDF with the fitted tail.

    All axes but the counts are log10. Layers of fewer than 3 distinct eigenvalues, or with NaN,
    have empty panels. The caller saves.
    """
    ws = matrices(source)
    figure = Figure(figsize=(8, 2.2 * len(ws)), layout="constrained")
    panels = figure.subplots(len(ws), 2, squeeze=False)
    for (left, right), (layer, w) in zip(panels, ws.items(), strict=True):
        # Logarithms on linear axes: a hundred log axes take twice as long to draw.
        left.set(title=layer, ylabel="count")
        right.set(ylabel="log10 share above")
        x = np.sort(_eigenvalues(w, _svdvals(w)))
        fit = power_law(x)
        if not fit.tail:
            continue
        left.stairs(*np.histogram(np.log10(x), bins=30), fill=True)
        right.plot(np.log10(x), np.log10(1 - np.arange(len(x)) / len(x)), ".", markersize=3)
        ends = np.log10(x[[-fit.tail, -1]])
        start = np.log10(fit.tail / len(x))
        label = f"alpha = {fit.alpha:.2f}, KS = {fit.ks:.3f}"
        right.plot(ends, start + (1 - fit.alpha) * (ends - ends[0]), label=label)
        right.legend(loc="lower left")
    for panel in panels[-1]:
        panel.set_xlabel("log10 eigenvalue")
    return figure
