"""torch.compile without graph breaks, and opcheck of every operation in the table."""

import io
import math
import os
import shutil
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import grad, hessian, jacrev, jvp, vmap

import ses_kernels
from ses_kernels import linalg, metrics, ops

OPERATIONS = [
    "location_scale",
    "gram",
    "gram_backward",
    "rational",
    "rational_from_samples",
    "eigh",
    "eigvalsh",
    "svd",
    "lowrank",
    "entropies",
]


compiles = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "compiler"),
    [
        pytest.param({}, "inductor", marks=compiles),
        ({}, "aot_eager"),  # the same graphs in seconds: for the other options that is enough
        ({"power": 1}, "aot_eager"),
        ({"order": 2}, "aot_eager"),
        ({"order": math.inf, "center": False}, "aot_eager"),
        ({"solver": "rational"}, "aot_eager"),
    ],
    ids=str,
)
def test_fullgraph_equals_eager(options, compiler):
    def loss(x):
        entropies = ses_kernels.spectral_entropies([x, x[:8], x.T @ x], **options)
        return (ses_kernels.spectral_entropy(x.sin(), **options) * 2 + entropies.sum()).sum()

    x = torch.randn(16, 24, requires_grad=True)
    expected = loss(x)
    (gradient,) = torch.autograd.grad(expected, x)
    got = torch.compile(loss, fullgraph=True, backend=compiler)(x)
    (compiled_gradient,) = torch.autograd.grad(got, x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_fullgraph_without_a_gradient(layers):
    """Dynamo tells a Function with a context from one without by its number of arguments."""
    xs = [torch.randn(12, 8 + i) for i in range(layers)]
    compiled = torch.compile(ses_kernels.spectral_entropies, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(xs), ses_kernels.spectral_entropies(xs))


@pytest.mark.parametrize("options", [{}, {"solver": "lowrank", "rank": 1}])
def test_compiled_transforms_of_torch_func(options):
    """Right by leaving the graph; never wrong within it."""
    f = lambda x: ses_kernels.spectral_entropy(x, **options)  # noqa: E731
    transforms = {
        "grad": grad(f),
        "vmap": vmap(f),
        "vmap of grad": vmap(grad(f)),
        "jacrev": jacrev(f),
    }
    if "rank" not in options:  # no forward mode
        transforms["jvp"] = lambda x: jvp(f, (x,), (x.cos(),))[1]
        transforms["hessian"] = hessian(f)
    for name, transform in transforms.items():
        x = torch.randn(13, 14) if name in ("grad", "hessian") else torch.randn(3, 13, 14)
        torch._dynamo.reset()
        got = torch.compile(transform, backend="aot_eager")(x)
        torch.testing.assert_close(got, transform(x), msg=name)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="run eagerly"):
            torch.compile(transform, fullgraph=True, backend="aot_eager")(x)


# ---- other tracers: what they may not do is look at a value on the host --------------------------


def entropy(**options):
    return lambda x: ses_kernels.spectral_entropy(x, **options)


FUNCTIONS = {
    "spectral_entropy": ses_kernels.spectral_entropy,
    "eigh": entropy(solver="eigh"),
    "rational": entropy(solver="rational"),
    "lowrank": entropy(solver="lowrank", rank=2),
    "lowrank without a tail": entropy(solver="lowrank", rank=2000),
    "torch": entropy(backend="torch"),
    "order 0.5": entropy(order=0.5),
    "order 1.1": entropy(order=1.1),
    "spectral_entropies": lambda x: ses_kernels.spectral_entropies([x[0], x[1, :4]]),
    "rankme": metrics.rankme,
    "stable_rank": metrics.stable_rank,
    "participation_ratio": metrics.participation_ratio,
    "vendi_score": metrics.vendi_score,
    "linalg.eigh": lambda x: linalg.eigh(x @ x.mT)[0],
    "linalg.svd": lambda x: linalg.svd(x)[1],
    "linalg.svdvals": linalg.svdvals,
}
differentiable = [name for name in FUNCTIONS if not name.startswith("linalg")]
every_function = pytest.mark.parametrize("name", FUNCTIONS)
sizes = pytest.mark.parametrize("n", [20, 140])  # within the extension's limits and beyond
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@every_function
@sizes
@dtypes
@pytest.mark.parametrize("grad", [False, True])
def test_export(name, n, dtype, grad):
    x = torch.randn(2, n, n + 9, dtype=dtype)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(Module(FUNCTIONS[name]), (x,)).module()
        y = torch.randn_like(x)
        assert_same(exported(y), FUNCTIONS[name](y))


@every_function
@sizes
@dtypes
@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_without_values(name, n, dtype, device):
    x = torch.randn(2, n, n + 9, dtype=dtype)
    expected = FUNCTIONS[name](x)
    with FakeTensorMode() if device == "fake" else nullcontext() as mode:
        shaped = mode.from_tensor(x) if mode else x.to("meta")
        got = FUNCTIONS[name](shaped)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if name in differentiable:
            shaped.requires_grad_()
            (g,) = torch.autograd.grad(FUNCTIONS[name](shaped).sum(), shaped)
            assert g.shape == x.shape


@every_function
@sizes
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(name, n, grad):
    """With its own check, which traces a second time under no_grad."""
    if grad and name not in differentiable:
        pytest.skip("linalg is not differentiable")
    function = FUNCTIONS[name]
    traced = torch.jit.trace(function, (torch.randn(2, n, n + 9, requires_grad=grad),))
    y = torch.randn(2, n, n + 9, requires_grad=grad)
    assert_same(traced(y), function(y))
    if grad:
        (g,) = torch.autograd.grad(traced(y).sum(), y)
        assert torch.equal(g, torch.autograd.grad(function(y).sum(), y)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_saved_trace_is_differentiable():
    file, y = io.BytesIO(), torch.randn(7, 9, requires_grad=True)
    function = torch.nn.Sequential(torch.nn.Linear(9, 5), Module(ses_kernels.spectral_entropy))
    torch.jit.save(torch.jit.trace(function, (torch.randn(7, 9),)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for _ in range(2):  # the second run of a trace is the optimised one
        (g,) = torch.autograd.grad(loaded(y), y)
        assert_same(g, torch.autograd.grad(function(y), y)[0])


def test_dynamic_shapes_compile_once():
    calls = []

    def counting(graph, inputs):
        calls.append(graph)
        return graph.forward

    f = torch.compile(ses_kernels.spectral_entropy, fullgraph=True, dynamic=True, backend=counting)
    for samples in (5, 9, 12):
        x = torch.randn(samples, 40)
        torch.testing.assert_close(f(x), ses_kernels.spectral_entropy(x))
    assert len(calls) == 1


def test_compiled_under_autocast():
    x = torch.randn(12, 30, requires_grad=True)
    (expected,) = torch.autograd.grad(ses_kernels.spectral_entropy(x), x)
    f = torch.compile(ses_kernels.spectral_entropy, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def arguments(name, side, center, dtype):
    x = torch.randn(3, 5, 7).to(dtype)
    x = x if side == "samples" else x.mT
    anchor = x[:, :1] if center else x[:, :0]
    location, scale = ops.location_scale(x, anchor, torch.float32, "auto")
    gram = ops.gram(x, location, scale, side, scale.dtype, "auto")
    # Rounding leaves a float32 one indefinite, of which the rational solver makes NaN.
    wide = ops.gram(x, location, scale, side, torch.float64, "auto")
    return {
        "location_scale": (x, anchor, torch.float32, "auto"),
        "gram": (x, location, scale, side, torch.float64, "auto"),
        "gram_backward": (gram, x, location, scale, scale, side, "auto"),
        "rational": (
            [wide, wide[:1]],
            [center, False],
            torch.float32,
            True,
            "auto",
        ),
        "rational_from_samples": ([x, x[:1, :3, :2]], center, True, "auto"),
        "eigh": (gram, "auto"),
        "eigvalsh": (gram, "auto"),
        "svd": (x,),
        "entropies": ([x, x[:1, :3]], center, 2.0, 1.0, "auto", "auto"),
        "lowrank": (torch.randn(2, 13, 14).to(dtype), 1, center, "auto"),
    }[name]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("side", ["samples", "features"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, side, center, dtype):
    operation = getattr(torch.ops.ses_kernels, name).default
    torch.library.opcheck(operation, arguments(name, side, center, dtype))


def test_every_operation_is_checked():
    registered = {
        s.name.removeprefix("ses_kernels::")
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("ses_kernels::")
    }
    assert registered == set(OPERATIONS)
