"""ses_kernels.linalg against LAPACK in float64, on the spectra of LAPACK's own testers and ours.

The matrices of one size are one batch, so that a hard one meets easy neighbours in its SIMD lanes.
"""

import math
import warnings

import pytest
import torch
from conftest import FAMILIES, family

from ses_kernels import linalg, ops

DTYPES = (torch.float32, torch.float64)
LIMIT = min(ops.eigh_limit("cpu", None, dtype.itemsize) for dtype in DTYPES) or 128  # kMaxN
# Odd, prime, powers of two and their neighbours; one above the limit goes to torch.linalg.eigh.
SIZES = sorted({1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 48, 61, 63, 64, 65, 97}
               | {LIMIT - 1, LIMIT, LIMIT + 1})  # fmt: skip


def eigh_fused(a):  # (b, n, n)
    return ops.eigh(a, "fused")


without_extension = pytest.mark.skipif(
    ops.EXTENSION_MISSING is not None, reason=str(ops.EXTENSION_MISSING)
)
ROUTES = [linalg.eigh, pytest.param(eigh_fused, marks=without_extension)]


# ---- matrices -----------------------------------------------------------------------------------


def spectra(n, eps):  # name -> (n,)
    """LAPACK's (dlatms modes 1 to 5; "clustered" is mode 1), and the rank families around them."""
    i = torch.arange(n, dtype=torch.float64)
    t = i / max(n - 1, 1)
    ones, rank = torch.ones(n, dtype=torch.float64), max(1, n // 4)
    few = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    return {
        "arithmetic": 1 - t * (1 - eps),
        "geometric": eps**t,
        "clustered": torch.where(i == 0, 1.0, eps),
        "one_small": torch.where(i == n - 1, eps, 1.0) if n > 1 else ones,
        "log_random": eps ** torch.rand(n, dtype=torch.float64),
        "rank_deficient": torch.where(i < rank, 1 - t / 2, 0.0),
        "rank_one": torch.where(i == 0, 1.0, 0.0),
        "near_rank": torch.where(i < rank, 1 - t / 2, 4 * eps),
        "repeated": few.repeat(n)[:n],
        "tight": 1 + 1e-6 * torch.rand(n, dtype=torch.float64),
        "two_clusters": torch.where(i % 2 == 0, 1.0, -1.0) + 8 * eps * torch.randn(n).double(),
    }


def orthogonal(*shape):
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


def symmetric_matrices(n, dtype):  # -> (b, n, n)
    """Types 1 to 18 of LAPACK's symmetric tester (dchkst), and what else is hard in its own way."""
    values = torch.stack(list(spectra(n, torch.finfo(dtype).eps).values()))
    signed = values * torch.randint(0, 2, values.shape).mul(2).sub(1)
    q = orthogonal(len(values), n, n)
    rotated = [values[:, None] * q @ q.mT, signed[:, None] * q @ q.mT]
    diagonal = torch.diag_embed(signed[:, torch.randperm(n)])
    # Square roots of the overflow and underflow thresholds, as far as LAPACK's testers go.
    info = torch.finfo(dtype)
    huge, tiny = math.sqrt(info.max) * info.eps / n, math.sqrt(info.tiny) * n / info.eps
    x = torch.randn(n, n, dtype=torch.float64)
    x = x + x.mT
    uniform = (2 * torch.rand(n, n, dtype=torch.float64) - 1).tril()
    i = torch.arange(n, dtype=torch.float64)
    grading = 10 ** (-4 * (i[:, None] + i) / n)
    others = [
        torch.zeros_like(x),
        torch.eye(n).double(),
        torch.ones_like(x),
        x,
        uniform + uniform.tril(-1).mT,
        x.tril(1).triu(-1),
        x.tril(3).triu(-3),
        x * grading,
        (x * grading).flip(0, 1),
        x + torch.diag(x.abs().sum(0)),  # diagonally dominant
        torch.diag((i - i.mean()).abs()) + torch.diag(torch.ones(n - 1).double(), 1)
        + torch.diag(torch.ones(n - 1).double(), -1),  # Wilkinson: pairs that nearly coincide
        x @ x / n,
    ]  # fmt: skip
    moderate = torch.cat([*rotated, diagonal, torch.stack(others)])
    extreme = [s * m for s in (huge, tiny) for m in (rotated[1][1], diagonal[1], others[3])]
    return torch.cat([moderate, torch.stack(extreme)]).to(dtype)


def assert_eigh(a, w, v):
    """Residual, orthogonality and reconstruction, in the 1-norm relative to A, as LAPACK's."""
    assert v.shape == a.shape
    assert w.dtype == v.dtype == a.dtype
    n, unit = a.shape[-1], a.shape[-1] * torch.finfo(a.dtype).eps
    a, w, v = a.double(), w.double(), v.double()
    a = a.tril() + a.tril(-1).mT
    norm = lambda m: m.abs().sum(-2).amax(-1)  # noqa: E731
    size = norm(a)
    assert (norm(a @ v - v * w[..., None, :]) <= 200 * unit * size).all()
    assert (norm(v.mT @ v - torch.eye(n)) <= 100 * unit).all()
    assert (norm((v * w[..., None, :]) @ v.mT - a) <= 400 * unit * size).all()
    assert (w.diff() >= 0).all()
    assert ((w - torch.linalg.eigvalsh(a)).abs().amax(-1) <= 20 * unit * size).all()


# ---- eigh ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_eigh_on_hard_matrices(n, dtype, route):
    if route is eigh_fused and n > LIMIT:
        with pytest.raises(RuntimeError, match=f"n = {n} exceeds"):
            route(torch.eye(n, dtype=dtype)[None])
        return
    a = symmetric_matrices(n, dtype)
    assert_eigh(a, *route(a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 16, 31, 64, 127, 129])
def test_eigh_on_gram_matrices(n, dtype):
    xs = [family(name, n, n + 3, torch.float64) for name in FAMILIES]
    a = torch.stack([x @ x.mT / (x * x).sum() for x in xs]).to(dtype)
    assert_eigh(a, *linalg.eigh(a))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_eigh_of_every_size_in_random_order(dtype, route):
    """One process, sizes and batches up and down: nothing is left over from the call before."""
    for n in (1 + torch.randperm(LIMIT)).tolist():
        batch = int(torch.randint(1, 12, ()))
        a = torch.randn(batch, n, n, dtype=dtype)
        a[::3] = torch.diag_embed(a[::3, 0])
        a[1::3] = a[1::3, :, :1] @ a[1::3, :, :1].mT
        a = a + a.mT
        assert_eigh(a, *route(a))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [6, 33])
def test_one_hard_matrix_among_easy_ones(n, dtype, route):
    easy = torch.diag(torch.arange(n, dtype=dtype)).expand(37, n, n)
    w_easy, v_easy = route(easy.contiguous())
    assert_eigh(easy, w_easy, v_easy)
    hard = symmetric_matrices(n, dtype)[4]
    w_hard, _ = route(hard[None])
    for place in (0, 7, 8, 15, 16, 31, 32, 36):  # the edges of lanes and of groups of them
        a = easy.clone()
        a[place] = hard
        w, v = route(a)
        assert_eigh(a, w, v)
        torch.testing.assert_close(w[place], w_hard[0], rtol=0, atol=20 * torch.finfo(dtype).eps)
        others = torch.arange(37) != place
        assert torch.equal(w[others], w_easy[others])
        assert torch.equal(v[others], v_easy[others])


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
    assert v.isnan().flatten(1).all(-1).tolist() == [False, True, False, True, False]
    torch.testing.assert_close(w[::2], expected[::2])
    assert v[::2].isfinite().all()


@pytest.mark.parametrize("n", [4, 40, 200])
def test_eigh_ignores_nan_above_the_diagonal(n):
    a = torch.randn(3, n, n)
    expected = linalg.eigh(a)
    a[1, 0, n - 1] = math.nan
    for got, clean in zip(linalg.eigh(a), expected, strict=True):
        torch.testing.assert_close(got, clean)


# ---- svd ----------------------------------------------------------------------------------------


def assert_svd(x, u, s, vh):
    n = min(x.shape[-2:])
    assert (u.shape, s.shape, vh.shape) == (
        (*x.shape[:-1], n), (*x.shape[:-2], n), (*x.shape[:-2], n, x.shape[-1]),
    )  # fmt: skip
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert u.dtype == s.dtype == vh.dtype == dtype
    unit = max(x.shape[-2:]) * torch.finfo(dtype).eps
    x, u, s, vh = x.double(), u.double(), s.double(), vh.double()
    exact = torch.linalg.svdvals(x)
    size = exact[..., 0]
    norm = torch.linalg.matrix_norm
    assert (norm(x @ vh.mT - u * s[..., None, :]) <= 20 * unit * size).all()
    assert (norm(u.mT @ u - torch.eye(n)) <= 20 * unit).all()
    assert (norm(vh @ vh.mT - torch.eye(n)) <= 20 * unit).all()
    assert (norm((u * s[..., None, :]) @ vh - x) <= 20 * unit * size).all()
    assert (s.diff() <= 0).all()
    assert (s >= 0).all()
    assert ((s - exact).abs().amax(-1) <= 4 * unit * size).all()


def assert_svdvals(x, s):
    """Absolute, relative to the largest; float64 round-off is not lost on the way to float32."""
    eps = torch.finfo(s.dtype).eps * (1 if s.dtype == torch.float32 else max(x.shape[-2:]))
    exact = torch.linalg.svdvals(x.double())
    assert ((s - exact).abs() <= 4 * eps * exact[..., :1]).all()
    assert (s.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(3, 5, 9), (2, 2, 9, 5), (6, 6), (1, 4), (3, 40, 130), (2, 150, 135)]
)
def test_svd_of_any_shape_and_dtype(shape, dtype):
    x = torch.randn(shape).to(dtype)
    assert_svd(x, *linalg.svd(x))
    s = linalg.svdvals(x)
    assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_svdvals(x, s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "d"), [(20, 50), (50, 20), (33, 33), (1, 7), (129, 131)])
def test_svd_on_hard_spectra(B, d, dtype):
    """A Gram matrix alone would lose the small singular values of most of these, and U with it."""
    n = min(B, d)
    values = torch.stack(list(spectra(n, torch.finfo(dtype).eps).values()))
    made = (orthogonal(len(values), B, n) * values[:, None]) @ orthogonal(len(values), d, n).mT
    ours = torch.stack([family(name, B, d, torch.float64) for name in FAMILIES])
    for x in torch.cat([made, ours, torch.zeros(1, B, d)]).to(dtype):
        assert_svd(x, *linalg.svd(x))
        assert_svdvals(x, linalg.svdvals(x))


def test_svd_leaves_the_gram_matrix_where_it_is_ill_conditioned(monkeypatch):
    called = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: called.append(a) or svd(*a, **k))

    def matrix(ratio):
        return (orthogonal(8, 8) * torch.logspace(0, math.log10(ratio), 8)) @ orthogonal(20, 8).mT

    def to_lapack(x):
        called.clear()
        assert_svd(x, *linalg.svd(x))
        return bool(called)

    good, bad = matrix(2e-4), matrix(5e-5)
    assert not to_lapack(torch.stack([good, good]).float())
    assert to_lapack(torch.stack([good, bad]).float())
    assert to_lapack(good.double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("conditioned", ["well", "badly"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 4, 7), (5, 50, 41), (5, 1, 3), (5, 140, 150)])
def test_svd_nan_stays_in_its_matrix(shape, dtype, conditioned, bad, capfd):
    x = torch.randn(shape, dtype=torch.float64)
    if conditioned == "badly":  # for torch.linalg.svd
        x[4] = x[4, :, :1] @ x[4, :1]
    x = x.to(dtype)
    expected = [*linalg.svd(x), linalg.svdvals(x)]
    x[1, 0, 2] = bad
    x[3, -1, 0] = bad
    got = [*linalg.svd(x), linalg.svdvals(x)]
    for clean, out in zip(expected, got, strict=True):
        assert out.flatten(1).isnan().all(-1).tolist() == [False, True, False, True, False]
        torch.testing.assert_close(out[::2], clean[::2])
    assert "MKL" not in "".join(capfd.readouterr())


# ---- what both refuse and ignore -----------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 9, 12), (3, 2, 150, 140)])
@pytest.mark.parametrize("function", [linalg.svd, linalg.svdvals, linalg.eigh])
def test_vmap_folds_the_batch(function, shape, dtype):
    x = torch.randn(shape).to(dtype)
    if function is linalg.eigh:
        x = (x @ x.mT).to(torch.promote_types(dtype, torch.float32))
    as_tuple = lambda outs: (outs,) if isinstance(outs, torch.Tensor) else outs  # noqa: E731
    for axis in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # where torch loops over the batch it says so
            got = as_tuple(torch.vmap(function, in_dims=axis)(x))
        for out, clean in zip(got, as_tuple(function(x.movedim(axis, 0))), strict=True):
            torch.testing.assert_close(out, clean)


@without_extension
@pytest.mark.parametrize("dtype", DTYPES)
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
