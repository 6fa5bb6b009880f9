"""What only a GPU can show: the kernels run, nothing synchronises, graphs capture it."""

import pytest
import torch
from conftest import FAMILIES, errors, family, plain_torch, root_mean_square, value_and_gradient

import ses_kernels
from ses_kernels import linalg, ops

pytestmark = pytest.mark.cuda

SHAPES = [(7, 64), (33, 33), (64, 48), (32, 200), (130, 40)]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("options", [{}, {"power": 1}, {"order": 2}, {"solver": "rational"}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("name", FAMILIES)
def test_float32_within_twice_plain_torch(name, options, backend):
    value_floor, gradient_floor = (1e-5, 2e-4) if "solver" in options else (1e-6, 1e-5)
    settings = {k: v for k, v in options.items() if k != "solver"}
    ours, plain = [], []
    for B, d in SHAPES:
        x = family(name, B, d).cuda()
        f = lambda y: ses_kernels.spectral_entropy(y, backend=backend, **options)  # noqa: E731
        ours.append(errors(f, x, **settings))
        plain.append(errors(lambda y: plain_torch(y, **settings), x, **settings))
    value, gradient = map(root_mean_square, zip(*ours, strict=True))
    plain_value, plain_gradient = map(root_mean_square, zip(*plain, strict=True))
    assert value <= 2 * plain_value + value_floor
    assert gradient <= 2 * plain_gradient + gradient_floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 20, 70), (3, 70, 20)])
def test_equals_cpu(shape, dtype):
    x = torch.randn(shape).to(dtype)
    h, g = value_and_gradient(ses_kernels.spectral_entropy, x)
    h_cuda, g_cuda = value_and_gradient(ses_kernels.spectral_entropy, x.cuda())
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(h_cuda.cpu(), h, rtol=0, atol=tolerance)
    unit = torch.finfo(dtype).eps + tolerance
    torch.testing.assert_close(g_cuda.cpu(), g, rtol=0, atol=4 * unit * g.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigh_kernel_residuals(dtype):
    limit = ops.eigh_limit("cuda", 0, dtype.itemsize)
    assert limit >= 32, ops.EXTENSION_MISSING
    for n in (1, 2, 3, 8, 31, 32, 33, 63, 64, 65, limit - 1, limit):
        xs = [family(name, n, n + 3, torch.float64) for name in FAMILIES]
        a = torch.stack([x @ x.mT / (x * x).sum() for x in xs]).to(dtype).cuda()
        w, v = ops.eigh(a, "fused")
        eps = torch.finfo(dtype).eps
        a, w, v = a.double(), w.double(), v.double()
        norm = a.abs().amax((1, 2))
        residual = (a @ v - v * w[:, None]).abs().amax((1, 2))
        assert (residual <= 200 * n * eps * norm).all(), n
        eye = torch.eye(n, device="cuda")
        assert (v.mT @ v - eye).abs().max() <= 100 * n * eps, n


def test_eigh_kernel_nan_stays_in_its_matrix():
    a = torch.randn(5, 40, 40, device="cuda")
    a = a + a.mT
    a[1, 2, 0] = float("nan")
    w, _ = linalg.eigh(a)
    assert w.isnan().all(-1).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("options", [{}, {"order": 2}, {"solver": "rational"}], ids=str)
def test_no_host_synchronisation(options):
    x = torch.randn(4, 32, 96, device="cuda", requires_grad=True)

    def step():
        return torch.autograd.grad(ses_kernels.spectral_entropy(x, **options).sum(), x)

    step()  # compiles kernels and sets their attributes
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"order": 2}, {"solver": "rational"}], ids=str)
def test_graph_capture_of_forward_and_backward(options):
    x = torch.randn(4, 32, 96, device="cuda", requires_grad=True)

    def step():
        h = ses_kernels.spectral_entropy(x, **options)
        return h, torch.autograd.grad(h.sum(), x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_current_stream_is_used():
    stream = torch.cuda.Stream()
    x = torch.randn(16, 32, 64, device="cuda")
    expected = ses_kernels.spectral_entropy(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        y = x * 1.0
        got = ses_kernels.spectral_entropy(y)
    stream.synchronize()
    torch.testing.assert_close(got, expected)


def test_compile_fullgraph():
    x = torch.randn(16, 48, device="cuda", requires_grad=True)
    f = torch.compile(lambda y: ses_kernels.spectral_entropy(y.sin()), fullgraph=True)
    (got,) = torch.autograd.grad(f(x), x)
    (expected,) = torch.autograd.grad(ses_kernels.spectral_entropy(x.sin()), x)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_more_matrices_than_a_grid_axis():
    x = torch.randn(70000, 4, 6, device="cuda")
    h = ses_kernels.spectral_entropy(x)
    torch.testing.assert_close(h[-5:], ses_kernels.spectral_entropy(x[-5:]), rtol=1e-5, atol=1e-6)
