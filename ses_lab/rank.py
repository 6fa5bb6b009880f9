"""Effective ranks of what SES hooks, in eval mode: on other samples than those it is trained on."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ses_kernels import SESRegularizer


def layer_of(name: str) -> str:
    """The layer of an entropy: of a head, ``blocks.0.attn:heads/3``, the one that has it."""
    return name.partition("/")[0]


def ranks(
    regularizer: SESRegularizer, model: nn.Module, images: Tensor, step: int
) -> dict[str, dict[str, float]]:
    """``rank``, exp(H), and ``rank_ratio``, rank / d^beta, of each layer and each head of one.

    Args:
        regularizer: of ``model``, and used for nothing else; one that trains stays disabled().
        model: in eval mode.
        images: N of them in one batch; a rank is at most N - 1.
        step: at which beta is taken, where it is a schedule.

    Cost: a forward pass with its graph, since that tells which axes are which.
    Source: Roy & Vetterli (EUSIPCO 2007).
    """
    regularizer.lambda_ses, regularizer.step = 0.0, 0
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # said of the batches that are trained on
        with _as_in_training(model):
            model(images)
        model.train()
        regularizer.loss()
        model.eval()
    regularizer.step = step
    entropies, targets = regularizer.flat_entropies(), regularizer.targets
    return {
        "rank": {name: math.exp(h) for name, h in entropies.items()},
        "rank_ratio": {
            name: math.exp(h - targets[layer_of(name)]) for name, h in entropies.items()
        },
    }


@contextlib.contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """The hooks of a regulariser see every module in training mode, its forward in eval mode."""

    def on(module: nn.Module, *_) -> None:
        module.training = True

    def off(module: nn.Module, *_) -> None:
        module.training = False

    handles = []
    for module in model.modules():
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            handles += [register(on, prepend=True), register(off)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
