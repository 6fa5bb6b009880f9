"""Optimisers and learning-rate schedules by name, SAM, spectral normalisation, a range test."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as _parametrize
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def optimizer(name: str, params: Iterable, *, lr: float, **options) -> Optimizer:
    """One of :data:`OPTIMIZERS`, with its options in torch. ValueError for an unknown name."""
    return _lookup("optimizer", name, OPTIMIZERS)(params, lr=lr, **options)


# ---- schedules: the factor of the learning rate at a share t in [0, 1) of the steps -------------


def constant(t: float) -> float:
    return 1.0


def multistep(t: float, *, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1) -> float:
    """gamma at each milestone passed, milestones being shares of the steps. He et al. (2016)."""
    return gamma ** sum(t >= milestone for milestone in milestones)


def cosine(t: float, *, final: float = 0.0) -> float:
    """Half a cosine from 1 to ``final``. Loshchilov & Hutter (ICLR 2017)."""
    return final + (1 - final) * (1 + math.cos(math.pi * t)) / 2


def linear(t: float, *, final: float = 0.0) -> float:
    """A straight line from 1 to ``final``."""
    return 1 + (final - 1) * t


def onecycle(
    t: float, *, rise: float = 0.3, initial: float = 1 / 25, final: float = 1 / 250_000
) -> float:
    """Up from ``initial`` to 1 in the share ``rise`` of the steps, then down to ``final``.

    Smith & Topin (2018), by cosines; the momentum stays.
    """
    if t < rise:
        return cosine(1 - t / rise, final=initial)
    return cosine((t - rise) / (1 - rise), final=final)


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "multistep": multistep,
    "cosine": cosine,
    "linear": linear,
    "onecycle": onecycle,
}


def schedule(
    name: str,
    optimizer: Optimizer,
    steps: int,
    *,
    warmup: int = 0,
    least: float | None = None,
    **params,
) -> LambdaLR:
    """A scheduler to be stepped after each of ``steps`` optimiser steps.

    The learning rate rises linearly during the first ``warmup`` of them, to its full value at the
    last, and follows one of :data:`SCHEDULES` with ``params`` over the others. ``least`` is the
    rate at which ``cosine``, ``linear`` and ``onecycle`` end, in the place of the share ``final``.
    """
    if least is not None:
        if not 0 <= least <= optimizer.param_groups[-1]["lr"] or "final" in params:
            raise ValueError(f"least is a rate from 0 to lr, and final the same; got {least}")
        params["final"] = least / optimizer.param_groups[-1]["lr"]
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be in [0, {steps}), the number of steps; got {warmup}")
    factor = partial(_lookup("schedule", name, SCHEDULES), **params)

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return factor(min(step - warmup, steps - warmup) / (steps - warmup))

    return LambdaLR(optimizer, at)


# ---- regularisers -------------------------------------------------------------------------------


class SAM:
    """Sharpness-aware minimisation: the gradient at w + rho g / |g| steps from w.

    ``step(closure)`` calls ``closure`` twice, which zeroes the gradients, computes the loss, calls
    backward, and returns the loss; the one at w is returned. A schedule, zero_grad and state_dict
    go to ``optimizer``, the one that takes the step. Clip inside the closure. Batch norms see the
    batch twice. Foret et al. (ICLR 2021). Cost: two passes a step, a copy of the parameters.
    """

    def __init__(self, optimizer: Optimizer, *, rho: float = 0.05) -> None:
        if not rho > 0:
            raise ValueError(f"rho must be positive, got {rho}")
        self.optimizer, self.rho = optimizer, rho

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        closure = torch.enable_grad()(closure)
        loss = closure()
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        start = [p.clone() for p in params]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        scale = self.rho / torch.where(norm > 0, norm, 1)
        for p in params:
            p.add_(scale * p.grad)
        closure()
        for p, before in zip(params, start, strict=True):
            p.copy_(before)  # subtracting the step again would round
        self.optimizer.step()
        return loss


def spectral_norm(model: nn.Module, *, power_iterations: int = 1) -> nn.Module:
    """Divides the weight of every convolution and linear layer by its largest singular value.

    In place, as parametrisations; of a convolution that of the matrix (outputs, inputs x kernel).
    Each training pass refines the singular vectors by ``power_iterations``. Miyato et al. (ICLR
    2018).
    """
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            _parametrize(module, n_power_iterations=power_iterations)
    return model


# ---- learning-rate range test -------------------------------------------------------------------


def lr_range_test(
    step: Callable[[], float],
    optimizer: Optimizer,
    *,
    start: float = 1e-6,
    stop: float = 1.0,
    steps: int = 100,
) -> list[dict[str, float]]:
    """Rows of lr, loss and smoothed loss while lr rises geometrically from start to stop.

    ``step()`` is one training step with ``optimizer`` and returns its loss. Ends early when the
    smoothed loss is 4 times its least, or not finite. Changes the model; the learning rates of the
    optimiser are put back. Smith (WACV 2017).
    """
    if not 0 < start < stop or steps < 2:
        raise ValueError(f"need 0 < start < stop and 2 steps, got {start}, {stop}, {steps}")
    before = [group["lr"] for group in optimizer.param_groups]
    rows, mean, least = [], 0.0, math.inf
    for i in range(steps):
        lr = start * (stop / start) ** (i / (steps - 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = float(step())
        mean = 0.9 * mean + 0.1 * loss
        smooth = mean / (1 - 0.9 ** (i + 1))  # a mean that starts at 0 is too small by this
        if not math.isfinite(smooth) or smooth > 4 * least:
            break
        least = min(least, smooth)
        rows.append({"lr": lr, "loss": loss, "smooth": smooth})
    for group, lr in zip(optimizer.param_groups, before, strict=True):
        group["lr"] = lr
    return rows


def steepest(rows: Sequence[dict[str, float]]) -> float:
    """The learning rate of a range test at which the smoothed loss falls fastest against log lr."""
    if len(rows) < 2:
        raise ValueError(f"a slope needs 2 rows, got {len(rows)}; lower start=")
    falls = [a["smooth"] - b["smooth"] for a, b in pairwise(rows)]
    return rows[max(range(len(falls)), key=falls.__getitem__)]["lr"]


def _lookup(kind: str, name: str, registry: dict[str, Callable]) -> Callable:
    if name not in registry:
        (near,) = difflib.get_close_matches(name, registry, n=1, cutoff=0)
        raise ValueError(f"unknown {kind} {name!r}, nearest {near!r}; one of {', '.join(registry)}")
    return registry[name]
