"""Classification losses: logits (N, K) and targets in, () out, the mean over the samples.

Targets are labels (N,) int64, or shares of the classes (N, K), as Mixup makes them. ValueError for
targets of other shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]

_TINY = 1e-8  # where x ** gamma would have an infinite derivative, for gamma < 1


def shares(targets: Tensor, logits: Tensor) -> Tensor:
    """Labels (N,) or shares (N, K) -> shares (N, K) in the dtype of the logits (N, K)."""
    if targets.shape == logits.shape[:1] and not targets.is_floating_point():
        return F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    if targets.shape == logits.shape and targets.is_floating_point():
        return targets.to(logits.dtype)
    raise ValueError(
        f"targets for logits {tuple(logits.shape)} are labels {tuple(logits.shape[:1])} int64 or "
        f"floats of the same shape, got {tuple(targets.shape)} {targets.dtype}"
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_k y_k log p_k."""
    return F.cross_entropy(logits, shares(targets, logits))


def label_smoothing(logits: Tensor, targets: Tensor, *, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy with (1 - smoothing) y + smoothing / K. Szegedy et al. (CVPR 2016)."""
    return F.cross_entropy(logits, shares(targets, logits), label_smoothing=smoothing)


def focal(logits: Tensor, targets: Tensor, *, gamma: float = 2.0) -> Tensor:
    """-sum_k y_k (1 - p_k)^gamma log p_k.

    Lin et al. (ICCV 2017) with alpha = 1, and softmax for their sigmoid; on two classes of logits 0
    and x it is theirs.
    """
    log_p = logits.log_softmax(1)
    others = -torch.expm1(log_p)  # 1 - p, exact where p is near 1
    return -(shares(targets, logits) * others.clamp_min(_TINY) ** gamma * log_p).sum(1).mean()


def class_balanced(
    logits: Tensor, targets: Tensor, *, counts: Sequence[int], beta: float = 0.9999
) -> Tensor:
    """Cross-entropy with the weight (1 - beta) / (1 - beta^n_k) of a class of n_k samples.

    ``counts`` are the K class sizes n_k >= 1 in the training set. The weights are scaled to sum to
    K. Cui et al. (CVPR 2019).
    """
    if len(counts) != logits.shape[1] or min(counts) < 1 or not 0 <= beta < 1:
        raise ValueError(
            f"class_balanced needs {logits.shape[1]} counts, each at least 1, and beta in [0, 1); "
            f"got {list(counts)} and {beta}"
        )
    weights = 1 / (1 - beta ** logits.new_tensor(counts, dtype=torch.float64))  # (K,)
    weights = (weights / weights.mean()).to(logits.dtype)
    return -(shares(targets, logits) * weights * logits.log_softmax(1)).sum(1).mean()


def asymmetric(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma_positive: float = 0.0,
    gamma_negative: float = 4.0,
    margin: float = 0.05,
) -> Tensor:
    """-sum_k y_k (1 - p_k)^gamma_positive log p_k + (1 - y_k) q_k^gamma_negative log(1 - q_k).

    p = sigmoid(logits) and q = max(p - margin, 0): K problems of one class against the others.
    Ridnik, Ben-Baruch et al. (ICCV 2021), with the exponents and margin of the paper.
    """
    y, p = shares(targets, logits), logits.sigmoid()
    q = (p - margin).clamp_min(0)
    not_q = (torch.sigmoid(-logits) + margin).clamp(_TINY, 1)  # 1 - q, exact where p is near 1
    positive = (1 - p).clamp_min(_TINY) ** gamma_positive * F.logsigmoid(logits)
    negative = q.clamp_min(_TINY) ** gamma_negative * not_q.log()
    return -(y * positive + (1 - y) * negative).sum(1).mean()


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "label_smoothing": label_smoothing,
    "class_balanced": class_balanced,
    "asymmetric": asymmetric,
}
