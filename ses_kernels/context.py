"""What is in force around a call: autocast, who traces or transforms it, the state of its tensors.

The one file with private names of torch, each for what no public name says; test_context.py tries
all of them on the torch at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")

# What convolutions, and batch and instance norms, have in common; public are the six of each alone,
# and a subclass of these need not be one of those.
CONVOLUTION = nn.modules.conv._ConvNd
BATCH_OR_INSTANCE_NORM = nn.modules.batchnorm._NormBase


def without_autocast(method: Callable[P, R]) -> Callable[P, R]:
    """Autocast would turn float32 products into half precision. The first tensor has the device."""

    @functools.wraps(method)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        # The public questions take the name of a device, which takes 20 us to look up after others
        # have used the caches.
        if torch._C._is_any_autocast_enabled():
            device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
            if torch.amp.is_autocast_available(device):  # not on the meta device
                with torch.autocast(device, enabled=False):
                    return method(*args, **kwargs)
        return method(*args, **kwargs)

    return inner


def is_transformed(xs: Iterable[Tensor]) -> bool:
    """Whether torch.func or forward mode wants more than a gradient of what becomes of xs."""
    # torch.func has transforms, and no word on which are active.
    if torch._C._are_functorch_transforms_active():
        return True
    # To ask each tensor takes a microsecond.
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in xs
    )


def _keys(*names: str) -> int:
    made = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(torch._C.DispatchKeySet.__or__, made).raw_repr()


_PLAIN_THREAD = _keys("BackendSelect", "ADInplaceOrView")
_PLAIN_TENSOR = _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")


def is_plain_cpu(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the dispatcher would do no more for an operation on them than call its CPU kernel.

    By its own keys, of the thread and of the tensors: every mode, transform and tracer has one, and
    so have subclasses and tensors that are not yet what they say (negated, zero, fake). Apart from
    these, function modes and profilers want to see it.
    """
    if torch.compiler.is_compiling() or torch.overrides.has_torch_function(tensors):
        return False
    if torch._C._autograd._profiler_enabled():
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() != _PLAIN_THREAD:
        return False
    for x in tensors:  # noqa: SIM110 # a generator would take another microsecond
        if torch._C._dispatch_keys(x).raw_repr() != _PLAIN_TENSOR:
            return False
    return True


def break_compiled_transforms() -> None:
    """Inside torch.func Dynamo traces a Function without its jvp and vmap: zeros, unannounced."""
    if torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active():
        # torch.compiler.disable breaks the graph at a function, whoever calls it.
        torch._dynamo.graph_break(msg="torch.func transforms of spectral_entropy run eagerly")


def is_batched(x: Tensor) -> bool:
    """Whether x is what torch.vmap maps: its shape, which is all the public names show, is not."""
    return torch._C._functorch.is_batchedtensor(x)


def bare_apply(function: type[torch.autograd.Function]) -> Callable:
    """What Function.apply comes to outside torch.func.

    That binds the arguments to a signature first, 13 of the 49 us of a small call.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc] # of torch._C


def in_backward() -> bool:
    """Whether a checkpointed block runs again; Dynamo traces no backward pass."""
    # A hook on every tensor would be the public way to learn of a backward pass.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def version(x: Tensor) -> int:
    """How often x has changed in place; autograd asks the same of what it saves, and shows none."""
    return x._version


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a and b are views of one storage; data_ptr() is 0 in every empty or meta tensor."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
