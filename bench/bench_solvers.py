"""From Gram matrices to H and M = dH/dK: every solver, beside what the hardware would allow."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from bench.bench_entropy import CLOCKS, DEVICE
from bench.measure import measure
from bench.providers import eigh_peers, solve_by_eigh
from bench.shapes import batch_of
from bench.timing import Call
from ses_kernels import ops, solvers
from ses_kernels.rational_coefficients import POLES

# The hooks of ResNet-18 at B = 256, of WideResNet-28-10 at B = 512, a ViT's heads, small matrices.
BATCHES = [(9, 256), (13, 512), (144, 64), (4096, 16)]
# float32 multiply-adds that a multiprocessor starts in a clock, by compute capability.
LANES = {(7, 0): 64, (7, 5): 64, (8, 0): 64}
LANES_SINCE_8_6 = 128


def peaks(device) -> tuple[float, float]:
    """float32 flops, and bytes to and from memory, a second: of get_device_properties.

    Without tensor cores, whose products are not float32; at the highest clocks.
    """
    lanes = LANES.get((device.major, device.minor), LANES_SINCE_8_6)
    arithmetic = 2 * lanes * device.multi_processor_count * 1e3 * device.clock_rate
    # Two transfers a clock, as it is reported for GDDR6 and for HBM alike.
    memory = 2 * device.memory_bus_width / 8 * 1e3 * device.memory_clock_rate
    return arithmetic, memory


def flops(batch: int, n: int, poles: int | None) -> int:
    """Of partial fractions: each pole's symmetric inverse in place is n^3 / 2 multiply-adds.

    Without poles, of an eigendecomposition: 9 n^3 by QR with vectors (Golub & Van Loan, "Matrix
    Computations", 4th ed., 8.3), and n^3 for the symmetric product V diag(f) V^T.
    """
    return batch * n**3 * (10 if poles is None else poles)


def roofline(work: int, moved: int, device) -> float:
    """Seconds in which a kernel that keeps either arithmetic or memory busy would be done."""
    peak_flops, peak_bytes = peaks(device)
    return max(work / peak_flops, moved / peak_bytes)


def _ours_by_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    return solvers.from_spectrum(*ops.eigh(gram, "auto"), 0.0, 2.0, 1.0)


def calls(gram: Tensor) -> dict[str, Call]:
    """Every solver on float32 Gram matrices (b, n, n): H (b,) and M (b, n, n)."""
    # In the type in which spectral_entropy hands it to this solver.
    wide = gram.to(ops.rational_gram_dtype(gram.device, gram.dtype))
    peers = eigh_peers(gram.device.type)
    return {
        "ours": partial(ops.rational, [wide], [False], gram.dtype, True, "auto"),
        "ours, eigh": partial(_ours_by_eigh, gram),
        **{name: partial(solve_by_eigh, gram, eigh) for name, eigh in peers.items()},
    }


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "n"), BATCHES)
def test_solver(benchmark, budget, batch: int, n: int, dtype, clock: str) -> None:
    (x,) = batch_of(batch, n).tensors(DEVICE, dtype)
    x -= x.mean(-2, keepdim=True)
    gram = x @ x.mT
    facts = {
        "shape": f"solver-{batch}x{n}",
        "layers": [(batch, n, n)],
        "dtype": str(dtype).removeprefix("torch."),
        "mode": "solver",
        "clock": clock,
        "io_bytes": 2 * gram.numel() * gram.element_size(),  # K in, M out
    }
    measure(benchmark, budget, calls(gram), facts, DEVICE, frozenset(eigh_peers(DEVICE)))
    if DEVICE == "cuda":  # on the CPU the algorithms, and what they could reach, are others
        properties = torch.cuda.get_device_properties(DEVICE)
        for row in benchmark.extra_info["rows"]:
            poles = len(POLES[dtype, dtype][1]) if row["provider"] == "ours" else None
            row["flops"] = flops(batch, n, poles)
            row["roofline_seconds"] = roofline(row["flops"], row["io_bytes"], properties)
