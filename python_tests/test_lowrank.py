"""solver="lowrank" against the float64 reference: value, error bound, gradient, randomness."""

import math

import pytest
import torch
from conftest import FAMILIES, errors, family

import ses_kernels
from ses_kernels import lowrank, reference


def entropy(x, rank=4, **options):
    return ses_kernels.spectral_entropy(x, solver="lowrank", rank=rank, **options)


def with_spectrum(sigma, B, d, dtype=torch.float64, seed=0):
    """(..., B, d) of those singular values; its columns have no mean, so centring changes none."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*sigma.shape[:-1], *shape, generator=g).double()  # noqa: E731
    u = normal(B, sigma.shape[-1])
    u = torch.linalg.qr(u - u.mean(-2, keepdim=True))[0]
    v = torch.linalg.qr(normal(d, sigma.shape[-1]))[0]
    return ((u * sigma[..., None, :]) @ v.mT).to(dtype)


def random_spectra(batch, n):
    """Singular values between flat and steep, with and without gaps: squares of many Gammas."""
    shape = torch.logspace(-2, 1, batch, dtype=torch.float64)[:, None].expand(batch, n)
    sigma = torch.distributions.Gamma(shape, 1.0).sample().sqrt()
    decay = torch.linspace(0, 3, batch, dtype=torch.float64)[torch.randperm(batch), None]
    return sigma * torch.arange(1, n + 1, dtype=torch.float64) ** -decay


# ---- value and bound ----------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 2])  # it holds on a subspace that is far off as well
@pytest.mark.parametrize("rank", [1, 5, 24])
@pytest.mark.parametrize(("B", "d"), [(60, 47), (48, 48), (41, 150)])
def test_the_bound_holds_on_random_spectra(B, d, rank, iterations, monkeypatch):
    monkeypatch.setattr(lowrank, "_POWER_ITERATIONS", iterations)
    n = min(B - 1, d)
    x = with_spectrum(random_spectra(60, n), B, d)
    h, bound = entropy(x, rank, return_bound=True)
    error = h - reference.spectral_entropy(x)
    assert (error >= -1e-12).all()
    assert (error <= bound + 1e-12).all()
    assert (error > 0.01 * bound).any()  # it is of the size of what it bounds


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_bound_holds_on_the_families(name, center):
    for B, d in ((50, 70), (70, 33)):
        x = family(name, B, d, torch.float64)
        h, bound = entropy(x, 6, center=center, return_bound=True)
        error = h - reference.spectral_entropy(x, center=center)
        assert -1e-11 <= error <= bound + 1e-11
        assert h <= math.log(min(B - center, d))


def test_the_bound_covers_the_worst_tail():
    """All that is missed in one direction: as far from uniform as a tail can be."""
    rank = 2
    q = rank + lowrank.OVERSAMPLING
    h, bound = entropy(with_spectrum(torch.ones(q + 1).double(), 200, 200), rank, return_bound=True)
    error = h - math.log(q + 1)
    assert 0.4 < error <= bound < 1.2


def test_the_bound_covers_the_worst_subspace(monkeypatch):
    """One that holds cos^2 of the only large direction, and misses the rest of it."""
    rank, tail = 1, 1e-4
    sigma = torch.cat([torch.ones(1), torch.full((58,), tail)]).double()
    x = with_spectrum(sigma, 60, 60)
    u = torch.linalg.svd(x)[0]
    for angle in (0.01, 0.3, 0.7, 1.2, 1.5):
        mixed = u[:, :1] * math.cos(angle) + u[:, 30:31] * math.sin(angle)
        subspace = torch.cat([mixed, u[:, 1 : rank + lowrank.OVERSAMPLING]], 1)[None]
        monkeypatch.setattr(lowrank, "_range", lambda *_, subspace=subspace: subspace)
        h, bound = entropy(x, rank, return_bound=True)
        error = h - reference.spectral_entropy(x)
        assert 0 < error <= bound < error + 1e-4  # and no smaller bound would do


def test_good_on_steep_spectra_and_poor_on_flat_ones():
    i = torch.arange(1, 200, dtype=torch.float64)
    for exponent, largest in ((2, 1e-4), (3, 1e-7), (4, 1e-9)):
        x = with_spectrum(i**-exponent, 200, 230)
        h, bound = entropy(x, 40, return_bound=True)
        assert h - reference.spectral_entropy(x) <= bound < largest
    h, bound = entropy(family("gaussian", 200, 230, torch.float64), 40, return_bound=True)
    assert bound > 2


def test_a_uniform_tail_is_exact():
    sigma = torch.cat([torch.linspace(1, 3, 12), torch.full((47,), 1e-3)]).double()
    for B, d in ((60, 90), (90, 59)):
        x = with_spectrum(sigma, B, d) + 5
        error, gradient_error = errors(entropy, x)
        assert error < 1e-12
        assert gradient_error < 1e-9


@pytest.mark.parametrize("rank", [30 - lowrank.OVERSAMPLING, 29, 1000])
def test_a_rank_without_a_tail_is_the_exact_spectrum(rank):
    x = torch.randn(30, 40)
    h, bound = entropy(x, rank, return_bound=True)
    assert bound == 0
    assert torch.equal(h, ses_kernels.spectral_entropy(x, solver="eigh"))


def test_the_largest_rank_with_a_tail_is_nearly_exact():
    x = torch.randn(30, 40, dtype=torch.float64)
    h, bound = entropy(x, 28 - lowrank.OVERSAMPLING, return_bound=True)  # 28 of 29 directions
    assert 0 <= h - reference.spectral_entropy(x) < 1e-3
    assert 0 < bound < 0.1


# ---- gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("B", "d"), [(13, 16), (17, 12)])
def test_gradcheck_where_the_subspace_has_converged(B, d, center):
    """A gap of 1e-3 after q directions; what lies beyond is no more uniform than Gaussian noise."""
    leading = with_spectrum(torch.linspace(1, 2, 1 + lowrank.OVERSAMPLING).double(), B, d)
    x = torch.stack([leading, 9 * leading + 3 * center]) + 1e-3 * torch.randn(2, B, d).double()
    torch.autograd.gradcheck(
        lambda x: entropy(x, 1, center=center), x.requires_grad_(), atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_on_steep_and_noisy_low_rank_data(dtype):
    i = torch.arange(1, 200, dtype=torch.float64)
    noisy = family("rank_5", 200, 300, torch.float64) + 1e-3 * torch.randn(200, 300).double()
    for x, largest in (
        (with_spectrum(i**-2, 200, 300), 2e-2),  # in units of 1 / |Xc|; the tail carries sqrt r
        (with_spectrum(i**-4, 200, 300), 1e-4),
        (noisy, 5e-3),
        (family("rank_5", 200, 300, torch.float64), 1e-4),
    ):
        error, gradient_error = errors(lambda y: entropy(y, 32), x.to(dtype))
        assert error < 3e-5
        assert gradient_error < largest


def test_once_differentiable():
    x = torch.randn(30, 40, requires_grad=True)
    (g,) = torch.autograd.grad(entropy(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        g.sum().backward()


def test_no_variance():
    for x in (torch.zeros(30, 40), torch.randn(40).expand(30, 40), torch.randn(1, 40)):
        x = x.clone().requires_grad_()
        h, bound = entropy(x, return_bound=True)
        (g,) = torch.autograd.grad(h, x)
        assert h == bound == 0
        assert (g == 0).all()


# ---- inputs --------------------------------------------------------------------------------------


def value_and_gradient(x, **options):
    x = x.detach().requires_grad_()
    h, bound = entropy(x, return_bound=True, **options)
    return h.detach(), bound, *torch.autograd.grad(h.sum(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    x = torch.randn(2, 30, 40).to(dtype)
    h, bound, g = value_and_gradient(x)
    expected = value_and_gradient(x.float())
    assert (h.dtype, g.dtype) == (torch.float32, dtype)
    assert torch.equal(h, expected[0])
    assert torch.equal(bound, expected[1])
    assert torch.equal(g, expected[2].to(dtype))


def test_autocast_changes_nothing():
    x = torch.randn(30, 40)
    expected = value_and_gradient(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradient(x)
    assert all(torch.equal(e, g) for e, g in zip(expected, got, strict=True))


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_any_scale(scale):
    x = torch.randn(30, 40)
    h, bound, g = value_and_gradient(x)
    scaled = value_and_gradient(x * scale)
    torch.testing.assert_close(scaled[0], h)
    torch.testing.assert_close(scaled[1], bound)
    torch.testing.assert_close(scaled[2] * scale, g, rtol=1e-4, atol=1e-7)


def test_a_large_mean_cancels():
    i = torch.arange(1, 60, dtype=torch.float64)
    x = (with_spectrum(i**-2, 60, 80) * 64).float() + 1000 * torch.rand(80)
    h, gradient = errors(lambda y: entropy(y, 20), x)
    assert h < 1e-4
    assert gradient < 2e-2


def test_batches_strides_and_blocks(monkeypatch):
    buffer = torch.randn(2, 3, 50, 35)
    x = buffer[..., 1:41, 2:32].mT  # (2, 3, 30, 40), no dimension dense
    assert not x.is_contiguous()
    h, bound, g = value_and_gradient(x)
    assert h.shape == bound.shape == (2, 3)
    monkeypatch.setattr(lowrank, "_BLOCK", 7 * 40)
    single = value_and_gradient(x[1, 2].contiguous())
    torch.testing.assert_close(h[1, 2], single[0])
    torch.testing.assert_close(bound[1, 2], single[1])
    torch.testing.assert_close(g[1, 2], single[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_matrix(bad):
    x = torch.randn(3, 30, 40)
    expected = value_and_gradient(x)
    x[1, 4, 5] = bad
    got = value_and_gradient(x)
    for e, g in zip(expected, got, strict=True):
        assert g[1].isnan().all()
        torch.testing.assert_close(g[::2], e[::2])


def test_saved_for_backward():
    saved = []
    x = torch.randn(60, 80, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        entropy(x, 4)
    assert sum(t is x or t.shape == (1, 60, 80) for t in saved) == 1
    q = 4 + lowrank.OVERSAMPLING
    assert sum(t.numel() for t in saved) == 60 * 80 + q * (60 + 80) + 2 * 80 + 2


def test_the_global_generator_is_neither_read_nor_moved():
    x = torch.randn(30, 40)
    state = torch.get_rng_state()
    first = value_and_gradient(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = value_and_gradient(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- the other functions, transforms, errors -----------------------------------------------------


def test_the_other_public_functions():
    xs = [torch.randn(30, 40), torch.randn(50, 25).double(), torch.randn(12, 9)]
    hs = ses_kernels.spectral_entropies(xs, solver="lowrank", rank=4)
    assert hs.dtype == torch.float64
    torch.testing.assert_close(hs, torch.stack([entropy(x).double() for x in xs]))
    rank = ses_kernels.effective_rank(xs[0], solver="lowrank", rank=4)
    torch.testing.assert_close(rank, entropy(xs[0]).exp())


def test_torch_func():
    x = torch.randn(3, 30, 40)
    h, _, g = value_and_gradient(x)
    torch.testing.assert_close(torch.func.vmap(entropy)(x), h)
    torch.testing.assert_close(torch.func.vmap(entropy, in_dims=2)(x.permute(1, 2, 0)), h)
    torch.testing.assert_close(torch.func.grad(entropy)(x[0]), g[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(entropy))(x), g)
    torch.testing.assert_close(torch.func.jacrev(entropy)(x)[1, 1], g[1])


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    x = torch.randn(30, 40)
    expected = value_and_gradient(x)
    compiled = torch.compile(entropy, fullgraph=True, backend="aot_eager")
    h = compiled(x.requires_grad_())
    torch.testing.assert_close(h.detach(), expected[0])
    torch.testing.assert_close(torch.autograd.grad(h, x)[0], expected[2])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "lowrank"}, ValueError, "rank=k"),
        ({"solver": "lowrank", "rank": 0}, ValueError, "at least 1, got 0"),
        ({"solver": "lowrank", "rank": 2.0}, ValueError, "got 2.0"),
        ({"solver": "lowrank", "rank": True}, ValueError, "got True"),
        ({"rank": 4}, ValueError, "lowrank"),
        ({"solver": "eigh", "rank": 4}, ValueError, "lowrank"),
        ({"solver": "lowrank", "rank": 4, "power": 1}, ValueError, "power=2"),
        ({"solver": "lowrank", "rank": 4, "order": 2}, ValueError, "order=1"),
        ({"solver": "lowrank", "rank": 4, "group": "world"}, ValueError, "group=None"),
        ({"solver": "lowrank", "rank": 4, "backend": "fused"}, RuntimeError, "no kernel"),
    ],
    ids=str,
)
def test_errors(options, error, message):
    x = torch.randn(30, 40)
    for function, argument in (
        (ses_kernels.spectral_entropy, x),
        (ses_kernels.spectral_entropies, [x]),
        (ses_kernels.effective_rank, x),
    ):
        with pytest.raises(error, match=message):
            function(argument, **options)


def test_the_bound_is_for_this_solver():
    with pytest.raises(ValueError, match="lowrank"):
        ses_kernels.spectral_entropy(torch.randn(30, 40), return_bound=True)
