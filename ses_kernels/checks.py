"""What a tensor handed to the public functions must be; every message says what to do instead."""

from __future__ import annotations

import torch
from torch import Tensor

SINGLE_AND_DOUBLE = (torch.float32, torch.float64)
FLOATING = (torch.float16, torch.bfloat16, *SINGLE_AND_DOUBLE)


def check(x: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATING) -> None:
    """Raise unless x is a dense (..., rows, columns) of one of these dtypes, no axis empty."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a torch.Tensor (..., rows, columns), got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(
            "expected a dense tensor, got a nested one; take the matrices of x.unbind() one by one"
        )
    if x.layout != torch.strided:
        raise TypeError(f"expected a dense tensor, got {x.layout}; convert with x.to_dense()")
    if hasattr(x, "full_tensor"):  # DTensor, without an import of torch.distributed
        raise TypeError(
            "expected a plain tensor, got a DTensor; gather it with x.full_tensor(), or, where it "
            "shards samples over a process group, take x.to_local() with group="
        )
    if x.dtype not in dtypes:
        instead = "convert with x.float()"
        if x.is_complex():
            instead = "torch.linalg.svdvals takes it; x.float() would drop the imaginary part"
        raise TypeError(f"expected {', '.join(map(str, dtypes))}, got {x.dtype}; {instead}")
    if x.dim() < 2:
        raise ValueError(f"expected shape (..., rows, columns), got {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"expected no empty axis in (..., rows, columns), got {tuple(x.shape)}")
