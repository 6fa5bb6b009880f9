"""What the features look like: ranks of the stages, dead units, neural collapse of the last."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ses_kernels import effective_rank
from ses_lab import models
from ses_lab.probes.common import Activations, evaluation


def ranks(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    *,
    samples: int | None = 2048,
    batch_size: int = 256,
) -> dict[str, float]:
    """Stage -> effective rank, exp(H), of the covariance of its features (mean over positions).

    At most min(samples - 1, width): compare runs at equal ``samples``. Needs ``model.stages``.
    Source: Roy & Vetterli (EUSIPCO 2007); :func:`ses_kernels.effective_rank`.
    """
    pooled: dict[str, list[Tensor]] = {name: [] for name in model.stages}
    with evaluation(model, images, labels, generator, samples, batch_size) as batches:
        for x, _ in batches:
            with torch.no_grad():
                stages = models.outputs(model, x).stages
            for name, stage in zip(model.stages, stages, strict=True):
                pooled[name].append(_mean_over_positions(stage))
    return {name: effective_rank(torch.cat(x)).item() for name, x in pooled.items()}


def _mean_over_positions(stage: Tensor) -> Tensor:
    """(N, C, H, W), (N, T, D) or (N, D) -> (N, features), in float32 (float64)."""
    wide = torch.float64 if stage.dtype == torch.float64 else torch.float32
    return stage if stage.dim() == 2 else stage.mean({3: (1,), 4: (2, 3)}[stage.dim()], dtype=wide)


def dead_units(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    *,
    samples: int | None = 512,
    batch_size: int = 256,
) -> dict[str, float]:
    """``share`` of the ``units`` that are active for none of the samples.

    A unit is a feature of what goes into a ReLU, leaky ReLU, GELU or SiLU, a channel of
    (N, C, H, W) and else an element of the last axis; it is active where that is positive, at any
    position. Behind a ReLU the others put out 0 and get no gradient; behind the rest it is the
    analogous count. Fewer samples find more of them: compare runs at equal ``samples``.

    Raises:
        ValueError: no such activation runs.

    Source: Lu, Shin, Su & Karniadakis, "Dying ReLU and initialization" (2020).
    """
    active: dict[int, Tensor] = {}  # of each activation that runs, (features,) bool

    def see(i: int, z: Tensor) -> None:
        found = (z > 0).movedim(1 if z.dim() == 4 else -1, 0).flatten(1).any(1)
        active[i] = active.get(i, False) | found

    with evaluation(model, images, labels, generator, samples, batch_size) as batches:
        for x, _ in batches:
            with torch.no_grad(), Activations(see):
                model(x)
    units = torch.cat([*active.values()])
    return {"share": (~units).double().mean().item(), "units": len(units)}


def collapse(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    *,
    samples: int | None = 2048,
    batch_size: int = 256,
) -> dict[str, float]:
    """Neural collapse of the classifier's inputs: all four go to 0 as the features collapse.

    With class means mu_c about their mean mu, K classes present and D features: ``nc1`` =
    tr(S_W S_B^+) / K, the scatter within classes over that between them; ``equinorm`` = std / mean
    of |mu_c - mu|; ``equiangular`` = std of the cosines between mu_c - mu and mu_d - mu, c != d;
    ``max_angle`` = mean |cosine + 1 / (K - 1)|, the distance from a simplex. The paper measures the
    training set: hand that in to compare. Needs ``model.classifier``.

    Raises:
        ValueError: fewer than two classes.

    Cost: one forward pass and an SVD of K x D. Source: Papyan, Han & Donoho, PNAS 117 (2020).
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].double())

    handle = model.get_submodule(model.classifier).register_forward_pre_hook(keep)
    try:
        with evaluation(model, images, labels, generator, samples, batch_size) as batches:
            with torch.no_grad():
                for x, _ in batches:
                    model(x)
            y = torch.cat([y for _, y in batches])
    finally:
        handle.remove()
    return _collapse(torch.cat(found), y)


def _collapse(h: Tensor, y: Tensor) -> dict[str, float]:  # (N, D), (N,)
    classes, y = y.unique(return_inverse=True)
    k = len(classes)
    if k < 2:
        raise ValueError(f"collapse needs samples of two or more classes, got {k}")
    counts = y.bincount(minlength=k).to(h)
    means = h.new_zeros(k, h.shape[1]).index_add(0, y, h) / counts[:, None]
    centred = means - means.mean(0)  # of the means: S_B weighs the classes equally
    # S_B = V S^2 V^T without a D x D matrix. The rows sum to 0: the K-th value is round-off, and so
    # is what the subtraction of large means leaves.
    _, s, vh = torch.linalg.svd(centred / k**0.5, full_matrices=False)
    s, vh = s[: k - 1], vh[: k - 1]
    size = torch.maximum(s[0], means.norm(dim=1).max())
    kept = s > size * max(centred.shape) * torch.finfo(h.dtype).eps
    within = ((h - means[y]) @ vh[kept].mT).square().mean(0)
    norms = centred.norm(dim=1)
    directions = centred / norms[:, None]
    cosines = (directions @ directions.mT)[~torch.eye(k, dtype=torch.bool, device=h.device)]
    return {
        "nc1": (within / s[kept] ** 2).sum().item() / k if kept.any() else math.inf,
        "equinorm": (norms.std(correction=0) / norms.mean()).item(),
        "equiangular": cosines.std(correction=0).item(),
        "max_angle": (cosines + 1 / (k - 1)).abs().mean().item(),
    }
