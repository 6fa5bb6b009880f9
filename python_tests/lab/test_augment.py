"""Augmentations: what each may do to a pixel, from which distribution, and that seeds repeat."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image, ImageEnhance

from ses_lab.augment import AUGMENTATIONS, turn_hue

N, C, H, W, K = 12, 3, 8, 6, 5


def batch(n=N):
    images = 1 + torch.rand(n, C, H, W)  # no pixel is 0, as the padding is
    return images, torch.nn.functional.one_hot(torch.arange(n) % K, K).float()


def apply(name, images, targets, seed=0, **params):
    return AUGMENTATIONS[name](images, targets, torch.Generator().manual_seed(seed), **params)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_seed_repeats_and_inputs_stay(name):
    images, targets = batch()
    images = images / 2  # colours are in [0, 1]
    before = images.clone(), targets.clone()
    first, again = apply(name, images, targets), apply(name, images, targets)
    other = apply(name, images, targets, seed=1)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])
    torch.testing.assert_close((images, targets), before, rtol=0, atol=0)
    assert first[0].shape == images.shape
    torch.testing.assert_close(first[1].sum(1), torch.ones(N))


def test_crop_flip_gives_every_crop_alike_and_nothing_else():
    n, padding = 4000, 2
    image, target = (x[:1] for x in batch(1))
    images, _ = apply("crop_flip", image.expand(n, -1, -1, -1), target.expand(n, -1),
                      padding=padding)  # fmt: skip
    padded = torch.nn.functional.pad(image, [padding] * 4)[0]
    crops = [
        crop if flip else crop.flip(2)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
        for flip in (True, False)
        for crop in [padded[:, top : top + H, left : left + W]]
    ]
    same = torch.stack([(images == crop).flatten(1).all(1) for crop in crops])  # (crops, n)
    assert (same.sum(0) == 1).all()
    assert scipy.stats.chisquare(same.sum(1).numpy()).pvalue > 1e-3


def test_color_jitter_is_that_of_pillow_without_rounding():
    """One kind at a time, with factors from the whole range and none beyond."""
    images = torch.rand(1, 3, 4, 4).mul(255).round().div(255).expand(2000, -1, -1, -1)
    for kind, enhance in (("brightness", ImageEnhance.Brightness),
                          ("contrast", ImageEnhance.Contrast),
                          ("saturation", ImageEnhance.Color)):  # fmt: skip
        only = {name: 0.3 * (name == kind) for name in ("brightness", "contrast", "saturation")}
        out, _ = apply("color_jitter", images, torch.zeros(2000, K), **only)
        picture = Image.fromarray((255 * images[0]).byte().permute(1, 2, 0).numpy())
        ends = [
            torch.from_numpy(np.array(enhance(picture).enhance(factor))).permute(2, 0, 1) / 255
            for factor in (0.7, 1.3)
        ]
        for found in (out.amin(0), out.amax(0)):  # each end is reached by one image or another
            gap = torch.minimum((found - ends[0]).abs(), (found - ends[1]).abs())
            assert gap.max() < 2.5 / 255
        assert (out.amax(0) - out.amin(0)).max() > 0.1
    same, _ = apply("color_jitter", images, torch.zeros(2000, K), **dict.fromkeys(only, 0.0))
    torch.testing.assert_close(same, images)


def test_crop_flip_keeps_each_image_and_target_in_its_place():
    images, targets = batch()
    same, kept = apply("crop_flip", images, targets, padding=0, flip=0.0)
    mirrored, _ = apply("crop_flip", images, targets, padding=0, flip=1.0)
    assert torch.equal(same, images)
    assert torch.equal(mirrored, images.flip(3))
    assert torch.equal(kept, targets)


def shares(seeds, name, alpha):
    """The share of the first image, read off the targets of two images of different classes."""
    images, targets = batch(2)
    for seed in range(seeds):
        mixed, soft = apply(name, images, targets, seed, alpha=alpha)
        if soft[0, 1] > 0 or soft[0, 0] < 1:  # otherwise each was mixed with itself
            yield images, mixed, soft[0, 0].item()


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_mixup(alpha):
    found = []
    for images, mixed, share in shares(600, "mixup", alpha):
        torch.testing.assert_close(mixed[0], share * images[0] + (1 - share) * images[1])
        torch.testing.assert_close(mixed[1], share * images[1] + (1 - share) * images[0])
        found.append(share)
    assert len(found) > 200
    assert scipy.stats.kstest(found, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_cutmix_pastes_a_box_whose_area_is_in_the_targets():
    areas = []
    for images, mixed, share in shares(300, "cutmix", 1.0):
        pasted = (mixed[0] == images[1]).all(0)  # (H, W)
        assert torch.equal(mixed[0], torch.where(pasted, images[1], images[0]))
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns)
        for line in (rows, columns):  # without a gap
            assert (line.int().diff() != 0).sum() <= 2
        assert share == pytest.approx(1 - pasted.float().mean().item(), abs=1e-6)
        areas.append(1 - share)
    assert max(areas) > 0.6
    assert min(areas) < 0.1


def test_the_box_of_cutmix_has_the_area_of_the_paper():
    """Beta(alpha, alpha) is 1/2 for huge alpha: sides of H / sqrt 2, where the border cuts none."""
    images = torch.zeros(2, 1, 40, 40)
    images[1] = 1
    sides, total = set(), torch.zeros(40, 40)
    for seed in range(400):
        mixed, _ = apply("cutmix", images, torch.eye(2), seed, alpha=1e9)
        sides |= {int(mixed[0, 0].sum(axis).max()) for axis in (0, 1)}
        total += mixed[0, 0]
    assert max(sides) == round(40 * 0.5**0.5)
    place = torch.arange(40.0) - 19.5
    for axis in (0, 1):  # its centre is anywhere, and in the mean that of the image
        assert abs((total.sum(axis) @ place / total.sum()).item()) < 2


def test_points():
    points, targets = torch.rand(N, 2), batch()[1]
    mixed, _ = apply("mixup", points, targets)
    assert mixed.shape == points.shape
    for name in ("crop_flip", "cutmix"):
        with pytest.raises(ValueError, match=rf"{name} takes images.* got shape \(12, 2\)"):
            apply(name, points, targets)


def test_hue_is_that_of_colorsys():
    images = torch.rand(40, 3, 1, 1)
    images[0] = 0.3  # no hue
    turns = torch.rand(40) - 0.5
    out = turn_hue(images, turns)[:, :, 0, 0]
    for x, turn, found in zip(images[:, :, 0, 0].tolist(), turns.tolist(), out, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*x)
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_share_of_the_images_loses_its_colours():
    images, targets = batch(4000)
    out, _ = apply("random_grey", images, targets, share=0.3)
    lost = (out == out[:, :1]).flatten(1).all(1)
    assert torch.equal(out[~lost], images[~lost])
    assert abs(lost.float().mean() - 0.3) < 0.03
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(out[lost][:, 0], (images[lost] * weights).sum(1))
    jittered, _ = apply("color_jitter", images / 2, targets, brightness=0.4, hue=0.1, share=0.8)
    changed = (jittered != images / 2).flatten(1).any(1)
    assert abs(changed.float().mean() - 0.8) < 0.03


def test_resized_crops_are_boxes_of_the_area_asked_for():
    """Images of their own coordinates tell where each crop lies, away from its border."""
    n, size = 500, 32
    axis = ((torch.arange(size) + 0.5) / size).expand(n, 1, size, size)
    images = torch.cat([axis, axis.mT], 1)
    out, _ = apply("random_resized_crop", images, torch.zeros(n, K), least=0.3, most=0.6)
    middle = slice(size // 4, -size // 4)
    x, y = out[:, 0, middle, middle], out[:, 1, middle, middle]
    width, height = x[:, 0, 1] - x[:, 0, 0], y[:, 1, 0] - y[:, 0, 0]  # of a pixel
    area = width * height * size**2
    assert 0.3 - 1e-4 <= area.min() < 0.32 < 0.58 < area.max() <= 0.6 + 1e-4
    ratio = width / height
    assert 0.75 - 1e-3 <= ratio.min() < 0.8 < 1.25 < ratio.max() <= 4 / 3 + 1e-3
    steps = x.diff(dim=2)
    torch.testing.assert_close(steps, width[:, None, None].expand_as(steps), rtol=0, atol=1e-5)
    centre = x.mean((1, 2))
    assert centre.min() < 0.4 < 0.6 < centre.max()
    assert ((centre - width * size / 2 > -1e-4) & (centre + width * size / 2 < 1 + 1e-4)).all()
    whole, _ = apply("random_resized_crop", images, torch.zeros(n, K), least=1.0, ratio=1.0)
    torch.testing.assert_close(whole, images)
    with pytest.raises(ValueError, match="need 0 < least <= most <= 1"):
        apply("random_resized_crop", images, torch.zeros(n, K), least=0.0)
