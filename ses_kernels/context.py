"""What is in force around a call: autocast, and who traces or transforms it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

P = ParamSpec("P")
R = TypeVar("R")


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
    return torch._C._are_functorch_transforms_active() or any(
        unpack_dual(x).tangent is not None for x in xs
    )


def break_compiled_transforms() -> None:
    """Inside torch.func Dynamo traces a Function without its jvp and vmap: zeros, unannounced."""
    if torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active():
        torch._dynamo.graph_break(msg="torch.func transforms of spectral_entropy run eagerly")
