"""torch.compile without graph breaks, and opcheck of every operation in the table."""

import math

import pytest
import torch

import ses_kernels
from ses_kernels import ops

OPERATIONS = [
    "location_scale",
    "gram",
    "gram_backward",
    "rational",
    "rational_from_samples",
    "eigh",
    "eigvalsh",
    "svd",
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "compiler"),
    [
        ({}, "inductor"),
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
    return {
        "location_scale": (x, anchor, torch.float32, "auto"),
        "gram": (x, location, scale, side, torch.float64, "auto"),
        "gram_backward": (gram, x, location, scale, scale, side, "auto"),
        "rational": (
            [gram.double(), gram[:1].double()],
            [center, False],
            torch.float32,
            True,
            "auto",
        ),
        "rational_from_samples": ([x, x[:1, :3, :2]], center, True, "auto"),
        "eigh": (gram, "auto"),
        "eigvalsh": (gram, "auto"),
        "svd": (x,),
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
