"""All layers by one call of the extension, and what backward needs of them in one tensor.

What ops.rational_from_samples and ops.gram_backward do, without the dispatcher and with two
allocations forward: the time of a small layer is made of those. Only for what nobody watches or
transforms; the operations are there for the rest.

Behind each other in the tensor lie, of each x (B, d) or (b, B, d): M (b, n, n), n = min(B, d), the
location (b, 2, d) where it is centred, and the scale (b,).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ses_kernels import ops
from ses_kernels.context import is_plain_cpu


def is_readable(xs: Sequence[Tensor], *others: Tensor) -> bool:
    """Whether the extension can read all of xs as they lie, and nothing else wants to."""
    if ops.EXTENSION_MISSING or not is_plain_cpu((*xs, *others)):
        return False
    dtype = xs[0].dtype
    if dtype not in ops.NAMES:
        return False
    for x in xs:  # noqa: SIM110 # a generator would take another microsecond
        if x.dtype != dtype or x.dim() > 3 or x.stride(-1) != 1:
            return False
    return True


def _places(xs: Sequence[Tensor], center: bool, gradient: bool = True) -> list[tuple]:
    """Of each: strides and shape as the extension takes them, whether K is on the samples' side, b
    and n; and how many numbers lie before M, the location, the scale and the next.
    """
    places, end = [], 0
    for x in xs:
        stride = x.stride()
        if len(stride) == 2:
            b, stride = 1, (0, *stride)
            rows, columns = x.shape
        else:
            b, rows, columns = x.shape
        n = min(rows, columns)
        location = end + (b * n * n if gradient else 0)
        scale = location + (2 * b * columns if center else 0)
        layout = stride, (b, rows, columns)
        places.append((layout, rows <= columns, b, n, end, location, scale, scale + b))
        end = scale + b
    return places


def solve(
    xs: Sequence[Tensor], shape: Sequence[int], center: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    """H of all xs, one after the other, in this shape; and the tensor for :func:`gradients`."""
    places = _places(xs, center, gradient)
    compute = ops.widened(xs[0])
    h = xs[0].new_empty(shape, dtype=compute)
    saved = xs[0].new_empty(places[-1][-1], dtype=compute)
    itemsize, at, h_at = h.element_size(), saved.data_ptr(), h.data_ptr()
    layers = []
    for x, (layout, by_samples, b, _, m, location, scale, _) in zip(xs, places, strict=True):
        samples = x.data_ptr(), ops.NAMES[x.dtype], *layout
        location_at = at + location * itemsize if center else 0
        m_at = at + m * itemsize if gradient else 0
        layers.append((samples, by_samples, location_at, at + scale * itemsize, h_at, m_at))
        h_at += b * itemsize
    poles = ops.poles(torch.float64, compute)
    ops._C.rational_from_samples_cpu(layers, itemsize, poles, torch.get_num_threads())
    return h.clamp_min_(0), saved  # rounding and poles go below, on a single direction


def gradients(
    g: Tensor, xs: Sequence[Tensor], needed: Sequence[bool], saved: Tensor, center: bool
) -> list[Tensor | None]:
    """g dH/dx of each x where it is needed; g has the shape of H."""
    threads = torch.get_num_threads()
    itemsize, at, g_at = g.element_size(), saved.data_ptr(), g.data_ptr()
    stride = g.stride(0) if g.dim() else 0
    found: list[Tensor | None] = []
    for x, needs, place in zip(xs, needed, _places(xs, center), strict=True):
        layout, by_samples, b, _, m, location, scale, _ = place
        out = None
        if needs:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            d = x.shape[-1]
            samples = x.data_ptr(), ops.NAMES[x.dtype], *layout
            location_at = at + location * itemsize if center else 0
            standard = location_at, (2 * d, d, 1), at + scale * itemsize, itemsize
            ops._C.gram_backward(
                at + m * itemsize, samples, standard, g_at, stride, by_samples, out.data_ptr(),
                threads,
            )  # fmt: skip
        found.append(out)
        g_at += b * stride * itemsize
    return found


def factors(
    xs: Sequence[Tensor], saved: Tensor, center: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """M (b, n, n), location (b, 2, d), (b, 0, d) if uncentred, and scale (b,) of each x."""
    for x, (_, _, b, n, m, location, scale, end) in zip(xs, _places(xs, center), strict=True):
        yield (
            saved[m:location].view(b, n, n),
            saved[location:scale].view(b, 2 if center else 0, x.shape[-1]),
            saved[scale:end],
        )
