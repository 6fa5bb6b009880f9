"""ses_kernels.linalg against LAPACK in float64, on the families and their failure modes."""

import math

import pytest
import torch
from conftest import FAMILIES, family

from ses_kernels import linalg, ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 31, 64, 127, 128, 129])
def test_eigh_residuals(n, dtype):
    """The Gram matrices of every family in one batch, so that one hard matrix cannot hide."""
    xs = [family(name, n, n + 3, torch.float64) for name in FAMILIES]
    a = torch.stack([x @ x.mT / (x * x).sum() for x in xs]).to(dtype)
    w, v = linalg.eigh(a)
    eps = torch.finfo(dtype).eps
    a, w, v = a.double(), w.double(), v.double()
    norm = a.abs().amax((1, 2))
    largest = lambda r: r.abs().amax((1, 2))  # noqa: E731
    assert (largest(a @ v - v * w[:, None]) <= 200 * n * eps * norm).all()
    assert largest(v.mT @ v - torch.eye(n)).max() <= 100 * n * eps
    assert (largest((v * w[:, None]) @ v.mT - a) <= 400 * n * eps * norm).all()
    assert (w.diff(dim=-1) >= 0).all()
    assert ((w - torch.linalg.eigvalsh(a)).abs().amax(1) <= 20 * n * eps * norm).all()


def test_eigh_reads_the_lower_triangle_of_any_strides():
    a = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    lower = a.tril() + a.tril(-1).mT
    w, v = linalg.eigh(a)
    torch.testing.assert_close(w, torch.linalg.eigvalsh(lower))
    torch.testing.assert_close((v * w[..., None, :]) @ v.mT, lower)
    strided = torch.randn(2, 7, 9, 4, dtype=torch.float64)[:, 1:6, 2:7].permute(0, 3, 1, 2)
    torch.testing.assert_close(linalg.eigh(strided)[0], torch.linalg.eigvalsh(strided))


@pytest.mark.parametrize("n", [4, 40, 200])
def test_eigh_nan_stays_in_its_matrix(n):
    a = torch.randn(5, n, n)
    a = a + a.mT
    expected = linalg.eigh(a)[0]
    a[1, 2, 0] = math.nan
    a[3, 3, 3] = math.inf
    w, v = linalg.eigh(a)
    assert w.isnan().all(-1).tolist() == [False, True, False, True, False]
    torch.testing.assert_close(w[::2], expected[::2])
    assert v[::2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 2, 9, 5), (6, 6), (1, 4), (3, 40, 130)])
def test_svd(shape, dtype):
    x = torch.randn(shape).to(dtype)
    u, s, vh = linalg.svd(x)
    n = min(shape[-2:])
    assert (u.shape, s.shape, vh.shape) == (
        (*shape[:-1], n), (*shape[:-2], n), (*shape[:-2], n, shape[-1]),
    )  # fmt: skip
    assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 100 * torch.finfo(s.dtype).eps * s.max().item()
    wide = {"rtol": 0, "atol": tolerance}
    torch.testing.assert_close((u * s[..., None, :]) @ vh, x.to(s.dtype), **wide)
    eye = torch.eye(n, dtype=s.dtype).expand(*shape[:-2], n, n)
    torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(vh @ vh.mT, eye, rtol=0, atol=1e-5)
    expected = torch.linalg.svdvals(x.double()).to(s.dtype)
    torch.testing.assert_close(s, expected, **wide)
    torch.testing.assert_close(linalg.svdvals(x), expected, **wide)


@pytest.mark.parametrize("name", FAMILIES)
def test_svd_where_the_gram_matrix_loses_the_small_values(name):
    for B, d in ((20, 50), (50, 20)):
        x = family(name, B, d)
        exact = torch.linalg.svdvals(x.double())
        eps = torch.finfo(torch.float32).eps
        assert (linalg.svdvals(x) - exact).abs().max() <= 4 * eps * exact.max()
        u, _, vh = linalg.svd(x)
        eye = torch.eye(20)
        torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=2e-5)
        torch.testing.assert_close(vh @ vh.mT, eye, rtol=0, atol=2e-5)


def test_errors():
    a = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="spectral_entropy"):
        linalg.eigh(a.requires_grad_())
    with torch.no_grad():
        linalg.eigh(a)
    a = a.detach()
    for call, error, message in (
        (lambda: linalg.eigh(a[:3]), ValueError, r"\(3, 4\)"),
        (lambda: linalg.eigh(a.half()), TypeError, "float16"),
        (lambda: linalg.svd(a.long()), TypeError, "int64"),
        (lambda: linalg.svdvals(a[0]), ValueError, r"\(4,\)"),
        (lambda: linalg.svd(a[:0]), ValueError, r"\(0, 4\)"),
        (lambda: linalg.eigh([[1.0]]), TypeError, "list"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_autocast_changes_nothing():
    a = torch.randn(3, 8, 12)
    expected = linalg.svd(a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linalg.svd(a)
    assert all(torch.equal(e, g) for e, g in zip(expected, got, strict=True))


@pytest.mark.skipif(ops.EXTENSION_MISSING is not None, reason=str(ops.EXTENSION_MISSING))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extension_and_torch_rows_agree(dtype):
    x = torch.randn(7, 24, 40, dtype=dtype)
    gram = x @ x.mT
    w, v = ops.eigh(gram, "fused")
    w_torch, v_torch = ops.eigh(gram, "torch")
    assert v.stride() == v_torch.stride()
    eps = torch.finfo(dtype).eps
    assert (w - w_torch).abs().max() <= 100 * eps * w.max()
    signs = (v * v_torch).sum(1, keepdim=True).sign()
    torch.testing.assert_close(v * signs, v_torch, rtol=0, atol=1e5 * eps)
