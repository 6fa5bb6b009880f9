"""The pairs of docs/migration.md: the published formula on the published matrices, and ours."""

from __future__ import annotations

import math

import pytest
import torch
from test_regularizer import Net, batch, relative
from test_targets import Vit, images

from ses_kernels import SESRegularizer, Term


def published(activations, beta):
    """By eigenvalues of the covariance, raised to 1e-12, in float64 instead of float32."""
    total = 0
    for x in activations:
        x = x.double()
        x = x.mean((2, 3)) if x.dim() == 4 else x.flatten(1)
        centred = x - x.mean(0, keepdim=True)
        values = torch.linalg.eigvalsh(centred.T @ centred / (len(x) - 1)).clamp(min=1e-12)
        p = values / values.sum()
        total = total + (-(p * p.log()).sum() - beta * math.log(x.shape[1])) ** 2
    return total


class Collector:
    """What the published collectors leave in ``activations``: a function of each block's output."""

    def __init__(self, modules, matrix):
        self.activations = []
        for module in modules:
            module.register_forward_hook(lambda m, args, out: self.activations.append(matrix(out)))


def weights(model, last):
    return [b.attn.seen["weights"].mean(2).flatten(1) for b in model.blocks[-last:]]


def whole(out):
    return out


def tokens(out):
    return out.mean(1)


PAIRS = {
    "ActivationCollector": (
        lambda: (Net(), batch()[0]), lambda m: ([*m.blocks, m.avgpool], whole), {}, 0.7),
    "ViTCollector": (
        lambda: (Vit(), images()), lambda m: (m.blocks, tokens), {"layers": "blocks"}, 0.7),
    "BlockOutputCollector": (
        lambda: (Vit(), images()), lambda m: (m.blocks[-2:], tokens),
        {"layers": "blocks", "hook_last_n": 2}, 0.5),
    "AttentionOutputCollector": (
        lambda: (Vit(), images()), lambda m: ([b.attn for b in m.blocks[-2:]], tokens),
        {"layers": "attention", "hook_last_n": 2}, 0.5),
    "not pooled": (
        lambda: (Vit(), images()), lambda m: (m.blocks[-1:], whole),
        {"layers": "blocks.2", "pool": lambda x: x.flatten(1)}, 0.7),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs(pair):
    make, hooked, options, beta = PAIRS[pair]
    model, x = make()
    collector = Collector(*hooked(model))
    reg = SESRegularizer(model, beta=beta, lambda_ses=1.0, **options)
    model(x)
    compare(model, reg.loss(), published(collector.activations, beta))


def test_attention_weights_and_the_combined_collector():
    model, x = Vit(), images()
    reg = SESRegularizer(
        model, beta=0.5, lambda_ses=1.0, terms=[Term("blocks", last=2), Term("attention_weights")]
    )
    collector = Collector(model.blocks[-2:], tokens)
    model(x)
    compare(model, reg.loss(), published([*collector.activations, *weights(model, 3)], 0.5))


def compare(model, ours, theirs):
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    gradients = [
        torch.cat([g.flatten().double() for g in torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, materialize_grads=True)])
        for loss in (ours, theirs)
    ]  # fmt: skip
    assert relative(*gradients) < 1e-4
