"""The measurement: for each shape, dtype and mode, all providers in paired rounds."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.provenance import provenance
from bench.providers import Provider, io_bytes, providers
from bench.shapes import SHAPES, Shape
from bench.timing import (
    Call,
    captured,
    cpu_clock,
    cuda_clock,
    paired,
    paired_ratios,
    peak_bytes,
    quartiles,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}[DEVICE]
CLOCKS = {"cpu": ["wall"], "cuda": ["eager", "graph"]}[DEVICE]
BASE = "ours"


def _call(provider: Provider, xs: list[torch.Tensor], mode: str) -> Call:
    if mode == "forward":
        return torch.no_grad()(partial(provider.entropies, xs))
    return partial(provider.step, [x.requires_grad_() for x in xs])


def _clock(provider: Provider, call: Call, clock: str):
    if clock == "wall":
        return cpu_clock(call)
    if clock == "graph" and not provider.capturable:
        raise RuntimeError("not on torch's stream and allocator")
    return cuda_clock(captured(call) if clock == "graph" else call)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_entropy(benchmark, budget, shape: Shape, dtype, mode: str, clock: str) -> None:
    xs = shape.tensors(DEVICE, dtype)
    rows, clocks = {}, {}
    for provider in providers(DEVICE):
        if mode == "forward+backward" and not provider.differentiable:
            continue
        row = {
            "provider": provider.name,
            "shape": shape.name,
            "layers": shape.layers,
            "dtype": str(dtype).removeprefix("torch."),
            "mode": mode,
            "clock": clock,
            "io_bytes": io_bytes(xs, backward=mode == "forward+backward"),
            **provenance(DEVICE),
        }
        call = _call(provider, xs, mode)
        try:
            row["peak_bytes"] = peak_bytes(call, DEVICE)  # and warms up
            clocks[provider.name] = _clock(provider, call, clock)
        except RuntimeError as error:  # a row all the same: why it could not run here
            row["skipped"] = str(error).partition("\n")[0]
        rows[provider.name] = row
    seconds = benchmark.pedantic(paired, (clocks, budget), rounds=1, iterations=1)
    ratios = paired_ratios(seconds, BASE) if BASE in seconds else {}
    for name, values in seconds.items():
        rows[name] |= {
            "rounds": len(values),
            "seconds": quartiles(values),
            f"over {BASE}": ratios.get(name),
        }
    benchmark.extra_info["rows"] = list(rows.values())
    assert clock == "graph" or BASE in seconds, rows[BASE]["skipped"]
