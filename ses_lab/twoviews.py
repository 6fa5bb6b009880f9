"""What brings two views of the same images together: OBJECTIVES, of their projections.

Each takes a and b, (N, D), and returns a () loss; in float32, whatever the projections came in,
which the exponentials of NT-Xent need.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def simclr(a: Tensor, b: Tensor, *, temperature: float = 0.5) -> Tensor:
    """NT-Xent: the other view of an image among all 2 N - 1 other views, by their cosines.

    Chen et al., "A simple framework for contrastive learning" (ICML 2020).
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    n = len(a)
    z = F.normalize(torch.cat([a, b]).float(), dim=1)  # (2 N, D)
    cosines = z @ z.mT / temperature
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(cosines.masked_fill(itself, -torch.inf), partner)


def vicreg(
    a: Tensor,
    b: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Tensor:
    """Mean squared distance of the views; deviations under 1; squared covariances over D.

    With ``variance`` and ``covariance`` 0 nothing speaks against the same output for all images.
    Bardes, Ponce & LeCun, "VICReg" (ICLR 2022).
    """
    a, b = a.float(), b.float()
    n, d = a.shape
    loss = invariance * F.mse_loss(a, b)
    for z in (a, b):
        deviations = (z.var(0) + 1e-4).sqrt()
        centred = z - z.mean(0)
        covariances = centred.mT @ centred / (n - 1)
        off = covariances.square().sum() - covariances.diagonal().square().sum()
        loss = loss + variance * F.relu(1 - deviations).mean() / 2 + covariance * off / d
    return loss


def barlow_twins(a: Tensor, b: Tensor, *, off_diagonal: float = 0.005) -> Tensor:
    """The matrix of correlations between the features of both views, less the identity, squared.

    ``off_diagonal`` weighs what is off its diagonal. Zbontar et al., "Barlow Twins" (ICML 2021).
    """
    x, y = (
        (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (a.float(), b.float())
    )
    correlations = x.mT @ y / len(x)
    diagonal = correlations.diagonal()
    off = correlations.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + off_diagonal * off


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "simclr": simclr,
    "vicreg": vicreg,
    "barlow_twins": barlow_twins,
}
