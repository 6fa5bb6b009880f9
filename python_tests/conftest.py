"""Matrices to test on, the plain PyTorch route to be measured against, and the CUDA marker."""

import math

import pytest
import torch

from ses_kernels import reference


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    reason = "needs a CUDA device, and torch.cuda.is_available() is False here"
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- hard spectra -----------------------------------------------------------------------------


def _with_spectrum(sigma, B, d, g):
    n = min(B, d)
    u = torch.linalg.qr(torch.randn(B, n, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(d, n, generator=g, dtype=torch.float64))[0]
    return (u * sigma[:n]) @ v.mT


def _power_law(exponent):
    def make(B, d, g):
        i = torch.arange(1, min(B, d) + 1, dtype=torch.float64)
        return _with_spectrum(i**-exponent, B, d, g)

    return make


def _rank(k):
    def make(B, d, g):
        left = torch.randn(B, k, generator=g, dtype=torch.float64)
        return left @ torch.randn(k, d, generator=g, dtype=torch.float64)

    return make


def _repeated(B, d, g):
    n = min(B, d)
    return _with_spectrum(torch.tensor([1.0, 0.5, 0.25] * n, dtype=torch.float64)[:n], B, d, g)


def _clustered(B, d, g):
    n = min(B, d)
    noise = torch.rand(n, generator=g, dtype=torch.float64)
    return _with_spectrum(1 + 1e-6 * noise, B, d, g)


def _dominant(B, d, g):
    x = torch.randn(B, d, generator=g, dtype=torch.float64)
    return x + 300 * torch.outer(torch.randn(B, generator=g, dtype=torch.float64), x[0])


def _relu_large_mean(B, d, g):
    x = torch.relu(torch.randn(B, d, generator=g, dtype=torch.float64))
    return x + 100 * torch.rand(d, generator=g, dtype=torch.float64)


def _outlier_first_row(B, d, g):
    x = torch.randn(B, d, generator=g, dtype=torch.float64)
    x[0] *= 1000
    return x


def _duplicate_rows(B, d, g):
    x = torch.randn(B, d, generator=g, dtype=torch.float64)
    x[B // 2 :] = x[: B - B // 2].clone()
    return x


def _dead_column(B, d, g):
    x = torch.randn(B, d, generator=g, dtype=torch.float64)
    x[:, d // 2] = 0
    return x


def _bfloat16(B, d, g):
    return torch.randn(B, d, generator=g).bfloat16().double()


FAMILIES = {
    "gaussian": lambda B, d, g: torch.randn(B, d, generator=g, dtype=torch.float64),
    "power_law_1": _power_law(1),
    "power_law_2": _power_law(2),
    "rank_1": _rank(1),
    "rank_5": _rank(5),
    "repeated": _repeated,
    "clustered": _clustered,
    "dominant": _dominant,
    "relu_large_mean": _relu_large_mean,
    "outlier_first_row": _outlier_first_row,
    "duplicate_rows": _duplicate_rows,
    "dead_column": _dead_column,
    "bfloat16": _bfloat16,
}


def family(name, B, d, dtype=torch.float32, seed=0):
    """(B, d) of that family, rounded to dtype, so that a float64 copy of it is the same data."""
    return FAMILIES[name](B, d, torch.Generator().manual_seed(seed)).to(dtype)


# ---- routes to compare -------------------------------------------------------------------------


def plain_torch(x, center=True, power=2, order=1.0):
    """What one would write in PyTorch: centre, Gram of the smaller side, eigvalsh, autograd.

    Where small singular values carry the result one would write svdvals instead.
    """
    xc = x - x.mean(-2, keepdim=True) if center else x
    if power * min(order, 1) < 2:
        w = torch.linalg.svdvals(xc) ** power
    else:
        gram = xc @ xc.mT if x.shape[-2] <= x.shape[-1] else xc.mT @ xc
        w = torch.linalg.eigvalsh(gram).clamp_min(0) ** (power / 2)
    p = w / w.sum(-1, keepdim=True)
    if order == 1:
        return -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)
    if math.isinf(order):
        return -p.amax(-1).log()
    return (torch.where(p > 0, p, 1.0) ** order * (p > 0)).sum(-1).log() / (1 - order)


def value_and_gradient(function, x):
    x = x.detach().requires_grad_()
    h = function(x)
    (g,) = torch.autograd.grad(h.sum(), x)
    return h.detach().double(), g.double()


def errors(function, x, **options):
    """|H - H_64| and |g - g_64| |Xc| against the float64 reference on the same data.

    1 / |Xc| is the natural unit of dH/dx: on a rank-1 matrix the gradient itself is near 0.
    """
    h, g = value_and_gradient(function, x)
    x = x.double()
    h64, g64 = value_and_gradient(lambda y: reference.spectral_entropy(y, **options), x)
    unit = (x - x.mean(-2, keepdim=True)).norm() if options.get("center", True) else x.norm()
    return (h - h64).abs().max().item(), ((g - g64).norm() * unit).item()


def root_mean_square(values):
    return math.sqrt(sum(v * v for v in values) / len(values))
