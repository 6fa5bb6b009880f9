"""Derivatives: finite differences, second order, and torch.func, against other routes."""

import math

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import ses_kernels
from ses_kernels import entropy, reference

OPTIONS = [
    {},
    {"center": False},
    {"power": 1},
    {"power": 3},
    {"order": 2},
    {"order": 0.5},
    {"order": 1.2, "power": 1.5},
    {"order": math.inf},
    {"solver": "rational"},
]
SHAPES = [(1, 3), (2, 5), (4, 4), (6, 3), (3, 7)]


def matrix(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck_and_gradgradcheck(shape, options):
    x = matrix(2, *shape).requires_grad_()
    f = lambda y: ses_kernels.spectral_entropy(y, **options)  # noqa: E731
    # two samples have one eigenvalue and H = 0 everywhere: finite differences see only round-off
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, atol=1e-6)
    assert torch.autograd.gradgradcheck(f, x, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"order": 2}, {"order": 0.5}, {"power": 1}], ids=str)
def test_second_derivative_at_repeated_eigenvalues(options):
    """A multiple of an orthogonal matrix: every eigenvalue equal, every gap 0."""
    q = torch.linalg.qr(matrix(5, 5))[0].requires_grad_()
    f = lambda y: ses_kernels.spectral_entropy(y, center=False, **options)  # noqa: E731
    assert torch.autograd.gradgradcheck(f, q, atol=1e-4)


@pytest.mark.parametrize(
    ("power", "order"), [(2, 1), (1, 1), (2, 0.7), (3, 2.5), (2, math.inf), (1, 4)]
)
def test_eigenvalue_derivatives_equal_autograd(power, order):
    """entropy.py's F and Gamma against autograd through its own value, gaps from 1e-9 to 1."""
    w = torch.tensor([[0.3, 0.3 + 1e-9, 0.3 + 1e-5, 0.35, 0.9, 2.0, 5.0]], dtype=torch.float64)
    value = lambda u: entropy.entropy(u, power, order, 0.0)[0]  # noqa: E731
    _, f = entropy.entropy(w, power, order, 0.0)
    torch.testing.assert_close(f, grad(lambda u: value(u).sum())(w), rtol=1e-10, atol=1e-13)
    dw = matrix(1, 7)
    gamma, shared = entropy.second_derivative(w, dw, power, order, 0.0)
    hvp = jvp(lambda u: entropy.entropy(u, power, order, 0.0)[1], (w,), (dw,))[1]
    diagonal = gamma.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal * dw + shared, hvp, rtol=1e-9, atol=1e-12)
    # off the diagonal: wide gaps by their definition, narrow ones by the slope between
    wide = (f[:, 0] - f[:, 5]) / (w[:, 0] - w[:, 5])
    torch.testing.assert_close(gamma[:, 0, 5], wide)
    torch.testing.assert_close(gamma[:, 0, 1], gamma[:, 0, 0], rtol=1e-7, atol=0)


def test_gradgradcheck_of_many_layers():
    xs = [matrix(4, 6), matrix(4, 9, seed=1), matrix(7, 3, seed=2)]
    xs = [x.requires_grad_() for x in xs]
    f = lambda *ys: ses_kernels.spectral_entropies(ys)  # noqa: E731
    assert torch.autograd.gradcheck(f, xs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, xs)


def test_third_derivative_is_refused():
    x = matrix(3, 5).requires_grad_()
    (g,) = torch.autograd.grad(ses_kernels.spectral_entropy(x), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gg.sum().backward()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_func_transforms(options):
    settings = {k: v for k, v in options.items() if k != "solver"}
    f = lambda y: ses_kernels.spectral_entropy(y, **options)  # noqa: E731
    r = lambda y: reference.spectral_entropy(y, **settings)  # noqa: E731
    scalar = lambda function: lambda y: function(y).sum()  # noqa: E731
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)  # noqa: E731
    x, tangent = matrix(3, 4, 6), matrix(3, 4, 6, seed=1)
    gradient = grad(scalar(r))(x)
    close(grad(scalar(f))(x), gradient)
    close(vmap(f)(x), r(x))
    close(vmap(f, in_dims=2)(x), r(x.movedim(2, 0)))
    close(vmap(vmap(f))(x[None]), r(x)[None])
    close(vmap(grad(scalar(f)))(x), gradient)
    close(jacrev(f)(x), jacrev(r)(x))
    close(jacfwd(f)(x), jacrev(r)(x))
    close(jvp(f, (x,), (tangent,))[1], (gradient * tangent).sum((-2, -1)))
    double = lambda function: grad(  # noqa: E731
        lambda y: (grad(scalar(function))(y) * tangent).sum()
    )
    step = 1e-6 * tangent
    finite = (grad(scalar(r))(x + step) - grad(scalar(r))(x - step)) / 2e-6
    torch.testing.assert_close(double(f)(x), finite, rtol=1e-5, atol=1e-6)
    y = x[0, :3, :4]
    hess = hessian(f)(y)
    torch.testing.assert_close(hess, jacrev(jacrev(f))(y), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        torch.einsum("ijkl,kl->ij", hess, tangent[0, :3, :4]),
        jvp(grad(f), (y,), (tangent[0, :3, :4],))[1],
        rtol=1e-8,
        atol=1e-9,
    )


def test_vmap_over_one_of_two_layers():
    x, y = matrix(5, 4, 6), matrix(4, 8, seed=1)
    got = vmap(lambda u: ses_kernels.spectral_entropies([u, y]))(x)
    expected = torch.stack([reference.spectral_entropy(x), reference.spectral_entropy(y).expand(5)])
    torch.testing.assert_close(got, expected.T)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    x = matrix(5, 9).requires_grad_()
    f = lambda y: ses_kernels.spectral_entropy(y.sin())  # noqa: E731
    (expected,) = torch.autograd.grad(f(x), x)
    checkpoint(f, x, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, expected)


def entropy_of_the_leading(x, rank, order):
    """Renyi entropy of the ``rank`` largest singular values alone, by autograd's own route."""
    s = torch.linalg.svdvals(x - x.mean(-2, keepdim=True))[..., :rank] ** 2
    p = s / s.sum(-1, keepdim=True)
    if order == 1:
        return torch.special.entr(p).sum(-1)
    return torch.log1p((p * torch.expm1((order - 1) * p.log())).sum(-1)) / (1 - order)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 5e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (64, 64), (9, 300)])
def test_orders_next_to_one_on_rank_deficient_samples(shape, dtype, largest):
    """Small integers of rank 5: exact in float32, with null directions that rounding fills."""
    x = matrix(shape[0], 5).mul(4).round() @ matrix(5, shape[1], seed=1).mul(4).round()
    v = matrix(shape[0], shape[0], seed=2) @ x  # keeps the rank
    for order in (0.9, 1 - 1e-7, 1, 1 + 1e-12, 1 + 1e-7, 1 + 1e-6, 1 + 1e-4, 1.001, 1.01, 1.1, 1.6):
        exact = grad(lambda y, q=order: entropy_of_the_leading(y, 5, q))
        ours = grad(lambda y, q=order: ses_kernels.spectral_entropy(y, order=q, solver="eigh"))
        expected = exact(x)
        got, product = jvp(ours, (x.to(dtype),), (v.to(dtype),))
        assert (got - expected).norm() <= largest * expected.norm(), order
        step = 1e-4 / shape[0]
        expected = (exact(x + step * v) - exact(x - step * v)) / (2 * step)
        assert (product - expected).norm() <= (1e-5 + 40 * largest) * expected.norm(), order


@pytest.mark.parametrize("shape", [(6, 30), (30, 6)])
def test_float32_second_derivative(shape):
    x, v = matrix(*shape).float(), matrix(*shape, seed=1).float()

    def product(y, u):
        y = y.requires_grad_()
        (g,) = torch.autograd.grad(ses_kernels.spectral_entropy(y), y, create_graph=True)
        return torch.autograd.grad(g, y, u)[0]

    got, expected = product(x.clone(), v), product(x.double(), v.double())
    assert got.dtype == torch.float32
    assert (got - expected).norm() < 1e-4 * expected.norm()
