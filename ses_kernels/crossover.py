"""Which solver and which eigh is the faster where: the table behind solver="auto".

What follows the line is written by python -m bench.crossover, which measures on the device at hand
and keeps the rows of the others.
"""

import torch


def rational_wins(device_type: str, dtype: torch.dtype, n: int, batch: int) -> bool:
    """Whether the rational solver beats eigh on (batch, n, n), for samples of this dtype."""
    return _wins(RATIONAL, device_type, dtype, n, batch)


def eigh_wins(device_type: str, dtype: torch.dtype, n: int, batch: int) -> bool:
    """Whether the extension's eigh, where it takes n at all, beats torch.linalg.eigh."""
    return _wins(EIGH, device_type, dtype, n, batch)


def _wins(table, device_type, dtype, n, batch):
    # One half type stands for both: they are read alike.
    key = device_type, torch.bfloat16 if dtype == torch.float16 else dtype
    return any(n <= largest and batch >= least for largest, least in table.get(key, {}).items())


MEASURED: dict[str, dict[str, object]]  # by device
EIGH: dict[tuple[str, torch.dtype], dict[int, int]]
RATIONAL: dict[tuple[str, torch.dtype], dict[int, int]]

# ---- written by python -m bench.crossover ----

MEASURED = {
    "cpu": {
        "device": "AMD EPYC",
        "threads": 2,
        "torch": "2.13.0+cpu",
        "commit": "9ec5b8c15bb7da2261b2078ea0bcd7b4cf0cd538",
        "dirty": False,
        "date": "2026-11-29",
    },
    "cuda": {
        "not measured": "the kernels up to their limits, for they never synchronise the host",
    },
}

# {largest n: smallest batch} between which the extension's eigh is the faster.
EIGH = {
    ("cpu", torch.float32): {48: 1, 80: 2, 128: 3},
    ("cpu", torch.float64): {48: 1, 96: 2, 128: 3},
    ("cuda", torch.float32): {170: 1},
    ("cuda", torch.float64): {170: 1},
}

# {largest n = min(B, d): smallest batch} between which the rational solver is the faster.
RATIONAL = {
    ("cpu", torch.float32): {4096: 1},
    ("cpu", torch.float64): {4096: 1},
    ("cpu", torch.bfloat16): {2048: 1},
    ("cuda", torch.float32): {256: 1},
    ("cuda", torch.float64): {},
    ("cuda", torch.bfloat16): {256: 1},
}
