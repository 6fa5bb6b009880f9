"""Figures of a classifier against scikit-learn, and by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from ses_lab.metrics import classification


@pytest.mark.parametrize("classes", [2, 5])
def test_figures_are_those_of_scikit_learn(classes):
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (200,), generator=generator)
    logits = torch.randn(200, classes, generator=generator).double()
    logits[torch.arange(200), labels] += 1
    scores = (4 * logits).round().div(4).softmax(1)  # with ties
    found = classification(scores, labels)
    predicted = scores.argmax(1)
    assert found["f1"] == pytest.approx(reference.f1_score(labels, predicted, average="macro"))
    recall = reference.recall_score(labels, predicted, average=None)
    assert found["per_class"] == pytest.approx(recall.tolist())
    one_against_rest = [reference.roc_auc_score(labels == k, scores[:, k]) for k in range(classes)]
    assert found["auroc"] == pytest.approx(np.mean(one_against_rest))


def test_a_class_without_samples_is_left_out():
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0]])
    found = classification(scores, torch.tensor([0, 1, 1]))
    assert found["per_class"][:2] == [1.0, 0.5]
    assert math.isnan(found["per_class"][2])
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found["auroc"] == 1.0  # both of class 1 are above the one of class 0
