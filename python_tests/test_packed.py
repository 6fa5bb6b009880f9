"""The short way for plain CPU tensors: the same bits as by the operations, and taken only where no
one wants to see these.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ses_kernels
from ses_kernels import ops, packed

pytestmark = pytest.mark.skipif(
    ops.EXTENSION_MISSING is not None, reason=str(ops.EXTENSION_MISSING)
)


class Watched(TorchDispatchMode):
    """The names of the operations under it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.OpOverload):
            self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


FORWARD, BACKWARD = "ses_kernels::rational_from_samples", "ses_kernels::gram_backward"


def entropies(xs, **options):
    if len(xs) == 1:
        return ses_kernels.spectral_entropy(xs[0], **options)
    return ses_kernels.spectral_entropies(xs, **options)


def samples(shape, dtype):  # cut from a larger tensor: gaps between rows and between matrices
    *batch, rows, columns = shape
    x = torch.randn(*batch, rows + 1, columns + 3, dtype=dtype)
    return x[..., 1:, 2:-1].detach().requires_grad_()


@pytest.fixture
def taken(monkeypatch):
    """What the short way has done, call by call."""
    names = []
    for name in ("solve", "gradients"):
        call = getattr(packed, name)
        monkeypatch.setattr(
            packed,
            name,
            lambda *a, _call=call, _name=name, **k: names.append(_name) or _call(*a, **k),
        )
    return names


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", ops.NAMES, ids=str)
@pytest.mark.parametrize(
    "shapes",
    [[(5, 9)], [(9, 5)], [(3, 7, 4)], [(3, 4, 7)], [(1, 1)], [(9, 5), (5, 9), (5, 5), (1, 3)]],
    ids=str,
)
def test_has_the_bits_of_the_operations(shapes, dtype, center, taken):
    xs = [samples(shape, dtype) for shape in shapes]
    options = {"center": center, "solver": "rational"}
    h = entropies(xs, **options)
    weights = torch.randn_like(h)
    found = torch.autograd.grad(h, xs, weights, retain_graph=True)
    with torch.no_grad():
        alone = entropies(xs, **options)
    assert taken == ["solve", "gradients", "solve"]
    with Watched() as watched:
        expected = entropies(xs, **options)
        wanted = torch.autograd.grad(expected, xs, weights)
        late = torch.autograd.grad(h, xs, weights)  # only backward is watched
    assert taken == ["solve", "gradients", "solve"]
    assert {FORWARD, BACKWARD} <= watched.names
    assert torch.equal(h, expected)
    assert torch.equal(h, alone)
    for one, other, third, x in zip(found, wanted, late, xs, strict=True):
        assert one.shape == x.shape
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_what_is_not_needed_gets_no_gradient(taken):
    x, y = samples((9, 5), torch.float32), samples((5, 7), torch.float32)
    h = ses_kernels.spectral_entropies([x, y.detach(), x])
    (found,) = torch.autograd.grad(h.sum(), x)  # a gradient without a stride
    (one,) = torch.autograd.grad(ses_kernels.spectral_entropy(x), x)
    torch.testing.assert_close(found, 2 * one)
    assert taken == ["solve", "gradients"] * 2


def test_result_may_be_changed_in_place():
    x = samples((9, 5), torch.float32)
    h = ses_kernels.spectral_entropy(x)
    h.mul_(2)
    (found,) = torch.autograd.grad(h, x)
    (one,) = torch.autograd.grad(ses_kernels.spectral_entropy(x), x)
    torch.testing.assert_close(found, 2 * one)


def test_second_derivative_goes_by_the_operations(taken):
    x = samples((2, 5, 7), torch.float64)
    assert torch.autograd.gradcheck(ses_kernels.spectral_entropy, x)
    assert torch.autograd.gradgradcheck(ses_kernels.spectral_entropy, x)
    xs = [samples((4, 6), torch.float64), samples((6, 3), torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *xs: ses_kernels.spectral_entropies(xs), xs)
    assert "solve" in taken


def test_forward_mode_over_backward(taken):
    """The gradient's tangent, where backward is what forward mode sees first."""
    x = samples((5, 7), torch.float64)
    g = torch.autograd.grad(ses_kernels.spectral_entropy(x), x)[0]
    taken.clear()
    h = ses_kernels.spectral_entropy(x)
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(torch.ones_like(h), torch.full_like(h, 3))
        (dual,) = torch.autograd.grad(h, x, weight, create_graph=True)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, 3 * g)
    assert taken == ["solve"]


def test_batched_gradients_go_by_the_operations(taken):
    xs = [samples((9, 5), torch.float32), samples((5, 7), torch.float32)]
    h = ses_kernels.spectral_entropies(xs)
    batched = torch.autograd.grad(h, xs, torch.eye(2), is_grads_batched=True, retain_graph=True)
    assert taken == ["solve"]
    for i, x in enumerate(xs):
        (one,) = torch.autograd.grad(h[i], x, retain_graph=True)
        assert torch.equal(batched[i][i], one)
        assert not batched[i][1 - i].any()


def test_profiler_sees_the_operations():
    x = samples((9, 5), torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(ses_kernels.spectral_entropy(x), x)
    assert {FORWARD, BACKWARD} <= {event.name for event in profile.events()}


def test_function_mode_sees_the_operations():
    x = samples((9, 5), torch.float32)
    with Functions() as mode:
        ses_kernels.spectral_entropy(x)
    assert FORWARD in mode.names


def test_fake_tensors_are_not_read(taken):
    with FakeTensorMode():
        x = torch.empty(9, 5, requires_grad=True)
        (g,) = torch.autograd.grad(ses_kernels.spectral_entropy(x), x)
    assert g.shape == (9, 5)
    assert ses_kernels.spectral_entropy(x.detach()).shape == ()  # nor outside of their mode
    assert taken == []


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 9).T,
        torch.randn(9, 10)[:, ::2],
        torch.randn(9, 5).as_subclass(Subclass),
        torch.randn(2, 2, 9, 5),
    ],
    ids=["columns", "gaps", "subclass", "four axes"],
)
def test_what_the_extension_cannot_read_as_it_lies(x, taken):
    expected = ses_kernels.spectral_entropy(x.detach().as_subclass(torch.Tensor).clone())
    taken.clear()
    found = ses_kernels.spectral_entropy(x)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
    assert taken == []


def test_samples_of_two_dtypes(taken):
    xs = [torch.randn(9, 5), torch.randn(9, 5, dtype=torch.bfloat16)]
    h = ses_kernels.spectral_entropies(xs)
    assert taken == []
    torch.testing.assert_close(h, torch.stack([ses_kernels.spectral_entropy(x) for x in xs]))


def test_negated_samples_are_not_read_as_they_lie(taken):
    x = torch.randn(9, 5)
    negated = torch._neg_view(x).requires_grad_()
    assert negated.is_neg()
    h = ses_kernels.spectral_entropy(negated)
    (found,) = torch.autograd.grad(h, negated)
    assert taken == []
    x.requires_grad_()
    (one,) = torch.autograd.grad(ses_kernels.spectral_entropy(x), x)
    torch.testing.assert_close(found, -one)


@pytest.mark.parametrize("autocast", [False, True])
def test_solver_and_backend_decide(autocast, taken):
    x = samples((9, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        for options in (
            {"solver": "eigh"}, {"backend": "torch"}, {"order": 2}, {"power": 1},
            {"solver": "lowrank", "rank": 1},
        ):  # fmt: skip
            ses_kernels.spectral_entropy(x, **options)
        assert taken == []
        h = ses_kernels.spectral_entropy(x, backend="fused")
        assert taken == ["solve"]
    assert h.dtype == torch.float32
    assert torch.equal(h, ses_kernels.spectral_entropy(x))
