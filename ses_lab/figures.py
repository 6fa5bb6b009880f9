"""Figures of an experiment: measures, sweeps, curves, corruptions, entropies, cost by effect."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ses_lab import curves
from ses_lab.curves import padded, style
from ses_lab.experiments import Experiment
from ses_lab.folder import RunFolder
from ses_lab.results import Results, probed, table, units


def draw(results: Results) -> dict[str, Figure]:
    """By kind: measures; curves, probes, corruption where there are; dynamics, ranks, pareto if
    asked.
    """
    experiment = results.experiment
    drawn = {"measures": _measures(results)}
    if found := _histories(results):
        drawn["curves"] = _curves(experiment, found)
    if found := _probed(results):
        drawn["probes"] = _curves(experiment, found)
    if names := _corruptions(results):
        drawn["corruption"] = _bars(results, names)
    if "entropy" in experiment.probes:
        drawn["dynamics"] = _by_layer(results, "entropy.distance", ["entropy"])
    if "rank" in experiment.probes:
        drawn["ranks"] = _by_layer(results, "rank.ratio", ["rank", "rank_ratio"])
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


def _measures(results: Results) -> Figure:
    """A panel for each measure, of ours and then of each source, a source in rows of its own."""
    experiment, unit, abreast = results.experiment, units(results.experiment), curves.ABREAST
    rows: list[list[tuple[str, str, Points]]] = []
    for label, points in _points(results):
        shown = [(label, measure, points) for measure in experiment.measures if measure in points]
        rows += [shown[i : i + abreast] for i in range(0, len(shown), abreast)]
    columns = max(map(len, rows), default=1)
    figure, panels = curves.grid(columns * len(rows), columns)
    for line, row in enumerate(rows):
        for panel, found in zip_longest(panels[line * columns : (line + 1) * columns], row):
            if found is None:
                panel.remove()
                continue
            label, measure, points = found
            _draw(experiment, panel, points[measure])
            panel.set_title(f"{measure}, {label}", fontsize="small")
            panel.set_ylabel(unit[measure], fontsize="x-small")
            panel.tick_params(labelsize="x-small")
    _legend(figure)
    return figure


def _draw(experiment: Experiment, panel: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    swept = {v: x for v in points if (x := experiment.swept(v)) is not None}
    if not swept:
        means, errors = zip(*points.values(), strict=True)
        panel.errorbar(range(len(points)), means, errors, fmt="o", capsize=3)
        aslant = {"rotation": 45, "ha": "right"}
        upright = {"rotation": 90}  # many would run into each other, as those of a grid
        panel.set_xticks(range(len(points)), [*points], **aslant if len(points) <= 8 else upright)
        panel.margins(x=0.2)
        return
    means, errors = zip(*(points[v] for v in swept), strict=True)
    panel.errorbar([*swept.values()], means, errors, marker="o", capsize=3)
    panel.set_xlabel(experiment.sweep.rpartition(".")[2], fontsize="x-small")
    if min(swept.values()) > 0 and max(swept.values()) >= 10 * min(swept.values()):
        panel.set_xscale("log")
        panel.set_xticks([*swept.values()], [f"{x:g}" for x in swept.values()])
        panel.xaxis.set_minor_locator(NullLocator())
    if experiment.control in points:
        mean, error = points[experiment.control]
        panel.axhline(mean, color="grey", linestyle="--", label=experiment.control)
        panel.axhspan(mean - error, mean + error, color="grey", alpha=0.2, linewidth=0)


# variant -> (seeds, epochs), NaN where there is no number
Histories = dict[str, np.ndarray]


def _histories(results: Results) -> dict[str, Histories]:
    """What the runs kept of every epoch, under the label of its axis: one function an axis."""
    configs = results.experiment.runs(results.root)
    objectives = {config.method: config.objective for config in configs.values()}
    rows = {
        (config.method, config.seed): RunFolder(path).rows()
        for path, config in configs.items()
        if config.seed in results.runs[config.method]
    }
    found: dict[str, Histories] = {}
    for key, scale in (("test_accuracy", 100), ("train_accuracy", 100), ("test_loss", 1),
                       ("train_loss", 1)):  # fmt: skip
        for variant, seeds in results.runs.items():
            runs = [[row.get(key) for row in rows[variant, seed]] for seed in seeds]
            if not runs or any(value is None for run in runs for value in run):
                continue
            objective = objectives[variant]
            first = rows[variant, next(iter(seeds))][0]
            label = {"test_accuracy": "accuracy on the test set, %",
                     "train_accuracy": "accuracy in training, %",
                     "test_loss": curves.held_out_loss(first, objective),
                     "train_loss": f"training loss: {objective}"}[key]  # fmt: skip
            found.setdefault(label, {})[variant] = scale * padded(runs)
    return found


def _probed(results: Results) -> dict[str, Histories]:
    """Measures that were probed while the runs trained, NaN in the epochs between."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    unit = units(results.experiment)
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
                label = f"{measure}, {unit[measure]}" if unit[measure] else measure
                found.setdefault(label, {}).setdefault(config.method, []).append(line)
    return {
        label: {variant: padded(runs) for variant, runs in variants.items()}
        for label, variants in found.items()
    }


def _curves(experiment: Experiment, found: Mapping[str, Histories]) -> Figure:
    """Mean over the seeds of each variant against epochs, their range shaded."""
    styles = {variant: style(i) for i, variant in enumerate(experiment.variants)}
    figure, panels = curves.grid(len(found))
    for panel, (label, histories) in zip(panels, found.items(), strict=True):
        curves.draw(panel, histories, styles, logarithmic="loss" in label)
        panel.set_title(_lines(label), fontsize="small")
        panel.tick_params(labelsize="x-small")
    _legend(figure)
    return figure


def _lines(title: str) -> str:
    """No wider than a panel: an objective is as long as its distiller and parameters."""
    return textwrap.fill(title, 40, break_long_words=False, break_on_hyphens=False)


def _legend(figure: Figure) -> None:
    """One for all panels, under them: in one of them it would hide what it explains."""
    entries = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if not entries:
        return
    abreast = max(1, int(12 * figure.get_figwidth() / (10 + max(map(len, entries)))))
    lines = -(-len(entries) // abreast)
    figure.legend(entries.values(), entries, loc="outside lower center", fontsize="small",
                  ncols=-(-len(entries) // lines))  # fmt: skip


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
    figure, (panel,) = curves.grid(1, height=3.5)
    figure.set_figwidth(min(curves.WIDTH, 2 + 1.5 * len(names)))
    width = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        values = [[*results.values(variant, f"corruption.{name}").values()] for name in names]
        means = [np.mean(v) if v else np.nan for v in values]
        errors = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
        places = np.arange(len(names)) + (i - (len(variants) - 1) / 2) * width
        color = style([*results.runs].index(variant))["color"]
        panel.bar(places, means, width, yerr=errors, capsize=2, label=variant, color=color)
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize="small")
    panel.set(ylabel="accuracy, %")
    _legend(figure)
    return figure


def _pareto(results: Results) -> Figure:
    """A measure against the time that it costs, ours and published in panels of their own."""
    experiment = results.experiment
    rows = [
        (label, points)
        for label, points in _points(results)
        if {experiment.pareto, "overhead"} <= points.keys()
    ]
    unit = units(experiment)[experiment.pareto]
    figure, panels = curves.grid(len(rows), height=3.5)
    for panel, (label, points) in zip(panels, rows, strict=True):
        costs = {experiment.control: (0.0, 0.0), **points["overhead"]}
        for i, variant in enumerate(experiment.variants):
            if variant in costs and variant in points[experiment.pareto]:
                (x, x_error), (y, y_error) = costs[variant], points[experiment.pareto][variant]
                panel.errorbar(x, y, y_error, x_error, fmt="o", capsize=3, label=variant,
                               color=style(i)["color"])  # fmt: skip
        panel.set_xlabel("time added to training steps, %")
        panel.set_ylabel(f"{experiment.pareto}, {unit}" if unit else experiment.pareto)
        panel.set_title(label, fontsize="small")
    _legend(figure)
    return figure


def _by_layer(results: Results, measure: str, kinds: Sequence[str]) -> Figure:
    """Every hooked layer against epochs, its range over seeds shaded; dashed: target.

    Variants whose runs have ``measure`` abreast, four at most; below each a panel for every kind.
    """
    configs = results.experiment.runs(results.root)
    paths = {(config.method, config.seed): path for path, config in configs.items()}
    probed = {v: [*results.values(v, measure)] for v in results.runs}
    variants = [variant for variant, seeds in probed.items() if seeds]
    columns = max(1, min(len(variants), curves.ABREAST))
    lines = -(-len(variants) // columns) * len(kinds)
    figure, panels = curves.grid(columns * lines, columns, height=3.2)
    for i, variant in enumerate(variants):
        runs = [RunFolder(paths[variant, seed]).rows() for seed in probed[variant]]
        for k, key in enumerate(kinds):
            panel = panels[(i // columns * len(kinds) + k) * columns + i % columns]
            if i:
                panel.sharey(panels[k * columns])
            layers = curves.draw_layers(panel, runs, key)
            panel.set_title(variant, fontsize="small")
            panel.tick_params(labelsize="x-small")
        # Layers of their own, where models differ; under the panel, which is narrow.
        panel.legend(handles=layers, loc="upper center", bbox_to_anchor=(0.5, -0.22),
                     fontsize="x-small", ncols=2)  # fmt: skip
    for panel in panels:
        if not panel.lines:
            panel.remove()
    return figure
