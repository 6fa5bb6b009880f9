"""The metrics against published code and formulas, closed forms, and the package's contract."""

import math

import pytest
import torch
from conftest import value_and_gradient
from vendi_score import vendi as published_vendi

from ses_kernels import metrics


def rankme_formula(x, eps=1e-7):
    sigma = torch.linalg.svdvals(x)
    p = sigma / sigma.sum() + eps
    return -(p * p.log()).sum()


def vne_formula(x):
    z = x / x.norm(dim=1, keepdim=True)
    w = torch.linalg.svdvals(z / len(z) ** 0.5) ** 2
    return -(w * w.log()).sum()


def vendi_formula(x, q):
    K = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1, eps=0)
    w = torch.linalg.eigvalsh(K / len(x))[-x.shape[1] :]  # the others are zero where B > d
    return w[-1].reciprocal() if q == math.inf else (w**q).sum() ** (1 / (1 - q))


def participation_formula(x):
    C = torch.cov(x.T)
    return C.trace() ** 2 / (C @ C).trace()


def stable_formula(w):
    return torch.linalg.matrix_norm(w) ** 2 / torch.linalg.matrix_norm(w, 2) ** 2


def vendi(order):
    return lambda x, **options: metrics.vendi_score(x, order=order, **options)


METRICS = {
    "rankme": (metrics.rankme, lambda x: rankme_formula(x, eps=0).exp()),
    "vendi_score": (metrics.vendi_score, lambda x: vne_formula(x).exp()),
    "vendi_score_0.5": (vendi(0.5), lambda x: vendi_formula(x, 0.5)),
    "vendi_score_2": (vendi(2), lambda x: vendi_formula(x, 2)),
    "vendi_score_inf": (vendi(math.inf), lambda x: vendi_formula(x, math.inf)),
    "vne": (metrics.vne, vne_formula),
    "participation_ratio": (metrics.participation_ratio, participation_formula),
    "stable_rank": (metrics.stable_rank, stable_formula),
}
every_metric = pytest.mark.parametrize("name", METRICS)
unit_rows = pytest.mark.parametrize("name", [n for n in METRICS if n.startswith("v")])


def smallest(name):  # the value of no variance and of rank one
    return 0.0 if name == "vne" else 1.0


@pytest.mark.parametrize("shape", [(20, 48), (48, 20)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
@every_metric
def test_value_and_gradient_equal_the_formula(name, dtype, tolerance, shape):
    metric, formula = METRICS[name]
    x = (torch.randn(shape, dtype=torch.float64) + 0.3).to(dtype)
    x[1] = 2 * torch.eye(shape[1])[3]  # a row with a single entry
    value, gradient = value_and_gradient(metric, x)
    expected, expected_gradient = value_and_gradient(formula, x.double())
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("q", [0.1, 0.5, 1, 2, 5, "inf"])
@pytest.mark.parametrize("shape", [(30, 64), (64, 30)])
def test_vendi_score_equals_its_package(shape, q):
    x = torch.randn(shape, dtype=torch.float64)
    if shape[0] <= shape[1]:  # of its two routes the one without null eigenvalues
        expected = published_vendi.score_K((x @ x.T).numpy(), q=q, normalize=True)
    else:
        expected = published_vendi.score_dual(x.numpy(), q=q)
    assert metrics.vendi_score(x, order=float(q)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_published_rankme_exceeds_ours_by_its_eps_at_most(rank):
    x = torch.randn(40, rank, dtype=torch.float64) @ torch.randn(rank, 60, dtype=torch.float64)
    excess = rankme_formula(x) - metrics.rankme(x).log()
    assert 1e-7 < excess < 40 * 1.7e-6


def test_known_values():
    rows = torch.linalg.qr(torch.randn(8, 8))[0][:5] * torch.tensor([1.0, 2, 3, 4, 5])[:, None]
    approx = pytest.approx
    for order in (0.5, 1, 2, math.inf):
        assert metrics.vendi_score(rows, order=order).item() == approx(5, rel=1e-5)
    assert metrics.vne(rows).item() == approx(math.log(5), rel=1e-5)
    assert metrics.stable_rank(rows).item() == approx(55 / 25, rel=1e-5)

    # p = 1/2, 1/4, 1/8, 1/8 has 7/4 bits
    assert metrics.rankme(torch.diag(torch.tensor([4.0, 2, 1, 1]))).item() == approx(2**1.75)

    three_to_one = torch.tensor([[1.0, 0], [2, 0], [0, 5], [3, 0]])
    assert metrics.vendi_score(three_to_one, order=2).item() == approx(1.6)
    assert metrics.vendi_score(three_to_one, order=math.inf).item() == approx(4 / 3)
    assert metrics.vne(three_to_one).item() == approx(math.log(4) - 0.75 * math.log(3))

    # centred columns, orthogonal, of variances 9 : 1
    x = torch.tensor([[3.0, 1], [3, -1], [-3, 1], [-3, -1]]) + 100
    assert metrics.participation_ratio(x).item() == approx(100 / 82)


def test_stable_rank_of_a_multiple_singular_value_follows_one_vector():
    """At W = I the gradient is 2 I - 6 v v^T for some unit v."""
    _, gradient = value_and_gradient(metrics.stable_rank, torch.eye(3, dtype=torch.float64))
    v_vt = (2 * torch.eye(3, dtype=torch.float64) - gradient) / 6
    torch.testing.assert_close(v_vt @ v_vt, v_vt)
    assert v_vt.trace().item() == pytest.approx(1)


@every_metric
def test_rank_one_and_no_variance(name):
    metric, _ = METRICS[name]
    direction, lengths = torch.randn(9), torch.rand(6, 1) + 1
    assert metric(lengths * direction).item() == pytest.approx(smallest(name), abs=1e-5)
    equal_rows = [direction.expand(6, 9)] if name == "participation_ratio" else []
    for x in [torch.zeros(4, 9), torch.zeros(9, 4), direction[None], *equal_rows]:
        value, gradient = value_and_gradient(metric, x)
        assert value.item() == pytest.approx(smallest(name), abs=1e-6)
        assert gradient.abs().max() < 1e-5


@unit_rows
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_rows_of_zeros_are_left_out(name, shape):
    metric, _ = METRICS[name]
    x = torch.randn(shape, dtype=torch.float64)
    padded = torch.zeros(shape[0] + 4, shape[1], dtype=torch.float64)
    rows = torch.arange(shape[0]) + 2  # two rows of zeros before and after
    padded[rows] = x
    value, gradient = value_and_gradient(metric, padded)
    expected, expected_gradient = value_and_gradient(metric, x)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[rows], expected_gradient, rtol=1e-9, atol=1e-12)
    gradient[rows] = 0
    assert not gradient.any()  # round-off could exceed the gradient of rows of large scale


@every_metric
def test_batch_equals_matrices_one_by_one(name):
    metric, _ = METRICS[name]
    x = torch.randn(2, 3, 10, 14).mT  # (2, 3, 14, 10), strided
    got = metric(x)
    assert got.shape == (2, 3)
    assert got.dtype == torch.float32
    expected = torch.stack([metric(m) for m in x.flatten(0, 1)]).reshape(2, 3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_metric
def test_nan_stays_in_its_matrix(name, bad):
    metric, _ = METRICS[name]
    x = torch.randn(3, 8, 12)
    expected = metric(x)
    x[1, 2, 3] = bad
    got = metric(x)
    assert got[1].isnan()
    torch.testing.assert_close(got[::2], expected[::2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
@every_metric
def test_scale_does_not_matter(name, scale):
    metric, _ = METRICS[name]
    x = torch.randn(16, 200)
    value, gradient = value_and_gradient(metric, x)
    scaled, scaled_gradient = value_and_gradient(metric, x * scale)
    torch.testing.assert_close(scaled, value, rtol=1e-5, atol=0)
    bound = 1e-4 * gradient.abs().max().item()
    torch.testing.assert_close(scaled_gradient * scale, gradient, rtol=0, atol=bound)


@unit_rows
def test_length_of_a_row_does_not_matter(name):
    metric, _ = METRICS[name]
    x = torch.randn(16, 200)
    lengths = torch.logspace(-18, 18, 16)[:, None]
    torch.testing.assert_close(metric(x * lengths), metric(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_metric
def test_half_inputs_compute_in_float32(name, dtype):
    metric, _ = METRICS[name]
    x = torch.randn(16, 40).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = metric(x)
    (gradient,) = torch.autograd.grad(value, x)
    expected, expected_gradient = value_and_gradient(metric, x.float())
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=eps, atol=1e-6)


@every_metric
def test_second_and_forward_derivatives(name):
    metric, _ = METRICS[name]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(metric, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(metric, x)


def test_vmap_of_gradient_equals_loop():
    x = torch.randn(3, 6, 9)
    gradient = torch.func.grad(metrics.vendi_score)
    expected = torch.stack([gradient(m) for m in x])
    torch.testing.assert_close(torch.func.vmap(gradient)(x), expected, rtol=1e-4, atol=1e-5)


def test_compiled_equals_eager():
    x = torch.randn(12, 30)
    x[1], x[2] = 0, torch.eye(30)[4]  # a row of zeros, and one with a single entry
    torch._dynamo.reset()
    compiled = torch.compile(metrics.vendi_score, fullgraph=True, backend="aot_eager")
    value, gradient = value_and_gradient(compiled, x)
    expected, expected_gradient = value_and_gradient(metrics.vendi_score, x)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)


@every_metric
def test_options_reach_the_solver(name):
    metric, _ = METRICS[name]
    x = torch.randn(10, 24)
    torch.testing.assert_close(metric(x, backend="torch"), metric(x), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="backend must be one of"):
        metric(x, backend="other")
    with pytest.raises(TypeError, match="power"):  # part of the definition
        metric(x, power=3)


@every_metric
def test_wrong_input_is_refused(name):
    metric, _ = METRICS[name]
    with pytest.raises(TypeError, match="int64"):
        metric(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        metric(torch.ones(4))
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        metric(torch.ones(0, 4))
