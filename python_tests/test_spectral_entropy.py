"""Values and gradients of the public functions against float64 references by another route."""

import math

import mpmath
import pytest
import torch
import torch.distributed as dist
from conftest import (
    FAMILIES,
    errors,
    family,
    plain_torch,
    root_mean_square,
    value_and_gradient,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import ses_kernels
from ses_kernels import ops, reference

OPTIONS = [
    {},
    {"center": False},
    {"power": 1},
    {"order": 2},
    {"order": 0.5},
    {"order": math.inf},
    {"power": 1.5, "order": 3},
    {"solver": "rational"},
    {"backend": "torch"},
]
SHAPES = [(7, 64), (33, 33), (64, 48), (32, 200), (257, 40), (130, 131)]


def definition(options):  # what the reference takes
    return {k: v for k, v in options.items() if k in ("center", "power", "order")}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_float32_within_twice_plain_torch(name, options):
    """Root mean squares over shapes and seeds; floors: 1e-6 nats, 1e-5 / |Xc| in the gradient."""
    if options.get("order") == math.inf and name in ("clustered", "repeated"):
        pytest.skip("the largest eigenvalue is not simple: -log max p has no gradient there")
    # The float32 poles end at 1.7e-6: near-null directions cost the rational solver that much more.
    value_floor, gradient_floor = (1e-5, 2e-4) if "solver" in options else (1e-6, 1e-5)
    settings = definition(options)
    ours, plain = [], []
    for B, d in SHAPES:
        for seed in range(2):
            x = family(name, B, d, seed=seed)
            ours.append(errors(lambda y: ses_kernels.spectral_entropy(y, **options), x, **settings))
            plain.append(errors(lambda y: plain_torch(y, **settings), x, **settings))
    value, gradient = map(root_mean_square, zip(*ours, strict=True))
    plain_value, plain_gradient = map(root_mean_square, zip(*plain, strict=True))
    assert value <= 2 * plain_value + value_floor
    assert gradient <= 2 * plain_gradient + gradient_floor


@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (200, 50), (16, 300), (140, 150)], ids=str)
def test_outliers_beyond_a_float32_gram_matrix(shape, place):
    """One row leaves 1e-4 to 1e-10 of the variance to the rest: what the docstring says of it."""
    unit = max(shape) * torch.finfo(torch.float32).eps

    def of(x, solver, options):
        f = lambda y: ses_kernels.spectral_entropy(y, solver=solver, **options)  # noqa: E731
        return errors(f, x, **options)

    worst = 0.0
    for size in (1e2, 1e3, 1e4, 1e5):
        x = torch.randn(shape)
        x[place] *= size
        for options in ({}, {"order": 1.1}, {"order": 3}, {"power": 3}):
            value, gradient = of(x, "eigh", options)
            assert value < 8 * unit
            assert gradient < 8 * math.sqrt(unit)
            worst = max(worst, gradient)
            assert of(x.double(), "eigh", options)[1] < 1e-8
        assert of(x, "auto", {"order": 2})[1] < 1e-5
        assert of(x, "rational", {})[1] < 1e-4
    assert worst > math.sqrt(unit) / 8  # the limit is no larger than what it limits


@pytest.mark.parametrize("n", [2, 8, 64])
@pytest.mark.parametrize("options", [{"power": 1}, {"power": 0.5}, {"order": 0.5}], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_the_smallest_singular_value_that_counts(options, n, turned):
    """sqrt(n eps) of float32 samples, by a float64 Gram matrix; max(B, d) eps of float64 ones."""
    width = n + 3
    double = torch.finfo(torch.float64).eps
    for dtype, limit in ((torch.float32, math.sqrt(n * double)), (torch.float64, width * double)):
        for share, counts in ((2, True), (0.5, False)):
            x = torch.zeros(n, width, dtype=dtype)
            x[0, 0], x[1, 1] = 1, share * limit
            x = x.mT if turned else x
            got = ses_kernels.spectral_entropy(x, center=False, **options).item()
            p = torch.tensor([1, share * limit], dtype=torch.float64) ** options.get("power", 2)
            p, q = p / p.sum(), options.get("order", 1)
            exact = torch.special.entr(p).sum() if q == 1 else (p**q).sum().log() / (1 - q)
            assert got == pytest.approx(exact.item() if counts else 0, rel=1e-4 / share)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("B", [1, 2, 3, 5, 16, 17, 31, 64, 65])
def test_float64_equals_reference(B, options):
    for d in (1, 2, 3, 13, 16, 31, 33, 64, 127):
        x = family("gaussian", B, d, torch.float64, seed=B + d)
        f = lambda y: ses_kernels.spectral_entropy(y, **options)  # noqa: E731
        value, gradient = errors(f, x, **definition(options))
        assert value < 1e-12
        assert gradient < 1e-9


def test_float64_equals_mpmath():
    """Eigenvalues in 40 digits of the exact Gram matrix of integers: 1e-12 relative."""
    x = torch.randint(-9, 10, (5, 7), generator=torch.Generator().manual_seed(0)).double()
    with mpmath.workdps(40):
        m = mpmath.matrix(x.tolist())
        mean = [sum(m[i, j] for i in range(5)) / 5 for j in range(7)]
        c = mpmath.matrix(5, 7)
        for i in range(5):
            for j in range(7):
                c[i, j] = m[i, j] - mean[j]
        w = sorted(mpmath.eigsy(c * c.T, eigvals_only=True))[1:]  # the smallest is exactly 0
        for power, order in [(2, 1), (1, 1), (2, 2), (2, 0.5), (1, 3), (2, 1.1), (2, 1.0001)]:
            v = [mpmath.mpf(u) ** (mpmath.mpf(power) / 2) for u in w]
            p = [u / sum(v) for u in v]
            if order == 1:
                expected = -sum(u * mpmath.log(u) for u in p)
            else:
                q = mpmath.mpf(order)
                expected = mpmath.log(sum(u**q for u in p)) / (1 - q)
            got = ses_kernels.spectral_entropy(x, power=power, order=order).item()
            assert abs(got - expected) <= 1e-12 * expected, (power, order)


def test_known_entropies():
    identity = torch.eye(8)
    assert ses_kernels.spectral_entropy(identity, center=False).item() == pytest.approx(math.log(8))
    assert ses_kernels.effective_rank(identity, center=False).item() == pytest.approx(8)
    # J has n - 1 eigenvalues 1 and one 0
    assert ses_kernels.spectral_entropy(identity).item() == pytest.approx(math.log(7))
    x = torch.diag(torch.tensor([2.0, 1.0]))
    p = torch.tensor([2 / 3, 1 / 3])
    assert ses_kernels.spectral_entropy(x, center=False, power=1).item() == pytest.approx(
        -(p * p.log()).sum().item()
    )
    assert ses_kernels.spectral_entropy(x, center=False, order=math.inf).item() == pytest.approx(
        -math.log(0.8)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_half_inputs_compute_in_float32(dtype, shape):
    x = torch.randn(shape).to(dtype)
    assert ses_kernels.spectral_entropy(x).dtype == torch.float32
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            h, g = value_and_gradient(ses_kernels.spectral_entropy, x)
            h32, g32 = value_and_gradient(ses_kernels.spectral_entropy, x.float())
        assert torch.equal(h, h32)
        assert torch.equal(g, g32.to(dtype).double())  # rounded once, at the end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"order": 2}, {"solver": "rational"}], ids=str)
def test_autocast_changes_nothing(dtype, options):
    x = torch.randn(24, 50)
    expected = value_and_gradient(lambda y: ses_kernels.spectral_entropy(y, **options), x)
    with torch.autocast("cpu", dtype=dtype):
        got = value_and_gradient(lambda y: ses_kernels.spectral_entropy(y, **options), x)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_variance_is_zero_with_zero_gradient(options, dtype):
    row = torch.rand(9) * 1000
    cases = [torch.zeros(4, 9), torch.zeros(9, 4)]
    if options.get("center", True):
        cases += [row.expand(6, 9).clone(), row.expand(30, 9).clone(), row[None], row[:1, None]]
    for x in cases:
        h, g = value_and_gradient(lambda y: ses_kernels.spectral_entropy(y, **options), x.to(dtype))
        assert h.item() == 0
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(4, 6, 10), (4, 10, 6), (4, 130, 150)])
def test_nan_stays_in_its_matrix(options, bad, shape):
    x = torch.randn(shape, dtype=torch.float64 if options == {"power": 1} else torch.float32)
    clean = value_and_gradient(lambda y: ses_kernels.spectral_entropy(y, **options), x)
    x[1, 2, 3] = bad
    x[3, 0, 0] = bad
    h, g = value_and_gradient(lambda y: ses_kernels.spectral_entropy(y, **options), x)
    assert h.isnan().tolist() == [False, True, False, True]
    assert g.isnan().all(-1).all(-1).tolist() == [False, True, False, True]
    for i in (0, 2):
        torch.testing.assert_close(h[i], clean[0][i], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(g[i], clean[1][i], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("exponent", [-60, -30, 30, 60])  # 2^60 is about 1e18
def test_scale_invariance_in_float32(options, exponent):
    x = torch.randn(12, 700)
    f = lambda y: ses_kernels.spectral_entropy(y, **options)  # noqa: E731
    h, g = value_and_gradient(f, x)
    h_scaled, g_scaled = value_and_gradient(f, x * 2.0**exponent)
    assert torch.equal(h, h_scaled)
    torch.testing.assert_close(g_scaled * 2.0**exponent, g, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(12, 70), (70, 12), (130, 3000)], ids=str)
@pytest.mark.parametrize("exponent", [-60, 60])
def test_small_weights_of_the_loss_keep_their_digits(shape, exponent):
    """A weight of 1e-6 on entropies of samples near 1e18: products must not leave the range."""
    x = torch.randn(shape)
    _, g = value_and_gradient(ses_kernels.spectral_entropy, x)
    weighted = lambda y: ses_kernels.spectral_entropy(y) * 1e-6  # noqa: E731
    _, got = value_and_gradient(weighted, x * 2.0**exponent)
    torch.testing.assert_close(got * 2.0**exponent, 1e-6 * g, rtol=1e-4, atol=1e-12)


def test_strided_inputs():
    buffer = torch.randn(3, 40, 50)
    views = [
        buffer[:, 3:20, 5:33],
        buffer[:, ::2, ::3],
        buffer.mT[:, :20, :10],
        buffer.permute(1, 2, 0)[:4],
        buffer[0].flip(0)[None],
        buffer[:, :1].expand(3, 7, 50)[:, :, :9],
        buffer[:1].expand(5, 40, 50),
    ]
    for view in views:
        for options in ({}, {"power": 1}):
            f = lambda y, options=options: ses_kernels.spectral_entropy(y, **options)  # noqa: E731
            h, g = value_and_gradient(f, view)
            h_dense, g_dense = value_and_gradient(f, view.contiguous())
            torch.testing.assert_close(h, h_dense, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(g, g_dense, rtol=1e-4, atol=1e-6)


def test_batch_equals_one_at_a_time():
    names = ["gaussian", "rank_5", "power_law_2", "dominant", "repeated", "duplicate_rows"]
    x = torch.stack([family(name, 20, 60) for name in names]).reshape(2, 3, 20, 60)
    h, g = value_and_gradient(ses_kernels.spectral_entropy, x)
    assert h.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            h1, g1 = value_and_gradient(ses_kernels.spectral_entropy, x[i, j])
            torch.testing.assert_close(h[i, j], h1, rtol=1e-6, atol=2e-6)
            torch.testing.assert_close(g[i, j], g1, rtol=1e-2, atol=1e-3 * g1.abs().max().item())


def test_large_batches_are_cut_into_blocks():
    x = torch.randn(300, 40, 60, dtype=torch.float64)  # several blocks of matrices
    wide = torch.randn(2, 30, 20000, dtype=torch.float64)  # several blocks of columns
    tall = torch.randn(2, 20000, 30, dtype=torch.float64)  # several blocks of rows
    for y in (x, wide, tall):
        value, gradient = errors(ses_kernels.spectral_entropy, y)
        assert value < 1e-12
        assert gradient < 1e-9


@pytest.mark.parametrize("options", [{}, {"power": 1}, {"order": 2}], ids=str)
def test_many_layers_at_once(options):
    shapes = [(16, 40), (16, 64), (30, 8), (16, 16), (50, 8), (40, 16)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float16] * 2
    xs = [torch.randn(s).to(t).requires_grad_() for s, t in zip(shapes, dtypes, strict=False)]
    hs = ses_kernels.spectral_entropies(xs, **options)
    assert hs.shape == (6,)
    assert hs.dtype == torch.float32
    weights = torch.arange(1.0, 7)
    grads = torch.autograd.grad((weights * hs).sum(), xs)
    for i, x in enumerate(xs):
        h, g = value_and_gradient(lambda y: ses_kernels.spectral_entropy(y, **options), x)
        torch.testing.assert_close(hs[i].double(), h, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grads[i].double(), weights[i].double() * g, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("gaps", [False, True], ids=["dense rows", "gaps in a row"])
def test_one_call_of_the_rational_solver_for_all_layers(monkeypatch, gaps):
    """Of the extension from samples on where it reads them, of the solver otherwise."""
    calls = []
    solve = "rational_cpu" if gaps else "rational_from_samples_cpu"
    if ops.EXTENSION_MISSING is None:
        call = getattr(ops._C, solve)
        monkeypatch.setattr(
            ops._C, solve, lambda layers, *a: calls.append(layers) or call(layers, *a)
        )
    dtypes = torch.float32, torch.bfloat16, torch.float16, torch.float32
    xs = [torch.randn(16, d).to(t) for d, t in zip((16, 20, 99, 5), dtypes, strict=True)]
    if gaps:
        xs[2] = xs[2][:, ::2]
    hs = ses_kernels.spectral_entropies(xs, solver="rational")
    assert hs.shape == (4,)
    assert ops.EXTENSION_MISSING or [len(layers) for layers in calls] == [4]


def test_one_call_of_an_eigensolver_for_layers_of_equal_side(monkeypatch):
    calls = []
    eigvalsh = ops.eigvalsh
    monkeypatch.setattr(ops, "eigvalsh", lambda a, b: calls.append(a.shape) or eigvalsh(a, b))
    ses_kernels.spectral_entropies([torch.randn(16, d) for d in (16, 5, 20, 99)], solver="eigh")
    assert calls == [(3, 16, 16), (1, 5, 5)]


def test_mixed_precision_layers_and_partial_gradients():
    a = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    b = torch.randn(8, 12)
    hs = ses_kernels.spectral_entropies([a, b])
    assert hs.dtype == torch.float64
    hs.sum().backward()
    torch.testing.assert_close(
        a.grad, value_and_gradient(reference.spectral_entropy, a)[1], rtol=1e-9, atol=1e-12
    )


def test_effective_rank_is_exp_of_entropy():
    x = torch.randn(2, 10, 30)
    for options in ({}, {"power": 1, "center": False}):
        torch.testing.assert_close(
            ses_kernels.effective_rank(x, **options),
            ses_kernels.spectral_entropy(x, **options).exp(),
        )


def test_saved_for_backward_is_x_and_a_small_matrix():
    x = torch.randn(20, 3000, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ses_kernels.spectral_entropy(x)
    assert [t.data_ptr() for t in saved if t.numel() >= x.numel()] == [x.data_ptr()]
    extra = sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr())
    assert extra == 20 * 20 + 2 * 3000 + 1


def test_errors_say_what_was_got():
    x = torch.randn(4, 6)
    cases = [
        (TypeError, "int64", lambda: ses_kernels.spectral_entropy(torch.ones(3, 3).long())),
        (TypeError, "complex64", lambda: ses_kernels.spectral_entropy(x.cfloat())),
        (TypeError, "list", lambda: ses_kernels.spectral_entropy([[1.0]])),
        (ValueError, r"\(6,\)", lambda: ses_kernels.spectral_entropy(x[0])),
        (ValueError, r"\(0, 6\)", lambda: ses_kernels.spectral_entropy(x[:0])),
        (ValueError, r"\(4, 0\)", lambda: ses_kernels.spectral_entropy(x[:, :0])),
        (ValueError, r"\(0, 4, 6\)", lambda: ses_kernels.spectral_entropy(x.expand(0, 4, 6))),
        (ValueError, "power.*-1", lambda: ses_kernels.spectral_entropy(x, power=-1)),
        (ValueError, "order.*0", lambda: ses_kernels.spectral_entropy(x, order=0)),
        (ValueError, "order.*nan", lambda: ses_kernels.spectral_entropy(x, order=math.nan)),
        (ValueError, "'svd'", lambda: ses_kernels.spectral_entropy(x, solver="svd")),
        (ValueError, "'cuda'", lambda: ses_kernels.spectral_entropy(x, backend="cuda")),
        (ValueError, "power=1",
         lambda: ses_kernels.spectral_entropy(x, solver="rational", power=1)),
        (ValueError, "empty", lambda: ses_kernels.spectral_entropies([])),
        (ValueError, r"\(2, 4, 6\).*index 1",
         lambda: ses_kernels.spectral_entropies([x, x.expand(2, 4, 6)])),
        (RuntimeError, "cannot be imported" if ops.EXTENSION_MISSING else "n = 300 exceeds",
         lambda: ses_kernels.spectral_entropy(
             torch.randn(300, 300), solver="eigh", backend="fused")),
        (RuntimeError, "cannot be imported" if ops.EXTENSION_MISSING else "rows without gaps",
         lambda: ses_kernels.spectral_entropy(x[:, ::2], backend="fused")),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(TypeError):  # keyword-only
        ses_kernels.spectral_entropy(x, True)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def distributed(x):
    return DTensor.from_local(x, DeviceMesh("cpu", [0]))


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (
            torch.Tensor.cfloat,
            "got torch.complex64; torch.linalg.svdvals.*would drop",
        ),
        (torch.Tensor.cdouble, "got torch.complex128; torch.linalg.svdvals"),
        (torch.Tensor.int, r"got torch.int32; convert with x.float\(\)"),
        (torch.Tensor.bool, r"got torch.bool; convert with x.float\(\)"),
        (lambda x: x.to(torch.float8_e4m3fn), r"float8_e4m3fn; convert with x.float\(\)"),
        (torch.Tensor.to_sparse, r"got torch.sparse_coo; convert with x.to_dense\(\)"),
        (torch.Tensor.to_sparse_csr, r"got torch.sparse_csr; convert with x.to_dense\(\)"),
        (torch.Tensor.to_sparse_csc, r"got torch.sparse_csc; convert with x.to_dense\(\)"),
        (torch.Tensor.to_mkldnn, r"got torch._mkldnn; convert with x.to_dense\(\)"),
        (lambda x: torch.nested.nested_tensor([x, x[:2]]), r"got a nested one.*x.unbind\(\)"),
        (lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged), "got a nested one"),
        (distributed, r"got a DTensor.*x.full_tensor\(\).*x.to_local\(\) with group="),
        (torch.Tensor.tolist, "got list"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested")
@pytest.mark.usefixtures("group")
def test_tensors_that_are_not_dense_and_real(convert, message):
    x = convert(torch.randn(4, 6))
    for function in (
        ses_kernels.spectral_entropy,
        lambda x: ses_kernels.spectral_entropies([x]),
        lambda x: ses_kernels.spectral_entropy(x, solver="lowrank", rank=1),
        ses_kernels.metrics.vendi_score,
        ses_kernels.linalg.eigh,
        ses_kernels.linalg.svd,
        ses_kernels.linalg.svdvals,
    ):
        with pytest.raises(TypeError, match=message):
            function(x)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(3, 10, 30), (1, 150, 140)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_gradient_the_value_is_the_same(options, shape, dtype):
    x = torch.randn(shape).to(dtype)
    x[0, 0] = 3 * x[0, 1]
    expected = ses_kernels.spectral_entropy(x.requires_grad_(), **options)
    assert expected.requires_grad
    for got in (
        ses_kernels.spectral_entropy(x.detach(), **options),
        torch.no_grad()(ses_kernels.spectral_entropy)(x, **options),
    ):
        assert not got.requires_grad
        torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=2e-6)


def test_without_a_gradient_no_eigenvector_is_computed(monkeypatch):
    from ses_kernels import ops

    monkeypatch.setattr(ops, "eigh", None)
    ses_kernels.spectral_entropy(torch.randn(200, 300))


def test_forward_mode_outside_torch_func():
    x, tangent = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        out = torch.autograd.forward_ad.unpack_dual(ses_kernels.spectral_entropy(dual))
    _, gradient = value_and_gradient(ses_kernels.spectral_entropy, x)
    torch.testing.assert_close(out.tangent, (gradient * tangent).sum())
