"""Classification beyond the mean: accuracy of each class, macro F1 and AUROC."""

from __future__ import annotations

import torch
from torch import Tensor


def classification(scores: Tensor, labels: Tensor) -> dict[str, float | list[float]]:
    """Figures of scores (N, K), probabilities or logits of one scale, and labels (N,).

    ``f1``: the mean over the classes of 2 TP / (2 TP + FP + FN); ``auroc``: the mean over the
    classes of the share of pairs, one of the class and one of the others, in which the former has
    the higher score, ties counting half; ``per_class``: accuracy of each. A class of which there is
    no sample is NaN in the last and left out of the others; it counts in F1 where it is predicted.
    Cost: a sort of the N scores of each class.

    Sources: scikit-learn's ``f1_score(average="macro")`` and ``roc_auc_score(multi_class="ovr",
    average="macro")``.
    """
    classes = scores.shape[1]
    predicted = scores.argmax(1)
    pairs = (labels * classes + predicted).bincount(minlength=classes**2)
    confusion = pairs.view(classes, classes).double()  # (true, predicted)
    hits, of_class, as_class = confusion.diag(), confusion.sum(1), confusion.sum(0)
    f1 = 2 * hits / (of_class + as_class)  # 0 / 0 where there is neither
    return {
        "f1": f1.nanmean().item(),
        "auroc": torch.stack([_auroc(scores[:, k], labels == k) for k in range(classes)])
        .nanmean()
        .item(),
        "per_class": (hits / of_class).tolist(),
    }


def _auroc(scores: Tensor, positive: Tensor) -> Tensor:  # (N,), (N,) bool
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    rank = (last - (counts - 1) / 2)[inverse].double()  # from 1; ties share the mean of theirs
    n, total = positive.sum(), len(positive)
    return (rank[positive].sum() - n * (n + 1) / 2) / (n * (total - n))  # 0 / 0: NaN
