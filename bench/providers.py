"""Ways to get the entropies of some layers and their gradient, all with one signature.

Each takes the layers of a `Shape`, a list of (..., B, d), and returns all entropies in one vector.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

import ses_kernels

Eigh = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Provider:
    name: str
    entropies: Callable[[list[Tensor]], Tensor]
    differentiable: bool = True
    capturable: bool = True  # False: runs on another library's stream or allocator

    def step(self, xs: list[Tensor]) -> tuple[Tensor, ...]:
        """Forward and backward, as a training step does."""
        return torch.autograd.grad(self.entropies(xs).sum(), xs)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _centred(x: Tensor) -> Tensor:
    x = _upcast(x)
    return x - x.mean(-2, keepdim=True)


def _entropy(weights: Tensor) -> Tensor:  # (..., n) -> (...)
    """The floor keeps log and its gradient finite at the zeros that round-off leaves."""
    p = (weights / weights.sum(-1, keepdim=True)).clamp_min(1e-12)
    return -(p * p.log()).sum(-1)


def paper(xs: list[Tensor]) -> Tensor:
    """The published recipe: eigenvalues of the d x d covariance, and autograd."""
    entropies = []
    for x in xs:
        xc = _centred(x)
        covariance = xc.mT @ xc / max(x.shape[-2] - 1, 1)
        entropies.append(_entropy(torch.linalg.eigvalsh(covariance)).flatten())
    return torch.cat(entropies)


def svdvals(xs: list[Tensor]) -> Tensor:
    return torch.cat([_entropy(torch.linalg.svdvals(_centred(x)) ** 2).flatten() for x in xs])


def _smaller_gram(xc: Tensor) -> Tensor:  # (..., B, d) -> (..., n, n)
    return xc @ xc.mT if xc.shape[-2] <= xc.shape[-1] else xc.mT @ xc


def _stacked(grams: list[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Matrices (..., n, n) joined by n: one solver call for all layers of one size."""
    by_side: dict[int, list[int]] = defaultdict(list)
    for i, k in enumerate(grams):
        by_side[k.shape[-1]].append(i)
    return [
        (index, torch.cat([grams[i].reshape(-1, n, n) for i in index]))
        for n, index in by_side.items()
    ]


def _split(index: list[int], grams: list[Tensor], joined: Tensor) -> list[tuple[int, Tensor]]:
    sizes = [grams[i].shape[:-2].numel() for i in index]
    return list(zip(index, joined.split(sizes), strict=True))


def gram(xs: list[Tensor]) -> Tensor:
    """Plain PyTorch: the Gram matrix of the smaller side, stacked eigvalsh, autograd."""
    grams = [_smaller_gram(_centred(x)) for x in xs]
    out: list[Tensor] = [grams[0]] * len(grams)
    for index, k in _stacked(grams):
        for i, h in _split(index, grams, _entropy(torch.linalg.eigvalsh(k))):
            out[i] = h
    return torch.cat(out)


def solve_by_eigh(k: Tensor, eigh: Eigh) -> tuple[Tensor, Tensor]:  # (b, n, n) -> (b,), (b, n, n)
    """H and M = dH/dK of Gram matrices."""
    trace = k.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eigenvalues, q = eigh(k / trace)
    p = eigenvalues.clamp_min(1e-12)
    h = -(p * p.log()).sum(-1)
    # M = -(log P + H I) / tr K = V diag(f) V^T
    return h, (q * (p.log() + h[..., None])[..., None, :]) @ q.mT / -trace


class _ClosedForm(torch.autograd.Function):
    """The Gram trick with stacked eigh and the closed-form gradient, for any batched eigh."""

    @staticmethod
    def forward(ctx, eigh: Eigh, *xs: Tensor) -> Tensor:
        centred = [_centred(x) for x in xs]
        grams = [_smaller_gram(xc) for xc in centred]
        entropies, factors = [None] * len(xs), [None] * len(xs)
        for index, k in _stacked(grams):
            h, m = solve_by_eigh(k, eigh)
            for i, part in _split(index, grams, h):
                entropies[i] = part
            for i, part in _split(index, grams, m):
                factors[i] = part.reshape(grams[i].shape)
        ctx.save_for_backward(*centred, *factors)
        ctx.dtypes = [x.dtype for x in xs]
        ctx.sizes = [len(h) for h in entropies]
        return torch.cat(entropies)

    @staticmethod
    def backward(ctx, grad: Tensor):
        half = len(ctx.saved_tensors) // 2
        centred, factors = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        grads = []
        for xc, m, g, dtype in zip(
            centred, factors, grad.split(ctx.sizes), ctx.dtypes, strict=True
        ):
            m = 2 * g.reshape(*m.shape[:-2], 1, 1) * m  # dH/dx = 2 M Xc
            grads.append((m @ xc if xc.shape[-2] <= xc.shape[-1] else xc @ m).to(dtype))
        return None, *grads


def gram_closed(xs: list[Tensor], eigh: Eigh = torch.linalg.eigh) -> Tensor:
    return _ClosedForm.apply(eigh, *xs)


@cache
def _blas():
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def vendi(xs: list[Tensor]) -> Tensor:
    """The vendi-score package on the same kernel: a value only, one matrix at a time."""
    from vendi_score import vendi as package

    entropies = []
    # One thread is the faster here, and leaves none spinning in the way of the next provider.
    with _blas().limit(limits=1, user_api="blas"):
        for x in xs:
            for xc in _centred(x).reshape(-1, *x.shape[-2:]).numpy():
                rows, columns = xc.shape
                # The package divides by the number of rows: make the trace after that 1.
                scaled = xc * (rows**0.5 / (xc**2).sum() ** 0.5)
                score = package.score_X if rows <= columns else package.score_dual
                entropies.append(float(score(scaled, normalize=False)))
    return torch.tensor(entropies).log()


class _ReadWrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sum((-2, -1)).flatten()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0].clone()


def io_floor(xs: list[Tensor]) -> Tensor:
    """No entropy: reads x forward, reads x and writes dx backward. Nothing can be faster."""
    return torch.cat([_ReadWrite.apply(x) for x in xs])


def io_bytes(xs: list[Tensor], backward: bool) -> int:
    return sum(x.numel() * x.element_size() for x in xs) * (3 if backward else 1)


def ours(xs: list[Tensor], **options: str) -> Tensor:
    if len(xs) == 1:
        return ses_kernels.spectral_entropy(xs[0], **options).flatten()
    return ses_kernels.spectral_entropies(xs, **options)


def _cupy_eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    import cupy

    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        w, v = cupy.linalg.eigh(cupy.from_dlpack(a.detach()))
        return torch.from_dlpack(w), torch.from_dlpack(v)


@cache  # a new jit at every call would trace again
def _jax_solver():
    import jax

    # The default symmetrises its input first, a pass that the others do not make.
    return jax.jit(partial(jax.numpy.linalg.eigh, symmetrize_input=False))


def _jax_eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    from jax.dlpack import from_dlpack

    w, v = _jax_solver()(from_dlpack(a.detach().contiguous()))
    return torch.from_dlpack(w), torch.from_dlpack(v)


def eigh_peers(device: str) -> dict[str, Eigh]:
    """Batched eigh of the libraries installed here."""
    peers: dict[str, Eigh] = {"torch eigh": torch.linalg.eigh}
    if device == "cuda" and importlib.util.find_spec("cupy"):
        peers["CuPy eigh"] = _cupy_eigh
    if device == "cuda" and importlib.util.find_spec("jax"):
        peers["JAX eigh"] = _jax_eigh
    return peers


def providers(device: str) -> list[Provider]:
    """Ours first: the others are compared with it."""
    found = [
        Provider("ours", ours),
        Provider("ours, torch", partial(ours, backend="torch")),
        Provider("ours, eigh", partial(ours, solver="eigh")),
        Provider("gram, autograd", gram),
        Provider("gram, closed form", gram_closed),
        Provider("svdvals", svdvals),
        Provider("paper", paper),
        Provider("I/O floor", io_floor),
    ]
    if device == "cuda":  # on the CPU "auto" is this one, wherever both were measured
        found.insert(2, Provider("ours, rational", partial(ours, solver="rational")))
    if device == "cpu" and importlib.util.find_spec("vendi_score"):
        found.append(Provider("vendi-score", vendi, differentiable=False))
    for name, eigh in eigh_peers(device).items():
        if eigh is not torch.linalg.eigh:
            found.append(
                Provider(f"gram, {name}", partial(gram_closed, eigh=eigh), capturable=False)
            )
    return found
