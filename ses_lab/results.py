"""The numbers of an experiment: collected from its run folders, compared, beside published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import mannwhitneyu, spearmanr, ttest_rel

from ses_lab import experiments
from ses_lab.config import Choice, RunConfig
from ses_lab.experiments import Experiment
from ses_lab.folder import RunFolder

# Probes of shares in the run folders, percent here and in the papers.
_SHARES = ("corruption", "fgsm", "pgd", "linear", "knn")

BySeed = dict[int, float]


class Results(NamedTuple):
    """What ``root`` holds of an experiment: variant -> seed -> measure -> number."""

    experiment: Experiment
    root: Path
    runs: dict[str, dict[int, dict[str, float]]]

    def values(self, variant: str, measure: str) -> BySeed:
        runs = self.runs[variant].items()
        return {seed: numbers[measure] for seed, numbers in runs if measure in numbers}

    @property
    def finished(self) -> int:
        return sum(map(len, self.runs.values()))


def collect(root: Path, seeds: Sequence[int] = ()) -> Results:
    """The numbers of every finished run below ``root``; see :data:`ses_lab.experiments.METRICS`.

    Of ``seeds`` only, where there are any.
    """
    experiment = experiments.saved(root / "experiment.yaml")
    if seeds:
        chosen = tuple(seed for seed in experiment.seeds if seed in seeds)
        experiment = experiment.model_copy(update={"seeds": chosen})
    runs: dict[str, dict[int, dict[str, float]]] = {v: {} for v in experiment.variants}
    for path, config in experiment.runs(root).items():
        run = RunFolder(path)
        if not run.finished():
            continue
        rows = run.rows()
        numbers = {"seconds": float(np.median([row["seconds"] for row in rows]))}
        if peak := run.status().get("peak_memory"):
            numbers["memory"] = peak / 2**20
        if "test_accuracy" in rows[-1]:  # masked-image modelling has none
            accuracies = [row["test_accuracy"] for row in rows]
            numbers["accuracy"] = 100 * accuracies[-1]
            numbers["best_accuracy"] = 100 * max(accuracies)
            held = {"f1": "test_f1", "auroc": "test_auroc", "validation": "val_accuracy"}
            for key, column in held.items():
                value = rows[-1].get(column)
                numbers |= {} if value is None else {key: 100 * value}
            numbers["gap"] = 100 * (rows[-1]["train_accuracy"] - accuracies[-1])
        kept = run.read_json("probes.json")
        for label, choice in experiment.probes.items():
            numbers |= probed(label, choice, kept.get(choice.slug, {}))
        for label, choice in config.probes.items():
            numbers |= probed(label, choice, rows[-1]["probes"][label])
        control = runs[experiment.control].get(config.seed)
        if config.method != experiment.control and control:
            numbers["overhead"] = 100 * (numbers["seconds"] / control["seconds"] - 1)
        runs[config.method][config.seed] = numbers
    return Results(experiment, root, runs)


def probed(label: str, choice: Choice, found: Mapping[str, float | None]) -> dict[str, float]:
    """What a probe found, by measure and in its unit."""
    scale = 100 if choice.name in _SHARES else 1
    # None is what JSON has for a number that is not finite
    return {f"{label}.{k}": scale * (math.nan if v is None else v) for k, v in found.items()}


def units(experiment: Experiment) -> dict[str, str]:
    """Measure -> ``%``, ``s``, ``MiB``, ``nats``, or nothing for a pure number."""
    found, names = {}, {label: probe.name for label, probe in experiment.probes.items()}
    for config in experiment.runs(Path()).values():
        names |= {label: probe.name for label, probe in config.probes.items()}
    for measure in {*experiment.measures, experiment.pareto} - {None}:
        label, _, key = measure.partition(".")
        if label not in names:
            found[measure] = {"seconds": "s", "memory": "MiB"}.get(label, "%")
        elif names[label] in _SHARES:
            found[measure] = "%"
        else:
            entropies = names[label] == "entropy" or key.startswith("entropy")
            found[measure] = "nats" if entropies else ""
    return found


class Contrast(NamedTuple):
    """One variant less another; None where there is nothing to say."""

    difference: float | None = None  # mean over the seeds of both
    p: float | None = None  # of a two-sided t-test, paired by seed
    d: float | None = None  # Cohen's: the difference of the means over the pooled deviation
    p_rank: float | None = None  # of a two-sided Mann-Whitney test, which knows of no pairs


def contrast(a: Mapping[int, float], b: Mapping[int, float]) -> Contrast:
    """a - b, over the seeds of both.

    Without a seed in common, or with a number that is not finite, all are None; the tests and the
    effect need two seeds, and the t-test differences that are not all alike: it says nothing then.
    Three seeds against three give a Mann-Whitney p of 0.1 at the least.

    Sources: Cohen, Statistical Power Analysis (1988), d_s; Mann & Whitney (1947), exact for these
    numbers of seeds, and by scipy's normal approximation where there are ties.
    """
    seeds = sorted(a.keys() & b.keys())
    x, y = (np.array([values[seed] for seed in seeds]) for values in (a, b))
    if not seeds or not np.isfinite(x - y).all():
        return Contrast()
    difference = float((x - y).mean())
    if len(seeds) < 2:
        return Contrast(difference)
    tested = np.ptp(x - y) > 1e-9 * np.abs(x - y).max()  # equal, but for round-off
    pooled = math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    return Contrast(
        difference,
        float(ttest_rel(x, y).pvalue) if tested else None,
        difference / pooled if pooled else None,
        float(mannwhitneyu(x, y).pvalue),
    )


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of one family of tests, adjusted so that each may be held against the level.

    The i-th smallest of m is multiplied by m + 1 - i, and is no less than those before it. Source:
    Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, least = [0.0] * len(ps), 0.0
    for i, which in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - i) * ps[which]))
        adjusted[which] = least
    return adjusted


def table(results: Results) -> list[dict[str, Any]]:
    """A cell for each variant and measure: ours, its difference from another, published.

    ``p_holm`` is corrected for the comparisons of the same measure in this study.
    """
    experiment, cells = results.experiment, []
    for variant in experiment.variants:
        for measure in experiment.measures:
            ours = results.values(variant, measure)
            values = np.array([*ours.values()])
            other = experiment.opponent(variant) if measure != "overhead" else None
            compared = (
                Contrast() if other is None else contrast(ours, results.values(other, measure))
            )
            published = [
                {"value": r.rows[variant][measure], **r.model_dump(exclude={"rows", "seeds"})}
                for r in experiment.reference
                if measure in r.rows.get(variant, {})
            ]
            cells.append(
                {
                    "experiment": experiment.name,
                    "scale": experiment.scale,
                    "variant": variant,
                    "measure": measure,
                    "seeds": len(ours),
                    "mean": _finite(values.mean()) if len(values) else None,
                    "std": _finite(values.std(ddof=1)) if len(values) > 1 else None,
                    "against": other,
                    **compared._asdict(),
                    "p_holm": None,
                    "published": published,
                }
            )
    for measure in experiment.measures:
        family = [c for c in cells if c["measure"] == measure and c["p"] is not None]
        for cell, p in zip(family, holm([c["p"] for c in family]), strict=True):
            cell["p_holm"] = p
    return cells


_COMPARED = {"accuracy": "accuracy", "gap": "gap", "corruption": "corruption.mean"}


def over_studies(found: Sequence[Results]) -> list[dict[str, Any]]:
    """What the penalty changed, hardest task first: a row for each variant that adds it alone.

    That is a variant with SES whose opponent is the same but for SES. ``task``: accuracy of the
    opponent, which orders the rows; ``accuracy``, ``gap`` and ``corruption``: contrasts, where both
    have the number; ``gap_without`` and ``corruption_without``: means of the opponent;
    ``published`` and ``published_without``: the difference in best accuracy, and that of the
    opponent, by the first source that has both, else None.
    """
    rows = []
    for results in found:
        experiment = results.experiment
        configs = {c.method: c for c in experiment.runs(results.root).values()}
        for variant, config in configs.items():
            other = experiment.opponent(variant)
            if other is None or not _adds_ses(config, configs[other]):
                continue
            tasks = results.values(other, "accuracy")
            if not tasks:
                continue
            measured: dict[str, Any] = {}
            for key, name in _COMPARED.items():
                theirs = results.values(other, name)
                measured[key] = contrast(results.values(variant, name), theirs)
                measured[f"{key}_without"] = float(np.mean([*theirs.values()])) if theirs else None
            rows.append(
                {
                    "study": experiment.name,
                    "scale": experiment.scale,
                    "variant": variant,
                    "against": other,
                    "on": f"{config.model.slug}, {config.dataset.slug}",
                    "task": float(np.mean([*tasks.values()])),
                    **_published(experiment, variant, other),
                    **measured,
                }
            )
    return sorted(rows, key=lambda row: row["task"])


def _published(experiment: Experiment, variant: str, other: str) -> dict[str, float | None]:
    for reference in experiment.reference:
        pair = [reference.rows.get(v, {}).get("best_accuracy") for v in (variant, other)]
        means = [value[0] if isinstance(value, tuple) else value for value in pair]
        if all(isinstance(mean, float) for mean in means):
            return {"published": means[0] - means[1], "published_without": means[1]}
    return {"published": None, "published_without": None}


def by_difficulty(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, int]]:
    """Of each difference in rows of :func:`over_studies`: Spearman's correlation with ``task``.

    And over how many pairs, three at the least; of ``published`` with ``published_without``.
    Negative where harder tasks gain more. The same runs in several studies count once. Pairs that
    share an opponent are not independent, so that there is no p.
    """
    values = {key: {(row["task"], row[key].difference) for row in rows} for key in _COMPARED}
    values["published"] = {(row["published_without"], row["published"]) for row in rows}
    found = {}
    for key, pairs in values.items():
        points = np.array([pair for pair in pairs if None not in pair])
        if len(points) > 2 and np.ptp(points, axis=0).all():
            found[key] = float(spearmanr(points).statistic), len(points)
    return found


def shapes(config: RunConfig) -> bool:
    """Whether the penalty of a run is more than a measurement."""
    ses = config.regularizer.ses
    return ses is not None and ses.get("lambda_ses", 1) != 0


def _adds_ses(ours: RunConfig, other: RunConfig) -> bool:
    def without(config: RunConfig) -> dict[str, Any]:
        fields = config.identity()
        del fields["method"]
        return {**fields, "regularizer": {**fields["regularizer"], "ses": None}}

    return shapes(ours) and not shapes(other) and without(ours) == without(other)


def _finite(value: float) -> float | None:  # JSON has no NaN
    return float(value) if math.isfinite(value) else None
