"""What every loader returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Split(NamedTuple):
    # (N, C, H, W) uint8; the points of a toy set: (N, 2) float32; text: (N, 2, T) int64
    images: Tensor
    labels: Tensor  # (N,) int64, 0 <= label < len(Dataset.classes)


class Dataset(NamedTuple):
    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    validation: Split | None = None  # where one is published
    vocabulary: int | None = None  # of text: its ids are below it
