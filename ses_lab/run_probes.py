"""Probes that ask for more than a model and samples: ``RUN_PROBES[name](folder, **params)``.

Of a run's weights, of what it kept of its epochs, and of its training set beside the test set.
Those that take ``weights`` have its "last" or its "best".
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ses_lab import build, engine, optim, spectra
from ses_lab.config import Choice, ConfigError, Registry, registries
from ses_lab.folder import RunFolder
from ses_lab.models import classified
from ses_lab.names import lookup, parameters
from ses_lab.rank import layer_of

# ---- what features are worth that were learned without labels ----
# The network is frozen and in eval mode, batch norms included; its features are the inputs of its
# classifier, on the training and the test images as they are.


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
    weights: str = "last",
    *,
    epochs: int = 100,
    lr: float = 0.1,
    batch_size: int = 256,
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
    folder: str | os.PathLike, weights: str = "last", *, k: int = 200, temperature: float = 0.07
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


# ---- weights, and what was kept of the epochs ----


def weight_spectra(
    folder: str | os.PathLike, weights: str = "last", *, layers: str = "*"
) -> dict[str, float]:
    """Means over the weights of a run that match the glob ``layers``.

    ``alpha``, ``hill``, ``hill_top``, ``stable_rank``, ``entropy`` and ``decay`` of
    :func:`ses_lab.spectra.table`; ``stable_rank_share`` of the smaller side; each
    also as ``..._change`` since the initial weights. Fits that fail are left out.
    """
    config = RunFolder(folder).config()
    last = _means(build.trained(folder, weights), layers)
    with torch.random.fork_rng():
        first = _means(build.model(config, build.dataset(config)[0]), layers)
    return {**last, **{f"{key}_change": last[key] - first[key] for key in last}}


def _means(model, layers: str) -> dict[str, float]:
    rows = [row for row in spectra.table(model) if fnmatchcase(row["layer"], layers)]
    if not rows:
        raise ConfigError(f"probe spectra: layers {layers!r} matches no weight of the model")
    for row in rows:
        row["stable_rank_share"] = row["stable_rank"] / min(row["rows"], row["columns"])
    keys = ("alpha", "hill", "hill_top", "stable_rank", "stable_rank_share", "entropy", "decay")
    found = {key: [row[key] for row in rows if not math.isnan(row[key])] for key in keys}
    return {key: float(np.mean(values)) if values else math.nan for key, values in found.items()}


def entropy_targets(folder: str | os.PathLike) -> dict[str, float]:
    """``target.<layer>``, beta log d in nats, of a run with SES; ``distance``: mean |H - target|.

    And, of the ratios exp(H) / d^beta, what :func:`rank_dynamics` has. All of the last training
    step that measured.
    """
    row = _last_with("entropy", folder)
    targets = row["target"]
    distances = {name: h - targets[layer_of(name)] for name, h in row["entropy"].items()}
    return {
        **{f"target.{layer}": target for layer, target in targets.items()},
        "distance": float(np.mean(np.abs([*distances.values()]))),
        **_of_ratios([math.exp(distance) for distance in distances.values()]),
    }


def _of_ratios(ratios: Sequence[float]) -> dict[str, float]:  # rank / d^beta, the last layer's last
    near = [abs(ratio - 1) <= 0.1 for ratio in ratios]
    return {"ratio": float(np.mean(ratios)), "last_ratio": ratios[-1], "near": float(np.mean(near))}


def rank_dynamics(folder: str | os.PathLike) -> dict[str, float]:
    """Of the effective ranks that a run with ``rank_samples`` took after its last epoch.

    ``ratio``: mean over the layers of rank / d^beta; ``last_ratio``: that of the last layer;
    ``near``: the share of the layers where it is 0.9 to 1.1; ``spread``: the largest rank over the
    least; ``mean``, and each ``layer.<layer>``: ranks; ``first_ratio`` and ``first.<layer>``: the
    same after the first epoch.
    """
    last = _last_with("rank", folder)
    ranks = last["rank"]
    first = RunFolder(folder).rows()[0]
    return {
        **{f"layer.{layer}": rank for layer, rank in ranks.items()},
        **{f"first.{layer}": rank for layer, rank in first["rank"].items()},
        "mean": float(np.mean([*ranks.values()])),
        "spread": max(ranks.values()) / min(ranks.values()),
        **_of_ratios([*last["rank_ratio"].values()]),
        "first_ratio": float(np.mean([*first["rank_ratio"].values()])),
    }


_KEPT_BY = {
    "entropy": "regularizer.ses (lambda_ses: 0 measures)",
    "rank": "rank_samples",
}


def _last_with(key: str, folder: str | os.PathLike) -> dict[str, Any]:
    """The last epoch of a run that has ``key``."""
    for row in reversed(RunFolder(folder).rows()):
        if key in row:
            return row
    raise ConfigError(f"probe {key}: {folder} has no {_KEPT_BY[key]}")


RUN_PROBES: dict[str, Callable[..., dict[str, float]]] = {
    "linear": linear_probe,
    "knn": knn,
    "spectra": weight_spectra,
    "entropy": entropy_targets,
    "rank": rank_dynamics,
}
REGISTRY = Registry(RUN_PROBES, ("folder", "weights"))


def check(choice: Choice) -> None:
    """ConfigError unless there is such a probe, of models or of runs, with these parameters."""
    of_models = registries()["probe"]
    lookup("probe", {**of_models.entries, **RUN_PROBES}, choice.name)
    (REGISTRY if choice.name in RUN_PROBES else of_models).check("probe", choice)


def probe(folder: str | os.PathLike, choice: Choice, weights: str) -> dict[str, float]:
    """One of :data:`RUN_PROBES` with its parameters. ConfigError with what it refuses."""
    function = RUN_PROBES[choice.name]
    of_weights = {"weights": weights} if "weights" in parameters(function) else {}
    with build.as_config_error(f"probe {choice.name}"):
        return function(folder, **of_weights, **choice.params)
