"""Augmentations of a batch: images and soft targets (N, K) in and out, random by a generator.

Images are floats (N, C, H, W) on any device; ``mixup`` takes points (N, 2) too. The generator, of
any device, is the only source of randomness: its state and the batch determine the result.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ses_lab.randaugment import blend, grey, randaugment

Augmentation = Callable[..., tuple[Tensor, Tensor]]


def crop_flip(
    images: Tensor, targets: Tensor, generator: Generator, *, padding: int = 4, flip: float = 0.5
) -> tuple[Tensor, Tensor]:
    """A crop of its own for each image padded with zeros, mirrored with probability ``flip``."""
    _require_images("crop_flip", images)
    n, _, h, w = images.shape
    x = F.pad(images, [padding] * 4)
    top, left = _integers(generator, 2 * padding + 1, (2, n, 1), images.device)
    rows = top + torch.arange(h, device=images.device)  # (N, H)
    columns = left + torch.arange(w, device=images.device)  # (N, W)
    flipped = _uniform(generator, (n, 1), images.device) < flip
    columns = torch.where(flipped, columns.flip(1), columns)
    sample = torch.arange(n, device=images.device)[:, None, None]
    # Indices around a slice put their axes first: (N, H, W, C)
    x = x[sample, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
    return x.contiguous(), targets


def mixup(
    images: Tensor, targets: Tensor, generator: Generator, *, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """lambda x + (1 - lambda) x', and targets alike, with x' from the same batch.

    One lambda ~ Beta(alpha, alpha) a batch, as in the code of Zhang et al. (ICLR 2018).
    """
    share, other = _beta(generator, alpha), _permutation(generator, images)
    return (
        share * images + (1 - share) * images[other],
        share * targets + (1 - share) * targets[other],
    )


def cutmix(
    images: Tensor, targets: Tensor, generator: Generator, *, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A box of another image of the batch, and its share of the area in the targets.

    One box a batch, of area 1 - lambda before it is cut at the border, lambda ~ Beta(alpha, alpha):
    Yun et al. (ICCV 2019).
    """
    _require_images("cutmix", images)
    side, other = (1 - _beta(generator, alpha)) ** 0.5, _permutation(generator, images)
    box, area = [], 1.0
    for length in images.shape[2:]:
        size, centre = round(length * side), int(_integers(generator, length, (), "cpu"))
        start = centre - size // 2
        box.append(slice(max(0, start), min(length, start + size)))
        area *= (box[-1].stop - box[-1].start) / length
    images = images.clone()
    images[:, :, box[0], box[1]] = images[other][:, :, box[0], box[1]]
    return images, (1 - area) * targets + area * targets[other]


def color_jitter(
    images: Tensor,
    targets: Tensor,
    generator: Generator,
    *,
    brightness: float = 0.1,
    contrast: float = 0.1,
    saturation: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Each image's brightness, contrast and saturation times 1 +- at most so much.

    In an order that is drawn for the batch. As torchvision's ``ColorJitter`` without hue.
    """
    _require_images("color_jitter", images)
    kinds = [
        (brightness, torch.zeros_like),
        (contrast, lambda x: grey(x).mean((2, 3), keepdim=True)),
        (saturation, grey),
    ]
    for i in torch.randperm(3, generator=generator, device=generator.device).tolist():
        most, other = kinds[i]
        factor = 1 + most * (2 * _uniform(generator, (len(images),), images.device) - 1)
        images = blend(images, other(images), factor)
    return images, targets


def _require_images(name: str, images: Tensor) -> None:
    if images.dim() != 4:
        raise ValueError(f"{name} takes images (N, C, H, W), got shape {tuple(images.shape)}")


def _integers(generator: Generator, high: int, shape: tuple[int, ...], device) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=generator.device).to(device)


def _uniform(generator: Generator, shape: tuple[int, ...], device) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


def _permutation(generator: Generator, images: Tensor) -> Tensor:
    order = torch.randperm(len(images), generator=generator, device=generator.device)
    return order.to(images.device)


def _beta(generator: Generator, alpha: float) -> float:
    # torch's Beta takes no generator
    seed = int(_integers(generator, 2**62, (), "cpu"))
    return random.Random(seed).betavariate(alpha, alpha)


AUGMENTATIONS: dict[str, Augmentation] = {
    "crop_flip": crop_flip,
    "mixup": mixup,
    "cutmix": cutmix,
    "color_jitter": color_jitter,
    "randaugment": randaugment,
}
