"""The readers, on small archives in the true format, damaged ones and malicious ones."""

import io
import os
import pickle

import numpy as np
import pytest
from data_files import (
    RNG,
    check,
    cifar_batch,
    jpeg,
    python2_pickle,
    write_archive,
    write_cifar,
    write_medmnist,
)
from PIL import Image
from scipy.io import savemat

from ses_lab.data import archives, load


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_pickle_reads_them(order):
    batch = cifar_batch(2, b"labels", 2)
    batch[b"data"] = np.asarray(batch[b"data"], order=order)
    data = python2_pickle(batch)
    read = pickle.loads(data, encoding="bytes")
    ours = archives._ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    assert np.array_equal(read[b"data"], batch[b"data"])
    assert np.array_equal(archives._uint8(ours[b"data"]), batch[b"data"])
    assert {**read, b"data": 0} == {**ours, b"data": 0} == {**batch, b"data": 0}


@pytest.mark.parametrize("packed", [True, False], ids=["tar.gz", "folder"])
def test_cifar10(tmp_path, packed):
    files = write_cifar(tmp_path, "cifar10", packed)
    dataset = load("cifar10", root=tmp_path)
    check(dataset, 20, 4, 3, 32)
    assert dataset.classes == ("airplane", "automobile", "bird", "cat")
    for k in range(1, 6):  # in the order of their numbers, not of the archive
        pixels = files[f"data_batch_{k}"][b"data"].reshape(4, 3, 32, 32)
        assert np.array_equal(dataset.train.images[4 * k - 4 : 4 * k], pixels)
    assert dataset.train.labels.tolist() == 5 * [0, 1, 2, 3]
    assert np.array_equal(dataset.test.images.flatten(1), files["test_batch"][b"data"])


def test_cifar100_has_its_fine_labels(tmp_path):
    files = write_cifar(tmp_path, "cifar100")
    dataset = load("cifar100", root=str(tmp_path))
    check(dataset, 4, 4, 3, 32)
    assert dataset.classes == ("apple", "aquarium_fish", "baby")
    assert dataset.train.labels.tolist() == [0, 1, 2, 0]
    assert np.array_equal(dataset.train.images.flatten(1), files["train"][b"data"])


class Runs:
    """Pickled, it calls ``function(*arguments)`` where it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["data", "labels", "all"])
def test_a_malicious_pickle_is_refused_before_it_runs(tmp_path, protocol, where):
    write_cifar(tmp_path, "cifar10", packed=False)
    evil = Runs(os.mkdir, str(tmp_path / "evil"))
    batch = {"data": {b"data": evil}, "labels": {b"labels": [evil]}, "all": evil}[where]
    batch = pickle.dumps(batch, protocol)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(batch)
    with pytest.raises(ValueError, match=r"asks for .*, and only arrays are read"):
        load("cifar10", root=tmp_path)
    assert not (tmp_path / "evil").exists()
    pickle.loads(batch)  # it is malicious indeed
    assert (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "builtins.getattr", "numpy.load", "numpy.ndarray.tofile", "copyreg._x"],
)
def test_only_the_names_of_arrays_are_admitted(name):
    module, _, attribute = name.partition(".")
    unpickler = archives._ArraysOnly(io.BytesIO(b""))
    with pytest.raises(pickle.UnpicklingError, match="only arrays"):
        unpickler.find_class(module, attribute)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "data_batch_2"),
        (lambda file: file.write_bytes(file.read_bytes()[:-2000]), "damaged"),
        (lambda file: file.write_bytes(python2_pickle({b"data": np.zeros((1, 2))})), "not uint8"),
        (
            lambda file: file.write_bytes(
                python2_pickle({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0, 1]})
            ),
            "17 images and 18 labels",
        ),
        (
            lambda file: file.write_bytes(
                python2_pickle({b"data": np.zeros((1, 3072), np.uint8), b"labels": [4]})
            ),
            "labels 0 to 4 for 4 classes",
        ),
    ],
    ids=["absent", "cut", "float64", "labels", "label"],
)
def test_a_damaged_cifar_folder_is_one_error(tmp_path, damage, message):
    write_cifar(tmp_path, "cifar10", packed=False)
    damage(tmp_path / "cifar-10-batches-py" / "data_batch_2")
    with pytest.raises(ValueError, match=f"cifar-10-batches-py.*{message}"):
        load("cifar10", root=tmp_path)


def test_a_cut_archive_is_one_error(tmp_path):
    write_cifar(tmp_path, "cifar100")
    path = tmp_path / "cifar-100-python.tar.gz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cifar-100-python.tar.gz is damaged.*download=True"):
        load("cifar100", root=tmp_path)


def test_svhn(tmp_path):
    images = {}
    for split, labels in (("train", [1, 9, 10]), ("test", [10, 2])):
        images[split] = RNG.integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
        contents = {"X": images[split], "y": np.array(labels, np.uint8)[:, None]}
        savemat(tmp_path / f"{split}_32x32.mat", contents, do_compression=True)
    dataset = load("svhn", root=tmp_path)
    check(dataset, 3, 2, 3, 32)
    assert dataset.train.labels.tolist() == [1, 9, 0]
    assert dataset.test.labels.tolist() == [0, 2]
    assert dataset.train.images[1, 2, 5, 7] == images["train"][5, 7, 2, 1]
    assert np.array_equal(dataset.test.images.permute(2, 3, 1, 0), images["test"])


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
def test_tiny_imagenet(tmp_path, packed):
    colour = [jpeg(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(5)]
    grey = jpeg(RNG.integers(0, 256, (64, 64), dtype=np.uint8))  # the real set has such ones
    contents = {
        "wnids.txt": b"n02124075\nn01443537\n",
        "words.txt": b"n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\n"
        b"n02124075\tEgyptian cat\n",
        "val/val_annotations.txt": b"val_0.JPEG\tn01443537\t0\t32\t44\t62\n"
        b"val_1.JPEG\tn02124075\t52\t55\t57\t59\n",
        "val/images/val_1.JPEG": colour[0],
        "val/images/val_0.JPEG": colour[1],
        "train/n02124075/n02124075_boxes.txt": b"n02124075_0.JPEG\t0\t10\t63\t58\n",
        "train/n02124075/images/n02124075_0.JPEG": colour[2],
        "train/n01443537/images/n01443537_1.JPEG": grey,
        "train/n01443537/images/n01443537_0.JPEG": colour[3],
        "test/images/test_0.JPEG": colour[4],
    }
    path = tmp_path / ("tiny-imagenet-200.zip" if packed else "")
    write_archive(path, "tiny-imagenet-200", contents)
    dataset = load("tiny_imagenet", root=tmp_path)
    check(dataset, 3, 2, 3, 64)
    assert dataset.classes == ("Egyptian cat", "goldfish, Carassius auratus")
    assert dataset.train.labels.tolist() == [1, 1, 0]
    assert dataset.test.labels.tolist() == [1, 0]
    expected = [np.asarray(Image.open(io.BytesIO(data))) for data in (colour[3], grey, colour[2])]
    expected[1] = np.repeat(expected[1][..., None], 3, -1)
    assert np.array_equal(dataset.train.images.permute(0, 2, 3, 1), np.stack(expected))
    assert np.array_equal(
        dataset.test.images[0].permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(colour[1])))
    )


@pytest.mark.parametrize("images", ["", "images/"])
def test_tiny_imagenet_with_a_validation_set_sorted_by_class(tmp_path, images):
    """As many scripts leave it; beside the files what macOS adds to an archive."""
    contents = {
        "wnids.txt": b"n01\nn02\n",
        "words.txt": b"n01\tone\nn02\ttwo\n",
        "val/val_annotations.txt": b"val_0.JPEG\tn01\t0\t32\t44\t62\n",
        "train/n01/images/._n01_0.JPEG": b"Mac OS X",
    }
    pixels = {f"n0{k}": RNG.integers(0, 256, (64, 64), dtype=np.uint8) for k in (1, 2)}
    for name, image in pixels.items():
        contents[f"train/{name}/images/{name}_0.JPEG"] = jpeg(image)
        contents[f"val/{name}/{images}val_{name}.JPEG"] = jpeg(image)
    write_archive(tmp_path, "tiny-imagenet-200", contents)
    dataset = load("tiny_imagenet", root=tmp_path)
    check(dataset, 2, 2, 3, 64)
    assert np.array_equal(dataset.test.images, dataset.train.images)
    assert dataset.test.labels.tolist() == [0, 1]
    bad = tmp_path / "tiny-imagenet-200/train/n02/images/n02_0.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"damaged.*train/n02/images/n02_0\.JPEG"):
        load("tiny_imagenet", root=tmp_path)


def test_image_folder(tmp_path):
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            (folder / "._0.png").write_bytes(b"Mac OS X")
            for i in range(count):
                pixels = np.zeros((20, 40, 3), np.uint8)
                pixels[:, 10:30] = 100 * (name == "dog") + i  # the middle, which is kept
                Image.fromarray(pixels).save(folder / f"{i}.png")
    dataset = load("image_folder", root=tmp_path, folder="pets", size=10)
    check(dataset, 6, 2, 3, 10)
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train.images[:, 0, 5, 5].tolist() == [0, 1, 2, 100, 101, 102]
    assert dataset.train.images[3].float().mean() > 95  # little of what was cut off
    assert len(dataset.validation.labels) == 4
    for file in (tmp_path / "pets" / "test").rglob("*.png"):
        file.unlink()
    for folder in sorted((tmp_path / "pets" / "test").rglob("*"), reverse=True):
        folder.rmdir()
    (tmp_path / "pets" / "test").rmdir()
    dataset = load("image_folder", root=tmp_path, folder="pets", size=10)
    assert (len(dataset.test.labels), dataset.validation) == (4, None)
    (tmp_path / "pets/train/dog/1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"train/dog/1\.png"):
        load("image_folder", root=tmp_path, folder="pets")
    with pytest.raises(FileNotFoundError, match=r"expected .*/none/train/CLASS/IMAGE"):
        load("image_folder", root=tmp_path, folder="none")


def test_medmnist(tmp_path):
    grey = write_medmnist(tmp_path / "breastmnist.npz", 28, 28, classes=2)
    colour = write_medmnist(tmp_path / "pathmnist_64.npz", 64, 64, 3)
    dataset = load("breastmnist", root=tmp_path)
    check(dataset, 6, 3, 1, 28)
    assert dataset.name == "breastmnist"
    assert dataset.classes == ("0", "1")
    assert np.array_equal(dataset.train.images[:, 0], grey["train_images"])
    assert dataset.test.labels.tolist() == [0, 1, 0]
    assert np.array_equal(dataset.validation.images[:, 0], grey["val_images"])
    dataset = load("medmnist", root=tmp_path, file="pathmnist_64.npz")
    check(dataset, 6, 3, 3, 64)
    assert dataset.name == "pathmnist_64"
    assert np.array_equal(dataset.test.images.permute(0, 2, 3, 1), colour["test_images"])


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((28, 28), {"train_labels": np.zeros((6, 14), np.uint8)}, r"mnist\.npz: its .* 14 labels"),
        ((28, 28, 28), {}, r"mnist\.npz: its images are volumes, \(6, 28, 28, 28\)"),
        ((28, 28), {"test_images": np.zeros((3, 28, 28))}, "damaged, .* float64, not uint8"),
    ],
    ids=["many labels", "3-D", "float64"],
)
def test_medmnist_says_what_it_does_not_read(tmp_path, shape, changes, message):
    write_medmnist(tmp_path / "chestmnist.npz", *shape, **changes)
    with pytest.raises(ValueError, match=message) as refused:
        load("medmnist", root=tmp_path, file="chestmnist.npz")
    assert ("Delete it" in str(refused.value)) == ("float64" in message)


def test_npz_with_objects_is_refused_before_it_runs(tmp_path):
    evil = np.empty(6, object)
    evil[:] = Runs(os.mkdir, str(tmp_path / "evil"))
    write_medmnist(tmp_path / "pathmnist.npz", 28, 28, train_labels=evil)
    with pytest.raises(ValueError, match=r"pathmnist.npz is damaged"):
        load("pathmnist", root=tmp_path)
    assert not (tmp_path / "evil").exists()
