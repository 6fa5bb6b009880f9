"""ses_kernels._C on the CPU, called as the package calls it: raw pointers."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

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


def test_limits_and_info():
    assert all(_C.max_n_cpu(itemsize) >= max(SIZES) for itemsize in ITEMSIZES)
    assert all(_C.max_n_cuda(10**6, itemsize) == 0 for itemsize in ITEMSIZES)
    with pytest.raises(ValueError, match="got 3"):
        _C.max_n_cpu(3)
    info = _C.info()
    assert info["simd"] in ("avx512", "avx2", "portable")
    assert isinstance(info["compiler"], str)
    assert (info["cuda_version"] is None) == (info["cuda_archs"] == [])


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
