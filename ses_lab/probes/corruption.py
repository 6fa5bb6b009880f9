"""Common corruptions of small images, as batched tensor operations, and accuracy under them.

In the spirit of Hendrycks & Dietterich, "Benchmarking neural network robustness to common
corruptions" (ICLR 2019), with the strengths of their CIFAR-10-C, meant for sides of about 32
pixels; lengths are in pixels, so 8 x 8 digits suffer more. Not their images: fog is another noise,
motion blur, defocus and elastic are built and scaled by us, JPEG does not subsample the colours.
Left out are frost (needs photographs), snow, spatter, glass blur and saturate.

:data:`SOURCE` is another set: the five corruptions with which Spectral Entropy Shaping was
published, in their strengths. They act on *normalised* images and clamp nothing: their numbers
compare with each other and with no one else's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ses_lab.names import lookup
from ses_lab.probes.common import accuracy, evaluation, rand, randn

Generator = torch.Generator | None

# ---- noise: x is (N, C, H, W) in [0, 1], c the strength ----


def _gaussian_noise(x: Tensor, c: float, generator: Generator) -> Tensor:
    return x + c * randn(x.shape, generator, x)


def _speckle_noise(x: Tensor, c: float, generator: Generator) -> Tensor:
    return x + c * x * randn(x.shape, generator, x)


def _shot_noise(x: Tensor, photons: float, generator: Generator) -> Tensor:
    rate = x.to(generator.device if generator else x.device) * photons
    return torch.poisson(rate, generator=generator).to(x) / photons


def _impulse_noise(x: Tensor, share: float, generator: Generator) -> Tensor:
    u = rand(x.shape, generator, x)  # below share / 2: pepper, above 1 - share / 2: salt
    return torch.where(u < share / 2, 0, torch.where(u > 1 - share / 2, 1, x))


# ---- blur ----


def _gaussian_blur(x: Tensor, sigma: float, generator: Generator) -> Tensor:
    radius = math.ceil(4 * sigma)
    t = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = (-(t**2) / (2 * sigma**2)).exp()
    return _filter(x, kernel[:, None] * kernel)


def _defocus_blur(x: Tensor, radius: float, generator: Generator) -> Tensor:
    side = math.ceil(radius)
    t = torch.arange(-side, side + 1, device=x.device, dtype=x.dtype)
    distance = (t[:, None] ** 2 + t**2).sqrt()
    return _filter(x, (radius + 0.5 - distance).clamp(0, 1))  # a disc with a soft edge


def _filter(x: Tensor, kernel: Tensor) -> Tensor:  # (N, C, H, W), (k, k)
    side = kernel.shape[0] // 2
    # Replicated, since reflection is not defined for a kernel wider than the image.
    padded = F.pad(x, (side, side, side, side), mode="replicate")
    weight = (kernel / kernel.sum()).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(padded, weight, groups=x.shape[1])


def _motion_blur(x: Tensor, c: tuple[int, float], generator: Generator) -> Tensor:
    length, sigma = c
    angle = (rand((len(x), 1, 1), generator, x) - 0.5) * (math.pi / 2)
    direction = torch.stack([angle.cos(), angle.sin()], -1)  # (N, 1, 1, 2)
    weights = [math.exp(-(t**2) / (2 * sigma**2)) for t in range(length + 1)]
    blurred = sum(w * _displace(x, t * direction) for t, w in enumerate(weights))
    return blurred / sum(weights)


def _zoom_blur(x: Tensor, furthest: float, generator: Generator) -> Tensor:
    zooms = [1 + 0.01 * i for i in range(round(100 * (furthest - 1)))]
    grid = _identity_grid(x)
    zoomed = (F.grid_sample(x, grid / z, padding_mode="border", align_corners=False) for z in zooms)
    return (x + sum(zoomed)) / (1 + len(zooms))


def _identity_grid(x: Tensor) -> Tensor:
    identity = torch.eye(2, 3, device=x.device, dtype=x.dtype).expand(len(x), -1, -1)
    return F.affine_grid(identity, list(x.shape), align_corners=False)


def _displace(x: Tensor, pixels: Tensor) -> Tensor:  # pixels: (N, H or 1, W or 1, 2)
    step = 2 * pixels / torch.tensor([x.shape[3], x.shape[2]], device=x.device)
    return F.grid_sample(x, _identity_grid(x) + step, padding_mode="border", align_corners=False)


# ---- weather, light, digital ----


def _fog(x: Tensor, c: tuple[float, float], generator: Generator) -> Tensor:
    amount, decay = c
    n, _, height, width = x.shape
    fog, cells = 0, 1
    while cells < max(height, width):  # octaves of noise, each finer and weaker
        corners = rand((n, 1, cells + 1, cells + 1), generator, x)
        octave = F.interpolate(corners, (height, width), mode="bilinear", align_corners=True)
        fog = fog + octave * decay ** -math.log2(cells)
        cells *= 2
    low, high = fog.amin((1, 2, 3), keepdim=True), fog.amax((1, 2, 3), keepdim=True)
    brightest = x.amax((1, 2, 3), keepdim=True)
    foggy = x + amount * (fog - low) / (high - low).clamp_min(1e-12)
    return foggy * brightest / (brightest + amount)


def _brightness(x: Tensor, c: float, generator: Generator) -> Tensor:
    value = x.amax(1, keepdim=True)  # V of HSV; hue and saturation stay
    brighter = (value + c).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp_min(1e-12), brighter)


def _contrast(x: Tensor, c: float, generator: Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * c + mean


def _elastic(x: Tensor, pixels: float, generator: Generator) -> Tensor:
    noise = 2 * rand((len(x), 2, *x.shape[2:]), generator, x) - 1
    smooth = _gaussian_blur(noise, 2.0, None)
    rms = smooth.square().mean((1, 2, 3), keepdim=True).sqrt()
    return _displace(x, (pixels * smooth / rms).permute(0, 2, 3, 1))


def _pixelate(x: Tensor, c: float, generator: Generator) -> Tensor:
    return _cells(x.shape[2], c, x) @ x @ _cells(x.shape[3], c, x).mT


def _cells(side: int, c: float, like: Tensor) -> Tensor:  # (side, side): the mean over one's cell
    cell = ((torch.arange(side, device=like.device) + 0.5) * int(side * c) / side).long()
    same = (cell[:, None] == cell).to(like)
    return same / same.sum(1, keepdim=True)


# ITU-T T.81 (the JPEG standard), annex K: quantisation of luminance and chrominance at quality 50.
_LUMINANCE = """
16 11 10 16 24 40 51 61     12 12 14 19 26 58 60 55     14 13 16 24 40 57 69 56
14 17 22 29 51 87 80 62     18 22 37 56 68 109 103 77   24 35 55 64 81 104 113 92
49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99
"""
_CHROMINANCE = (
    """
17 18 24 47 99 99 99 99     18 21 26 66 99 99 99 99
24 26 56 99 99 99 99 99     47 66 99 99 99 99 99 99
"""
    + 32 * "99 "
)
_YCBCR = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]


def _jpeg(x: Tensor, quality: int, generator: Generator) -> Tensor:
    channels, height, width = x.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"JPEG needs 1 or 3 channels, got {channels}")
    levels = (255 * x).round()
    to_ycbcr = torch.tensor(_YCBCR, device=x.device, dtype=x.dtype)
    if channels == 3:
        levels = torch.einsum("ij,njhw->nihw", to_ycbcr, levels).round()
        levels[:, 1:] += 128
    padded = F.pad(levels, (0, -width % 8, 0, -height % 8), mode="replicate") - 128
    i = torch.arange(8, device=x.device, dtype=x.dtype)
    dct = 0.5 * torch.cos(math.pi / 8 * i[:, None] * (i + 0.5))  # orthogonal, 8 x 8
    dct[0] *= 0.5**0.5
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality  # that of the IJG's library
    tables = [
        torch.tensor([int((int(q) * scale + 50) // 100) for q in text.split()]).clamp(1, 255)
        for text in (_LUMINANCE, _CHROMINANCE, _CHROMINANCE)[:channels]
    ]
    table = torch.stack(tables).view(channels, 1, 1, 8, 8).to(x)
    blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8)  # (N, C, H / 8, W / 8, 8, 8)
    coefficients = (dct @ blocks @ dct.mT / table).round() * table
    decoded = (dct.mT @ coefficients @ dct + 128).round().clamp(0, 255)
    decoded = decoded.permute(0, 1, 2, 4, 3, 5).reshape(padded.shape)[:, :, :height, :width]
    if channels == 3:
        decoded = torch.cat([decoded[:, :1], decoded[:, 1:] - 128], 1)
        decoded = torch.einsum("ij,njhw->nihw", to_ycbcr.inverse(), decoded)
    return decoded.round() / 255


CORRUPTIONS: dict[str, tuple[Callable[..., Tensor], Sequence]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (_speckle_noise, (0.06, 0.10, 0.12, 0.16, 0.20)),
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": (_defocus_blur, (0.6, 0.8, 1.0, 1.3, 1.8)),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic": (_elastic, (0.4, 0.7, 1.0, 1.3, 1.6)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40)),
}


def corrupt(
    x: Tensor,
    name: str,
    severity: int,
    generator: Generator = None,
    set: str = "hendrycks",
    model: nn.Module | None = None,
) -> Tensor:
    """(N, C, H, W) images in [0, 1] under one corruption of :data:`SETS` at severity 1 to 5.

    Those of "source" leave [0, 1]: ``model.normalize`` makes of them what the source hands its
    network. ValueError for an unknown name, a severity out of range, or an x that is no batch of
    images.
    """
    known = SETS[set].corruptions
    if name not in known or severity not in range(1, 6):
        raise ValueError(
            f"no corruption {name!r} of severity {severity!r}: severities are 1 to 5 and names "
            f"{', '.join(known)}"
        )
    if x.dim() != 4:
        raise ValueError(f"corruptions are for images (N, C, H, W), got {tuple(x.shape)}")
    function, strengths = known[name]
    if set == "hendrycks":
        return function(x, strengths[severity - 1], generator).clamp(0, 1)
    normalize = model.normalize
    corrupted = function(normalize(x), strengths[severity - 1], generator)
    return corrupted * normalize.std + normalize.mean


# ---- the five of D. Le Bone, Spectral Entropy Shaping (2026), ses_vit_augmentation.py: z is
# (N, C, H, W), normalised, and c the strength ----


def _added_noise(z: Tensor, c: float, generator: Generator) -> Tensor:
    return z + c * randn(z.shape, generator, z)


def _box_blur(z: Tensor, side: int, generator: Generator) -> Tensor:
    kernel = torch.ones(z.shape[1], 1, side, side, device=z.device, dtype=z.dtype) / side**2
    return F.conv2d(z, kernel, padding=side // 2, groups=z.shape[1])  # zeros: the mean colour


def _added_light(z: Tensor, c: float, generator: Generator) -> Tensor:
    return z + c


def _positive_shots(z: Tensor, photons: float, generator: Generator) -> Tensor:
    return _shot_noise(z.clamp_min(0), photons, generator)  # what is darker than the mean is lost


SOURCE: dict[str, tuple[Callable[..., Tensor], Sequence]] = {
    "gaussian_noise": (_added_noise, (0.04, 0.06, 0.08, 0.10, 0.12)),
    "gaussian_blur": (_box_blur, (3, 3, 5, 5, 7)),  # a box, under the name that it has there
    "contrast": (_contrast, (0.8, 0.6, 0.4, 0.3, 0.2)),
    "brightness": (_added_light, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "shot_noise": (_positive_shots, (500, 250, 100, 75, 50)),
}


class _Set(NamedTuple):
    corruptions: Mapping[str, tuple[Callable[..., Tensor], Sequence]]
    severities: tuple[int, ...]


SETS = {"hendrycks": _Set(CORRUPTIONS, (1, 2, 3, 4, 5)), "source": _Set(SOURCE, (1, 3, 5))}


def corruption(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: Generator = None,
    *,
    set: str = "hendrycks",
    names: Sequence[str] | None = None,
    severities: Sequence[int] | None = None,
    samples: int | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """Accuracy: ``clean``, ``<name>/<severity>`` for each corruption, ``<name>`` and ``mean``.

    The last two are means over the severities and over all. One minus ``mean`` is the unnormalised
    corruption error; the paper's mCE divides by AlexNet's, which is not here.

    Args:
        set: "hendrycks", or "source", which needs ``model.normalize``; see above.
        names: of the set; None for all of them.
        severities: 1 to 5; None for all of them, 1, 3 and 5 in the source's set.
    """
    chosen = lookup("corruption set", SETS, set)
    names = tuple(chosen.corruptions) if names is None else names
    severities = chosen.severities if severities is None else severities
    with evaluation(model, images, labels, generator, samples, batch_size) as batches:
        result = {"clean": accuracy(model, batches)}
        for name in names:
            for severity in severities:
                corrupted = [
                    (corrupt(x, name, severity, generator, set, model), y) for x, y in batches
                ]
                result[f"{name}/{severity}"] = accuracy(model, corrupted)
            result[name] = sum(result[f"{name}/{s}"] for s in severities) / len(severities)
    result["mean"] = sum(result[name] for name in names) / len(names)
    return result
