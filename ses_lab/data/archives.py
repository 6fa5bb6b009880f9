"""Readers of published image archives, as they come or unpacked, in a folder the user names.

Nothing in an archive is run: CIFAR's pickles are read without importing what they name, NumPy files
without their objects, and nothing is unpacked onto the disk.
"""

from __future__ import annotations

import io
import pickle
import re
import shlex
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.io import loadmat

from ses_lab.data.dataset import Dataset, Split
from ses_lab.data.download import download as fetch


class Archive(NamedTuple):
    file: str
    url: str | None = None
    md5: str | None = None
    folder: str | None = None  # what it unpacks to, which may stand in its place


# URLs and checksums: pytorch/vision, torchvision/datasets/cifar.py and svhn.py.
CIFAR10 = Archive(
    "cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
    "cifar-10-batches-py",
)
CIFAR100 = Archive(
    "cifar-100-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-python",
)
SVHN_TRAIN = Archive(
    "train_32x32.mat",
    "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
    "e26dedcc434d2e4c54c9b2d4a06d8373",
)
SVHN_TEST = Archive(
    "test_32x32.mat",
    "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
    "eb5a983be6a315427106f1b164d9cef3",
)
# ContinualAI/avalanche, benchmarks/datasets/tiny_imagenet/tiny_imagenet.py.
TINY_IMAGENET = Archive(
    "tiny-imagenet-200.zip",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
    "tiny-imagenet-200",
)
# MedMNIST/MedMNIST 3.0.2, medmnist/info.py: its 2-D sets of one label an image, at 28 x 28.
MEDMNIST_URL = "https://zenodo.org/records/10519652/files/{}?download=1"
MEDMNIST_MD5 = {
    "pathmnist": "a8b06965200029087d5bd730944a56c1",
    "dermamnist": "0744692d530f8e62ec473284d019b0c7",
    "octmnist": "c68d92d5b585d8d81f7112f81e2d0842",
    "pneumoniamnist": "28209eda62fecd6e6a2d98b1501bb15f",
    "retinamnist": "bd4c0672f1bba3e3a89f0e4e876791e4",
    "breastmnist": "750601b1f35ba3300ea97c75c52ff8f6",
    "bloodmnist": "7053d0359d879ad8a5505303e11de1dc",
    "tissuemnist": "ebe78ee8b05294063de985d821c1c34b",
    "organamnist": "68e3f8846a6bd62f0c9bf841c0d9eacc",
    "organcmnist": "b9ceb9546e10131b32923c5bbeaea2b1",
    "organsmnist": "9ab87b696fb54e2a387ebe992d6ed5f1",
}


def _locate(name: str, archive: Archive, root: Path, download: bool) -> Path:
    """The unpacked folder or else the archive in ``root``, fetched if it may be."""
    path = root / archive.file
    if archive.folder and (root / archive.folder).is_dir():
        return root / archive.folder
    if path.exists():
        return path
    absent = f"{name}: there is no {path}"
    if archive.folder:
        absent += f", nor the folder {root / archive.folder}"
    if archive.url is None:
        raise FileNotFoundError(f"{absent}. No checksum of it is known here: bring it there")
    if not download:
        raise FileNotFoundError(
            f"{absent}. Fetch it with\n  python -m ses_lab.data {name} {shlex.quote(str(root))}\n"
            f"or bring {archive.url} there"
        )
    fetch(archive.url, path, archive.md5)
    return path


class _UnsupportedError(ValueError):
    """A file that is whole, of a kind that is not read here."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except _UnsupportedError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # a damaged or hostile file can make a parser raise anything
        raise ValueError(
            f"{path} is damaged, or not in its published format: {error!r}. Delete it, and load "
            "it again with download=True"
        ) from error


@contextmanager
def _naming(file: str | Path) -> Iterator[None]:
    """The one image of many that is not what it should be."""
    try:
        yield
    except Exception as error:  # PIL's decoders raise anything
        raise ValueError(f"{file}: {error!r}") from error


def _members(path: Path, wanted: str) -> dict[str, bytes]:
    """Files of an archive or of its unpacked folder: the group that ``wanted`` matches -> bytes.

    ``wanted`` is a regular expression on names below the archive's one top folder. In one pass:
    to go back in a compressed tar is to begin again. What macOS puts beside a file, ``._`` and its
    name, is no part of the data.
    """

    def entries() -> Iterator[tuple[str, Any]]:
        if path.is_dir():
            for file in path.rglob("*"):
                yield f"{path.name}/{file.relative_to(path).as_posix()}", file.read_bytes
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    yield name, partial(archive.read, name)
        else:
            with tarfile.open(path, "r:gz") as archive:
                for member in archive:
                    if member.isfile():  # neither a link nor a device
                        yield member.name, archive.extractfile(member).read

    ours = ((name, read) for name, read in entries() if "/._" not in name)
    matches = ((re.fullmatch(f"[^/]+/{wanted}", name), read) for name, read in ours)
    return {match[1]: read() for match, read in matches if match}


# ---- CIFAR -------------------------------------------------------------------------------------


class _Pickled:
    """What a pickled array is made of: the arguments and the state that were meant for NumPy."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ArraysOnly(pickle.Unpickler):
    """Admits Python's own literals and containers, and the three names of a pickled array.

    Not even those three are NumPy's: a state made up by an attacker reaches no code but
    :func:`_uint8`.
    """

    NAMES = frozenset({"numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"})

    def find_class(self, module: str, name: str) -> type:
        if f"{module}.{name}" not in self.NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays are read")
        return _Pickled


def _uint8(pickled: _Pickled) -> np.ndarray:
    _, shape, dtype, fortran_order, data = pickled.state
    if dtype.arguments[0] != b"u1":
        raise ValueError(f"its array is {dtype.arguments[0]}, not uint8")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran_order else "C")


def _cifar(
    archive: Archive,
    train: tuple[str, ...],
    test: str,
    label_key: bytes,
    meta: str,
    class_key: bytes,
    name: str,
    root: Path,
    download: bool,
) -> Dataset:
    """CIFAR: 50,000 images to train on and 10,000 to test, (3, 32, 32)."""
    path = _locate(name, archive, root, download)
    with _reading(path):
        files = {
            # Python 2 wrote them: its str are bytes.
            file: _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
            for file, data in _members(path, f"({'|'.join((*train, test, meta))})").items()
        }

        def split(*names: str) -> Split:
            pixels = np.concatenate([_uint8(files[file][b"data"]) for file in names])  # (N, 3072)
            labels = [label for file in names for label in files[file][label_key]]
            return _split(pixels.reshape(-1, 3, 32, 32), labels)

        classes = tuple(label.decode() for label in files[meta][class_key])
        return _checked(Dataset(name, split(*train), split(test), classes))


# ---- the others --------------------------------------------------------------------------------


def _svhn(name: str, root: Path, download: bool) -> Dataset:
    """Street View House Numbers: 73,257 digits to train on and 26,032 to test, (3, 32, 32)."""
    paths = [_locate(name, archive, root, download) for archive in (SVHN_TRAIN, SVHN_TEST)]
    splits = []
    for path in paths:
        with _reading(path):
            file = loadmat(path, variable_names=("X", "y"))  # (32, 32, 3, N), (N, 1)
            # A zero is labelled 10.
            splits.append(_split(file["X"].transpose(3, 2, 0, 1), file["y"][:, 0] % 10))
    return _checked(Dataset(name, *splits, tuple("0123456789")))


def _tiny_imagenet(name: str, root: Path, download: bool) -> Dataset:
    """Tiny-ImageNet: 100,000 images of 200 classes, (3, 64, 64); tested on its validation set."""
    path = _locate(name, TINY_IMAGENET, root, download)
    with _reading(path):
        files = _members(path, r"(\w+\.txt|val/val_annotations\.txt|(?:train|val)/.+\.JPEG)")
        annotations = files.get("val/val_annotations.txt")
        identifiers = files["wnids.txt"].decode().split()
        words = dict(line.split("\t", 1) for line in files["words.txt"].decode().splitlines())
        label_of = {identifier: label for label, identifier in enumerate(identifiers)}

        def by_folder(which: str) -> dict[str, int]:  # which/n01443537/..., many sort val so too
            names = sorted(file for file in files if re.match(rf"{which}/n\d+/", file))
            return {file: label_of[file.split("/")[1]] for file in names}

        train, test = by_folder("train"), by_folder("val")
        if annotations is not None and not test:
            rows = (line.split("\t") for line in annotations.decode().splitlines())
            test = {f"val/images/{file}": label_of[identifier] for file, identifier, *_ in rows}

        def split(labels: dict[str, int]) -> Split:
            images = np.empty((len(labels), 3, 64, 64), np.uint8)  # 1.2 GB: never held twice
            for image, file in zip(images, labels, strict=True):
                with _naming(file), Image.open(io.BytesIO(files.pop(file)), formats=("JPEG",)) as p:
                    image[:] = np.asarray(p.convert("RGB")).transpose(2, 0, 1)  # some: grey
            return _split(images, list(labels.values()))

        classes = tuple(words[identifier] for identifier in identifiers)
        return _checked(Dataset(name, split(train), split(test), classes))


def _medmnist(name: str, root: Path, download: bool, *, file: str) -> Dataset:
    """MedMNIST: the arrays of an ``.npz`` at any side, one label an image."""
    name = file.removesuffix(".npz")
    md5 = MEDMNIST_MD5.get(name)
    archive = Archive(file, MEDMNIST_URL.format(file) if md5 else None, md5)
    path = _locate(name, archive, root, download)
    with _reading(path), np.load(path, allow_pickle=False) as arrays:

        def split(which: str) -> Split:
            images, labels = arrays[f"{which}_images"], arrays[f"{which}_labels"]
            if labels.ndim == 2 and labels.shape[1] > 1:
                raise _UnsupportedError(
                    f"its images have {labels.shape[1]} labels each, of which several can hold at "
                    "once; sets of one label an image are read"
                )
            if images.ndim == 5 or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
                raise _UnsupportedError(
                    f"its images are volumes, {images.shape}; sets of images are read, (N, H, W) "
                    "or (N, H, W, 3)"
                )
            if images.ndim == 3:  # (N, H, W): grey
                images = images[..., None]
            if images.ndim != 4 or labels.shape != (len(images), 1):
                raise ValueError(f"{which} has images {images.shape} and labels {labels.shape}")
            return _split(images.transpose(0, 3, 1, 2), labels[:, 0])

        train, validation, test = split("train"), split("val"), split("test")
        highest = max(int(s.labels.max()) for s in (train, validation, test))
        classes = tuple(map(str, range(1 + highest)))
        return _checked(Dataset(name, train, test, classes, validation))


def _image_folder(name: str, root: Path, download: bool, *, folder: str, size: int = 64) -> Dataset:
    """ImageNet's layout: ``root/folder/train/CLASS/*``, and ``val`` or ``test`` likewise.

    Each image is scaled until its shorter side is ``size`` and cut to its middle, RGB. Where both
    are there, ``val`` is the validation set and ``test`` is tested on.
    """
    path = root / folder
    classes = tuple(sorted(p.name for p in path.glob("train/*") if p.is_dir()))
    parts = [part for part in ("train", "val", "test") if (path / part).is_dir()]
    if not classes or len(parts) < 2:
        raise FileNotFoundError(
            f"{name}: expected {path}/train/CLASS/IMAGE, and val or test beside train"
        )

    def split(which: str) -> Split:
        files = sorted(p for p in (path / which).rglob("*") if p.suffix.lower() in _IMAGES)
        files = [file for file in files if not file.name.startswith("._")]
        images = np.empty((len(files), 3, size, size), np.uint8)
        labels = [classes.index(file.relative_to(path / which).parts[0]) for file in files]
        for image, file in zip(images, files, strict=True):
            with _naming(file), Image.open(file) as picture:
                fitted = ImageOps.fit(picture.convert("RGB"), (size, size), Image.BILINEAR)
                image[:] = np.asarray(fitted).transpose(2, 0, 1)
        return _split(images, labels)

    with _reading(path):
        splits = {part: split(part) for part in parts}
        test, validation = splits.pop("test", None), splits.get("val")
        test, validation = (validation, None) if test is None else (test, validation)
        return _checked(Dataset(folder, splits["train"], test, classes, validation))


_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")


def _split(images: np.ndarray, labels: Any) -> Split:
    if images.dtype != np.uint8:
        raise ValueError(f"its images are {images.dtype}, not uint8")
    labels = torch.tensor(np.asarray(labels, np.int64))
    return Split(torch.from_numpy(images).contiguous(), labels)


def _checked(dataset: Dataset) -> Dataset:
    for split in filter(None, (dataset.train, dataset.validation, dataset.test)):
        if not len(split.images) == len(split.labels) > 0:
            raise ValueError(f"it has {len(split.images)} images and {len(split.labels)} labels")
        low, high = split.labels.aminmax()
        if low < 0 or high >= len(dataset.classes):
            raise ValueError(f"labels {low} to {high} for {len(dataset.classes)} classes")
    return dataset


ARCHIVES: dict[str, Callable[..., Dataset]] = {  # (name, root, download, **params) -> Dataset
    "cifar10": partial(
        _cifar,
        CIFAR10,
        tuple(f"data_batch_{k}" for k in range(1, 6)),
        "test_batch",
        b"labels",
        "batches.meta",
        b"label_names",
    ),
    "cifar100": partial(
        _cifar, CIFAR100, ("train",), "test", b"fine_labels", "meta", b"fine_label_names"
    ),
    "svhn": _svhn,
    "tiny_imagenet": _tiny_imagenet,
    **{name: partial(_medmnist, file=f"{name}.npz") for name in MEDMNIST_MD5},
    "medmnist": _medmnist,
    "image_folder": _image_folder,
}
