"""What every probe needs: a model in eval mode, the samples on its device, random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Batches = list[tuple[Tensor, Tensor]]


@contextlib.contextmanager
def evaluation(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None,
    samples: int | None,
    batch_size: int,
) -> Iterator[Batches]:
    """Batches of up to ``samples`` random samples on the model's device, the model in eval mode.

    Every module gets its own mode back: a fine-tuned model may have frozen parts in eval mode.
    """
    if not images.is_floating_point():
        raise TypeError(f"expected float images in [0, 1], got {images.dtype}; divide by 255")
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"expected as many labels as images, got {len(images)}, {len(labels)}")
    if samples is not None and samples < len(images):
        chosen = randperm(len(images), generator)[:samples].to(images.device)
        images, labels = images[chosen], labels[chosen]
    device = next(model.parameters(), images).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        yield [(x.to(device), y.to(device)) for x, y in pairs]
    finally:
        for module, mode in modes.items():
            module.training = mode


class Activations(TorchDispatchMode):
    """``see(i, z)`` of the input z of the i-th ReLU, leaky ReLU, GELU or SiLU that runs.

    It watches operations rather than modules, which sees ``F.relu`` too. ValueError at the end of
    a pass without any.
    """

    def __init__(self, see: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self.see, self.count = see, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.rstrip("_") in ("relu", "leaky_relu", "gelu", "silu"):
            self.see(self.count, args[0])
            self.count += 1
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        if exception[0] is None and not self.count:
            raise ValueError("the model ran no ReLU, leaky ReLU, GELU or SiLU")


def accuracy(model: nn.Module, batches: Batches) -> float:
    with torch.no_grad():
        correct = sum((model(x).argmax(1) == y).sum().item() for x, y in batches)
    return correct / sum(len(y) for _, y in batches)


# A generator draws on its own device only, wherever the samples are.


def randn(shape, generator: torch.Generator | None, like: Tensor) -> Tensor:
    device = generator.device if generator else like.device
    return torch.randn(shape, generator=generator, device=device).to(like)


def rand(shape, generator: torch.Generator | None, like: Tensor) -> Tensor:
    device = generator.device if generator else like.device
    return torch.rand(shape, generator=generator, device=device).to(like)


def randperm(n: int, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(n, generator=generator, device=generator.device if generator else None)
