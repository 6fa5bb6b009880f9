"""The public functions: what may be asked, checked once, then handed to autograd.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from ses_kernels import distributed, lowrank
from ses_kernels.autograd import apply, apply_packed
from ses_kernels.checks import check
from ses_kernels.solvers import Options

_SOLVERS = ("auto", "eigh", "rational", "lowrank")
_BACKENDS = ("auto", "torch", "fused")


@overload
def spectral_entropy(
    x: Tensor,
    *,
    center: bool = ...,
    power: float = ...,
    order: float = ...,
    solver: str = ...,
    rank: int | None = ...,
    backend: str = ...,
    group: torch.distributed.ProcessGroup | None = ...,
    return_bound: Literal[False] = ...,
) -> Tensor: ...
@overload
def spectral_entropy(
    x: Tensor,
    *,
    center: bool = ...,
    power: float = ...,
    order: float = ...,
    solver: str = ...,
    rank: int | None = ...,
    backend: str = ...,
    group: torch.distributed.ProcessGroup | None = ...,
    return_bound: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def spectral_entropy(
    x: Tensor,
    *,
    center: bool = True,
    power: float = 2,
    order: float = 1.0,
    solver: str = "auto",
    rank: int | None = None,
    backend: str = "auto",
    group: torch.distributed.ProcessGroup | None = None,
    return_bound: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (..., B, d) -> (...)
    """Entropy, in nats, of the normalised spectrum of a matrix of B samples and d features.

    With σ_i the singular values of x (its column means removed if ``center``),
    p_i = σ_i^power / Σ_j σ_j^power and H = -Σ_i p_i log p_i, where 0 log 0 = 0. It is taken from
    the Gram matrix of the smaller side, with a closed-form gradient: no derivative of an
    eigenvector, so repeated and zero eigenvalues are no special case.

    Examples:
        By its definition, for the defaults:

        >>> x = torch.randn(256, 512)
        >>> s = torch.linalg.svdvals(x - x.mean(-2, keepdim=True)) ** 2
        >>> p = s / s.sum(-1, keepdim=True)
        >>> H = torch.special.entr(p).sum(-1)
        >>> torch.testing.assert_close(ses_kernels.spectral_entropy(x), H, rtol=1e-5, atol=0)
        >>> ses_kernels.spectral_entropy(torch.eye(2), center=False)  # log 2
        tensor(0.6931)

    Args:
        x: ``(..., B, d)``, float16, bfloat16, float32 or float64, any strides, any device.
        center: subtract the mean over the B samples.
        power: p_i is proportional to sigma_i ** power, power > 0. 2: covariance eigenvalues
            (SES, VNE, Vendi score). 1: singular values (RankMe, weight spectra).
        order: Renyi order q > 0. 1: Shannon (von Neumann). 2: collision entropy, for power 2
            without any eigensolver. ``math.inf``: min-entropy, -log max p.
        solver: ``"eigh"`` the exact spectrum; ``"rational"`` partial fractions of the logarithm,
            no eigenvectors and no synchronisation (power 2 and order 1 only); ``"auto"`` picks one
            of the two. ``"lowrank"``: an approximation for two sides beyond a few thousand, below.
        rank: for ``solver="lowrank"``, the number k of leading directions to resolve.
        backend: ``"torch"`` plain PyTorch operations; ``"fused"`` our kernels, an error where they
            cannot run; ``"auto"`` the kernels where they can.
        group: a ``torch.distributed`` process group over whose ranks the samples are sharded
            (shards may be uneven). Each rank gets the entropy H of the global batch and, from
            backward, the exact dH/dx of its own shard. DDP divides the sum of the ranks' parameter
            gradients by the world size W, so multiply this term of the loss by W to get the
            gradient of one process on the joined batch. Collectives: an all-reduce of d x d where d
            is the smaller side, else an all-gather of the samples (kept for backward); the shard
            sizes are read on the host. Eager only, once differentiable.
        return_bound: with ``solver="lowrank"``, return ``(H, bound)``, both ``(...)``: the exact
            entropy lies in [H - bound, H]. No gradient flows through the bound.

    Returns:
        ``(...)``, float32 (float64 for float64). No variance (B = 1, equal rows, zeros) gives 0
        with a gradient of 0. NaN or Inf in a matrix gives NaN for that matrix alone. The gradient
        has the dtype of x.

    Raises:
        TypeError: x is not a dense tensor of the dtypes above: complex, sparse, nested, a DTensor.
        ValueError: fewer than two axes, an empty axis, an option outside its range, or options that
            exclude each other.
        RuntimeError: ``backend="fused"`` and a kernel that cannot run here.

    Precision: float32 (float64 for float64), whatever autocast says. Some Gram matrices are in
    float64 all the same: with ``solver="rational"`` on the CPU, where that keeps the gradient right
    on spectra that fall beyond the eps of float32; and where small singular values carry the result
    (power * min(order, 1) < 2), because a Gram matrix squares the condition number. There float64
    inputs go through ``torch.linalg.svd``. Values are scaled by a power of two first: |x| from
    1e-18 to 1e18 is safe.

    What a Gram matrix cannot hold: in float32 (``"eigh"`` at power 2 and order 1, order > 1 or
    power > 2, ``backend="torch"``, CUDA) shares p_i below some N 1e-7, N = max(B, d), are rounding.
    H is right to a few N 1e-7, but its gradient, in units of 1 / |Xc|, to a few sqrt(N 1e-7):
    where one outlier, a row of 1e4 among ones, leaves H near 1e-5, that may be all of it.
    ``"rational"`` on the CPU and float64 samples keep it. And where small singular values carry the
    result, those of float32 samples up to sqrt(n) 1.5e-8 sigma_1 count as zero, which is about what
    rounding to float32 makes of zeros.

    Cost: O(B d n + n^3), n = min(B, d), for value and gradient. Saved for backward: x, one n x n
    matrix, and 2 d + 1 numbers; temporaries of x have at most 2^18 elements on the CPU.
    ``solver="auto"`` picks from measurements (``python -m ses_kernels`` prints them). On CUDA
    ``solver="eigh"`` synchronises the host for n above the extension's limit, where it calls
    ``torch.linalg.eigh``; the rest does not.

    ``solver="lowrank"`` (power 2, order 1, no group) takes q = k + 8 directions from a randomised
    range finder with two power iterations, always the same for the same x, and spreads the rest r
    of the variance evenly over the other directions, which never gives too small an entropy. Good
    where sigma_i falls like i^-2 or faster, and for low rank plus little noise: at 3000 x 3000 and
    k = 50, in float32, H was 6e-6 too large for i^-2 (bound 4e-5) and 2e-6 for rank 20 plus 1 %
    noise (9e-5). Poor on flat spectra, where the tail carries everything: 0.02 for i^-1 (0.14), and
    on Gaussian data 0.5 of 7.5 (7.5) with a gradient wholly wrong. So look at the bound once, which
    is at most about r log(n / r); it leaves out round-off, some 1e-6 in float32. O(B d q) in 7
    passes over x, and an SVD of q x d: at k = 128 on two cores a quarter of the time of
    ``"rational"`` at 1536 x 1536, a twentieth at 4096 x 4096. Saved for backward: x and q (B + d)
    numbers. The gradient holds the subspace fixed: exact where the power iterations have converged,
    once differentiable, no forward mode. k + 8 >= n takes the exact spectrum. Derivation:
    ``ses_kernels/lowrank.py``.

    Sources: SVD trick and entropy: Roy & Vetterli, "The effective rank" (EUSIPCO 2007); VNE: Kim et
    al. (CVPR 2023). Gradient of a spectral function: Lewis, Math. Oper. Res. 21 (1996). Second
    derivative: Daleckii & Krein (1965), see Higham, "Functions of Matrices" (2008), ch. 3. Range
    finder: Halko, Martinsson & Tropp, SIAM Review 53 (2011).
    """
    check(x)
    options = _options(center, power, order, solver, rank, backend, group)
    if return_bound:
        if solver != "lowrank":
            raise ValueError(f'return_bound is for solver="lowrank", got solver={solver!r}')
        entropy, bound = _low_rank(_flat(x), rank, options)
        return entropy.reshape(x.shape[:-2]), bound.reshape(x.shape[:-2])
    at_once = apply_packed(options, x.shape[:-2], x)
    if at_once is not None:
        return at_once
    (entropy,) = _flat_entropies([x], rank, options)
    return entropy if x.dim() == 3 else entropy.reshape(x.shape[:-2])


def spectral_entropies(
    xs: Sequence[Tensor],
    *,
    center: bool = True,
    power: float = 2,
    order: float = 1.0,
    solver: str = "auto",
    rank: int | None = None,
    backend: str = "auto",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:  # L tensors (B_l, d_l) -> (L,)
    """Spectral entropies of many layers at once: one solver call for all layers of equal min(B, d).

    Examples:
        >>> layers = [torch.eye(2), torch.eye(4)]
        >>> ses_kernels.spectral_entropies(layers, center=False)
        tensor([0.6931, 1.3863])

    Args:
        xs: L matrices ``(B_l, d_l)`` on one device; B, d and dtype may differ.

    The other options, errors and costs are those of :func:`spectral_entropy`.

    Returns:
        ``(L,)`` entropies in nats: float32, or float64 if any x is.
    """
    xs = list(xs)
    options = _options(center, power, order, solver, rank, backend, group)
    if not xs:
        raise ValueError("spectral_entropies needs at least one matrix, got an empty sequence")
    for index, x in enumerate(xs):
        check(x)
        if x.dim() != 2:
            raise ValueError(
                f"spectral_entropies takes one (B, d) matrix a layer, got shape {tuple(x.shape)} "
                f"at index {index}; use spectral_entropy for a batch of matrices"
            )
        if x.device != xs[0].device:
            raise ValueError(
                f"spectral_entropies takes tensors of one device, got {xs[0].device} at index 0 "
                f"and {x.device} at index {index}; call it once per device"
            )
    at_once = apply_packed(options, (len(xs),), *xs)
    if at_once is not None:
        return at_once
    entropies = _flat_entropies(xs, rank, options)
    dtype = torch.float64 if any(h.dtype == torch.float64 for h in entropies) else torch.float32
    return torch.cat([h.to(dtype) for h in entropies])


def effective_rank(
    x: Tensor,
    *,
    center: bool = True,
    power: float = 2,
    order: float = 1.0,
    solver: str = "auto",
    rank: int | None = None,
    backend: str = "auto",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:  # (..., B, d) -> (...)
    """exp of :func:`spectral_entropy`: the number of equal directions with the same entropy.

    ``power=1`` is the effective rank of Roy & Vetterli (2007) and, with ``center=False``, RankMe
    (Garrido et al., ICML 2023). Options, shapes, errors and cost: :func:`spectral_entropy`.

    Examples:
        >>> two_of_three = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
        >>> ses_kernels.effective_rank(two_of_three, center=False)
        tensor(2.)
    """
    return spectral_entropy(
        x, center=center, power=power, order=order, solver=solver, rank=rank, backend=backend,
        group=group,
    ).exp()  # fmt: skip


def _flat_entropies(xs: list[Tensor], rank: int | None, options: Options) -> tuple[Tensor, ...]:
    """L tensors (..., B, d) -> L tensors (prod(...),)."""
    flat = [_flat(x) for x in xs]
    if options.solver == "lowrank":
        return tuple(_low_rank(x, rank, options)[0] for x in flat)
    if options.group is None:
        return apply(options, *flat)
    sharded = [distributed.gather_if_wide(x, options.group) for x in flat]
    return tuple(apply(options._replace(group=group), x)[0] for x, group in sharded)


def _low_rank(x: Tensor, rank: int | None, options: Options) -> tuple[Tensor, Tensor]:  # (b, B, d)
    """Entropies and bounds (b,); a rank that would leave no tail gets the exact spectrum."""
    assert rank is not None  # _options has asked for it
    if rank + lowrank.OVERSAMPLING < min(x.shape[1] - int(options.center), x.shape[2]):
        return lowrank.apply(x, rank, options.center, options.backend)
    (entropy,) = apply(options._replace(solver="eigh"), x)
    return entropy, torch.zeros_like(entropy)


def _flat(x: Tensor) -> Tensor:  # (..., B, d) -> (prod(...), B, d)
    return x if x.dim() == 3 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _options(center, power, order, solver, rank, backend, group) -> Options:
    power, order = float(power), float(order)
    if not (0 < power < math.inf):
        raise ValueError(f"power must be a positive finite number, got {power}")
    if not order > 0:
        raise ValueError(f"order must be positive (math.inf for the min-entropy), got {order}")
    if solver not in _SOLVERS:
        raise ValueError(f"solver must be one of {_SOLVERS}, got {solver!r}")
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS}, got {backend!r}")
    if solver in ("rational", "lowrank") and (power, order) != (2.0, 1.0):
        raise ValueError(
            f'solver="{solver}" is made for the logarithm and needs power=2 and order=1, got '
            f'power={power} and order={order}; use solver="eigh"'
        )
    if solver != "lowrank" and rank is not None:
        raise ValueError(f'rank is for solver="lowrank", got rank={rank} and solver={solver!r}')
    if solver == "lowrank":
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f'solver="lowrank" needs rank=k, an int of at least 1, got {rank!r}')
        if group is not None:
            raise ValueError('solver="lowrank" needs group=None: its samples cannot be sharded')
        if backend == "fused":
            raise RuntimeError(
                'backend="fused": solver="lowrank" has no kernel; use backend="auto" or "torch"'
            )
    return Options(bool(center), power, order, solver, backend, group)
