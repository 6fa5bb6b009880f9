"""Published spectral metrics, each one definition by the entropy of functional.py.

Every function takes ``(..., B, d)`` and returns ``(...)``. Without a spectrum (zeros; equal rows
where the mean is removed) ranks and scores are 1 and the entropy 0, with a gradient of 0. Dtypes,
precision, NaN, errors, derivatives and cost are those of :func:`ses_kernels.spectral_entropy`, and
``**options`` its ``solver``, ``rank``, ``backend`` and ``group``.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack  # of typing from Python 3.11 on

from ses_kernels.checks import check
from ses_kernels.functional import effective_rank, spectral_entropy


class Options(TypedDict, total=False):
    """What no definition fixes."""

    solver: str
    rank: int | None
    backend: str
    group: torch.distributed.ProcessGroup | None


def rankme(x: Tensor, **options: Unpack[Options]) -> Tensor:  # (..., B, d) -> (...)
    """RankMe of B embeddings: exp of the entropy of p_k = σ_k / Σ_j σ_j.

    The mean is not removed. The published value adds 1e-7 to every p_k to keep log 0 away, which
    moves it by a factor of at most exp(1.7e-6 min(B, d)); here 0 log 0 = 0. Dtypes, errors, cost
    and options: :func:`ses_kernels.spectral_entropy`.

    Source: Garrido, Balestriero, Najman & LeCun (ICML 2023).

    Examples:
        >>> ses_kernels.metrics.rankme(torch.eye(8)[:5])  # five directions of eight
        tensor(5.)
    """
    return effective_rank(x, center=False, power=1, order=1, **options)


def vendi_score(
    x: Tensor, *, order: float = 1.0, **options: Unpack[Options]
) -> Tensor:  # (..., B, d) -> (...)
    """Vendi score of B samples under cosine similarity: the effective number of distinct ones.

    exp of the Renyi entropy of order q = ``order`` of the eigenvalues of K / B, where K_ij is the
    cosine of rows i and j. A row of zeros has no direction: it is left out, with a gradient of 0.
    Dtypes, errors, cost and options: :func:`ses_kernels.spectral_entropy`; saved for backward are
    two scaled copies of x, float32 or float64, in its place.

    Args:
        order: q > 0. A small q counts rare directions in full, ``math.inf`` the commonest alone.

    Sources: Friedman & Dieng (TMLR 2023); orders: Pasarkar & Dieng, "Cousins of the Vendi Score"
    (AISTATS 2024).

    Examples:
        >>> x = torch.eye(3)[[0, 0, 1, 1]]  # four samples, each of them twice
        >>> ses_kernels.metrics.vendi_score(x)
        tensor(2.)
    """
    return effective_rank(_unit_rows(x), center=False, power=2, order=order, **options)


def vne(x: Tensor, **options: Unpack[Options]) -> Tensor:  # (..., B, d) -> (...)
    """Von Neumann entropy, in nats, of the autocorrelation of B samples.

    -tr(C log C), where C is the mean of z z^T over the rows z of x scaled to unit length. It is the
    log of :func:`vendi_score`, which says what becomes of rows of zeros and of memory. Dtypes,
    errors, cost and options: :func:`ses_kernels.spectral_entropy`.

    Source: Kim, Kang, Hwang, Shin & Rhee (CVPR 2023).

    Examples:
        >>> ses_kernels.metrics.vne(torch.eye(4))  # log 4
        tensor(1.3863)
    """
    return spectral_entropy(_unit_rows(x), center=False, power=2, order=1, **options)


def participation_ratio(x: Tensor, **options: Unpack[Options]) -> Tensor:  # (..., B, d) -> (...)
    """(tr C)^2 / tr(C^2), with C the d x d covariance of B samples: a count of its dimensions.

    No eigensolver: O(B d min(B, d)). Dtypes, errors and options:
    :func:`ses_kernels.spectral_entropy`.

    Source: Litwin-Kumar, Harris, Axel, Sompolinsky & Abbott, Neuron 93 (2017).

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> ses_kernels.metrics.participation_ratio(x)
        tensor(2.)
    """
    return effective_rank(x, center=True, power=2, order=2, **options)


def stable_rank(w: Tensor, **options: Unpack[Options]) -> Tensor:  # (..., m, n) -> (...)
    """|W|_F^2 / |W|_2^2 of a weight matrix W, its mean not removed.

    Where the largest singular value is multiple, the gradient is that of one of its vectors.
    Dtypes, errors, cost and options: :func:`ses_kernels.spectral_entropy`.

    Source: Rudelson & Vershynin, "Sampling from large matrices", J. ACM 54 (2007).

    Examples:
        >>> ses_kernels.metrics.stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])))  # 6 / 4
        tensor(1.5000)
    """
    return effective_rank(w, center=False, power=2, order=math.inf, **options)


def _unit_rows(x: Tensor) -> Tensor:  # (..., B, d), at least float32; rows of zeros stay zero
    check(x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.detach().abs().amax(-1, keepdim=True)  # a constant: the quotient is free of it
    # Infinity lets no gradient through to a row of zeros, not even round-off, whatever its scale.
    x = x / torch.where(largest == 0, math.inf, largest)
    # One entry of a row is +-1 now unless all are 0: the clamp is for rows of zeros alone.
    return x / x.square().sum(-1, keepdim=True).clamp_min(0.5).sqrt()
