"""Entropies of a network's layers, forward and with the gradient, by every provider."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.measure import measure
from bench.providers import Provider, io_bytes, providers
from bench.shapes import SHAPES, Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}[DEVICE]
CLOCKS = {"cpu": ["wall"], "cuda": ["eager", "graph"]}[DEVICE]


def _call(provider: Provider, xs: list[torch.Tensor], mode: str):
    if mode == "forward":
        return torch.no_grad()(partial(provider.entropies, xs))
    return partial(provider.step, [x.requires_grad_() for x in xs])


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_entropy(benchmark, budget, shape: Shape, dtype, mode: str, clock: str) -> None:
    xs = shape.tensors(DEVICE, dtype)
    found = [p for p in providers(DEVICE) if mode == "forward" or p.differentiable]
    facts = {
        "shape": shape.name,
        "layers": shape.layers,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "clock": clock,
        "io_bytes": io_bytes(xs, backward=mode == "forward+backward"),
    }
    measure(
        benchmark,
        budget,
        {p.name: _call(p, xs, mode) for p in found},
        facts,
        DEVICE,
        frozenset(p.name for p in found if not p.capturable),
    )
