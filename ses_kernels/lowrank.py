"""Entropy of the leading singular directions and a uniform tail, where both sides are long.

Let G = Xc Xc^T / |Xc|_F^2, with eigenvalues l_1 >= .. >= l_n, and U an orthonormal basis of q
directions in the range of Xc in which U^T G U = diag(p_1 >= .. >= p_q): Ritz vectors and values.
The mass that they miss is r = 1 - sum_i p_i. What is returned is

    H = -sum_i p_i log p_i - r log(r / (n - q)),

the largest entropy that G can have given p and U. It is never too small: pinching G to U and its
complement does not lower the entropy, and a uniform tail is the largest entropy of the rest. It is
too large by at most

    bound = H - [-(p_1 + r) log(p_1 + r) - sum_{i > 1} p_i log p_i]
          <= r (log((n - q) (p_1 + r) / r) + 1)

By Cauchy's interlacing l_i >= p_i, so that the sum of any m leading l_i is at most that of the m
leading p_i plus r: (p_1 + r, p_2, .. p_q, 0 ..) majorises l, and entropy is Schur-concave. Neither
side asks that the subspace have converged, nor for the residuals of the Ritz pairs.

With U held fixed, dH/dx = (2 / tau) [U diag(f) U^T Xc + f_tail (Xc - U U^T Xc)], tau = |Xc|_F^2,
f_i = -(log p_i + H), f_tail = -(log(r / (n - q)) + H). At an invariant subspace the derivative of
U adds nothing, because H is stationary there.

The subspace comes from a Gaussian test matrix and power iterations, orthonormalised at each half
step: Halko, Martinsson & Tropp, SIAM Review 53 (2011), algorithm 4.4, then 5.1. Not
torch.svd_lowrank: it draws from the global generator, and subtracts its M after the product, where
a large mean cancels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ses_kernels import ops, torch_rows
from ses_kernels.context import break_compiled_transforms, without_autocast

OVERSAMPLING = 8  # directions computed, and used, beyond the rank asked for: q = rank + 8
_POWER_ITERATIONS = 2
_BLOCK = 1 << 20  # elements of x standardised at a time: bounds the temporaries


def apply(
    x: Tensor, rank: int, center: bool, backend: str
) -> tuple[Tensor, Tensor]:  # (b, B, d) -> 2 x (b,)
    """H and the bound on its error (b,); rank + OVERSAMPLING < min(B - center, d)."""
    break_compiled_transforms()
    return LowRankFunction.apply(x, rank, center, backend)[:2]


class LowRankFunction(torch.autograd.Function):
    """(x, rank, center, backend) -> (H, bound, then for backward U, C V^T, tail, location, scale).

    dH/dx = tail Xs + U C V^T, C diagonal.
    """

    @staticmethod
    def forward(x, rank, center, backend):  # (b, B, d)
        return _solve(x, rank, center, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or there would be zeros for all that is saved
        ctx.save_for_backward(inputs[0], *output[2:])

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:
            return None, None, None, None
        return LowRankBackward.apply(g, *ctx.saved_tensors), None, None, None

    @staticmethod
    def vmap(info, in_dims, x, *options):
        x = x.movedim(in_dims[0], 0).flatten(0, 1)
        outs = LowRankFunction.apply(x, *options)
        return tuple(o.unflatten(0, (info.batch_size, -1)) for o in outs), (0,) * len(outs)


class LowRankBackward(torch.autograd.Function):
    """(g, then what was saved) -> g dH/dx. A Function, so that its derivative is refused aloud."""

    generate_vmap_rule = True

    @staticmethod
    @without_autocast
    def forward(g, x, u, cv, tail, location, scale):
        g = g.to(scale.dtype)[:, None, None]
        blocks = [
            torch.baddbmm(g * tail[:, None, None] * xs, g * u[:, rows], cv).to(x.dtype)
            for rows, xs in _standardized(x, location, scale)
        ]
        return torch.cat(blocks, 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            'spectral_entropy(solver="lowrank") is once differentiable; use solver="eigh" for a '
            "second derivative"
        )


@without_autocast
def _solve_row(x, rank, center, backend):
    dtype = ops.widened(x)
    location, scale = ops.location_scale(x, x[:, :1] if center else x[:, :0], dtype, backend)
    n = min(x.shape[1] - int(center), x.shape[2])  # centred samples sum to zero: one direction less
    q = rank + OVERSAMPLING

    u = _range(x, location, scale, q)
    w = _transposed_times(u, x, location, scale).mT  # U^T Xs (b, q, d)
    finite = w.isfinite().all(-1).all(-1)  # LAPACK rejects NaN for the whole batch
    w = torch.where(finite[:, None, None], w, 0.0)
    rotation, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    u = u @ rotation
    rest = torch.zeros_like(scale)
    for rows, xs in _standardized(x, location, scale):  # |Xs|^2 - |W|^2 would be mere rounding
        missed = torch.baddbmm(xs, u[:, rows], sigma[..., None] * vh, alpha=-1)
        rest += missed.square().sum((1, 2))

    sigma, rest = sigma.double(), rest.double()[:, None]
    total = (sigma**2).sum(-1, keepdim=True) + rest
    t = torch.where(total == 0, 1.0, total)  # no variance: H = 0
    p, r = sigma**2 / t, rest / t
    log_p, log_tail = _log(p), _log(r / (n - q))
    h = -(p * log_p).sum(-1, keepdim=True) - r * log_tail
    lowest = torch.special.entr(p[:, :1] + r) - (p * log_p)[:, 1:].sum(-1, keepdim=True)
    bound = h - lowest

    # f = -(log p + H), f_tail = -(log(r / (n - q)) + H); where p = 0 nothing is multiplied by f
    f, f_tail = -(log_p + h), -(log_tail + h)
    coefficient = (2 * scale[:, None] / t) * torch.where(finite, 1.0, torch.nan)[:, None]
    cv = (coefficient * (f - f_tail) * sigma).to(dtype)[..., None] * vh
    tail = (coefficient * f_tail)[:, 0].to(dtype)
    h, bound = (torch.where(finite, v[:, 0], torch.nan).to(dtype) for v in (h, bound))
    return h, bound, u, cv.contiguous(), tail, location, scale


def _solve_fake(x, rank, center, backend):
    b, rows, columns = x.shape
    q = rank + OVERSAMPLING
    sizes = [
        (b,),
        (b,),
        (b, rows, q),
        (b, q, columns),
        (b,),
        (b, 2 if center else 0, columns),
        (b,),
    ]
    return tuple(x.new_empty(size, dtype=ops.widened(x)) for size in sizes)


# One operation: its draws and its blocks are no tracer's business.
_solve = ops.register(
    "lowrank",
    "(Tensor x, int rank, bool center, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_solve_fake,
    default=_solve_row,
)


def _range(x, location, scale, q) -> Tensor:  # -> (b, B, q)
    """Orthonormal, near the span of the q leading left singular vectors of Xs."""
    y = _test_matrix(x.shape[2], q, scale.dtype, x.device).expand(x.shape[0], -1, -1)
    for _ in range(_POWER_ITERATIONS):
        u = torch.linalg.qr(_times(x, location, scale, y))[0]
        y = torch.linalg.qr(_transposed_times(u, x, location, scale))[0]
    return torch.linalg.qr(_times(x, location, scale, y))[0]


def _test_matrix(d: int, q: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)  # the user's stays where it is
    return torch.randn(d, q, generator=generator, dtype=dtype, device=device)


def _times(x, location, scale, y) -> Tensor:  # Xs y: (b, d, q) -> (b, B, q)
    return torch.cat([xs @ y for _, xs in _standardized(x, location, scale)], 1)


def _transposed_times(u, x, location, scale) -> Tensor:  # Xs^T u: (b, B, q) -> (b, d, q)
    out = scale.new_zeros(x.shape[0], x.shape[2], u.shape[2])
    for rows, xs in _standardized(x, location, scale):
        out.baddbmm_(xs.mT, u[:, rows])
    return out


def _standardized(x, location, scale) -> Iterator[tuple[slice, Tensor]]:
    """(rows, Xs there): the centred x as a whole would be a second x."""
    step = max(1, _BLOCK // (x.shape[0] * x.shape[2]))
    for i in range(0, x.shape[1], step):
        rows = slice(i, i + step)
        yield rows, torch_rows.standardize(x[:, rows], location, scale)


def _log(p: Tensor) -> Tensor:
    """log p, 0 where p = 0."""
    return torch.where(p == 0, 1.0, p).log()
