"""Batched small-matrix solvers on their own: eigh, svd, svdvals. Not differentiable."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ses_kernels import ops


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:  # (..., n, n) -> (..., n), (..., n, n)
    """Eigenvalues, ascending, and eigenvectors (columns) of symmetric matrices.

    Args:
        a: ``(..., n, n)``, float32 or float64; only the lower triangle is read.

    Up to the extension's limit on n (``python -m ses_kernels`` prints it): on the CPU Householder
    tridiagonalisation and implicit QL (Golub & Van Loan, "Matrix Computations", 4th ed., 8.3), the
    matrices of a batch side by side in SIMD lanes; on CUDA cyclic Jacobi (8.5) in shared memory.
    Beyond, and without the extension: ``torch.linalg.eigh``, which on CUDA synchronises the host.
    O(n^3) a matrix. A NaN or Inf gives NaN for that matrix alone.

    Raises:
        TypeError: another dtype. ValueError: not square matrices, or an empty axis.
        RuntimeError: a requires grad (use :func:`torch.linalg.eigh`, or for a function of the
            spectrum :func:`ses_kernels.spectral_entropy`, whose gradient needs no eigenvector's).
    """
    _check(a, "eigh", (torch.float32, torch.float64))
    n = a.shape[-1]
    if a.shape[-2] != n:
        raise ValueError(f"eigh takes square matrices (..., n, n), got shape {tuple(a.shape)}")
    with torch.autocast(a.device.type, enabled=False):
        w, v = ops.eigh(a.reshape(-1, n, n), "auto")
    return w.reshape(a.shape[:-1]), v.reshape(a.shape)


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD, x = U diag(S) Vh: (..., B, d) -> (..., B, n), (..., n), (..., n, d), n = min(B, d).

    Args:
        x: ``(..., B, d)``, float16, bfloat16, float32 or float64; the result is float32 (float64).

    float32 and half inputs go through the float64 Gram matrix of the smaller side: O(B d n), and
    right to float32 round-off while sigma_min > 1e-4 sigma_max. A Gram matrix squares the condition
    number, so a batch with a smaller ratio, and every float64 input, goes to ``torch.linalg.svd``;
    finding out reads one number on the host.

    Errors: as :func:`eigh`, for any B and d.
    """
    _check(x, "svd", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype != torch.float64:
            wide = x.shape[-2] <= x.shape[-1]
            y = x.double() if wide else x.mT.double()
            w, u = _gram_eigh(y)
            sigma = w.clamp_min(0).sqrt()
            if bool((sigma[..., -1] > 1e-4 * sigma[..., 0]).all()):
                vh = (u.mT @ y) / sigma[..., None]
                u, vh = (u, vh) if wide else (vh.mT, u.mT)
                return u.float(), sigma.float(), vh.float()
            x = x.float()
        return torch.linalg.svd(x, full_matrices=False)


def svdvals(x: Tensor) -> Tensor:  # (..., B, d) -> (..., n)
    """Singular values, descending, n = min(B, d).

    float32 and half inputs: square roots of the eigenvalues of the float64 Gram matrix, an absolute
    error of about 1e-8 sigma_max at worst, below float32 round-off. float64 inputs:
    ``torch.linalg.svdvals``, because the Gram matrix would lose half their digits.

    Dtypes and errors: as :func:`svd`.
    """
    _check(x, "svdvals", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype == torch.float64:
            return torch.linalg.svdvals(x)
        y = x.double()
        w, _ = _gram_eigh(y if x.shape[-2] <= x.shape[-1] else y.mT)
        return w.clamp_min(0).sqrt().float()


def _gram_eigh(y: Tensor) -> tuple[Tensor, Tensor]:  # (..., n, m), descending
    gram = y @ y.mT
    n = gram.shape[-1]
    w, u = ops.eigh(gram.reshape(-1, n, n), "auto")
    return w.flip(-1).reshape(gram.shape[:-1]), u.flip(-1).reshape(gram.shape)


def _check(a: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(a, Tensor):
        raise TypeError(f"{name} takes a torch.Tensor, got {type(a).__name__}")
    if a.dtype not in dtypes:
        raise TypeError(f"{name} takes {', '.join(map(str, dtypes))}, got {a.dtype}")
    if a.dim() < 2 or math.prod(a.shape) == 0:
        raise ValueError(f"{name} takes (..., rows, columns), no axis empty, got {tuple(a.shape)}")
    if torch.is_grad_enabled() and a.requires_grad:
        raise RuntimeError(
            f"ses_kernels.linalg.{name} is not differentiable and its input requires grad; call it "
            f"on x.detach(), use torch.linalg.{name}, or ses_kernels.spectral_entropy for a "
            "function of the spectrum with an exact gradient"
        )
