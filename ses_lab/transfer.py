"""What features are worth that were learned without labels: a linear classifier, neighbours.

Both of the frozen network of a run in eval mode, batch norms included: of the inputs of its
classifier, on its training and its test images as they are.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ses_lab import build, engine, optim
from ses_lab.folder import RunFolder
from ses_lab.models import classified


class Features(NamedTuple):
    train: Tensor  # (N, D), float32
    train_labels: Tensor
    test: Tensor  # (M, D)
    test_labels: Tensor
    classes: int
    seed: int  # of the run


@torch.no_grad()
def features(folder: str | os.PathLike, weights: str = "last") -> Features:
    """Of a run's data, in its "last" or its "best" weights."""
    config = RunFolder(folder).config()
    dataset, _ = build.dataset(config)
    device = engine.device_of(config)
    model = build.trained(folder, weights).to(device)
    found = [
        torch.cat([
            classified(model, build.pixels(images, device)).float()
            for images in split.images.split(build.EVALUATION_BATCH)
        ])
        for split in (dataset.train, dataset.test)
    ]  # fmt: skip
    labels = (split.labels.to(device) for split in (dataset.train, dataset.test))
    (train, test), (train_labels, test_labels) = found, labels
    return Features(train, train_labels, test, test_labels, len(dataset.classes), config.seed)


def linear_probe(
    folder: str | os.PathLike,
    *,
    epochs: int = 100,
    lr: float = 0.1,
    batch_size: int = 256,
    weights: str = "last",
) -> dict[str, float]:
    """``accuracy`` on the test set of a linear classifier, and ``train`` on the training set.

    By SGD with momentum 0.9 and a cosine, without weight decay, on features that are standardised
    by the training set; no augmentation. Cost: one pass over the data, however many ``epochs``.
    """
    found = features(folder, weights)
    mean, deviation = found.train.mean(0), found.train.std(0).clamp_min(1e-6)
    train, test = ((x - mean) / deviation for x in (found.train, found.test))
    batch_size = min(batch_size, len(train))
    generator = torch.Generator().manual_seed(build.seed_of(found.seed, "linear"))
    head = nn.Linear(train.shape[1], found.classes, device=train.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    sgd = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9)
    schedule = optim.schedule("cosine", sgd, epochs * (len(train) // batch_size))
    for _ in range(epochs):
        order = torch.randperm(len(train), generator=generator).to(train.device)
        for rows in order[: len(train) // batch_size * batch_size].split(batch_size):
            sgd.zero_grad()
            F.cross_entropy(head(train[rows]), found.train_labels[rows]).backward()
            sgd.step()
            schedule.step()
    with torch.no_grad():
        return {
            "accuracy": (head(test).argmax(1) == found.test_labels).float().mean().item(),
            "train": (head(train).argmax(1) == found.train_labels).float().mean().item(),
        }


def knn(
    folder: str | os.PathLike,
    *,
    k: int = 200,
    temperature: float = 0.07,
    weights: str = "last",
) -> dict[str, float]:
    """``accuracy`` by the ``k`` training images of the largest cosine, all if there are fewer.

    Each votes with exp(cosine / temperature). Wu et al., "Unsupervised feature learning via
    non-parametric instance discrimination" (CVPR 2018).
    """
    if k < 1 or not temperature > 0:
        raise ValueError(f"knn needs k >= 1 and a positive temperature, got {k} and {temperature}")
    found = features(folder, weights)
    bank = F.normalize(found.train, dim=1)
    correct = 0
    for x, y in zip(found.test.split(1024), found.test_labels.split(1024), strict=True):
        cosines, nearest = (F.normalize(x, dim=1) @ bank.mT).topk(min(k, len(bank)))  # (M, k)
        votes = torch.zeros(len(x), found.classes, device=x.device)
        votes.scatter_add_(1, found.train_labels[nearest], ((cosines - 1) / temperature).exp())
        correct += (votes.argmax(1) == y).sum().item()
    return {"accuracy": correct / len(found.test_labels)}
