"""What every loader returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Split(NamedTuple):
    images: Tensor  # (N, C, H, W) uint8; the points of a toy set: (N, 2) float32
    labels: Tensor  # (N,) int64, 0 <= label < len(Dataset.classes)


class Dataset(NamedTuple):
    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    validation: Split | None = None  # where one is published
