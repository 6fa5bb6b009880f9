"""Entropy and gradient over all sizes: how the cost grows with n and with the batch, and where."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.bench_entropy import CLOCKS, DEVICE
from bench.measure import measure
from bench.providers import Provider, gram, gram_closed, io_bytes, ours
from bench.shapes import affordable, batch_of

# Powers of two and numbers between them, where a blocked kernel would show its steps.
SIZES = [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
BATCHES = [2**i for i in range(14)]
FIXED_SIZES, FIXED_BATCHES = [8, 32, 128, 512], [1, 64, 4096]

POINTS = {(batch, n) for n in SIZES for batch in FIXED_BATCHES}
POINTS |= {(batch, n) for n in FIXED_SIZES for batch in BATCHES}
POINTS = sorted(point for point in POINTS if affordable(*point))
PROVIDERS = [
    Provider("ours", ours),
    Provider("gram, closed form", gram_closed),
    Provider("gram, autograd", gram),
]


@pytest.mark.parametrize("clock", CLOCKS[:1])
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "n"), POINTS)
def test_sweep(benchmark, budget, batch: int, n: int, dtype, clock: str) -> None:
    shape = batch_of(batch, n)
    xs = [x.requires_grad_() for x in shape.tensors(DEVICE, dtype)]
    facts = {
        "shape": shape.name,
        "layers": shape.layers,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": "sweep",
        "clock": clock,
        "io_bytes": io_bytes(xs, backward=True),
    }
    calls = {provider.name: partial(provider.step, xs) for provider in PROVIDERS}
    # A curve needs its points less sharp than a table its numbers.
    measure(benchmark, budget / 10, calls, facts, DEVICE)
