"""ses_kernels._C on the CPU, called as the package calls it: raw pointers.

The values of location_scale, gram and gram_backward are in test_ops.py.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from ses_kernels import rational_coefficients, reference, spectral_entropy

_C = pytest.importorskip("ses_kernels._C")

DTYPES = (torch.float32, torch.float64)
ITEMSIZES = (4, 8)
# One, two, three, odd, prime, powers of two and their neighbours, and the limit.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 24, 31, 32, 33, 50, 63, 64, 65, 97, 127, 128)


def eigh(a, threads=2):  # (batch, n, n) -> (batch, n), (batch, n, n)
    w = torch.full(a.shape[:2], 7.0, dtype=a.dtype)
    v = torch.full(a.shape, 7.0, dtype=a.dtype)
    _C.eigh_cpu(
        a.data_ptr(), w.data_ptr(), v.data_ptr(), a.shape[0], a.shape[1], a.element_size(), threads
    )
    return w, v.mT


def spectrum(values, generator):  # (n,) -> (n, n)
    n = len(values)
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    return (q * torch.as_tensor(values, dtype=torch.float64)) @ q.mT


def family(name, n, generator):  # (n, n), float64
    x = torch.randn(n, n, dtype=torch.float64, generator=generator)
    i = torch.arange(n, dtype=torch.float64)
    rank = max(1, n // 4)
    return {
        "gaussian": lambda: x + x.mT,
        "covariance": lambda: x @ x.mT / n,
        "rank_one": lambda: x[:, :1] @ x[:, :1].mT,
        "rank_deficient": lambda: x[:, :rank] @ x[:, :rank].mT,
        "near_rank": lambda: spectrum([1.0] * rank + [1e-7] * (n - rank), generator),
        "indefinite_low_rank": lambda: spectrum([1.0, -1.0, *[0.0] * n][:n], generator),
        "repeated": lambda: spectrum([1.0 + (j % 3) for j in range(n)], generator),
        "clustered": lambda: spectrum((1 + 1e-6 * i).tolist(), generator),
        "graded": lambda: spectrum(
            torch.logspace(-8, 0, n, dtype=torch.float64).tolist(), generator
        ),
        "graded_entries": lambda: (x + x.mT) * 10 ** (-4 * (i[:, None] + i) / n),
        "graded_entries_up": lambda: ((x + x.mT) * 10 ** (-4 * (i[:, None] + i) / n)).flip(0, 1),
        "band": lambda: (x + x.mT).tril(2).triu(-2),
        "second_difference": lambda: (
            torch.eye(n, dtype=torch.float64) * 2
            - torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
            - torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
        ),
        "zero": lambda: torch.zeros(n, n, dtype=torch.float64),
        "ones": lambda: torch.ones(n, n, dtype=torch.float64),
        "identity": lambda: torch.eye(n, dtype=torch.float64),
        "diagonal": lambda: torch.diag(x[0]),
        "antidiagonal": lambda: torch.eye(n, dtype=torch.float64).flip(0),
        "dominant": lambda: 1e6 * x[:, :1] @ x[:, :1].mT + x + x.mT,
        "block": lambda: torch.block_diag(
            *[spectrum([1.0, 2.0], generator) for _ in range(n // 2)], *[x[:1, :1]] * (n % 2)
        ),
    }[name]()


FAMILIES = (
    "gaussian", "covariance", "rank_one", "rank_deficient", "near_rank", "indefinite_low_rank",
    "repeated", "clustered", "graded", "graded_entries", "graded_entries_up", "band",
    "second_difference", "zero", "ones", "identity", "diagonal", "antidiagonal", "dominant",
    "block",
)  # fmt: skip


def mixture(n, dtype, seed=0, copies=1):  # every family in one batch: (b, n, n)
    generator = torch.Generator().manual_seed(1000 * n + seed)
    a = torch.stack([family(name, n, generator) for name in FAMILIES for _ in range(copies)])
    a = a.to(dtype)
    return torch.tril(a) + torch.tril(a, -1).mT


def errors(a, w, v):  # Frobenius, relative to A and to n eps: (b,) each
    n, unit = a.shape[-1], a.shape[-1] * torch.finfo(a.dtype).eps
    a, w, v = a.double(), w.double(), v.double()
    size = torch.linalg.matrix_norm(a)
    size = torch.where(size == 0, 1.0, size)
    eye = torch.eye(n, dtype=torch.float64)
    residual = torch.linalg.matrix_norm(a @ v - v * w[:, None]) / size
    orthogonality = torch.linalg.matrix_norm(v.mT @ v - eye)
    reconstruction = torch.linalg.matrix_norm((v * w[:, None]) @ v.mT - a) / size
    return residual / unit, orthogonality / unit, reconstruction / unit


def assert_accurate(a, w, v):
    residual, orthogonality, reconstruction = errors(a, w, v)
    assert residual.max() < 10
    assert orthogonality.max() < 20
    assert reconstruction.max() < 20
    assert (w.diff() >= 0).all()
    exact = torch.linalg.eigvalsh(a.double())
    size = torch.linalg.matrix_norm(a.double())[:, None]
    assert ((w - exact).abs() <= 10 * a.shape[-1] * torch.finfo(a.dtype).eps * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_accuracy_on_every_family(n, dtype):
    a = mixture(n, dtype)
    assert_accurate(a, *eigh(a))


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_order_of_batch_sizes(dtype):
    generator = torch.Generator().manual_seed(5)
    for batch in torch.randint(1, 200, (30,), generator=generator).tolist():
        n = int(torch.randint(1, 40, (), generator=generator))
        x = torch.randn(batch, n, n, dtype=dtype, generator=generator)
        a = x + x.mT
        assert_accurate(a, *eigh(a, threads=batch % 4 + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5, 16, 33, 64, 128])
def test_bits_depend_on_the_matrix_alone(n, dtype):
    a = mixture(n, dtype, copies=2)
    w, v = eigh(a, threads=1)
    for threads in (2, 3, 8):
        assert all(map(torch.equal, eigh(a, threads), (w, v)))
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(1))
    for batch in (1, 3, 9, 17, len(a)):
        some = order[:batch]
        w_some, v_some = eigh(a[some].contiguous())
        # As integers: a zero that changed its sign would compare equal.
        bits = torch.int32 if dtype == torch.float32 else torch.int64
        assert torch.equal(w_some.view(bits), w[some].view(bits))
        assert torch.equal(v_some.view(bits), v[some].view(bits))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 32, 65])
def test_nan_and_inf_stay_in_their_matrix(n, dtype, bad):
    a = mixture(n, dtype)
    w, v = eigh(a)
    spoiled = a.clone()
    spoiled[3, -1, n // 2] = spoiled[3, n // 2, -1] = bad
    spoiled[5] = bad
    w_bad, v_bad = eigh(spoiled)
    good = [i for i in range(len(a)) if i not in (3, 5)]
    assert w_bad[[3, 5]].isnan().all()
    assert v_bad[[3, 5]].isnan().all()
    assert torch.equal(w_bad[good], w[good])
    assert torch.equal(v_bad[good], v[good])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-100, -60, -3, 3, 60, 100])
def test_a_power_of_two_scales_the_eigenvalues_and_nothing_else(exponent, dtype):
    a = mixture(17, dtype, seed=1)
    # Entries that a scale would push into the subnormals lose bits: none of those.
    a = torch.where(a.abs() < 1e-6, 0.0, a)
    w, v = eigh(a)
    scale = 2.0**exponent
    w_scaled, v_scaled = eigh(a * scale)
    assert torch.equal(v_scaled, v)
    assert torch.equal(w_scaled[w.abs() > 1e-7], (w * scale)[w.abs() > 1e-7])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-18, 1e18, 1e30, 1e36])
def test_scales(scale, dtype):
    x = torch.randn(20, 24, 24, dtype=dtype, generator=torch.Generator().manual_seed(2))
    a = (x + x.mT) * scale
    assert_accurate(a, *eigh(a))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_the_lower_triangle(dtype):
    a = mixture(12, dtype)
    poisoned = torch.tril(a) + torch.full_like(a, float("nan")).triu(1).nan_to_num(nan=1e3)
    assert all(map(torch.equal, eigh(poisoned), eigh(a)))


def test_python_threads_do_not_disturb_each_other():
    a = [mixture(n, torch.float32) for n in (8, 24, 40, 64)]
    expected = [eigh(x) for x in a]
    results = [None] * len(a)

    def work(i):
        results[i] = [eigh(a[i]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(a))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, (w, v) in zip(results, expected, strict=True):
        assert all(torch.equal(w, x) and torch.equal(v, y) for x, y in result)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_works_after_fork():
    a = mixture(64, torch.float32, copies=8)
    expected, v = eigh(a, threads=4)
    w = torch.zeros_like(expected)
    arguments = (a.data_ptr(), w.data_ptr(), v.data_ptr(), len(a), 64, 4, 4)
    child = os.fork()
    if child == 0:  # only our code and no torch operation: OpenMP's own threads did not survive
        _C.eigh_cpu(*arguments)
        os._exit(0 if w.numpy().tobytes() == expected.numpy().tobytes() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- the rational solver ------------------------------------------------------------------------


POLES = {dtype: _C.Poles(*rational_coefficients.columns(torch.float64, dtype)) for dtype in DTYPES}


def rational(gram, dtype=torch.float64, gradient=True, center=False, threads=2, poles=None):
    """H (batch,) and M (batch, n, n) in ``dtype``; what is not asked for is not written."""
    h = torch.full(gram.shape[:1], 7.0, dtype=dtype)
    m = torch.full(gram.shape, 7.0, dtype=dtype)
    layer = gram.data_ptr(), gram.shape, h.data_ptr(), m.data_ptr() if gradient else 0, center
    _C.rational_cpu([layer], dtype.itemsize, poles or POLES[dtype], threads)
    return h, m


def gram_family(name, n, generator):  # (n, n), float64, positive semidefinite up to rounding
    x = torch.randn(n, n, dtype=torch.float64, generator=generator)
    i = torch.arange(n, dtype=torch.float64)
    rank = max(1, n // 4)
    cosine = torch.eye(n, dtype=torch.float64) - torch.ones(n - 1, dtype=torch.float64).diag(1) / 2
    return {
        "gaussian": lambda: x @ x.mT,
        "huge": lambda: x @ x.mT * 1e300,
        "tiny": lambda: x @ x.mT * 1e-300,
        "rank_one": lambda: x[:, :1] @ x[:, :1].mT,
        "rank_deficient": lambda: x[:, :rank] @ x[:, :rank].mT,
        "repeated": lambda: spectrum([1.0 + (j % 3) for j in range(n)], generator),
        "power_law": lambda: spectrum((1 + i) ** -4, generator),
        "exponential": lambda: spectrum((-i).exp(), generator),
        "collapse": lambda: spectrum([1.0] + [1e-6] * (n - 1), generator),
        "dominant": lambda: x @ x.mT + 1e8 * x[:, :1] @ x[:, :1].mT,
        "ones": lambda: torch.ones(n, n, dtype=torch.float64),
        "identity": lambda: torch.eye(n, dtype=torch.float64),
        "diagonal": lambda: torch.diag(x[0] ** 2),
        "blocks": lambda: spectrum_of_blocks(n),
        "tridiagonal": lambda: cosine + cosine.mT,
        "zero": lambda: torch.zeros(n, n, dtype=torch.float64),
    }[name]()


def spectrum_of_blocks(n):
    two = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    return torch.block_diag(*[two] * (n // 2), *[torch.ones(1, 1, dtype=torch.float64)] * (n % 2))


GRAM_FAMILIES = (
    "gaussian", "huge", "tiny", "rank_one", "rank_deficient", "repeated", "power_law",
    "exponential", "collapse", "dominant", "ones", "identity", "diagonal", "blocks", "tridiagonal",
    "zero",
)  # fmt: skip


def gram_mixture(n, seed=0, copies=1):
    generator = torch.Generator().manual_seed(1000 * n + seed)
    k = [gram_family(name, n, generator) for _ in range(copies) for name in GRAM_FAMILIES]
    return torch.stack(k).tril() + torch.stack(k).tril(-1).mT


def same_bits(one, other):
    """As integers: a zero that changed its sign would compare equal. NaN is NaN."""
    one, other = (t.nan_to_num(nan=7.0) for t in (one, other))
    bits = torch.int32 if one.dtype == torch.float32 else torch.int64
    return torch.equal(one.view(bits), other.view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 17, 31, 32, 33, 40, 63, 64, 65, 100, 129, 200, 257])
def test_rational_equals_the_eigendecomposition(n, dtype):
    gram = gram_mixture(n)
    trace = gram.diagonal(dim1=1, dim2=2).sum(-1)
    unit = torch.where(trace == 0, 1.0, trace)[:, None, None]
    w, v = torch.linalg.eigh(gram / unit)
    w = w.clamp_min(0)
    h64 = torch.special.entr(w).sum(-1)
    h, m = rational(gram, dtype)
    unrounded, _ = rational(gram, poles=POLES[dtype])
    assert torch.equal(h, unrounded.to(dtype))
    # What the poles leave of an eigenvalue, and rounding
    assert ((unrounded - h64).abs() <= n * (1.44e-12 if dtype == torch.float32 else 6e-15)).all()
    assert h[-1] == 0
    assert (m[-1] == 0).all()
    # M in the basis of eigenvectors. A row weighs as much as its eigenvalue does in K M, or its
    # square root, the singular value, in the gradient.
    scaled = m.double() * unit
    error = v.mT @ scaled @ v + torch.diag_embed(w.clamp_min(1e-300).log() + h64[:, None])
    error = error[:-1].where((w > 0)[:-1, :, None], 0.0)  # not: the last, zero
    if dtype == torch.float32:  # 1 / tr K of the second and third is no float32
        assert h[1:3].isfinite().all()
        error[1:3] = 0
    assert (w[:-1, :, None] * error).abs().max() < (3e-6 if dtype == torch.float32 else 1e-12)
    weighted = w[:-1].sqrt()[:, :, None] * error
    assert weighted.abs().max() < (5e-6 if dtype == torch.float32 else 2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 32, 33, 64, 129])
def test_rational_bits_depend_on_the_matrix_alone(n, dtype):
    gram = gram_mixture(n, copies=2)
    gram[5] = torch.nan
    gram[9, -1, 0] = torch.inf
    for center in (False, True):
        h, m = rational(gram, dtype, center=center, threads=1)
        for threads in (2, 5):
            assert all(map(same_bits, rational(gram, dtype, True, center, threads), (h, m)))
        h_alone, untouched = rational(gram, dtype, gradient=False, center=center)
        assert same_bits(h_alone, h)
        assert (untouched == 7).all()
        order = torch.randperm(len(gram), generator=torch.Generator().manual_seed(1))
        for batch in (4, 5, 9, len(gram)):
            some = order[:batch]
            found = rational(gram[some].contiguous(), dtype, center=center)
            assert all(map(same_bits, found, (h[some], m[some])))
        # Fewer than four of one size are solved one by one, and differ from the batch by rounding.
        alone = [rational(gram[i : i + 1].contiguous(), dtype, center=center) for i in order[:3]]
        found = rational(gram[order[:3]].contiguous(), dtype, center=center)
        for i, one in enumerate(alone):
            assert all(map(same_bits, (t[i : i + 1] for t in found), one))


@pytest.mark.parametrize("n", [130, 257, 512, 515])
def test_rational_bits_of_one_matrix_on_any_number_of_threads(n):
    """Two parts from 256, four from 512: as many threads as parts, fewer, and more."""
    gram = gram_mixture(n)[:1]
    for center in (False, True):
        h, m = rational(gram, torch.float32, center=center, threads=1)
        for threads in (2, 3, 4, 8):
            assert all(map(same_bits, rational(gram, torch.float32, True, center, threads), (h, m)))
    w, v = torch.linalg.eigh(gram / gram.diagonal(dim1=1, dim2=2).sum())
    h, m = rational(gram, threads=4)
    assert (h - torch.special.entr(w).sum(-1)).abs().max() < n * 6e-15
    error = m * gram.diagonal(dim1=1, dim2=2).sum() + (v * (w.log() + h)) @ v.mT
    assert (v.mT @ error @ v * w).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, 6, 32, 33, 50])
def test_rational_centers_m(n):
    gram = gram_mixture(n)[[0, 3, 4, 5, 11]]
    (h, m), (h_centered, m_centered) = rational(gram), rational(gram, center=True)
    assert torch.equal(h, h_centered)
    expected = m - m.mean(1, keepdim=True)
    expected = expected - expected.mean(2, keepdim=True)
    size = m.abs().amax((1, 2), keepdim=True)
    assert ((m_centered - expected).abs() <= 1e-14 * size).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 32, 33, 65])
def test_rational_nan_and_inf_stay_in_their_matrix(n, dtype, bad):
    gram = gram_mixture(n)
    h, m = rational(gram, dtype)
    spoiled = gram.clone()
    spoiled[3, -1, n // 2] = bad
    spoiled[5] = bad
    spoiled[7, 0, 0] = bad
    h_bad, m_bad = rational(spoiled, dtype)
    good = [i for i in range(len(gram)) if i not in (3, 5, 7)]
    assert h_bad[[3, 5, 7]].isnan().all()
    assert m_bad[[3, 5, 7]].isnan().all()
    assert same_bits(h_bad[good], h[good])
    assert same_bits(m_bad[good], m[good])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 20, 32, 33, 80])
def test_rational_widens_the_poles_of_an_indefinite_matrix(n, dtype):
    """A Gram matrix worse than its type says costs digits; one that is none gives NaN."""
    generator = torch.Generator().manual_seed(n)
    w = torch.rand(n, dtype=torch.float64, generator=generator) + 0.5
    w[0] = 0
    exact = torch.special.entr(w / w.sum()).sum()
    gram = gram_mixture(n)
    expected = rational(gram, dtype)
    for relative, widened in ((-1e-9, True), (-0.3, False)):
        w[0] = relative * w.sum()
        made = spectrum(w, generator)
        gram[2] = (made + made.mT) / 2
        h, m = rational(gram, dtype)
        if widened:
            assert (h[2] - exact).abs() < 1e-6
            assert m[2].isfinite().all()
        else:
            assert h[2].isnan()
            assert m[2].isnan().all()
        others = torch.arange(len(gram)) != 2
        assert same_bits(h[others], expected[0][others])
        assert same_bits(m[others], expected[1][others])


@pytest.mark.parametrize("n", [5, 32, 33, 70])
def test_rational_reads_the_lower_triangle(n):
    gram = gram_mixture(n)
    poisoned = gram.tril() + torch.ones_like(gram).triu(1) * torch.nan
    poisoned[:, torch.ones(n, n).tril().bool()] = gram[:, torch.ones(n, n).tril().bool()]
    assert all(map(same_bits, rational(poisoned), rational(gram)))


def test_rational_layers_of_any_sizes_in_one_call():
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(1, 80, (25,), generator=generator).tolist()
    layers = [gram_mixture(n, seed=i)[: 1 + 3 * i % 16] for i, n in enumerate(sizes)]
    expected = [rational(gram, center=i % 2 == 0) for i, gram in enumerate(layers)]
    hs = [torch.full(gram.shape[:1], 7.0, dtype=torch.float64) for gram in layers]
    ms = [torch.full_like(gram, 7.0) for gram in layers]
    calls = [
        (gram.data_ptr(), gram.shape, h.data_ptr(), m.data_ptr(), i % 2 == 0)
        for i, (gram, h, m) in enumerate(zip(layers, hs, ms, strict=True))
    ]
    _C.rational_cpu(calls, 8, POLES[torch.float64], 3)
    for h, m, found in zip(hs, ms, expected, strict=True):
        assert all(map(same_bits, (h, m), found))
    _C.rational_cpu([], 8, POLES[torch.float64], 3)


# ---- threads and forks --------------------------------------------------------------------------


def test_all_kernels_from_several_python_threads_at_once():
    """Each calling thread starts a team of its own."""
    x = torch.randn(300, 40, 70, dtype=torch.float64)

    def work():
        location = x.new_empty(300, 2, 70)
        scale, g = x.new_empty(300), x.new_ones(300)
        gram, out = x.new_empty(300, 40, 40), torch.empty_like(x)
        samples = x.data_ptr(), "float64", x.stride(), x.shape
        _C.location_scale(
            samples, x.data_ptr(), x.stride(0), location.data_ptr(), scale.data_ptr(), 8, 2
        )
        standard = location.data_ptr(), location.stride(), scale.data_ptr(), 8
        _C.gram(samples, standard, True, gram.data_ptr(), 8, 2)
        h, m = rational(gram, center=True)
        _C.gram_backward(m.data_ptr(), samples, standard, g.data_ptr(), 1, True, out.data_ptr(), 2)
        return location, scale, gram, h, m, out, *eigh(gram)

    expected = work()
    assert all(t.isfinite().all() for t in expected)
    results = [None] * 4

    def repeat(i):
        results[i] = [work() for _ in range(3)]

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        assert all(all(map(torch.equal, result, expected)) for result in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("used", [True, False], ids=["after a call", "before any call"])
def test_a_forked_child_starts_threads_of_its_own(used):
    """torch's OpenMP team, which the parent has started, does not survive the fork."""
    code = f"""
        import os, signal
        import torch
        from ses_kernels import _C, rational_coefficients

        torch.set_num_threads(2)
        x = torch.randn(256, 40, 64, dtype=torch.float64)
        scale, gram = x.new_ones(256), x.new_empty(256, 40, 40)
        h, m, out = x.new_empty(256), torch.empty_like(gram), torch.empty_like(x)
        samples = x.data_ptr(), "float64", x.stride(), x.shape
        standard = 0, (0, 0, 0), scale.data_ptr(), 8
        poles = _C.Poles(*rational_coefficients.columns(torch.float64, torch.float64))
        layer = gram.data_ptr(), gram.shape, h.data_ptr(), m.data_ptr(), False

        def solve():
            _C.gram(samples, standard, True, gram.data_ptr(), 8, 2)
            _C.rational_cpu([layer], 8, poles, 2)
            _C.gram_backward(
                m.data_ptr(), samples, standard, scale.data_ptr(), 1, True, out.data_ptr(), 2
            )

        if {used}:
            solve()
        torch.randn(4_000_000).exp().sum()
        child = os.fork()
        if child == 0:  # only our code and no torch operation
            signal.alarm(30)
            solve()
            os.write(1, out.numpy().tobytes()[:8])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        solve()
        os.write(1, out.numpy().tobytes()[:8])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    assert len(result.stdout) == 16
    assert result.stdout[:8] == result.stdout[8:]


# ---- what is refused ----------------------------------------------------------------------------


def test_empty_batch():
    w, v = eigh(torch.empty(0, 4, 4))
    assert w.shape == (0, 4)
    assert v.shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, r"n must be in \[1, \d+\] .* got 0"),
        ({"n": -3}, "got -3"),
        ({"n": 100000}, "got 100000"),
        ({"batch": -1}, "batch must be .* got -1"),
        ({"itemsize": 2}, "itemsize must be 4 .* got 2"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"a": 0}, "must not be null"),
    ],
)
def test_bad_arguments(arguments, message):
    x = torch.zeros(4, 4)
    good = {"a": x.data_ptr(), "w": x.data_ptr(), "v": x.data_ptr(), "batch": 1, "n": 2}
    with pytest.raises(ValueError, match=message):
        _C.eigh_cpu(**{**good, "itemsize": 4, "threads": 1, **arguments})


X = torch.zeros(1, 4, 4, dtype=torch.float64)
AT = X.data_ptr()
VALUES = {
    "Samples": {"x": AT, "dtype": "float32", "stride": (6, 3, 1), "shape": (1, 2, 3)},
    "Standard": {"location": AT, "stride": (6, 3, 1), "scale": AT, "itemsize": 4},
    "Poles": {"c": 1.0, "t": [1.0] * 12, "w": [1.0] * 12},
    "GramLayer": {"gram": AT, "shape": (1, 2, 2), "h": AT, "m": 0, "center": False},
    "SampleLayer": {"by_samples": True, "location": AT, "scale": AT, "h": AT, "m": 0},
}
TOO_LONG = 2**31


def value(name, **wrong):
    samples = {"x": value("Samples")} if name == "SampleLayer" else {}
    return tuple({**samples, **VALUES[name], **wrong}.values())


def take(name, parts):
    """By a function that has such a value."""
    if name == "Poles":
        _C.Poles(*parts)
    elif name == "GramLayer":
        _C.rational_cpu([parts], 8, POLES[torch.float64], 1)
    elif name == "SampleLayer":
        _C.rational_from_samples_cpu([parts], 4, POLES[torch.float32], 1)
    else:
        values = {"x": value("Samples"), "standard": value("Standard")}
        values["x" if name == "Samples" else "standard"] = parts
        _C.gram(**values, by_samples=True, out=AT, out_itemsize=8, threads=1)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("Samples", {"x": 0}, "x must not be null"),
        ("Samples", {"shape": (0, 2, 3)}, r"no axis empty, got \(0, 2, 3\)"),
        ("Samples", {"shape": (1, -1, 3)}, r"no axis empty, got \(1, -1, 3\)"),
        ("Samples", {"shape": (1, 2, 0)}, r"no axis empty, got \(1, 2, 0\)"),
        ("Samples", {"stride": (6, 3, 2)}, r"rows must be dense, got strides \(6, 3, 2\)"),
        ("Samples", {"dtype": "int8"}, "float16, bfloat16, float32 or float64, got int8"),
        ("Standard", {"scale": 0}, "scale must not be null"),
        ("Standard", {"itemsize": 2}, "itemsize must be 4 .* got 2"),
        ("Poles", {"t": [], "w": []}, "a multiple of 12 .* got 0 and 0"),
        ("Poles", {"t": [1.0] * 11, "w": [1.0] * 11}, "a multiple of 12 .* got 11 and 11"),
        ("Poles", {"w": [1.0] * 24}, "the same number .* got 12 and 24"),
        ("Poles", {"t": [1.0] * 48, "w": [1.0] * 48}, "at most 40, got 48 and 48"),
        ("GramLayer", {"gram": 0}, "gram and h must not be null"),
        ("GramLayer", {"h": 0}, "gram and h must not be null"),
        ("GramLayer", {"shape": (1, 0, 0)}, r"n must be in \[1, \d+\] .* got 0"),
        ("GramLayer", {"shape": (1, -3, -3)}, "got -3"),
        ("GramLayer", {"shape": (1, TOO_LONG, TOO_LONG)}, f"got {TOO_LONG}"),
        ("GramLayer", {"shape": (-1, 2, 2)}, "batch must be .* got -1"),
        ("GramLayer", {"shape": (1, 2, 3)}, r"square, got \(1, 2, 3\)"),
        ("SampleLayer", {"scale": 0}, "scale and h must not be null"),
        ("SampleLayer", {"h": 0}, "scale and h must not be null"),
    ],
)
def test_values_check_themselves(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        take(name, value(name, **wrong))


ARGUMENTS = {
    "location_scale": {
        "anchor": AT, "anchor_stride": 3, "location": AT, "scale": AT, "itemsize": 4,
    },
    "gram": {"by_samples": True, "out": AT, "out_itemsize": 4},
    "gram_backward": {"m": AT, "g": AT, "g_stride": 1, "by_samples": True, "out": AT},
    "rational_cpu": {"layers": [value("GramLayer")], "itemsize": 8, "poles": POLES[torch.float64]},
    "rational_from_samples_cpu": {
        "layers": [value("SampleLayer")], "itemsize": 4, "poles": POLES[torch.float32],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "wrong", "message"),
    [
        *((name, {"threads": 0}, "threads must be at least 1, got 0") for name in ARGUMENTS),
        *((name, {"threads": -5}, "threads must be at least 1, got -5") for name in ARGUMENTS),
        *(
            (name, {"x": value("Samples", dtype="float64")}, "float64 samples .* in float64")
            for name in ("location_scale", "gram", "gram_backward")
        ),
        ("location_scale", {"location": 0}, "location must not be null"),
        ("location_scale", {"scale": 0}, "scale must not be null"),
        ("location_scale", {"itemsize": 2}, "itemsize must be 4 .* got 2"),
        ("gram", {"out": 0}, "out must not be null"),
        ("gram", {"out_itemsize": 3}, "itemsize must be 4 .* got 3"),
        ("gram_backward", {"m": 0}, "m and g must not be null"),
        ("gram_backward", {"g": 0}, "m and g must not be null"),
        ("gram_backward", {"out": 0}, "out must not be null"),
        ("rational_cpu", {"itemsize": 2}, "itemsize must be 4 .* got 2"),
        ("rational_from_samples_cpu", {"itemsize": 2}, "itemsize must be 4 .* got 2"),
        (
            "rational_from_samples_cpu",
            {"layers": [value("SampleLayer", x=value("Samples", dtype="float64"))]},
            "float64 samples are standardised in float64",
        ),
    ],
)
def test_bad_arguments_of_functions_of_values(function, wrong, message):
    arguments = {**ARGUMENTS[function], "threads": 1}
    if function in ("location_scale", "gram", "gram_backward"):
        arguments["x"] = value("Samples")
    if function in ("gram", "gram_backward"):
        arguments["standard"] = value("Standard")
    with pytest.raises(ValueError, match=message):
        getattr(_C, function)(**{**arguments, **wrong})


@pytest.mark.parametrize("function", ["rational_cuda_workspace", "rational_cuda"])
def test_rational_solver_refuses_a_device_that_is_not_there(function):
    rest = {} if function.endswith("workspace") else {"workspace": 16, "stream": 0}
    with pytest.raises(ValueError, match=r"n must be in \[1, 0\] on CUDA device 1000000, got 2"):
        getattr(_C, function)([value("GramLayer")], POLES[torch.float32], device=10**6, **rest)


def test_limits_and_info():
    assert all(_C.max_n_cpu(itemsize) >= max(SIZES) for itemsize in ITEMSIZES)
    assert all(_C.max_n_cuda(10**6, itemsize) == 0 for itemsize in ITEMSIZES)
    with pytest.raises(ValueError, match="got 3"):
        _C.max_n_cpu(3)
    info = _C.info()
    assert info["isas"] == [isa for isa in ("avx512", "avx2", "portable") if isa in info["isas"]]
    assert info["isa"] == info["isas"][0]
    assert info["isas"][-1] == "portable"
    assert isinstance(info["compiler"], str)
    assert (info["cuda_version"] is None) == (info["cuda_archs"] == [])


@contextlib.contextmanager
def instruction_set(isa):
    before = _C.info()["isa"]
    _C.use_isa(isa)
    try:
        yield
    finally:
        _C.use_isa(before)


@pytest.mark.parametrize("isa", _C.info()["isas"])
def test_every_instruction_set_is_right(isa):
    xs = [torch.randn(shape, dtype=dtype) for shape in ((9, 20), (3, 33, 7)) for dtype in DTYPES]
    with instruction_set(isa):
        assert _C.info()["isa"] == isa
        for dtype in DTYPES:
            assert_accurate(mixture(17, dtype), *eigh(mixture(17, dtype)))
        for x in xs:
            exact = x.double().requires_grad_()
            expected = reference.spectral_entropy(exact)
            x.requires_grad_()
            for solver in ("rational", "eigh"):
                h = spectral_entropy(x, solver=solver, backend="fused")
                torch.testing.assert_close(h.double(), expected, rtol=1e-6, atol=1e-6)
                (actual,) = torch.autograd.grad(h.sum(), x)
                (wanted,) = torch.autograd.grad(expected.sum(), exact, retain_graph=True)
                torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(len(_C.info()["isas"]) == 1, reason="one instruction set")
def test_an_instruction_set_asked_for_is_the_one_that_runs():
    """Only the portable build has no fused multiply-add: its rounding tells it apart."""
    a = mixture(17, torch.float32)
    by_isa = {}
    for isa in _C.info()["isas"]:
        with instruction_set(isa):
            by_isa[isa] = eigh(a)[0]
    portable = by_isa.pop("portable")
    assert all(not torch.equal(w, portable) for w in by_isa.values())


def test_an_instruction_set_that_is_not_there_is_an_error():
    before = _C.info()
    with pytest.raises(ValueError, match=f"of {', '.join(before['isas'])}, got avx1024"):
        _C.use_isa("avx1024")
    assert _C.info() == before


def test_cuda_refuses_a_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"n must be .* on CUDA device 1000000"):
        _C.eigh_cuda(16, 16, 16, 1, 2, 4, 10**6, 0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*SIZES, "limit"])
def test_cuda_accuracy_on_every_family(n, dtype):
    device = torch.cuda.current_device()
    limit = _C.max_n_cuda(device, dtype.itemsize)
    n = limit if n == "limit" else n
    if n > limit:
        pytest.skip(f"n = {n} exceeds the limit of {limit}")
    a = mixture(n, dtype).cuda()
    w, v = a.new_full(a.shape[:2], 7.0), torch.full_like(a, 7.0)
    stream = torch.cuda.current_stream().cuda_stream
    _C.eigh_cuda(
        a.data_ptr(), w.data_ptr(), v.data_ptr(), len(a), n, a.element_size(), device, stream
    )
    assert_accurate(a.cpu(), w.cpu(), v.cpu().mT)
