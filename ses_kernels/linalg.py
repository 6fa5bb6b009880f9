"""Batched small-matrix solvers on their own: eigh, svd, svdvals. Not differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ses_kernels import ops, torch_rows
from ses_kernels.checks import FLOATING, SINGLE_AND_DOUBLE, check


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:  # (..., n, n) -> (..., n), (..., n, n)
    """Eigenvalues, ascending, and eigenvectors (columns) of symmetric matrices.

    Examples:
        >>> w, v = ses_kernels.linalg.eigh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> w
        tensor([1., 3.])

    Args:
        a: ``(..., n, n)``, float32 or float64; only the lower triangle is read.

    Up to the extension's limit on n (``python -m ses_kernels`` prints it): on the CPU Householder
    tridiagonalisation and implicit QL (Golub & Van Loan, "Matrix Computations", 4th ed., 8.3), the
    matrices of a batch side by side in SIMD lanes; on CUDA cyclic Jacobi (8.5) in shared memory.
    Beyond, and without the extension: ``torch.linalg.eigh``, which on CUDA synchronises the host.
    O(n^3) a matrix. A NaN or Inf gives NaN for that matrix alone.

    Raises:
        TypeError: another dtype.
        ValueError: not square matrices, or an empty axis.
        RuntimeError: a requires grad (use :func:`torch.linalg.eigh`, or for a function of the
            spectrum :func:`ses_kernels.spectral_entropy`, whose gradient needs no eigenvector's).
    """
    _check(a, "eigh", SINGLE_AND_DOUBLE)
    n = a.shape[-1]
    if a.shape[-2] != n:
        raise ValueError(f"eigh takes square matrices (..., n, n), got shape {tuple(a.shape)}")
    w, v = ops.eigh(a.reshape(-1, n, n), "auto")
    return w.reshape(a.shape[:-1]), v.reshape(a.shape)


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD, x = U diag(S) Vh: (..., B, d) -> (..., B, n), (..., n), (..., n, d), n = min(B, d).

    Examples:
        >>> x = torch.randn(10, 4, 6)
        >>> u, s, vh = ses_kernels.linalg.svd(x)
        >>> torch.testing.assert_close(u * s[:, None] @ vh, x, rtol=1e-4, atol=1e-5)

    Args:
        x: ``(..., B, d)``, float16, bfloat16, float32 or float64; the result is float32 (float64).

    float32 and half inputs go through the float64 Gram matrix of the smaller side: O(B d n), and
    right to float32 round-off while sigma_min > 1e-4 sigma_max. A Gram matrix squares the condition
    number, so a batch with a smaller ratio, and every float64 input, goes to ``torch.linalg.svd``;
    finding out reads one number on the host. A NaN or Inf gives NaN for that matrix alone.

    Errors: as :func:`eigh`, for any B and d.
    """
    _check(x, "svd", FLOATING)
    u, s, vh = _svd(x.reshape(-1, *x.shape[-2:]))
    batch = x.shape[:-2]
    return (
        u.reshape(*batch, *u.shape[1:]), s.reshape(*batch, -1), vh.reshape(*batch, *vh.shape[1:])
    )  # fmt: skip


def svdvals(x: Tensor) -> Tensor:  # (..., B, d) -> (..., n)
    """Singular values, descending, n = min(B, d).

    Examples:
        >>> ses_kernels.linalg.svdvals(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
        tensor([3., 2., 1.])

    float32 and half inputs: square roots of the eigenvalues of the float64 Gram matrix, an absolute
    error of about 1e-8 sigma_max at worst, below float32 round-off. float64 inputs:
    ``torch.linalg.svdvals``, because the Gram matrix would lose half their digits.

    Dtypes, NaN and errors: as :func:`svd`.
    """
    _check(x, "svdvals", FLOATING)
    y = x.reshape(-1, *x.shape[-2:])
    if x.dtype == torch.float64:
        finite = y.isfinite().all(-1).all(-1)[:, None]  # LAPACK rejects NaN for the whole batch
        sigma = torch.linalg.svdvals(torch.where(finite[..., None], y, 0.0))
        return torch.where(finite, sigma, torch.nan).reshape(*x.shape[:-2], -1)
    y = y.double() if x.shape[-2] <= x.shape[-1] else y.mT.double()
    w = ops.eigvalsh(y @ y.mT, "auto")
    return w.flip(-1).clamp_min(0).sqrt().float().reshape(*x.shape[:-2], -1)


# One operation, for the look on the host in it: tracers and vmap could not follow.


def _svd_row(x):
    outs = None if x.dtype == torch.float64 else _svd_by_gram(x)
    if outs is None:
        finite, bad = torch_rows.without_nan(x.to(ops.widened(x)))
        outs = [torch_rows.with_nan(out, bad) for out in torch.linalg.svd(finite, False)]
    return tuple(out.to(ops.widened(x), memory_format=torch.contiguous_format) for out in outs)


def _svd_by_gram(x):  # (b, B, d)
    """U, S, Vh from the float64 Gram matrix of the smaller side; None if one is ill-conditioned."""
    wide = x.shape[1] <= x.shape[2]
    y = x.double() if wide else x.mT.double()
    w, u = ops.eigh(y @ y.mT, "auto")
    sigma, u = w.flip(-1).clamp_min(0).sqrt(), u.flip(-1)
    if bool((sigma[:, -1] <= 1e-4 * sigma[:, 0]).any()):  # never of NaN
        return None
    vh = (u.mT @ y) / sigma[..., None]
    return (u, sigma, vh) if wide else (vh.mT, sigma, u.mT)


def _svd_fake(x):
    b, rows, columns = x.shape
    n = min(rows, columns)
    sizes = (b, rows, n), (b, n), (b, n, columns)
    return tuple(x.new_empty(size, dtype=ops.widened(x)) for size in sizes)


_svd = ops.register(
    "svd", "(Tensor x) -> (Tensor, Tensor, Tensor)", fake=_svd_fake, default=_svd_row, folds=True
)


def _check(a: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    check(a, dtypes)
    if torch.is_grad_enabled() and a.requires_grad:
        raise RuntimeError(
            f"ses_kernels.linalg.{name} is not differentiable and its input requires grad; call it "
            f"on x.detach(), use torch.linalg.{name}, or ses_kernels.spectral_entropy for a "
            "function of the spectrum with an exact gradient"
        )
