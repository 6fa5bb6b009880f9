"""The table of operations: schema, fake and rows of each; picks the backend.

    location_scale  where x lies and how large it is, in one pass
    gram            K of the standardised x
    gram_backward   g df/dx from M = df/dK: 2 g scale times the product of M with the standardised x
    rational        H and M = dH/dK of Gram matrices, by partial fractions of the logarithm; with
                    ``center``, J M J, J = I - 11^T / n
    rational_from_samples
                    location_scale, gram and rational of many x in one call, where that is faster
    eigh            eigenvalues and eigenvectors of a batch of symmetric matrices
    eigvalsh        the eigenvalues alone

x is (b, B, d). Standardised: Xs = ((x - first row) - mean offset) * scale, in the compute dtype
(the dtype of scale). Subtracting a row first makes equal rows exactly zero and keeps a large common
offset out of the rounding of the mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ses_kernels import crossover, rational_coefficients, torch_rows
from ses_kernels.checks import FLOATING

EXTENSION_MISSING: str | None = None
try:
    import ses_kernels._C as _C
except ImportError as error:
    _C, EXTENSION_MISSING = None, f"the C++ extension cannot be imported ({error})"

_library = torch.library.Library("ses_kernels", "DEF")


class Kernel(NamedTuple):
    """The row of a device whose kernels do not take every call."""

    launch: Callable
    refusal: Callable  # of the same arguments: why not this call; None where it is taken


def _or_default(kernel: Kernel, default: Callable) -> Callable:
    launch, refusal = kernel

    def row(*args):
        backend = args[-1]
        if backend == "torch":
            return default(*args)
        why = refusal(*args)
        if why is None:
            return launch(*args)
        if backend == "fused":
            raise RuntimeError(f'backend="fused" cannot run: {why}; use backend="auto" or "torch"')
        return default(*args)

    return row


def register(name: str, schema: str, *, fake, default, folds=False, **rows: Callable | Kernel):
    """One operation. ``default`` serves devices without a row, and the calls a kernel refuses.

    ``folds``: its only tensor is a batch of matrices (b, ..), which an axis of vmap joins.
    """
    _library.define(name + schema)
    _library.impl(name, default, "CompositeExplicitAutograd")
    for key, row in rows.items():
        _library.impl(name, _or_default(row, default) if isinstance(row, Kernel) else row, key)
    torch.library.register_fake(f"ses_kernels::{name}", fake, lib=_library)
    operation = getattr(torch.ops.ses_kernels, name).default
    if folds:

        def fold(info, in_dims, x, *options):
            outs = operation(x.movedim(in_dims[0], 0).flatten(0, 1), *options)
            if isinstance(outs, Tensor):
                return outs.unflatten(0, (info.batch_size, -1)), 0
            return tuple(o.unflatten(0, (info.batch_size, -1)) for o in outs), (0,) * len(outs)

        torch.library.register_vmap(f"ses_kernels::{name}", fold, lib=_library)
    return operation


# ---- what can run here ----------------------------------------------------------------------


@functools.cache
def triton_missing(device: int) -> str | None:
    """Why the Triton kernels cannot run on this CUDA device; None if they can."""
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip:
        return "the Triton kernels are written for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"sm_{major}{minor} has no tensor-core path in Triton (sm_80 and later have)"
    return None


@functools.cache
def eigh_limit(device_type: str, index: int | None, itemsize: int) -> int:
    """Largest n of the extension's eigh on this device; 0 without one."""
    if _C is None:
        return 0
    if device_type == "cpu":
        return _C.max_n_cpu(itemsize)
    return _C.max_n_cuda(index, itemsize) if device_type == "cuda" else 0


def rational_gram_dtype(device: torch.device, compute: torch.dtype) -> torch.dtype:
    """The rational solver takes float64 Gram matrices where float64 costs as little as on a CPU.

    Rounding in a float32 Gram matrix is what limits the gradient on steep spectra, not the solver.
    """
    return torch.float64 if device.type == "cpu" else compute


def smaller_side(x: Tensor) -> str:
    return "samples" if x.shape[1] <= x.shape[2] else "features"


def widened(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64: what x is computed in unless small values matter."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- results, empty: what kernels write into, and the fakes of their operations ------------


def _empty_location_scale(x, anchor, dtype, backend):
    rows = 2 if anchor.shape[1] else 0
    return x.new_empty(x.shape[0], rows, x.shape[2], dtype=dtype), x.new_empty(
        x.shape[0], dtype=dtype
    )


def _empty_gram(x, location, scale, side, dtype, backend):
    n = x.shape[1] if side == "samples" else x.shape[2]
    return x.new_empty(x.shape[0], n, n, dtype=dtype)


def _empty_gram_backward(m, x, location, scale, g, side, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _empty_rational(grams, center, dtype, gradient, backend):
    sizes = [gram.shape if gradient else (gram.shape[0], 0, 0) for gram in grams]
    return [gram.new_empty(gram.shape[0], dtype=dtype) for gram in grams] + [
        gram.new_empty(size, dtype=dtype) for gram, size in zip(grams, sizes, strict=True)
    ]


def _empty_rational_from_samples(xs, center, gradient, backend):
    compute = widened(xs[0])
    hs, ms, locations, scales = [], [], [], []
    for x in xs:
        b, rows, columns = x.shape
        n = min(rows, columns) if gradient else 0
        hs.append(x.new_empty(b, dtype=compute))
        ms.append(x.new_empty(b, n, n, dtype=compute))
        locations.append(x.new_empty(b, 2 if center else 0, columns, dtype=compute))
        scales.append(x.new_empty(b, dtype=compute))
    return hs + ms + locations + scales


def _empty_eigh(a):  # eigenvectors as rows: transposed, that is torch.linalg.eigh's layout
    return a.new_empty(a.shape[:-1]), torch.empty_like(a, memory_format=torch.contiguous_format)


def _eigh_fake(a, backend):
    w, v = _empty_eigh(a)
    return w, v.mT


def _eigvalsh_fake(a, backend):
    return a.new_empty(a.shape[:-1])


# ---- kernel rows ----------------------------------------------------------------------------


def _unreadable(*xs: Tensor) -> str | None:
    """Why the extension cannot read one of xs as it lies."""
    if EXTENSION_MISSING:
        return EXTENSION_MISSING
    if any(x.stride(2) != 1 for x in xs):
        return "the CPU kernels read rows without gaps"
    return None


# Values as the extension takes them; each checks itself there.


NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOATING}


def _samples(x: Tensor) -> tuple:
    return x.data_ptr(), NAMES[x.dtype], x.stride(), x.shape


def _standard(location: Tensor, scale: Tensor) -> tuple:
    address = location.data_ptr() if location.shape[1] else 0
    return address, location.stride(), scale.data_ptr(), scale.element_size()


@functools.cache
def poles(gram: torch.dtype, result: torch.dtype):
    return _C.Poles(*rational_coefficients.columns(gram, result))


def _location_scale_cpu(x, anchor, dtype, backend):
    location, scale = _empty_location_scale(x, anchor, dtype, backend)
    _C.location_scale(
        _samples(x), anchor.data_ptr() if anchor.shape[1] else 0, anchor.stride(0),
        location.data_ptr(), scale.data_ptr(), scale.element_size(), torch.get_num_threads(),
    )  # fmt: skip
    return location, scale


def _gram_cpu(x, location, scale, side, dtype, backend):
    location, scale = location.contiguous(), scale.contiguous()
    gram = _empty_gram(x, location, scale, side, dtype, backend)
    _C.gram(
        _samples(x), _standard(location, scale), side == "samples",
        gram.data_ptr(), gram.element_size(), torch.get_num_threads(),
    )  # fmt: skip
    return gram


def _gram_backward_cpu(m, x, location, scale, g, side, backend):
    m, location, scale = m.contiguous(), location.contiguous(), scale.contiguous()
    out = _empty_gram_backward(m, x, location, scale, g, side, backend)
    _C.gram_backward(
        m.data_ptr(), _samples(x), _standard(location, scale),
        g.data_ptr(), g.stride(0), side == "samples", out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _rational_refusal(grams, center, dtype, gradient, backend):
    if EXTENSION_MISSING:
        return EXTENSION_MISSING
    for gram in grams:
        if gram.dtype != torch.float64:
            return f"the CPU's rational solver takes float64 Gram matrices, not {gram.dtype}"
    return None


def _rational_cpu(grams, center, dtype, gradient, backend):
    outputs = _empty_rational(grams, center, dtype, gradient, backend)
    grams = [gram.contiguous() for gram in grams]
    _C.rational_cpu(
        _layers(grams, center, outputs),
        dtype.itemsize,
        poles(torch.float64, dtype),
        torch.get_num_threads(),
    )
    return outputs


def _rational_from_samples_cpu(xs, center, gradient, backend):
    outputs = _empty_rational_from_samples(xs, center, gradient, backend)
    layers = [
        (
            _samples(x), smaller_side(x) == "samples",
            location.data_ptr() if center else 0, scale.data_ptr(), h.data_ptr(), m.data_ptr(),
        )
        for i, x in enumerate(xs)
        for h, m, location, scale in [outputs[i :: len(xs)]]
    ]  # fmt: skip
    compute = widened(xs[0])
    _C.rational_from_samples_cpu(
        layers, compute.itemsize, poles(torch.float64, compute), torch.get_num_threads()
    )
    return outputs


@functools.cache
def rational_limit_cuda(device: int) -> int:
    return 0 if _C is None else _C.max_n_rational_cuda(device)


def _rational_refusal_cuda(grams, center, dtype, gradient, backend):
    limit = rational_limit_cuda(grams[0].device.index)
    if EXTENSION_MISSING or limit == 0:
        return EXTENSION_MISSING or "the extension was built without cuda kernels"
    for gram in grams:
        if gram.dtype != torch.float32 or dtype != torch.float32:
            return "the rational solver on cuda computes in float32, and this call in float64"
        if gram.shape[1] > limit:
            return f"n = {gram.shape[1]} exceeds the rational kernel's limit of {limit} on cuda"
    return None


def _rational_cuda(grams, center, dtype, gradient, backend):
    outputs = _empty_rational(grams, center, dtype, gradient, backend)
    grams = [gram.contiguous() for gram in grams]
    layers = _layers(grams, center, outputs)
    found = poles(torch.float32, torch.float32)
    device = grams[0].device
    workspace = grams[0].new_empty(_C.rational_cuda_workspace(layers, found, device.index))
    stream = torch.cuda.current_stream(device).cuda_stream
    _C.rational_cuda(layers, found, workspace.data_ptr(), device.index, stream)
    return outputs


def _layers(grams, center, outputs) -> list[tuple]:
    """The address of an empty M is 0."""
    hs, ms = outputs[: len(grams)], outputs[len(grams) :]
    return [
        (gram.data_ptr(), gram.shape, h.data_ptr(), m.data_ptr(), centered)
        for gram, h, m, centered in zip(grams, hs, ms, center, strict=True)
    ]


def _no_triton(x: Tensor, compute: torch.dtype) -> str | None:
    if compute == torch.float64:
        return "the Gram kernels compute in float32, and this call computes in float64"
    return triton_missing(x.device.index)


def _location_scale_cuda(x, anchor, dtype, backend):
    from ses_kernels.kernels import gram

    if anchor.shape[1]:
        return gram.location_scale(x, anchor[:, 0].float())
    return x.new_empty(x.shape[0], 0, x.shape[2], dtype=dtype), gram.location_scale(x, None)[1]


def _gram_cuda(x, location, scale, side, dtype, backend):
    from ses_kernels.kernels import gram

    return gram.gram(x, location if location.shape[1] else None, scale, side)


def _gram_backward_cuda(m, x, location, scale, g, side, backend):
    from ses_kernels.kernels import gram

    location = location if location.shape[1] else None
    return gram.gram_backward(m, x, location, scale, g, side)


def _eigh_refusal(a, backend):
    limit = eigh_limit(a.device.type, a.device.index, a.element_size())
    if EXTENSION_MISSING or limit == 0:
        return EXTENSION_MISSING or f"the extension was built without {a.device.type} kernels"
    if a.shape[-1] > limit:
        return f"n = {a.shape[-1]} exceeds the eigh kernel's limit of {limit} on {a.device.type}"
    b, n, _ = a.shape
    wins = backend == "fused" or crossover.eigh_wins(a.device.type, a.dtype, n, b)
    return None if wins else "torch.linalg.eigh is the faster"


def _eigh_cpu(a, backend):
    a = a.contiguous()
    w, v = _empty_eigh(a)
    _C.eigh_cpu(
        a.data_ptr(), w.data_ptr(), v.data_ptr(), *a.shape[:2], a.element_size(),
        torch.get_num_threads(),
    )  # fmt: skip
    return w, v.mT


def _eigvalsh_cpu(a, backend):
    # The kernels make the vectors all the same; LAPACK is faster without.
    return _eigh_cpu(a, backend)[0]


def _eigh_cuda(a, backend):
    a = a.contiguous()
    w, v = _empty_eigh(a)
    stream = torch.cuda.current_stream(a.device).cuda_stream
    _C.eigh_cuda(
        a.data_ptr(), w.data_ptr(), v.data_ptr(), *a.shape[:2], a.element_size(),
        a.device.index, stream,
    )  # fmt: skip
    return w, v.mT


def _eigvalsh_cuda(a, backend):
    return _eigh_cuda(a, backend)[0]


# ---- one operation by others ----------------------------------------------------------------


def _rational_from_samples_in_steps(xs, center, gradient, backend):
    compute = widened(xs[0])
    sides = [smaller_side(x) for x in xs]
    located = [location_scale(x, x[:, :1] if center else x[:, :0], compute, backend) for x in xs]
    dtype = rational_gram_dtype(xs[0].device, compute)
    grams = [
        gram(x, *at, side, dtype, backend) for x, at, side in zip(xs, located, sides, strict=True)
    ]
    centered = [center and side == "samples" for side in sides]
    results = rational(grams, centered, compute, gradient, backend)
    return results + [location for location, _ in located] + [scale for _, scale in located]


# ---- the table ------------------------------------------------------------------------------

location_scale = register(
    "location_scale",
    "(Tensor x, Tensor anchor, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    fake=_empty_location_scale,
    default=torch_rows.location_scale,
    CPU=Kernel(_location_scale_cpu, lambda x, anchor, *_: _unreadable(x, anchor)),
    CUDA=Kernel(_location_scale_cuda, lambda x, anchor, dtype, _: _no_triton(x, dtype)),
)
gram = register(
    "gram",
    "(Tensor x, Tensor location, Tensor scale, str side, ScalarType dtype, str backend) -> Tensor",
    fake=_empty_gram,
    default=torch_rows.gram,
    CPU=Kernel(_gram_cpu, lambda x, *_: _unreadable(x)),
    CUDA=Kernel(_gram_cuda, lambda x, location, scale, side, dtype, _: _no_triton(x, dtype)),
)
gram_backward = register(
    "gram_backward",
    "(Tensor m, Tensor x, Tensor location, Tensor scale, Tensor g, str side, str backend)"
    " -> Tensor",
    fake=_empty_gram_backward,
    default=torch_rows.gram_backward,
    CPU=Kernel(_gram_backward_cpu, lambda m, x, *_: _unreadable(x)),
    CUDA=Kernel(_gram_backward_cuda, lambda m, x, location, scale, *_: _no_triton(x, scale.dtype)),
)
rational = register(
    "rational",
    "(Tensor[] grams, bool[] center, ScalarType dtype, bool gradient, str backend) -> Tensor[]",
    fake=_empty_rational,
    default=torch_rows.rational,
    CPU=Kernel(_rational_cpu, _rational_refusal),
    CUDA=Kernel(_rational_cuda, _rational_refusal_cuda),
)
rational_from_samples = register(
    "rational_from_samples",
    "(Tensor[] xs, bool center, bool gradient, str backend) -> Tensor[]",
    fake=_empty_rational_from_samples,
    default=_rational_from_samples_in_steps,
    CPU=Kernel(_rational_from_samples_cpu, lambda xs, *_: _unreadable(*xs)),
)
eigh = register(
    "eigh",
    "(Tensor a, str backend) -> (Tensor, Tensor)",
    fake=_eigh_fake,
    default=torch_rows.eigh,
    folds=True,
    CPU=Kernel(_eigh_cpu, _eigh_refusal),
    CUDA=Kernel(_eigh_cuda, _eigh_refusal),
)
eigvalsh = register(
    "eigvalsh",
    "(Tensor a, str backend) -> Tensor",
    fake=_eigvalsh_fake,
    default=torch_rows.eigvalsh,
    folds=True,
    CPU=Kernel(_eigvalsh_cpu, _eigh_refusal),
    CUDA=Kernel(_eigvalsh_cuda, _eigh_refusal),
)
