"""The numbers of an experiment: collected from its run folders, compared, beside published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ttest_rel

from ses_lab import experiments
from ses_lab.config import Choice
from ses_lab.experiments import Experiment
from ses_lab.folder import RunFolder

# Shares in the run folders, percent here and in the papers.
_SHARES = ("corruption.", "fgsm.", "pgd.")

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
    slugs = {Choice(name=n, **params).slug: n for n, params in experiment.probes.items()}
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
            for key in ("f1", "auroc"):
                value = rows[-1].get(f"test_{key}")
                numbers |= {} if value is None else {key: 100 * value}
            numbers["gap"] = 100 * (rows[-1]["train_accuracy"] - accuracies[-1])
        for slug, values in run.read_json("probes.json").items():
            for key, value in values.items() if slug in slugs else ():
                measure = f"{slugs[slug]}.{key}"
                value = math.nan if value is None else value  # what JSON has for it
                numbers[measure] = (100 if measure.startswith(_SHARES) else 1) * value
        control = runs[experiment.control].get(config.seed)
        if config.method != experiment.control and control:
            numbers["overhead"] = 100 * (numbers["seconds"] / control["seconds"] - 1)
        runs[config.method][config.seed] = numbers
    return Results(experiment, root, runs)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Mean of a - b over the seeds of both, and p of a two-sided paired t-test.

    The mean is None where no seed is in both, p for fewer than two or where all differ alike: the
    test says nothing then.
    """
    seeds = sorted(a.keys() & b.keys())
    x, y = (np.array([values[seed] for seed in seeds]) for values in (a, b))
    if not seeds or not np.isfinite(x - y).all():
        return None, None
    tested = np.ptp(x - y) > 1e-9 * np.abs(x - y).max()  # equal, but for round-off
    return float((x - y).mean()), float(ttest_rel(x, y).pvalue) if tested else None


def table(results: Results) -> list[dict[str, Any]]:
    """A cell for each variant and measure: ours, its difference from the control, published."""
    experiment, cells = results.experiment, []
    for variant in experiment.variants:
        for measure in experiment.measures:
            ours = results.values(variant, measure)
            values = np.array([*ours.values()])
            difference, p = paired(ours, results.values(experiment.control, measure))
            compared = variant != experiment.control and measure != "overhead"
            published = [
                {"value": r.rows[variant][measure], "source": r.source, "setting": r.setting}
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
                    "difference": difference if compared else None,
                    "p": p if compared else None,
                    "published": published,
                }
            )
    return cells


def _finite(value: float) -> float | None:  # JSON has no NaN
    return float(value) if math.isfinite(value) else None
