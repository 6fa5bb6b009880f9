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
    hue: float = 0.0,
    share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Each image's brightness, contrast and saturation times 1 +- at most so much.

    ``hue`` is turned by at most so many turns either way, where there are three channels;
    ``share``: the probability of an image to be changed at all. In an order that is drawn for the
    batch. As torchvision's ``ColorJitter``.
    """
    _require_images("color_jitter", images)
    kinds: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, u: blend(x, torch.zeros_like(x), 1 + brightness * u),
        lambda x, u: blend(x, grey(x).mean((2, 3), keepdim=True), 1 + contrast * u),
        lambda x, u: blend(x, grey(x), 1 + saturation * u),
    ]
    if hue and images.shape[1] == 3:
        kinds.append(lambda x, u: turn_hue(x, hue * u))
    jittered = images
    order = torch.randperm(len(kinds), generator=generator, device=generator.device)
    for i in order.tolist():
        jittered = kinds[i](jittered, 2 * _uniform(generator, (len(images),), images.device) - 1)
    return _some(generator, share, jittered, images), targets


def turn_hue(x: Tensor, turns: Tensor) -> Tensor:  # (N, 3, H, W) in [0, 1], (N,)
    """Through hue, value and chroma, as :mod:`colorsys` defines the first two."""
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)  # (N, H, W)
    red, green, blue = x.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * turns[:, None, None]
    # A channel falls by the chroma over one sixth of the circle, stays for two, and rises again.
    k = x.new_tensor([5, 3, 1])[:, None, None]
    t = (k + sixths[:, None]) % 6  # (N, 3, H, W)
    return value[:, None] - chroma[:, None] * torch.minimum(t, 4 - t).clamp(0, 1)


def random_grey(
    images: Tensor, targets: Tensor, generator: Generator, *, share: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Each image without its colours, with probability ``share``."""
    _require_images("random_grey", images)
    return _some(generator, share, grey(images).expand_as(images), images), targets


def random_resized_crop(
    images: Tensor,
    targets: Tensor,
    generator: Generator,
    *,
    least: float = 0.2,
    most: float = 1.0,
    ratio: float = 4 / 3,
) -> tuple[Tensor, Tensor]:
    """A crop of its own for each image, ``least`` to ``most`` of its area, at its size again.

    Width over height of a crop, as shares of the image's, is up to ``ratio`` either way; a side is
    cut to the image's where it would be longer, in the place of torchvision's
    ``RandomResizedCrop`` drawing again. Bilinear.
    """
    _require_images("random_resized_crop", images)
    if not 0 < least <= most <= 1 or ratio < 1:
        raise ValueError(
            f"need 0 < least <= most <= 1 and ratio >= 1, got {least}, {most} and {ratio}"
        )
    n, device = len(images), images.device
    area = least + (most - least) * _uniform(generator, (n,), device)
    shape = ratio ** (2 * _uniform(generator, (n,), device) - 1)
    sides = torch.stack([(area * shape).sqrt(), (area / shape).sqrt()], 1).clamp(max=1)  # x, y
    centres = (1 - sides) * (2 * _uniform(generator, (n, 2), device) - 1)  # in [-1, 1]
    matrix = torch.cat([torch.diag_embed(sides), centres[:, :, None]], 2)  # (N, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False), targets


def _some(generator: Generator, share: float, changed: Tensor, images: Tensor) -> Tensor:
    """Images of ``changed`` with probability ``share``; 1 draws nothing."""
    if share == 1:
        return changed
    chosen = _uniform(generator, (len(images), 1, 1, 1), images.device) < share
    return torch.where(chosen, changed, images)


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
    "random_grey": random_grey,
    "random_resized_crop": random_resized_crop,
    "randaugment": randaugment,
}
