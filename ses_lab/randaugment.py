"""RandAugment as batched tensor operations: each image draws its own, all of a kind run at once.

The operations and their ranges are those of torchvision's ``RandAugment`` on PIL images, with 31
magnitudes, nearest neighbours, and black where an image was moved away. Pillow's ``ImageOps`` and
``ImageEnhance`` define those on colours, which take 256 levels where that matters.

Source: Cubuk, Zoph, Shlens & Le, "RandAugment" (NeurIPS 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# Images are (N, C, H, W) in [0, 1]; a strength is (N,), one an image, with its sign.


def _affine(x: Tensor, a: Tensor) -> Tensor:  # a: (N, 2, 3), from a pixel of the result to x's
    n, _, height, width = x.shape
    columns = torch.arange(width, device=x.device) + 0.5
    rows = torch.arange(height, device=x.device)[:, None] + 0.5
    u, v = (  # (N, H, W)
        (a[:, i, 0, None, None] * columns + a[:, i, 1, None, None] * rows + a[:, i, 2, None, None])
        .floor()
        .long()
        for i in (0, 1)
    )
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    image = torch.arange(n, device=x.device)[:, None, None]
    moved = x[image, :, v.clamp(0, height - 1), u.clamp(0, width - 1)].movedim(3, 1)
    return moved * inside[:, None]


def _matrix(like: Tensor, **entries: Tensor) -> Tensor:
    """The identity but for entries by row and column, ``_01=shear``."""
    matrix = torch.eye(2, 3, device=like.device).repeat(len(like), 1, 1)
    for place, value in entries.items():
        matrix[:, int(place[1]), int(place[2])] = value
    return matrix


def _shear_x(x: Tensor, strength: Tensor) -> Tensor:  # about the upper left corner, as there
    return _affine(x, _matrix(x, _01=0.3 * strength))


def _shear_y(x: Tensor, strength: Tensor) -> Tensor:
    return _affine(x, _matrix(x, _10=0.3 * strength))


def _translate_x(x: Tensor, strength: Tensor) -> Tensor:
    return _affine(x, _matrix(x, _02=(150 / 331 * x.shape[3] * strength).trunc()))


def _translate_y(x: Tensor, strength: Tensor) -> Tensor:
    return _affine(x, _matrix(x, _12=(150 / 331 * x.shape[2] * strength).trunc()))


def _rotate(x: Tensor, strength: Tensor) -> Tensor:
    angle = math.radians(-30) * strength
    cos, sin = angle.cos(), angle.sin()
    h, w = x.shape[2] / 2, x.shape[3] / 2  # about the middle
    return _affine(
        x,
        _matrix(x, _00=cos, _01=sin, _02=w - cos * w - sin * h,
                _10=-sin, _11=cos, _12=h + sin * w - cos * h),
    )  # fmt: skip


def grey(x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, 1, H, W)
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """From ``other`` at 0 over x at 1 to beyond it; factor: (N,)."""
    return (other + factor.view(-1, 1, 1, 1) * (x - other)).clamp(0, 1)


def _brightness(x: Tensor, strength: Tensor) -> Tensor:
    return blend(x, torch.zeros_like(x), 1 + 0.9 * strength)


def _color(x: Tensor, strength: Tensor) -> Tensor:
    return blend(x, grey(x), 1 + 0.9 * strength)


def _contrast(x: Tensor, strength: Tensor) -> Tensor:
    return blend(x, grey(x).mean((2, 3), keepdim=True), 1 + 0.9 * strength)


def _sharpness(x: Tensor, strength: Tensor) -> Tensor:
    kernel = x.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = x.clone()  # the rim stays
    if min(x.shape[2:]) > 2:
        smooth[:, :, 1:-1, 1:-1] = F.conv2d(
            x, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]
        )
    return blend(x, smooth, 1 + 0.9 * strength)


def _levels(x: Tensor) -> Tensor:
    return (255 * x).round()


def _posterize(x: Tensor, strength: Tensor) -> Tensor:
    step = 2 ** (4 * strength.abs()).round().view(-1, 1, 1, 1)  # 8 to 4 bits are left
    return (_levels(x) / step).floor() * step / 255


def _solarize(x: Tensor, strength: Tensor) -> Tensor:
    threshold = 1 - strength.abs().view(-1, 1, 1, 1)
    return torch.where(x < threshold, x, 1 - x)


def _autocontrast(x: Tensor, strength: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-6), x)


def _equalize(x: Tensor, strength: Tensor) -> Tensor:
    levels = _levels(x).long().flatten(2)  # (N, C, H W)
    counts = x.new_zeros(*levels.shape[:2], 256).scatter_add_(
        2, levels, torch.ones_like(levels, dtype=x.dtype)
    )
    below = counts.cumsum(2) - counts
    brightest = counts.gather(2, levels.amax(2, keepdim=True))
    step = ((levels.shape[2] - brightest) / 255).floor()  # pixels a level
    table = (((step / 2).floor() + below) / step.clamp_min(1)).floor().clamp(max=255)
    equal = table.gather(2, levels) / 255
    return torch.where(step > 0, equal, levels / 255).view_as(x)


def _identity(x: Tensor, strength: Tensor) -> Tensor:
    return x


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": _identity,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}


def randaugment(
    images: Tensor, targets: Tensor, generator: Generator, *, n: int = 2, m: int = 9
) -> tuple[Tensor, Tensor]:
    """``n`` operations one after another, drawn for each image, of magnitude ``m``, 0 to 30.

    Signs are drawn too. Cost: each operation ``n`` times, on the images that drew it.
    """
    if images.dim() != 4 or not 0 <= m <= 30 or n < 0:
        raise ValueError(
            f"randaugment takes images (N, C, H, W), n >= 0 and m in 0 to 30; got "
            f"{tuple(images.shape)}, {n} and {m}"
        )
    images = images.clone()
    for _ in range(n):
        shape = (len(images),)
        device = generator.device
        drawn = torch.randint(len(OPERATIONS), shape, generator=generator, device=device)
        signs = 2 * torch.randint(2, shape, generator=generator, device=device) - 1
        drawn, strength = drawn.to(images.device), m / 30 * signs.to(images)
        for i, operation in enumerate(OPERATIONS.values()):
            rows = (drawn == i).nonzero()[:, 0]
            if len(rows):
                images[rows] = operation(images[rows], strength[rows])
    return images, targets
