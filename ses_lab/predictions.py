"""Six predictions of D. Le Bone, Spectral Entropy Shaping (2026), beside what runs here gave.

What is expected is its table "Testable empirical predictions", and what it found its summary, both
at 4abfcca of github.com/akira-n-28/Spectral-Entropy-Shaping. Its settings are other than ours, and
the numbers are judged by their means, whatever their noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ses_lab.results import Results, over_studies, shapes


class Finding(NamedTuple):
    where: str
    measured: str
    met: bool  # what was expected


class Prediction(NamedTuple):
    name: str
    claim: str
    expected: str
    published: str  # what its source found
    measure: Callable[[Sequence[Results]], Iterator[Finding]]


def findings(found: Sequence[Results]) -> list[tuple[Prediction, list[Finding]]]:
    """Each prediction and what the finished runs say of it, one finding a study or scale."""
    return [(prediction, [*prediction.measure(found)]) for prediction in PREDICTIONS]


def _relative(found: Sequence[Results], key: str, least: float) -> Iterator[Finding]:
    """Over all pairs of a scale: by how many percent the penalty changed ``key``."""
    for scale in dict.fromkeys(results.experiment.scale for results in found):
        rows = over_studies([r for r in found if r.experiment.scale == scale])
        # The same runs in several studies count once.
        pairs = {(row["task"], change) for row in rows if (change := _change(row, key)) is not None}
        if pairs:
            changes = np.array([change for _, change in pairs])
            median = float(np.median(changes))
            text = (
                f"median {median:+.1f} %, less in {(changes < 0).sum()} of {len(changes)} pairs, "
                f"by {least:g} % or more in {(changes <= -least).sum()}"
            )
            yield Finding(f"all studies, {scale}", text, median <= -least)


def _change(row: dict[str, Any], key: str) -> float | None:
    difference = row[key].difference
    if difference is None:
        return None
    if key == "corruption":  # accuracy, of which the error is wanted
        difference, before = -difference, 100 - row["corruption_without"]
    else:
        before = row["gap_without"]
    return 100 * difference / before if before > 0 else None  # of no gap there is no share


def _shaped(found: Sequence[Results], *measures: str) -> Iterator[tuple[str, Results, str, str]]:
    """Study and scale, results, variant with SES, and the first of the measures that it has."""
    for results in found:
        experiment = results.experiment
        configs = {c.method: c for c in experiment.runs(results.root).values()}
        for variant, config in configs.items():
            for measure in measures if shapes(config) else ():
                if results.values(variant, measure):
                    where = f"{experiment.name} {variant}, {experiment.scale}"
                    yield f"{where}, {config.epochs} epochs", results, variant, measure
                    break


def _mean(results: Results, variant: str | None, measure: str) -> float | None:
    values = [*results.values(variant, measure).values()] if variant else []
    return float(np.mean(values)) if values else None


def _near(found: Sequence[Results]) -> Iterator[Finding]:
    for where, results, variant, measure in _shaped(found, "rank.near", "entropy.near"):
        near = _mean(results, variant, measure)
        without = _mean(results, results.experiment.opponent(variant), measure)
        ratio = _mean(results, variant, measure.replace("near", "ratio"))
        text = f"{100 * near:.0f} % of the layers within 10 %, {ratio:.2f} on average"
        text += "" if without is None else f"; without the penalty {100 * without:.0f} %"
        yield Finding(where, text, near == 1)


def _last(found: Sequence[Results]) -> Iterator[Finding]:
    for where, results, variant, measure in _shaped(found, "rank.last_ratio", "entropy.last_ratio"):
        least = min(results.values(variant, measure).values())
        yield Finding(where, f"{least:.2f} d^beta, the least of the seeds", least > 0.5)


def _condition(found: Sequence[Results]) -> Iterator[Finding]:
    for where, results, variant, measure in _shaped(found, "jacobian.mean_condition"):
        without = _mean(results, results.experiment.opponent(variant), measure)
        if without is not None:
            with_it = _mean(results, variant, measure)
            text = f"{without:.1f} to {with_it:.1f}, {without / with_it:.2f} times less"
            yield Finding(where, text, without / with_it >= 2)


def _rising(found: Sequence[Results]) -> Iterator[Finding]:
    for results in found:
        experiment = results.experiment
        if experiment.sweep != "regularizer.ses.beta":
            continue
        gaps = {}
        for variant in experiment.variants:
            beta, gap = experiment.swept(variant), _mean(results, variant, "gap")
            if beta is not None and gap is not None:
                gaps[beta] = gap
        if len(gaps) > 2:
            steps = [gaps[b] - gaps[a] for a, b in pairwise(sorted(gaps))]
            shown = ", ".join(f"{gaps[beta]:.2f} at {beta:g}" for beta in sorted(gaps))
            met = all(step > 0 for step in steps)
            yield Finding(f"{experiment.name}, {experiment.scale}", f"gap {shown}", met)


PREDICTIONS = (
    Prediction(
        "P1", "smaller gap between training and test accuracy, where there is one",
        "15 to 30 % less; ResNet-18, CIFAR-10",
        "CIFAR-10: +0.01 points; CIFAR-100: -1.3 %; Tiny-ImageNet: -6.1 %",
        lambda found: _relative(found, "gap", 15),
    ),
    Prediction(
        "P2", "more robust to corruptions", "error 5 to 10 % less; CIFAR-10-C",
        "+0.45 points of accuracy (CIFAR-10), +0.65 (CIFAR-100), +2.37 (Tiny-ImageNet): 1.4, 1.2 "
        "and 3.9 % of the error",
        lambda found: _relative(found, "corruption", 5),
    ),
    Prediction(
        "P3", "effective rank as chosen", "d^beta within 10 %; MLP, MNIST",
        "toy and CIFAR-10: within 5 %, by its words; CIFAR-100: stages of ResNet-18 at 0.86 to "
        "1.22, blocks of a ViT at 0.99 to 1.81",
        _near,
    ),
    Prediction(
        "P4", "lower condition number of the Jacobian", "2 to 5 times; 10 layers, toy in the plane",
        "57.3 to 23.4, 2.45 times; five layers", _condition,
    ),
    Prediction(
        "P5", "no collapse", "rank of the last layers over 0.5 d^beta; 500 epochs, CIFAR-10",
        "rank stable through training; no figure, at most 60 epochs", _last,
    ),
    Prediction(
        "P6", "beta trades bias for variance",
        "curves monotonic in beta, 0.3 to 0.9; by its theory the gap rises with beta",
        "early curves differ and last accuracies hardly; ViT: 44.61, 42.13, 43.10 and 43.35 points "
        "of gap at 0.3, 0.5, 0.7 and 0.9", _rising,
    ),
)  # fmt: skip
