"""The private names of torch: all of them in context.py, and each does here what we rely on.

To be run under every torch from 2.11 on; it needs nothing else.
"""

import ast
import pathlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import ses_kernels
from ses_kernels import context

PACKAGE = pathlib.Path(ses_kernels.__file__).parent


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


# ---- no other file has any ----------------------------------------------------------------------


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


MEMBERS = {
    name
    for kind in (torch.Tensor, torch.UntypedStorage, torch.autograd.Function, torch.nn.Module)
    for name in [*dir(kind), *vars(kind() if kind is torch.nn.Module else kind)]
    if is_private(name)
}


def private_names(source):
    """torch._a.b, a private member of a torch object (not of self), super(..) of another class."""
    tree = ast.parse(source)
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                full = f"{module}.{alias.name}".lstrip(".")
                if full.split(".")[0] == "torch":
                    roots.add((alias.asname or alias.name).split(".")[0])
                    if any(map(is_private, full.split("."))):
                        yield full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner.split(".")[0] in roots or (owner != "self" and node.attr in MEMBERS):
                yield ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super" and node.args:
            yield ast.unparse(node)


def test_only_context_uses_private_names_of_torch():
    found = {
        str(path.relative_to(PACKAGE)): sorted(set(private_names(path.read_text())))
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: names for name, names in found.items() if names} == {
        "context.py": [
            "a.untyped_storage()._cdata",
            "b.untyped_storage()._cdata",
            "forward_ad._current_level",
            "nn.modules.batchnorm._NormBase",
            "nn.modules.conv._ConvNd",
            "super(torch.autograd.Function, function)",
            "torch._C",
            "torch._C._are_functorch_transforms_active",
            "torch._C._autograd",
            "torch._C._autograd._profiler_enabled",
            "torch._C._current_graph_task_id",
            "torch._C._dispatch_keys",
            "torch._C._dispatch_tls_local_include_set",
            "torch._C._functorch",
            "torch._C._is_any_autocast_enabled",
            "torch._dynamo",
            "x._version",
        ]
    }


@pytest.mark.parametrize(
    "source",
    ["import torch\ntorch._C.f()", "import torch._dynamo", "from torch._inductor import config",
     "import torch.nn.functional as F\nF._pad", "from torch import nn\nnn.modules._x",
     "y.x._version", "super(A, B).f()", "module._parameters"],
)  # fmt: skip
def test_private_names_are_found(source):
    assert list(private_names(source))


# ---- what each of them does ---------------------------------------------------------------------


def test_bases_of_modules():
    for d in (1, 2, 3):
        for name in (f"Conv{d}d", f"ConvTranspose{d}d", f"LazyConv{d}d"):
            assert issubclass(getattr(nn, name), context.CONVOLUTION)
        for name in (f"BatchNorm{d}d", f"InstanceNorm{d}d", f"LazyBatchNorm{d}d"):
            assert issubclass(getattr(nn, name), context.BATCH_OR_INSTANCE_NORM)
    assert issubclass(nn.SyncBatchNorm, context.BATCH_OR_INSTANCE_NORM)
    assert not issubclass(nn.GroupNorm, context.BATCH_OR_INSTANCE_NORM)


def test_without_autocast():
    @context.without_autocast
    def product(x):
        return x @ x

    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert product(x).dtype == torch.float32
        assert product(x.to("meta")).dtype == torch.float32
    assert not torch._C._is_any_autocast_enabled()


def test_is_transformed():
    found = []

    def f(x):
        found.append(context.is_transformed([x]))
        return x.sum()

    x = torch.ones(2, requires_grad=True)
    f(x)
    assert found == [False]
    torch.func.grad(f)(x.detach())
    torch.func.vmap(f)(x.detach()[None])
    torch.func.jvp(f, (x.detach(),), (x.detach(),))
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x.detach(), x.detach()))
    assert found == [False, True, True, True, True]
    assert not context.is_transformed([x])


class Subclass(torch.Tensor):
    pass


def test_is_plain_cpu():
    x = torch.ones(2, 3)
    found = []

    def ask(y=x):
        found.append(context.is_plain_cpu((x, y)))
        return y

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        ask(x.to(dtype))
    ask(nn.Parameter(x))
    ask(x.T[1:])
    with torch.no_grad(), torch.autocast("cpu"):
        ask()
    y = x.clone().requires_grad_().sum()
    y.register_hook(lambda g: ask(g) and None)
    y.backward()
    assert found == 8 * [True]
    found.clear()

    ask(x.to("meta"))
    ask(x.to_sparse())
    ask(torch._neg_view(x))
    ask(torch._efficientzerotensor(2, 3))
    ask(x.as_subclass(Subclass))
    ask(TwoTensor(x, x))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        ask()
    ask(fake)
    with torch.inference_mode():
        ask(torch.ones(2))
    with FlopCounterMode(display=False):
        ask()
    with torch.device("cpu"):  # a function mode
        ask()
    for profiler in (torch.profiler.profile, torch.autograd.profiler.profile):
        with profiler():
            ask()
    for transform in (torch.func.vmap, torch.func.functionalize, torch.func.jacrev):
        transform(ask)(x)
    torch.jit.trace(lambda y: ask(y) + 1, (x,), check_trace=False)
    make_fx(lambda y: ask(y) + 1)(x)
    torch.compile(lambda y: ask(y) + 1, backend="eager")(x)
    assert found == 19 * [False]
    assert context.is_plain_cpu((x,))


def test_break_compiled_transforms():
    def f(x):
        context.break_compiled_transforms()
        return (x * x).sum()

    x = torch.ones(2)
    assert torch.compile(f, backend="eager", fullgraph=True)(x) == 2
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run eagerly"):
        torch.compile(torch.func.grad(f), backend="eager", fullgraph=True)(x)


def test_is_batched():
    found = []

    def f(x):
        found.append(context.is_batched(x))
        return x.sum()

    x = torch.ones(3, 2)
    f(x)
    torch.func.vmap(f)(x)
    torch.func.grad(f)(x)
    assert found == [False, True, False]


def test_bare_apply():
    x = torch.ones(2, requires_grad=True)
    y = context.bare_apply(Twice)(x)
    assert type(y.grad_fn) is type(Twice.apply(x).grad_fn)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, 2 * x)
    assert torch.equal(g, torch.full((2,), 2.0))


def test_in_backward():
    found = []
    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda g: found.append(context.in_backward()))
    y.sum().backward()
    assert found == [True]
    assert not context.in_backward()


def test_version():
    x = torch.ones(2)
    before = context.version(x)
    view = x.detach()[:1]
    view.add_(1)
    assert context.version(x) == context.version(view) == before + 1
    assert context.version(x.clone()) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("size", [0, 2])
def test_share_memory(size, device):
    x = torch.ones(size, device=device)
    assert context.share_memory(x, x[:1].detach())
    assert not context.share_memory(x, x.clone())
