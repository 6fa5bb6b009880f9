"""The rational entropy of CUDA on the host: its digits, and the barriers it cannot do without."""

from __future__ import annotations

import ctypes
import math
import os

import pytest
import torch
from conftest import FAMILIES, _power_law, _with_spectrum, root_mean_square
from test_csrc import DRIVERS, SANITIZERS, compile_cpp, run, run_driver, sanitizer_flags

from ses_kernels import rational_coefficients, rational_solver, torch_rows

SOURCE = DRIVERS / "sweep_host.cpp"
SMALL, MEDIUM, LARGE, HUGE = range(4)  # the kernels; planned by size if none is asked for
SIZES = (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 192, 255, 256)


def _exponential(B, d, g):
    return _with_spectrum(torch.exp(-torch.arange(1, min(B, d) + 1).double() / 3), B, d, g)


def _collapse(noise):
    def make(B, d, g):
        common = torch.randn(d, generator=g, dtype=torch.float64)
        return common + noise * torch.randn(B, d, generator=g, dtype=torch.float64)

    return make


STRESS = FAMILIES | {
    "identical_columns": lambda B, d, g: FAMILIES["gaussian"](B, 1, g).expand(B, d),
    "bfloat16_rank_5": lambda B, d, g: FAMILIES["rank_5"](B, d, g).bfloat16().double(),
    "power_law_3": _power_law(3),
    "power_law_4": _power_law(4),
    "exponential": _exponential,
    "collapse_1e-3": _collapse(1e-3),
    "collapse_1e-6": _collapse(1e-6),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "sweep.so"
    compile_cpp("-O2", "-g0", "-march=native", "-shared", "-fPIC", SOURCE, "-o", path)
    library = ctypes.CDLL(str(path))
    library.rational_host.restype = ctypes.c_long
    return library


@pytest.fixture(scope="module")
def entropy(library):
    """(gram, **options) -> H, M and the floats of workspace, as on so many multiprocessors."""

    def call(gram, center=False, processors=132, method=-1, gradient=True, poles=None):
        assert gram.is_contiguous()
        c, t, w = poles or rational_coefficients.columns(torch.float32, torch.float32)
        batch, n = gram.shape[:2]
        h, m = torch.full((batch,), 7.0), torch.full((batch, n, n), 7.0)
        column = ctypes.c_double * len(t)
        floats = library.rational_host(
            ctypes.c_void_p(gram.data_ptr()), ctypes.c_void_p(h.data_ptr()),
            ctypes.c_void_p(m.data_ptr() if gradient else None), ctypes.c_long(batch), n,
            ctypes.c_double(c), len(t), column(*t), column(*w), center, processors, method,
        )  # fmt: skip
        if floats < 0:
            raise ValueError(gram.shape)
        return h, m, floats

    return call


def centered(x):
    x = x - x[:, :1]
    return x - x.mean(1, keepdim=True)


def samples(n, names=STRESS, seed=0):
    """One of each family, (len(names), n, 2 n + 1), and its Gram matrices, both in float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack([STRESS[name](n, 2 * n + 1, generator) for name in names]).float()
    xc = centered(x)
    return x, xc @ xc.mT


def from_eigh(gram):
    w, q = torch.linalg.eigh(gram)
    trace = w.sum(-1, keepdim=True)
    trace = torch.where(trace > 0, trace, 1.0)
    p = w.clamp_min(0) / trace
    log = torch.where(p > torch.finfo(p.dtype).eps, p, 1.0).log()
    h = -(p * log).sum(-1)
    return h, -(q * ((log + h[:, None]) / trace)[:, None]) @ q.mT


class Errors:
    """|H - H_64| and |g - g_64| |Xc| against float64 on the same samples, one a matrix."""

    def __init__(self, x):
        self.xc = centered(x.double())
        self.h, m = from_eigh(self.xc @ self.xc.mT)
        self.g = 2 * m @ self.xc

    def __call__(self, h, m):
        g = 2 * m.double() @ self.xc
        g_error = torch.linalg.matrix_norm(g - self.g) * torch.linalg.matrix_norm(self.xc)
        return (h - self.h).abs().tolist(), g_error.tolist()


def assert_as_good_as_lapack(outcome, x, gram):
    """Within twice the errors of the same partial fractions by Cholesky, matrix by matrix."""
    errors = Errors(x)
    ours, lapack = errors(*outcome[:2]), errors(*rational_solver.entropy(gram, torch.float32))
    for one, other, floor in zip(ours, lapack, (2e-6, 5e-6), strict=True):
        assert all(a <= 2 * b + floor for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_same_bits_on_any_number_of_threads(sanitizer, tmp_path):
    flags = sanitizer_flags(sanitizer, tmp_path)
    compile_cpp(*flags, SOURCE, "-o", tmp_path / "driver")
    assert run_driver(tmp_path / "driver").strip() == "ok"


def test_thread_sanitizer_finds_a_missing_barrier(tmp_path):
    flags = sanitizer_flags("thread", tmp_path)
    compile_cpp(*flags, "-DSES_DROP_SYNC", SOURCE, "-o", tmp_path / "driver")
    options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    result = run(tmp_path / "driver", timeout=300, env=options)
    assert result.returncode != 0
    assert "data race" in result.stderr


def test_float32_errors_on_hard_spectra(entropy):
    ours, eigh = ([], []), ([], [])
    for n in SIZES:
        x, gram = samples(n)
        errors = Errors(x)
        outcome = entropy(gram)
        assert all(values.isfinite().all() for values in outcome[:2]), n
        assert_as_good_as_lapack(outcome, x, gram)
        for total, (h, m) in ((ours, outcome[:2]), (eigh, from_eigh(gram))):
            for values, new in zip(total, errors(h, m), strict=True):
                values += new
    h_ours = sorted(ours[0])
    assert h_ours[-1] < 1e-4
    assert h_ours[int(0.95 * len(h_ours))] < 1e-5
    for one, other in zip(ours, eigh, strict=True):
        assert root_mean_square(one) <= root_mean_square(other)


@pytest.mark.parametrize("n", [257, 300, 512])
def test_matrices_that_stay_in_memory(entropy, n):
    x, gram = samples(n, ("gaussian", "rank_1", "power_law_2"))
    assert_as_good_as_lapack(entropy(gram), x, gram)


@pytest.mark.parametrize("n", [1, 2, 16, 32, 47, 64, 100, 256])
def test_every_kernel(entropy, n):
    x, gram = samples(n, ("gaussian", "rank_5", "power_law_1"))
    for method, largest in ((SMALL, 32), (MEDIUM, 64), (LARGE, 256), (HUGE, 512)):
        if n <= largest:
            assert_as_good_as_lapack(entropy(gram, method=method), x, gram)
    for large, huge in zip(entropy(gram, method=LARGE), entropy(gram, method=HUGE), strict=True):
        if torch.is_tensor(large):  # tiles in registers and in memory: the same digits
            assert torch.equal(large, huge)


@pytest.mark.parametrize("n", [1, 5, 32, 33, 70, 300])
def test_center_is_j_m_j(entropy, n):
    _, gram = samples(n, ("gaussian", "rank_5"))
    h, m, _ = entropy(gram)
    h_centered, m_centered, _ = entropy(gram, center=True)
    assert torch.equal(h_centered, h)
    assert torch.equal(m_centered, m_centered.mT)
    scale = m.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
    expected = torch_rows.double_center(m.double())
    torch.testing.assert_close((m_centered / scale).double(), expected / scale, rtol=0, atol=5e-7)


def test_value_alone_takes_no_matrix_of_workspace(entropy):
    _, gram = samples(100, ("gaussian",))
    h, _, floats = entropy(gram)
    h_alone, m, floats_alone = entropy(gram, gradient=False)
    assert torch.equal(h, h_alone)
    assert (m == 7).all()
    assert floats_alone < 100 < floats


def test_many_matrices_share_the_workspace(entropy):
    """A task a pole for few; all poles one after the other, and the slice of one, for many."""
    _, gram = samples(40, ("gaussian",))
    h, _, few = entropy(gram)
    h_many, _, many = entropy(gram.expand(300, -1, -1).contiguous(), processors=1)
    assert many / 300 < few / 10
    torch.testing.assert_close(h_many, h.expand(300), rtol=0, atol=1e-6)


def test_special_matrices_stay_alone(entropy):
    for n in (1, 7, 40, 70):
        _, gram = samples(n, ("gaussian",) * 6)
        gram[0] += torch.eye(n)
        gram[1] = 0
        gram[2, 0, 0] = torch.nan
        gram[3, n - 1, n - 1] = torch.inf
        gram[4] = -torch.eye(n)
        gram[5, -1] = gram[5, :, -1] = torch.nan
        h, m, _ = entropy(gram, center=True)
        assert h[1] == 0
        assert (m[1] == 0).all()
        assert h[2:].isnan().all()
        assert m[2:].isnan().all()
        alone = entropy(gram[:1].contiguous(), center=True)
        torch.testing.assert_close((h[0], m[0]), (alone[0][0], alone[1][0]), rtol=1e-5, atol=1e-7)


def test_any_scale_and_alignment(entropy):
    _, gram = samples(36, ("gaussian",))
    gram /= gram.diagonal(dim1=-2, dim2=-1).sum()
    h, m, _ = entropy(gram)
    for exponent in (-90, -40, 40, 90):  # of a power of two: exact
        h_scaled, m_scaled, _ = entropy(torch.ldexp(gram, torch.tensor(exponent)))
        assert torch.equal(h_scaled, h)
        assert torch.equal(torch.ldexp(m_scaled, torch.tensor(exponent)), m)
    buffer = torch.empty(gram.numel() + 1)
    buffer[1:] = gram.flatten()
    shifted = entropy(buffer[1:].view(gram.shape))
    assert torch.equal(shifted[0], h)
    assert torch.equal(shifted[1], m)


def test_poles_are_scaled_where_rounding_left_p_indefinite(entropy):
    n = 50
    p = torch.full((1, n), 1 / n)
    p[0, 3] = -1.2e-5  # between -4 t_1 and -16 t_1
    h, m, _ = entropy(p.diag_embed().contiguous())
    assert abs(h.item() - math.log(n - 1)) < 1e-3
    assert m.isfinite().all()
    p[0, 3] = -1e-3
    h, m, _ = entropy(p.diag_embed().contiguous())
    assert h.isnan().all()
    assert m.isnan().all()


def test_sizes_out_of_range(entropy):
    with pytest.raises(ValueError, match="513"):
        entropy(torch.zeros(1, 513, 513))
    with pytest.raises(ValueError, match="41"):
        entropy(torch.eye(41)[None], poles=(0.0, [1.0] * 41, [1.0] * 41))
    assert entropy(torch.zeros(0, 8, 8))[2] == 0
