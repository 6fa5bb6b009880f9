"""The torch rows of the operations in ops.py, which has their shapes: the definition of each.

Every row takes the backend last, as the operation does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ses_kernels import rational_solver

_BLOCK = 1 << 18  # elements of x standardised at a time: bounds the temporaries, fits the L2 cache
_STRIP = 64  # rows of a Gram matrix computed at a time: shorter ones leave BLAS below its speed


def standardize(x: Tensor, location: Tensor, scale: Tensor) -> Tensor:  # (b, B, d)
    xs = x.to(scale.dtype)
    if location.shape[1]:
        xs = xs - location[:, :1]
        xs -= location[:, 1:]
        return xs.mul_(scale[:, None, None])
    return xs * scale[:, None, None]


def _blocks(x: Tensor, axis: int) -> Iterator[tuple[slice, slice]]:
    """(matrices, range of ``axis``) that together cover x (b, B, d)."""
    block = _BLOCK if x.device.type == "cpu" else 64 * _BLOCK  # a launch wants more work
    size = x.shape[1] * x.shape[2]
    matrices = max(1, block // size)
    along = x.shape[axis] if size <= block else max(1, block * x.shape[axis] // size)
    for i in range(0, x.shape[0], matrices):
        for j in range(0, x.shape[axis], along):
            yield slice(i, i + matrices), slice(j, j + along)


def _standardized_blocks(x, location, scale, side) -> Iterator[tuple]:
    """(matrices, rows, columns, Xs there), cut along the axis that the Gram matrix contracts."""
    for matrices, part in _blocks(x, 2 if side == "samples" else 1):
        rows, columns = (slice(None), part) if side == "samples" else (part, slice(None))
        xs = standardize(
            x[matrices, rows, columns], location[matrices, :, columns], scale[matrices]
        )
        yield matrices, rows, columns, xs


def location_scale(x, anchor, dtype, backend):
    b, _, d = x.shape
    total = x.new_zeros(b, d, dtype=dtype)
    largest = x.new_zeros(b, dtype=dtype)
    first = anchor.to(dtype)
    for matrices, rows in _blocks(x, 1):
        shifted = x[matrices, rows].to(dtype)
        if anchor.shape[1]:
            shifted = shifted - first[matrices]
            total[matrices] += shifted.sum(1)
        low, high = shifted.aminmax() if b == 1 else (shifted.amin((1, 2)), shifted.amax((1, 2)))
        largest[matrices] = largest[matrices].maximum(torch.maximum(high, -low))
    if not anchor.shape[1]:
        return x.new_empty(b, 0, d, dtype=dtype), power_of_two(largest)
    return torch.cat([first, total[:, None] / x.shape[1]], 1), power_of_two(largest)


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two that brings ``largest`` into [1/2, 1), 1 for 0."""
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    return torch.ldexp(torch.ones_like(largest), -exponent)


def gram(x, location, scale, side, dtype, backend):
    n = x.shape[1] if side == "samples" else x.shape[2]
    k = x.new_empty(x.shape[0], n, n, dtype=dtype)
    location, scale = location.to(dtype), scale.to(dtype)
    strip = max(_STRIP, -(-n // 4))
    for matrices, rows, columns, xs in _standardized_blocks(x, location, scale, side):
        left = xs if side == "samples" else xs.mT
        first = not (rows.start or columns.start)
        for i in range(0, n, strip):  # rows up to the diagonal: the rest is their mirror image
            k[matrices, i : i + strip, : i + strip].baddbmm_(
                left[:, i : i + strip], left[:, : i + strip].mT, beta=0 if first else 1
            )
    for i in range(strip, n, strip):
        k[:, :i, i : i + strip] = k[:, i : i + strip, :i].mT
    return k


def gram_backward(m, x, location, scale, g, side, backend):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    m = m * (2 * scale * g)[:, None, None]  # into scale it would square the size of x: out of range
    for matrices, rows, columns, xs in _standardized_blocks(x, location, scale, side):
        factors = (m[matrices], xs) if side == "samples" else (xs, m[matrices])
        block = out[matrices, rows, columns]
        if x.dtype == scale.dtype:
            block.baddbmm_(*factors, beta=0)  # written where it belongs
        else:
            block.copy_(torch.bmm(*factors))
    return out


def double_center(m: Tensor) -> Tensor:  # (b, n, n), in place
    """J M J, J = I - 11^T / n."""
    row = m.mean(-1)
    row -= row.mean(-1, keepdim=True) / 2
    return m.sub_(row[:, :, None]).sub_(row[:, None, :])


def rational(grams, center, dtype, gradient, backend):
    hs, ms = [], []
    for k, centered in zip(grams, center, strict=True):
        h, m = rational_solver.entropy(k, dtype)
        hs.append(h.to(dtype))
        ms.append((double_center(m) if centered else m).to(dtype))
    return hs + (ms if gradient else [m.new_empty(m.shape[0], 0, 0) for m in ms])


def eigh(a, backend):
    a, bad = without_nan(a.tril())
    w, v = torch.linalg.eigh(a)
    return with_nan(w, bad), with_nan(v, bad)


def eigvalsh(a, backend):
    a, bad = without_nan(a.tril())
    return with_nan(torch.linalg.eigvalsh(a), bad)


def without_nan(a: Tensor) -> tuple[Tensor, Tensor | None]:  # (b, m, n) -> the same, (b,) or None
    """LAPACK rejects NaN for the whole batch: zeros for such matrices, and which they are."""
    if math.isfinite(a.sum()):  # a look on the host, as torch.linalg.eigh itself takes
        return a, None
    bad = ~a.isfinite().all(-1).all(-1)
    return a.masked_fill(bad[:, None, None], 0), bad


def with_nan(out: Tensor, bad: Tensor | None) -> Tensor:  # (b, ..)
    if bad is None:
        return out
    return out.masked_fill(bad.reshape(-1, *[1] * (out.dim() - 1)), torch.nan)
