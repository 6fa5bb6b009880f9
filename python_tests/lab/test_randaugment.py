"""RandAugment against Pillow, operation by operation, and how operations are drawn."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from ses_lab import randaugment as ours
from ses_lab.randaugment import OPERATIONS, randaugment

M = 9 / 30


@pytest.fixture(scope="module")
def pictures():
    """uint8 (H, W, 3), wider than high."""
    photograph = load_sample_image("flower.jpg")
    return [photograph[y : y + 32, x : x + 40] for y, x in ((0, 0), (150, 250), (300, 400))]


def run(name, pictures, strength):
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    out = OPERATIONS[name](images, torch.full((len(images),), float(strength)))
    return 255 * out.permute(0, 2, 3, 1)


def affine(*matrix):
    return lambda p, s: p.transform(p.size, Image.AFFINE, [x(s) for x in matrix], Image.NEAREST)


def one(s):
    return 1


def zero(s):
    return 0


def enhanced(kind):
    return lambda p, s: kind(p).enhance(1 + 0.9 * s)


# name -> what Pillow makes of it, and by how many levels of 255 the two may differ: it rounds to
# whole levels after each step of an enhancement.
REFERENCE = {
    "identity": (lambda p, s: p, 0),
    "shear_x": (affine(one, lambda s: 0.3 * s, zero, zero, one, zero), 0),
    "shear_y": (affine(one, zero, zero, lambda s: 0.3 * s, one, zero), 0),
    "translate_x": (affine(one, zero, lambda s: int(150 / 331 * 40 * s), zero, one, zero), 0),
    "translate_y": (affine(one, zero, zero, zero, one, lambda s: int(150 / 331 * 32 * s)), 0),
    "brightness": (enhanced(ImageEnhance.Brightness), 1.01),
    "color": (enhanced(ImageEnhance.Color), 2.01),
    "contrast": (enhanced(ImageEnhance.Contrast), 2.01),
    "sharpness": (enhanced(ImageEnhance.Sharpness), 2.01),
    "posterize": (lambda p, s: ImageOps.posterize(p, 8 - round(4 * abs(s))), 0.01),
    "solarize": (lambda p, s: ImageOps.solarize(p, 255 * (1 - abs(s))), 0.01),
    "autocontrast": (lambda p, s: ImageOps.autocontrast(p), 1.01),
    "equalize": (lambda p, s: ImageOps.equalize(p), 0.01),
}


def test_every_operation_has_a_reference():
    assert OPERATIONS.keys() == {*REFERENCE, "rotate"}


@pytest.mark.parametrize("strength", [M, -M, 1.0])
@pytest.mark.parametrize("name", REFERENCE)
def test_operations_are_those_of_pillow(name, strength, pictures):
    pillow, levels = REFERENCE[name]
    out = run(name, pictures, strength)
    for picture, image in zip(pictures, out, strict=True):
        expected = np.asarray(pillow(Image.fromarray(picture), strength), float)
        assert np.abs(image.numpy() - expected).max() <= levels + 1e-3
    if name not in ("identity", "autocontrast"):
        assert (out - torch.from_numpy(np.stack(pictures))).abs().max() > 0.9


@pytest.mark.parametrize("strength", [M, -M, 1.0])
def test_rotation_is_that_of_pillow(strength, pictures):
    """But for pixels whose centre falls within rounding of an edge."""
    for picture, image in zip(pictures, run("rotate", pictures, strength), strict=True):
        rotated = Image.fromarray(picture).rotate(30 * strength, Image.NEAREST)
        same = (np.abs(image.numpy() - np.asarray(rotated)) < 1e-3).all(-1)
        assert same.mean() > 0.99


def test_flat_and_grey_images():
    flat = torch.full((2, 1, 6, 6), 0.4)
    flat = (255 * flat).round() / 255
    for name, operation in OPERATIONS.items():
        out = operation(flat, torch.tensor([M, -M]))
        assert out.shape == flat.shape
        assert out.isfinite().all()
        if name in ("autocontrast", "equalize", "contrast", "sharpness", "color"):
            torch.testing.assert_close(out, flat)


def test_each_image_draws_its_own_operations(monkeypatch):
    """All alike, with both signs, at the magnitude that was asked for."""
    strengths = []

    def spy(k):
        def add(x, strength):
            strengths.append(strength)
            return x + 10.0**k

        return add

    monkeypatch.setattr(ours, "OPERATIONS", {f"{k}": spy(k) for k in range(4)})
    images, targets = torch.zeros(4000, 1, 1, 1).double(), torch.zeros(4000, 2)
    generator = torch.Generator().manual_seed(0)
    out, same = randaugment(images, targets, generator, n=1, m=12)
    assert same is targets
    kinds, counts = out.flatten().unique(return_counts=True)
    assert kinds.tolist() == [1, 10, 100, 1000]
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    drawn = torch.cat(strengths)
    assert drawn.abs().unique().tolist() == [pytest.approx(12 / 30)]
    assert abs((drawn > 0).double().mean() - 0.5) < 4 / math.sqrt(4 * 4000)
    out, _ = randaugment(images, targets, generator, n=2, m=12)
    assert len(out.unique()) == 4 + 6  # twice the same, or two of four
    nothing, _ = randaugment(images, targets, generator, n=0)
    assert torch.equal(nothing, images)


@pytest.mark.parametrize("params", [{"m": 31}, {"n": -1}, {"m": -1}])
def test_what_it_refuses(params):
    with pytest.raises(ValueError, match="m in 0 to 30"):
        randaugment(torch.zeros(2, 1, 4, 4), torch.zeros(2, 2), torch.Generator(), **params)
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        randaugment(torch.zeros(2, 2), torch.zeros(2, 2), torch.Generator())
