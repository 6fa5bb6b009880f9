"""Properties of the spectrum, on matrices that hypothesis invents."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import ses_kernels

orders = st.sampled_from([0.5, 1.0, 1.3, 2.0, 5.0, math.inf])
powers = st.sampled_from([1.0, 2.0, 3.0])
seeds = st.integers(0, 2**31)
sides = st.integers(1, 24)
few = settings(max_examples=40, deadline=None, derandomize=True)


def matrix(B, d, seed, rank=None):
    g = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(B, d, generator=g, dtype=torch.float64)
    left = torch.randn(B, rank, generator=g, dtype=torch.float64)
    return left @ torch.randn(rank, d, generator=g, dtype=torch.float64)


def entropy(x, **options):
    return ses_kernels.spectral_entropy(x, **options).item()


@few
@given(sides, sides, seeds, powers, orders)
def test_orthogonal_invariance(B, d, seed, power, order):
    x = matrix(B, d, seed)
    q = torch.linalg.qr(matrix(d, d, seed + 1))[0]
    options = {"power": power, "order": order}
    assert math.isclose(entropy(x @ q, **options), entropy(x, **options), abs_tol=1e-9)
    u = torch.linalg.qr(matrix(B, B, seed + 2))[0]
    options["center"] = False
    assert math.isclose(entropy(u @ x, **options), entropy(x, **options), abs_tol=1e-9)


@few
@given(sides, sides, seeds, powers, orders, st.floats(1e-100, 1e100))
def test_scale_and_shift_invariance(B, d, seed, power, order, scale):
    x = matrix(B, d, seed)
    options = {"power": power, "order": order}
    h = entropy(x, **options)
    assert math.isclose(entropy(scale * x, **options), h, abs_tol=1e-9)
    assert math.isclose(entropy(x + matrix(1, d, seed + 1), **options), h, abs_tol=1e-9)


@few
@given(sides, sides, seeds, powers, orders)
def test_permutation_and_transpose(B, d, seed, power, order):
    x = matrix(B, d, seed)
    options = {"power": power, "order": order}
    h = entropy(x, **options)
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(B, generator=g), torch.randperm(d, generator=g)
    assert math.isclose(entropy(x[rows][:, columns], **options), h, abs_tol=1e-9)
    options["center"] = False
    assert math.isclose(entropy(x.T, **options), entropy(x, **options), abs_tol=1e-9)


@few
@given(st.integers(2, 24), st.integers(2, 24), st.integers(1, 30), seeds, powers)
def test_bounds_and_order_in_the_order(B, d, rank, seed, power):
    """0 <= H_inf <= H_2 <= H_1 <= H_1/2 <= log rank."""
    x = matrix(B, d, seed, rank)
    values = [entropy(x, power=power, order=q) for q in (math.inf, 2.0, 1.0, 0.5)]
    bounds = [0.0, *values, math.log(max(min(B - 1, d, rank), 1))]
    assert all(low <= high + 1e-6 for low, high in itertools.pairwise(bounds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{"order": q, "power": p} for q in (0.3, 0.9, 1, 1.2, 1.5, 1.6, 2, 3, 9, math.inf)
     for p in (1, 2, 3)]
    + [{"solver": "rational"}, {"solver": "rational", "backend": "torch"}, {"solver": "eigh"},
       {"order": 2, "backend": "torch"}, {"solver": "lowrank", "rank": 1}],
    ids=str,
)  # fmt: skip
def test_one_direction_has_no_less_than_one_dimension(options, dtype):
    """Nothing is rounded below 0, which is where H of a single direction lies."""
    g = torch.Generator().manual_seed(0)
    for B, d in itertools.product((1, 2, 5, 19, 40, 64), (1, 3, 19, 31, 64)):
        outer = torch.randn(B, 1, generator=g) @ torch.randn(1, d, generator=g)
        noise = 1e-7 * torch.randn(B, d, generator=g)
        row = torch.zeros(B, d)
        row[0] = 3.7
        x = torch.stack([outer, outer + noise, torch.ones(B, d), row])
        for center in (True, False):
            h = ses_kernels.spectral_entropy(x.to(dtype), center=center, **options)
            assert (h >= 0).all()
            rank = ses_kernels.effective_rank(x.to(dtype), center=center, **options)
            assert (rank >= 1).all()
    if options.get("solver") == "lowrank":
        _, bound = ses_kernels.spectral_entropy(x.to(dtype), return_bound=True, **options)
        assert (bound >= 0).all()


@few
@given(st.integers(2, 24), sides, seeds, powers, orders)
def test_gradient_is_orthogonal_to_what_changes_nothing(B, d, seed, power, order):
    """H ignores scale (Euler: <g, x> = 0) and the mean (columns of g sum to 0)."""
    x = matrix(B, d, seed).requires_grad_()
    h = ses_kernels.spectral_entropy(x, power=power, order=order)
    (g,) = torch.autograd.grad(h, x)
    assert abs((g * x.detach()).sum().item()) < 1e-8
    assert g.sum(0).abs().max().item() < 1e-8
