"""Losses against the formulas of their papers, class by class and sample by sample."""

from __future__ import annotations

import math

import pytest
import torch

from ses_lab.losses import LOSSES

N, K = 7, 4
COUNTS = [500, 120, 30, 4]


def softmax(row):
    e = [math.exp(v) for v in row]
    return [v / sum(e) for v in e]


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def cross_entropy(row, y):
    return -sum(y[k] * math.log(softmax(row)[k]) for k in range(K))


def focal(row, y, gamma=2.0):
    p = softmax(row)
    return -sum(y[k] * (1 - p[k]) ** gamma * math.log(p[k]) for k in range(K))


def label_smoothing(row, y, smoothing=0.1):
    return cross_entropy(row, [(1 - smoothing) * v + smoothing / K for v in y])


def class_balanced(row, y, counts, beta=0.9999):
    effective = [(1 - beta**n) / (1 - beta) for n in counts]
    total = sum(1 / e for e in effective)
    p = softmax(row)
    return -sum(K / total / effective[k] * y[k] * math.log(p[k]) for k in range(K))


def asymmetric(row, y, gamma_positive=0.0, gamma_negative=4.0, margin=0.05):
    total = 0.0
    for k in range(K):
        p = sigmoid(row[k])
        q = max(p - margin, 0)
        total -= y[k] * (1 - p) ** gamma_positive * math.log(p)
        total -= (1 - y[k]) * q**gamma_negative * math.log(1 - q)
    return total


CASES = [
    ("cross_entropy", cross_entropy, {}),
    ("focal", focal, {}),
    ("focal", focal, {"gamma": 0.5}),
    ("focal", cross_entropy, {"gamma": 0.0}),
    ("label_smoothing", label_smoothing, {}),
    ("label_smoothing", label_smoothing, {"smoothing": 0.3}),
    ("class_balanced", class_balanced, {"counts": COUNTS}),
    ("class_balanced", class_balanced, {"counts": COUNTS, "beta": 0.99}),
    ("asymmetric", asymmetric, {}),
    ("asymmetric", asymmetric, {"gamma_positive": 1.0, "gamma_negative": 2.0, "margin": 0.2}),
    ("asymmetric", asymmetric, {"gamma_negative": 0.5, "margin": 0.0}),
]


def labels_and_shares():
    labels = torch.randint(K, (N,))
    return labels, torch.nn.functional.one_hot(labels, K).double(), torch.rand(N, K).softmax(1)


@pytest.mark.parametrize(("name", "formula", "params"), CASES)
def test_equals_the_formula(name, formula, params):
    logits = 3 * torch.randn(N, K, dtype=torch.float64)
    labels, one_hot, soft = labels_and_shares()
    given = {} if formula is cross_entropy else params
    for targets, y in ((labels, one_hot), (one_hot, one_hot), (soft, soft)):
        expected = sum(formula(logits[i].tolist(), y[i].tolist(), **given) for i in range(N)) / N
        # A margin or gamma of the loss that rounds nothing away: 1e-8 is its floor
        assert LOSSES[name](logits, targets, **params).item() == pytest.approx(expected, rel=1e-6)


def test_every_loss_is_tested():
    assert {name for name, *_ in CASES} == set(LOSSES)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 5.0])
def test_focal_of_two_classes_is_the_sigmoid_focal_loss(gamma):
    x, t = 4 * torch.randn(20, dtype=torch.float64), torch.randint(2, (20,))
    p = x.sigmoid()
    p_t = torch.where(t == 1, p, 1 - p)  # equations (2) and (4) of the paper
    expected = -((1 - p_t) ** gamma * p_t.log()).mean()
    logits = torch.stack([torch.zeros_like(x), x], 1)
    torch.testing.assert_close(LOSSES["focal"](logits, t, gamma=gamma), expected)


@pytest.mark.parametrize(("name", "params"), [(n, p) for n, _, p in CASES])
@pytest.mark.parametrize("scale", [0.0, 1e2, 1e4])
def test_extreme_logits_give_finite_values_and_gradients(name, params, scale):
    for targets in labels_and_shares():
        for sign in (1, -1):  # sure and right, sure and wrong
            labels = targets if targets.dim() == 1 else targets.argmax(1)
            logits = sign * scale * torch.nn.functional.one_hot(labels, K).float()
            logits.requires_grad_()
            loss = LOSSES[name](logits, targets, **params)
            loss.backward()
            assert loss.dtype == torch.float32
            assert loss.isfinite()
            assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("name", "params"), [(n, p) for n, _, p in CASES])
def test_descent_finds_the_label(name, params):
    logits = torch.zeros(N, K, requires_grad=True)
    labels = torch.arange(N) % K
    optimizer = torch.optim.SGD([logits], lr=5.0)
    for _ in range(50):
        optimizer.zero_grad()
        LOSSES[name](logits, labels, **params).backward()
        optimizer.step()
    assert (logits.argmax(1) == labels).all()


@pytest.mark.parametrize(
    "targets",
    [torch.zeros(N), torch.zeros(N, K, dtype=torch.int64), torch.zeros(N, K + 1), torch.zeros(1)],
)
def test_other_targets_are_refused(targets):
    with pytest.raises(ValueError, match="labels"):
        LOSSES["cross_entropy"](torch.zeros(N, K), targets)


@pytest.mark.parametrize(
    "params", [{"counts": [1, 2]}, {"counts": [1, 2, 3, 0]}, {"counts": COUNTS, "beta": 1.0}]
)
def test_class_balanced_refuses_counts_that_do_not_fit(params):
    with pytest.raises(ValueError, match="counts"):
        LOSSES["class_balanced"](torch.zeros(N, K), torch.zeros(N, dtype=torch.int64), **params)
