"""Batched symmetric eigendecomposition with vectors: the kernel, and what "auto" picks."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.bench_entropy import CLOCKS, DEVICE
from bench.measure import measure
from bench.providers import eigh_peers
from ses_kernels import ops

BATCHES = [(4096, 8), (4096, 16), (1024, 32), (256, 64), (64, 128)]


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("batch", "n"), BATCHES)
def test_eigh(benchmark, budget, batch: int, n: int, dtype, clock: str) -> None:
    x = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    a = x + x.mT
    peers = eigh_peers(DEVICE)
    calls = {"ours": partial(ops.eigh, a, "auto"), "ours, fused": partial(ops.eigh, a, "fused")}
    calls |= {name: partial(eigh, a) for name, eigh in peers.items()}
    name = str(dtype).removeprefix("torch.")
    facts = {
        "shape": f"eigh-{batch}x{n}-{name}",
        "layers": [(batch, n, n)],
        "dtype": name,
        "mode": "eigh",
        "clock": clock,
        "io_bytes": 2 * a.numel() * a.element_size(),
    }
    measure(benchmark, budget, calls, facts, DEVICE, frozenset(peers))
