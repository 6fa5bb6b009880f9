"""Less of a training set, or a worse one: few samples, balanced classes, wrong labels."""

from __future__ import annotations

import torch
from torch import Tensor

from ses_lab.data.dataset import Dataset, Split


def subset(
    dataset: Dataset,
    *,
    samples: int | None = None,
    ratio: float | None = None,
    balanced: bool = False,
    label_noise: float = 0.0,
    subset_seed: int = 0,
) -> Dataset:
    """``dataset`` with another training set; what it is validated and tested on stays.

    Args:
        samples: how many are kept, at random; None for all.
        ratio: the share that is kept, (0, 1]; not together with ``samples``.
        balanced: as many of each class, ``samples`` / K, or as many as the smallest class has.
        label_noise: the share of the labels that is replaced by another class, drawn evenly.
        subset_seed: of what is kept, and of the noise; the same for all seeds of a run.

    Raises:
        ValueError: more than there are, or shares out of range.
    """
    images, labels = dataset.train
    total, classes = len(labels), len(dataset.classes)
    if samples is not None and ratio is not None:
        raise ValueError("samples and ratio say the same: give one of them")
    if not 0 < (1.0 if ratio is None else ratio) <= 1 or not 0 <= label_noise <= 1:
        raise ValueError(
            f"ratio is in (0, 1] and label_noise in [0, 1], got {ratio} and {label_noise}"
        )
    kept = round(ratio * total) if ratio is not None else samples
    generator = torch.Generator().manual_seed(subset_seed)
    if kept is not None or balanced:
        order = torch.randperm(total, generator=generator)
        if balanced:
            order = _balanced(labels[order], order, kept, classes)
        elif not 1 <= kept <= total:
            raise ValueError(f"{kept} samples of {total}")
        rows = order[:kept].sort().values
        images, labels = images[rows], labels[rows]
    if label_noise:
        wrong = torch.randperm(len(labels), generator=generator)[: round(label_noise * len(labels))]
        shift = torch.randint(1, classes, wrong.shape, generator=generator)
        labels = labels.clone()
        labels[wrong] = (labels[wrong] + shift) % classes
    return dataset._replace(train=Split(images, labels))


def _balanced(labels: Tensor, order: Tensor, kept: int | None, classes: int) -> Tensor:
    smallest = int(labels.bincount(minlength=classes).min())
    each = smallest if kept is None else kept // classes
    if not 1 <= each <= smallest or (kept is not None and kept % classes):
        raise ValueError(
            f"balanced: samples are a multiple of {classes} classes, and at most {smallest} of "
            f"each; got {kept}"
        )
    return torch.cat([order[labels == label][:each] for label in range(classes)])
