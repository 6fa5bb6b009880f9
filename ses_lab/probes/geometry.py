"""Geometry of a trained network: input-output Jacobian, input partition, and loss landscape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ses_lab.probes.common import Activations, Batches, evaluation, randn

Generator = torch.Generator | None

# ---- in the space of inputs ----


def jacobian(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: Generator = None,
    *,
    samples: int | None = 256,
    batch_size: int = 64,
) -> dict[str, float]:
    """Singular values of J = d logits / d input, K x P per sample.

    ``condition``: median of sigma_max / sigma_min over the samples (inf for a singular J);
    ``mean_condition``, ``std_condition`` and ``log_condition``: over the others its mean, its
    deviation and the mean of its logarithm; ``singular``: the share of singular J, sigma_min within
    max(K, P) eps of sigma_max; ``spectral`` and ``frobenius``: mean norms.

    Cost: K backward passes, and an SVD of K x P a sample in float64. Sources: spectrum of J,
    Pennington, Schoenholz & Ganguli (NeurIPS 2017); its norm and generalisation, Novak et al.
    (ICLR 2018).
    """
    with evaluation(model, images, labels, generator, samples, batch_size) as batches:
        js = [jacobians(model, x) for x, _ in batches]
    sigma = torch.cat([torch.linalg.svdvals(j.double()) for j in js])  # (N, min(K, P))
    largest, smallest = sigma[:, 0], sigma[:, -1]
    singular = smallest <= max(js[0].shape[1:]) * torch.finfo(images.dtype).eps * largest
    condition = torch.where(singular, torch.inf, largest / smallest)
    finite = condition[~singular]
    return {
        "condition": condition.median().item(),
        "mean_condition": finite.mean().item(),
        "std_condition": finite.std().item(),
        "log_condition": finite.log().mean().item(),
        "singular": singular.double().mean().item(),
        "spectral": largest.mean().item(),
        "frobenius": sigma.norm(dim=1).mean().item(),
    }


def jacobians(model: nn.Module, x: Tensor) -> Tensor:  # (N, ...) -> (N, K, P)
    """d logits / d input of each sample; the model must treat samples apart, as in eval mode."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        totals = model(x).sum(0)  # no sample touches another's logits, so one pass does for all
        rows = [torch.autograd.grad(total, x, retain_graph=True)[0] for total in totals]
    return torch.stack(rows, 1).flatten(2)


def complexity(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: Generator = None,
    *,
    radius: float = 0.005,
    directions: int = 20,
    samples: int | None = 256,
    batch_size: int = 16,
) -> dict[str, float]:
    """Local complexity: how many units' hyperplanes cross a small neighbourhood of a sample.

    The neighbourhood of x is spanned by x +- radius v for random orthonormal v (as many as
    ``directions``, at most P; the same for all samples). A unit is an element of the input of any
    ReLU, leaky ReLU, GELU or SiLU that runs; it counts if its sign is not the same at all these
    points. ``crossings``: mean count a sample; ``share``: of all units.

    For the first layer the count is exact: a hyperplane meets the hull of the points. Behind it the
    hull bends, and a crossing between the points goes unseen. GELU and SiLU have no kink: for them
    it is the analogous count and no partition. Max-pooling cuts the inputs too and is not counted.

    Raises:
        ValueError: no such activation runs.

    Cost: forward passes of 2 * directions points a sample. Source: Humayun, Balestriero & Baraniuk,
    "Deep networks always grok and here is why" (ICML 2024); radius and number of directions are
    those of their code for CIFAR-10, which works on standardised images.
    """
    crossed, units = 0, 0

    def see(_: int, z: Tensor) -> None:
        nonlocal crossed, units
        positive = (z > 0).unflatten(0, (-1, len(offsets)))  # (N, points, ...)
        crossed += (positive.any(1) & ~positive.all(1)).sum().item()
        units += positive[:, 0].numel()

    with evaluation(model, images, labels, generator, samples, batch_size) as batches:
        first = batches[0][0]
        frame = _orthonormal(first[0].numel(), directions, generator, first)
        offsets = radius * torch.cat([frame, -frame]).view(-1, *first.shape[1:])
        for x, _ in batches:
            with torch.no_grad(), Activations(see):
                model((x[:, None] + offsets).flatten(0, 1))
        count = sum(len(x) for x, _ in batches)
    return {"crossings": crossed / count, "share": crossed / units}


def _orthonormal(size: int, count: int, generator: Generator, like: Tensor) -> Tensor:
    q, _ = torch.linalg.qr(randn((size, min(count, size)), generator, like))
    return q.mT  # (count, size)


# ---- in the space of parameters ----


def sharpness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: Generator = None,
    *,
    rho: float = 0.05,
    samples: int | None = 1024,
    batch_size: int = 256,
) -> dict[str, float]:
    """How much the mean cross-entropy L rises at the edge of a ball around the parameters w.

    ``sharpness`` = L(w + rho g / |g|) - L(w) with the gradient g = dL/dw: the one step that SAM
    takes for the maximum over the ball, so a lower bound of it; ``loss`` = L(w); ``gradient_norm``
    = |g|. Batch norm uses its running statistics. The model is not changed.

    Cost: two passes forward and one backward; a copy of the parameters. Source: Foret et al. (ICLR
    2021), whose rho is 0.05.
    """
    parameters = _trainable(model)
    with evaluation(model, images, labels, generator, samples, batch_size) as batches:
        loss, *gradient = _accumulated(
            lambda loss: [loss.detach(), *_gradient(loss, parameters)],
            _losses(model, parameters, batches),
        )
        norm = _dot(gradient, gradient).sqrt()
        scale = rho / norm.clamp_min(1e-12)
        moved = {
            name: p.detach() + scale * g
            for (name, p), g in zip(parameters.items(), gradient, strict=True)
        }
        with torch.no_grad():
            rise = sum(_losses(model, moved, batches)) - loss
    return {"loss": loss.item(), "sharpness": rise.item(), "gradient_norm": norm.item()}


def hessian(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: Generator = None,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    samples: int | None = 256,
    batch_size: int = 256,
) -> dict[str, float]:
    """``eigenvalue``: the largest of the Hessian of the mean cross-entropy in the parameters.

    Power iteration on Hessian-vector products until the residual |H v - e v| is below ``tolerance``
    |e|. It finds the eigenvalue of the largest magnitude; should that be negative, a second round
    on the Hessian less this one finds the largest. ``residual``: the last one over |e|, so some
    eigenvalue is as near as that; ``iterations``: the products taken. Batch norm uses its running
    statistics.

    Cost: ``iterations`` double backward passes at most, twice as many if shifted. Source: Yao et
    al., "PyHessian" (IEEE Big Data 2020).
    """
    parameters = _trainable(model)

    def product(v: list[Tensor]) -> list[Tensor]:
        def of(loss: Tensor) -> list[Tensor]:
            slope = _dot(_gradient(loss, parameters, create_graph=True), v)
            return _gradient(slope, parameters)  # H v

        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return _accumulated(of, _losses(model, parameters, batches))

    with evaluation(model, images, labels, generator, samples, batch_size) as batches:
        start = [randn(p.shape, generator, p) for p in parameters.values()]
        value, residual, used = _power_iteration(product, start, iterations, tolerance, 0.0)
        if value < 0:
            shift = value
            value, residual, more = _power_iteration(product, start, iterations, tolerance, shift)
            used += more
    return {"eigenvalue": value, "residual": residual, "iterations": used}


def gradient_alignment(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: Generator = None,
    *,
    samples: int | None = 1024,
    batch_size: int = 256,
) -> dict[str, float]:
    """Whether the loss pulls the weights towards lower rank: cosines of dL/dW and U V^T.

    W = U S V^T is a weight as a matrix (out, all else), fused projections whole, and U V^T the
    gradient of its nuclear norm; L the mean cross-entropy in eval mode. ``cosine``: mean over the
    weights, positive where descent lowers the norm; ``aligned``: the share of positive ones.
    Weights without a gradient are left out; NaN if none has one.

    Cost: a pass forward and backward, and an SVD in float64 of each weight. Sources: "gradient
    alignment" of github.com/mgrts/vision-spectra at fe4758b, there of linear layers alone and for
    the last batch of training; the implicit bias, Gunasekar et al. (NeurIPS 2017).
    """
    parameters = {name: p for name, p in _trainable(model).items() if p.dim() in (2, 4)}
    with evaluation(model, images, labels, generator, samples, batch_size) as batches:
        gradients = _accumulated(
            lambda loss: _gradient(loss, parameters), _losses(model, parameters, batches)
        )
    cosines = []
    for p, gradient in zip(parameters.values(), gradients, strict=True):
        u, _, vh = torch.linalg.svd(p.detach().flatten(1).double(), full_matrices=False)
        g = gradient.flatten(1).double()
        if norm := g.norm().item():
            cosines.append(((u @ vh) * g).sum().item() / (norm * len(vh) ** 0.5))
    found = torch.tensor(cosines)
    return {"cosine": found.mean().item(), "aligned": (found > 0).float().mean().item()}


def _power_iteration(
    product: Callable[[list[Tensor]], list[Tensor]],
    v: list[Tensor],
    iterations: int,
    tolerance: float,
    shift: float,
) -> tuple[float, float, int]:
    """An eigenvalue of H, the farthest from ``shift``; its relative residual; products taken."""
    for step in range(1, iterations + 1):
        norm = _dot(v, v).sqrt()
        v = [x / norm for x in v]
        hv = product(v)
        value = _dot(v, hv)
        error = [h - value * x for h, x in zip(hv, v, strict=True)]
        residual = (_dot(error, error).sqrt() / value.abs().clamp_min(1e-30)).item()
        if residual < tolerance or step == iterations:
            return value.item(), residual, step
        v = [h - shift * x for h, x in zip(hv, v, strict=True)]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _losses(model: nn.Module, parameters: dict[str, Tensor], batches: Batches) -> Iterator[Tensor]:
    """Parts of the mean loss over all samples, batch by batch: they add up to it."""
    count = sum(len(y) for _, y in batches)
    for x, y in batches:
        logits = torch.func.functional_call(model, parameters, (x,))
        yield F.cross_entropy(logits, y, reduction="sum") / count


def _gradient(loss: Tensor, parameters: dict[str, Tensor], **options) -> list[Tensor]:
    ws = list(parameters.values())
    return list(torch.autograd.grad(loss, ws, materialize_grads=True, **options))


def _accumulated(of: Callable[[Tensor], list[Tensor]], losses: Iterator[Tensor]) -> list[Tensor]:
    total = None
    with torch.enable_grad():
        for loss in losses:
            parts = of(loss)
            total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    return total


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))
