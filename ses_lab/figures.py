"""Figures of an experiment: measures, sweeps, curves, corruptions, entropies, cost by effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ses_lab.experiments import Experiment
from ses_lab.folder import RunFolder
from ses_lab.results import Results, probed, table
from ses_lab.run_probes import layer_of


def draw(results: Results) -> dict[str, Figure]:
    """By kind: measures; curves, probes, corruption where there are; dynamics, ranks, pareto if
    asked.
    """
    experiment = results.experiment
    drawn = {"measures": _measures(results)}
    if curves := _histories(results):
        drawn["curves"] = _curves(curves)
    if curves := _probed(results):
        drawn["probes"] = _curves(curves)
    if names := _corruptions(results):
        drawn["corruption"] = _bars(results, names)
    if "entropy" in experiment.probes:
        drawn["dynamics"] = _by_layer(results, "entropy.distance", _ENTROPIES)
    if "rank" in experiment.probes:
        drawn["ranks"] = _by_layer(results, "rank.ratio", _RANKS)
    if experiment.pareto:
        drawn["pareto"] = _pareto(results)
    return drawn


Points = dict[str, dict[str, tuple[float, float]]]  # measure -> variant -> value, deviation


def _points(results: Results) -> list[tuple[str, Points]]:
    """Ours and each source's, those that have any."""
    experiment = results.experiment
    ours: Points = {}
    for cell in table(results):
        if cell["mean"] is not None:
            point = cell["mean"], cell["std"] or 0.0
            ours.setdefault(cell["measure"], {})[cell["variant"]] = point
    rows = [(f"scale {experiment.scale}", ours)]
    for number, reference in enumerate(experiment.reference, 1):
        published: Points = {}
        for variant, numbers in reference.rows.items():
            for measure, value in numbers.items():
                if not isinstance(value, str):
                    point = value if isinstance(value, tuple) else (value, 0.0)
                    published.setdefault(measure, {})[variant] = point
        rows.append((f"published [{number}]", published))
    return [(label, points) for label, points in rows if points]


_ABREAST = 4  # panels: wider than a screen is read by no one


def _measures(results: Results) -> Figure:
    """A panel for each measure, of ours and then of each source, in rows of four at most."""
    measures = results.experiment.measures
    rows: list[list[tuple[str, str, Points]]] = []
    for label, points in _points(results):
        shown = [(label, measure, points) for measure in measures if measure in points]
        rows += [shown[i : i + _ABREAST] for i in range(0, len(shown), _ABREAST)]
    columns = max(map(len, rows), default=1)
    figure = Figure(figsize=(3 * columns, 2.8 * max(1, len(rows))), layout="constrained")
    panels = figure.subplots(max(1, len(rows)), columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for line, row in zip(panels, rows, strict=False):
        for panel, (label, measure, points) in zip(line, row, strict=False):
            panel.set_axis_on()
            _draw(results.experiment, panel, points[measure])
            panel.set_title(f"{measure}, {label}", fontsize="small")
            panel.tick_params(labelsize="x-small")
    return figure


def _draw(experiment: Experiment, panel: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    swept = {v: x for v in points if (x := experiment.swept(v)) is not None}
    if not swept:
        means, errors = zip(*points.values(), strict=True)
        panel.errorbar(range(len(points)), means, errors, fmt="o", capsize=3)
        panel.set_xticks(range(len(points)), [*points], rotation=45, ha="right")
        panel.margins(x=0.2)
        return
    means, errors = zip(*(points[v] for v in swept), strict=True)
    panel.errorbar([*swept.values()], means, errors, marker="o", capsize=3)
    panel.set_xlabel(experiment.sweep.rpartition(".")[2], fontsize="x-small")
    if min(swept.values()) > 0 and max(swept.values()) >= 10 * min(swept.values()):
        panel.set_xscale("log")
    if experiment.control in points:
        mean, error = points[experiment.control]
        panel.axhline(mean, color="grey", linestyle="--", label=experiment.control)
        panel.axhspan(mean - error, mean + error, color="grey", alpha=0.2, linewidth=0)
        panel.legend(fontsize="x-small")


# variant -> (seeds, epochs), NaN where a run ended before
Histories = dict[str, np.ndarray]


def _histories(results: Results) -> dict[str, Histories]:
    """What the runs kept of every epoch, under the label of its axis."""
    kinds = {"test_accuracy": ("accuracy on the test set, %", 100), "train_loss": ("loss", 1)}
    rows = {
        (config.method, config.seed): RunFolder(path).rows()
        for path, config in results.experiment.runs(results.root).items()
        if config.seed in results.runs[config.method]
    }
    found: dict[str, Histories] = {}
    for key, (label, scale) in kinds.items():
        for variant, seeds in results.runs.items():
            runs = [[row.get(key) for row in rows[variant, seed]] for seed in seeds]
            if not runs or any(value is None for run in runs for value in run):
                continue
            found.setdefault(label, {})[variant] = scale * _padded(runs)
    return found


def _padded(runs: Sequence[Sequence[float]]) -> np.ndarray:
    values = np.full((len(runs), max(map(len, runs))), np.nan)
    for line, run in zip(values, runs, strict=True):
        line[: len(run)] = run
    return values


def _probed(results: Results) -> dict[str, Histories]:
    """Measures that were probed while the runs trained, NaN in the epochs between."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for path, config in results.experiment.runs(results.root).items():
        if not config.probes or config.seed not in results.runs[config.method]:
            continue
        epochs: list[dict[str, float]] = []
        for row in RunFolder(path).rows():
            epochs.append({})
            for label, values in row.get("probes", {}).items():
                epochs[-1] |= probed(label, config.probes[label], values)
        for measure in results.experiment.measures:
            if measure in epochs[-1]:
                line = [numbers.get(measure, np.nan) for numbers in epochs]
                found.setdefault(measure, {}).setdefault(config.method, []).append(line)
    return {
        measure: {variant: _padded(runs) for variant, runs in variants.items()}
        for measure, variants in found.items()
    }


def _curves(found: Mapping[str, Histories]) -> Figure:
    """Mean over the seeds of each variant against epochs, their range shaded."""
    columns = min(len(found), _ABREAST)
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(min(5 * columns, 14), 3.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    panels = grid[: len(found)]
    for panel in grid[len(found) :]:
        panel.set_axis_off()
    for panel, (label, histories) in zip(panels, found.items(), strict=True):
        for i, (variant, values) in enumerate(histories.items()):
            color = f"C{i % 10}"
            epochs = np.flatnonzero(~np.isnan(values).all(0))  # those in which there was a number
            values, epochs = values[:, epochs], epochs + 1
            panel.plot(epochs, np.nanmean(values, 0), color=color, label=variant)
            low, high = np.nanmin(values, 0), np.nanmax(values, 0)
            panel.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
        every = np.concatenate([values.ravel() for values in histories.values()])
        if label == "loss" and 0 < np.nanmin(every) < np.nanmax(every) / 20:
            panel.set_yscale("log")  # or the first epoch is all that is seen
        panel.set(xlabel="epoch", ylabel=label)
    panels[0].legend(fontsize="x-small")
    return figure


def _corruptions(results: Results) -> list[str]:
    """Corruptions that runs were probed with; [] for fewer than two, which the table shows."""
    numbers = [n for runs in results.runs.values() for n in runs.values()]
    measures = dict.fromkeys(key for n in numbers for key in n if key.startswith("corruption."))
    names = [measure.removeprefix("corruption.") for measure in measures]
    names = [name for name in names if name not in ("clean", "mean") and "/" not in name]
    return names if len(names) > 1 else []


def _bars(results: Results, names: Sequence[str]) -> Figure:
    """Accuracy under each corruption, a bar for each variant, deviations over the seeds."""
    variants = [variant for variant, runs in results.runs.items() if runs]
    figure = Figure(figsize=(min(12, 2 + 1.5 * len(names)), 3.5), layout="constrained")
    panel, width = figure.subplots(), 0.8 / len(variants)
    for i, variant in enumerate(variants):
        values = [[*results.values(variant, f"corruption.{name}").values()] for name in names]
        means = [np.mean(v) if v else np.nan for v in values]
        errors = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
        places = np.arange(len(names)) + (i - (len(variants) - 1) / 2) * width
        panel.bar(places, means, width, yerr=errors, capsize=2, label=variant)
    panel.set_xticks(range(len(names)), names, rotation=20, ha="right")
    panel.set(ylabel="accuracy, %")
    panel.legend(fontsize="x-small", ncols=2)
    return figure


def _pareto(results: Results) -> Figure:
    """A measure against the time that it costs, ours and published in panels of their own."""
    experiment = results.experiment
    rows = [
        (label, points)
        for label, points in _points(results)
        if {experiment.pareto, "overhead"} <= points.keys()
    ]
    figure = Figure(figsize=(4.5 * max(1, len(rows)), 3.5), layout="constrained")
    panels = figure.subplots(1, max(1, len(rows)), squeeze=False)[0]
    for panel, (label, points) in zip(panels, rows, strict=False):
        costs = {experiment.control: (0.0, 0.0), **points["overhead"]}
        for variant, (y, y_error) in points[experiment.pareto].items():
            if variant in costs:
                x, x_error = costs[variant]
                panel.errorbar(x, y, y_error, x_error, marker="o", capsize=3, label=variant)
        panel.set(xlabel="time added to training steps, %", ylabel=experiment.pareto, title=label)
        panel.legend(fontsize="x-small")
    return figure


# Key of a row of metrics -> label of its axis, and what a layer of that row should be at.
_ENTROPIES = {
    "entropy": ("spectral entropy, nats", lambda row, layer: row["target"][layer_of(layer)])
}
_RANKS = {
    "rank": ("effective rank", lambda row, layer: row["rank"][layer] / row["rank_ratio"][layer]),
    "rank_ratio": ("effective rank / d^beta", lambda row, layer: 1.0),
}


def _by_layer(results: Results, measure: str, kinds: Mapping[str, tuple[str, Any]]) -> Figure:
    """Every hooked layer against epochs, its range over seeds shaded; dashed: target.

    Variants whose runs have ``measure`` abreast, four at most; below each a panel for every kind.
    """
    configs = results.experiment.runs(results.root)
    paths = {(config.method, config.seed): path for path, config in configs.items()}
    probed = {v: [*results.values(v, measure)] for v in results.runs}
    variants = [variant for variant, seeds in probed.items() if seeds]
    columns = max(1, min(len(variants), _ABREAST))
    lines = max(1, -(-len(variants) // columns)) * len(kinds)
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for panel in grid.flat:
        panel.set_axis_off()
    for i, variant in enumerate(variants):
        runs = [RunFolder(paths[variant, seed]).rows() for seed in probed[variant]]
        for k, (key, (label, goal)) in enumerate(kinds.items()):
            panel = grid[i // columns * len(kinds) + k, i % columns]
            if i:
                panel.sharey(grid[k, 0])
            panel.set_axis_on()
            _draw_layers(panel, runs, key, goal)
            panel.set(title=variant, xlabel="epoch", ylabel=label)
            panel.legend(fontsize="x-small", ncols=2)  # layers of their own, where models differ
    return figure


def _draw_layers(panel: Axes, runs: Sequence[Sequence[Mapping[str, Any]]], key: str, goal) -> None:
    for i, layer in enumerate(runs[0][-1][key]):
        values = np.array([[row[key][layer] for row in rows] for rows in runs])
        epochs, color = range(1, values.shape[1] + 1), f"C{i % 10}"
        panel.plot(epochs, values.mean(0), color=color, label=layer)
        panel.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.2)
        targets = [goal(row, layer) for row in runs[0]]
        panel.plot(epochs, targets, color=color, linestyle="--", linewidth=1)
