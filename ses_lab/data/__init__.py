"""Datasets by name, whole in memory: :func:`load`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ses_lab.data.archives import ARCHIVES
from ses_lab.data.bundled import BUNDLED as IMAGES
from ses_lab.data.dataset import Dataset, Split
from ses_lab.data.subset import subset
from ses_lab.data.text import GLUE, docstrings
from ses_lab.names import parameters

__all__ = ["DATASETS", "Dataset", "Split", "load", "subset"]

BUNDLED = {**IMAGES, "docstrings": docstrings}  # need no file
DATASETS: dict[str, Callable[..., Dataset]] = {**BUNDLED, **ARCHIVES, **GLUE}


def load(
    name: str, *, root: str | Path | None = None, download: bool = False, **params: Any
) -> Dataset:
    """A dataset of images uint8 (N, C, H, W), or of points float32 (N, 2), and labels int64 (N,).

    Or of text, int64 (N, 2, T): see :mod:`ses_lab.data.text`.

    ============================================  ================================================
    name                                          what, and from where
    ============================================  ================================================
    ``digits``, ``mnist5k``                       real digits; no file needed
    ``shapes`` (preset, classes, samples, ...)    drawn; see :func:`ses_lab.data.bundled.shapes`
    ``moons``, ``spirals``, ``rings``             points of the plane (samples, noise, ...)
    ``cifar10``, ``cifar100``                     ``cifar-10-python.tar.gz`` or its folder; fine
                                                  labels
    ``svhn``                                      ``train_32x32.mat``, ``test_32x32.mat``
    ``tiny_imagenet``                             ``tiny-imagenet-200.zip`` or its folder; the test
                                                  split is the validation set
    ``pathmnist``, ..., ``organsmnist``           MedMNIST at 28 x 28: ``pathmnist.npz``, ...
    ``medmnist`` (file)                           any other ``.npz`` of MedMNIST's layout
    ``image_folder`` (folder, size)               ImageNet's layout, ``folder/train/CLASS/*``
    ``docstrings`` (length, vocabulary)           text that every Python has; no file needed
    ``sst2``, ``mrpc`` (tokenizer, length)        GLUE: ``SST-2``, ``MRPC`` or their ZIP, with
                                                  ``train.tsv`` and ``dev.tsv``
    ============================================  ================================================

    The same arguments give the same data. Any of them takes the parameters of
    :func:`ses_lab.data.subset.subset` too: ``samples``, ``ratio``, ``balanced``, ``label_noise``.

    Args:
        root: the folder of the published files; the bundled sets do not look at it.
        download: fetch what ``root`` lacks, resumably, and verify its published MD5. Files that
            are there are taken as they are.

    Raises:
        ValueError: for an unknown name, a ``root`` that is missing, or a file that is damaged, not
            in its published format, or asks for more than arrays.
        FileNotFoundError: for an absent file, with its path and the command that fetches it.
        ConnectionError: where a download fails; what came of it is kept.

    Cost: all of it is decoded into memory, 180 MB for CIFAR (a second, packed), 1.4 GB for
    Tiny-ImageNet (0.25 ms a JPEG, one after another).
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DATASETS)}"
        raise ValueError(f"no dataset {name!r}: {hint}")
    own = parameters(DATASETS[name])
    less = {key: params.pop(key) for key in parameters(subset) if key in params and key not in own}
    if name in BUNDLED:
        return subset(BUNDLED[name](**params), **less)
    if root is None:
        raise ValueError(f"{name} is read from published files: give their folder as root")
    read = {**ARCHIVES, **GLUE}[name]
    return subset(read(name, Path(root).expanduser(), download, **params), **less)
