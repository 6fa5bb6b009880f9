"""Adversarial robustness: FGSM and projected gradient descent, in L-infinity and L2."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ses_lab.probes.common import accuracy, evaluation, rand, randn


def attack(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float,
    norm: str = "linf",
    random_start: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:  # (N, ...), (N,) or (N, K) -> (N, ...)
    """Adversarial examples within ``epsilon`` of x that ascend the cross-entropy.

    Each of ``steps`` steps goes ``step_size`` along the gradient (its sign for ``norm="linf"``, its
    direction for ``"l2"``), then back into the ball and, for images (four axes), into [0, 1]. The
    model's mode is not touched: in training mode its batch statistics move. Parameters get no
    gradient. The last iterate is returned, not the worst.

    Raises:
        ValueError: an unknown norm.

    Cost: ``steps`` forward and backward passes. Sources: FGSM, Goodfellow, Shlens & Szegedy (ICLR
    2015), is one step of epsilon from x; PGD, Madry et al. (ICLR 2018).
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm is 'linf' or 'l2', got {norm!r}")
    low, high = (0.0, 1.0) if x.dim() == 4 else (-math.inf, math.inf)
    delta = torch.zeros_like(x)
    if random_start:
        delta = _random_start(x, epsilon, norm, generator)
    adversarial = (x + delta).clamp(low, high)
    for _ in range(steps):
        with torch.enable_grad():
            point = adversarial.detach().requires_grad_()
            # The sum: a sample's gradient is then free of the size of its batch.
            loss = F.cross_entropy(model(point), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
        step = gradient.sign() if norm == "linf" else gradient / _norms(gradient)
        delta = adversarial + step_size * step - x
        if norm == "linf":
            delta = delta.clamp(-epsilon, epsilon)
        else:
            delta = delta * (epsilon / _norms(delta)).clamp(max=1)
        adversarial = (x + delta).clamp(low, high)
    return adversarial


def _norms(x: Tensor) -> Tensor:  # (N, ...) -> (N, 1, ...)
    norms = x.flatten(1).norm(dim=1).clamp_min(1e-12)
    return norms.view(-1, *[1] * (x.dim() - 1))


def _random_start(x: Tensor, epsilon: float, norm: str, generator) -> Tensor:
    if norm == "linf":
        return epsilon * (2 * rand(x.shape, generator, x) - 1)
    direction = randn(x.shape, generator, x)
    radius = rand((len(x), *[1] * (x.dim() - 1)), generator, x) ** (1 / x[0].numel())
    return epsilon * radius * direction / _norms(direction)  # uniform in the ball


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    *,
    epsilon: float = 8 / 255,
    samples: int | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """``clean`` and ``robust`` accuracy under FGSM: one signed step of epsilon (:func:`attack`)."""
    with evaluation(model, images, labels, generator, samples, batch_size) as batches:
        attacked = [
            (attack(model, x, y, epsilon=epsilon, steps=1, step_size=epsilon), y)
            for x, y in batches
        ]
        return {"clean": accuracy(model, batches), "robust": accuracy(model, attacked)}


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    *,
    norm: str = "linf",
    epsilon: float | None = None,
    steps: int = 20,
    samples: int | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """``clean`` and ``robust`` accuracy under PGD: random start, steps of 2.5 epsilon / steps.

    epsilon defaults to 8 / 255 (``norm="linf"``) and 0.5 (``"l2"``), the usual ones on CIFAR-10. An
    upper bound of the accuracy under the worst perturbation: a network that masks its gradients
    looks better than it is. Source of the step: Madry et al.; options and cost: :func:`attack`.
    """
    if epsilon is None:
        epsilon = 0.5 if norm == "l2" else 8 / 255
    options = {"norm": norm, "epsilon": epsilon, "steps": steps, "step_size": 2.5 * epsilon / steps}
    with evaluation(model, images, labels, generator, samples, batch_size) as batches:
        attacked = [
            (attack(model, x, y, random_start=True, generator=generator, **options), y)
            for x, y in batches
        ]
        return {"clean": accuracy(model, batches), "robust": accuracy(model, attacked)}
