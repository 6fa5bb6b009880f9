"""Table, figures and JSON of ``mnist.py``, from its rows alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from network import WIDTHS

CORRUPTIONS = ("noise", "blur", "contrast")
Values = Sequence[float]  # one per seed


def corrupted(row: dict) -> float:
    return statistics.fmean(row[name] for name in CORRUPTIONS)


# Column -> value of a row, decimals, and whether less of it is better.
COLUMNS: dict[str, tuple[Callable[[dict], float], int, bool]] = {
    "accuracy %": (lambda row: 100 * row["accuracy"], 2, False),
    "noise %": (lambda row: 100 * row["noise"], 1, False),
    "blur %": (lambda row: 100 * row["blur"], 1, False),
    "contrast %": (lambda row: 100 * row["contrast"], 1, False),
    "gap (points)": (lambda row: 100 * row["gap"], 2, True),
    "gap (nats)": (lambda row: row["loss_gap"], 3, True),
    "condition of J": (lambda row: row["condition_number"], 1, True),
    "time per step": (lambda row: row["relative_time"], 3, True),
}


def point(values: Values) -> tuple[float, float]:  # mean and sample standard deviation
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def spread(values: Values, decimals: int, sign: str = "") -> str:
    mean, deviation = point(values)
    text = f"{mean:{sign}.{decimals}f}"
    return text if math.isnan(deviation) else f"{text} ± {deviation:.{decimals}f}"


def table(header: list[str], lines: list[list[str]]) -> str:  # in Markdown
    cells = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    )


def by_condition(rows: list[dict]) -> dict[str, list[dict]]:  # every list in the order of the seeds
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["condition"], []).append(row)
    return groups


def differences(group: list[dict], plain: list[dict], column: str) -> Values:
    value = COLUMNS[column][0]
    return [value(row) - value(other) for row, other in zip(group, plain, strict=True)]


def verdict(group: list[dict], plain: list[dict]) -> str:
    """The columns in which every seed changes for the better, and for the worse."""
    better, worse = [], []
    for column, (_, _, less_is_better) in COLUMNS.items():
        changes = differences(group, plain, column)
        if max(changes) < 0:
            (better if less_is_better else worse).append(column)
        elif min(changes) > 0:
            (worse if less_is_better else better).append(column)
    return f"better: {', '.join(better) or 'nothing'}; worse: {', '.join(worse) or 'nothing'}"


def text(settings: dict, rows: list[dict]) -> str:
    groups = by_condition(rows)
    plain = groups["without"]
    shaped = {name: group for name, group in groups.items() if group is not plain}
    values = [
        [name, *(spread([f(row) for row in group], n) for f, n, _ in COLUMNS.values())]
        for name, group in groups.items()
    ]
    changes = [
        [name, *(spread(differences(group, plain, c), n, "+") for c, (_, n, _) in COLUMNS.items())]
        for name, group in shaped.items()
    ]
    ranks = [
        [name, *(spread(r, 1) for r in zip(*(row["ranks"] for row in group), strict=True))]
        for name, group in groups.items()
    ]
    seeds = settings["seeds"]
    chance = 100 * 2.0 ** (1 - seeds)
    parts = [
        ", ".join(f"{name} {value}" for name, value in settings.items()),
        f"Mean ± standard deviation over {seeds} seeds. every k: beta 0.7, the penalty at every\n"
        "k-th step; beta b: at every step. Gap: training against test set. J: logits by pixels,\n"
        "median of 32 images. Time: relative to without, paired step by step.",
        table(["", *COLUMNS], values),
        "Difference from without, paired by seed:",
        table(["", *COLUMNS], changes),
        f"The same in all {seeds} seeds, as {chance:.0f} % of comparisons would be by chance;\n"
        "everything else differs in sign from seed to seed:",
        "\n".join(f"- {name}: {verdict(group, plain)}" for name, group in shaped.items()),
        "Effective rank exp(H) on the test set, block by block:",
        table(["", *(f"d = {d}" for d in WIDTHS)], ranks),
    ]
    if settings["quick"]:
        parts.append("A quick look, on small images and too short to judge by.")
    return "\n\n".join(parts)


def dynamics(groups: dict[str, list[dict]], axes: list[Axes]) -> None:
    """Entropy of every block at every step, the range over the seeds shaded; dashed: targets."""
    for axis, name in zip(axes, ("without", "every 1"), strict=True):
        history = torch.tensor([row["entropies"] for row in groups[name]])  # (seeds, steps, blocks)
        for i, d in enumerate(WIDTHS):
            low, high = history[..., i].amin(0), history[..., i].amax(0)
            axis.plot(history[..., i].mean(0), color=f"C{i}", label=f"block {i}, d = {d}")
            axis.fill_between(range(len(low)), low, high, color=f"C{i}", alpha=0.2, linewidth=0)
        for d in sorted(set(WIDTHS)):
            target = groups["every 1"][0]["beta"] * math.log(d)
            axis.axhline(target, color=f"C{WIDTHS.index(d)}", linestyle="--", linewidth=1)
        axis.set(title=name, xlabel="step", ylabel="spectral entropy H, nats")
    axes[1].sharey(axes[0])
    axes[1].legend(fontsize="small")


def beta_sweep(groups: dict[str, list[dict]], axes: list[Axes]) -> None:
    measures = (("accuracy", lambda row: row["accuracy"]), ("accuracy under corruption", corrupted))
    shaped = [g for g in groups.values() if g[0]["beta"] is not None and g[0]["every_k"] == 1]
    shaped.sort(key=lambda group: group[0]["beta"])
    for axis, (label, value) in zip(axes, measures, strict=True):
        points = [point([100 * value(row) for row in group]) for group in shaped]
        mean, error = zip(*points, strict=True)
        axis.errorbar([group[0]["beta"] for group in shaped], mean, error, marker="o", capsize=3)
        mean, error = point([100 * value(row) for row in groups["without"]])
        axis.axhline(mean, color="grey", linestyle="--", label="without")
        axis.axhspan(mean - error, mean + error, color="grey", alpha=0.2, linewidth=0)
        axis.set(xlabel="beta", ylabel=f"{label}, %")
        axis.legend()


def pareto(groups: dict[str, list[dict]], axes: list[Axes]) -> None:
    for name in ("without", *(name for name in groups if name.startswith("every"))):
        x, x_error = point([100 * (row["relative_time"] - 1) for row in groups[name]])
        y, y_error = point([100 * row["accuracy"] for row in groups[name]])
        axes[0].errorbar(x, y, y_error, x_error, marker="o", capsize=3, label=name)
    axes[0].set(xlabel="time added to a step, %", ylabel="accuracy, %")
    axes[0].legend()


def write(settings: dict, rows: list[dict], folder: Path) -> None:
    """``results.json``, ``results.md`` (also printed), and a picture per figure."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    (folder / "results.json").write_text(
        f'{{"settings": {json.dumps(settings)},\n"rows": [\n{lines}\n]}}\n'
    )
    report = text(settings, rows)
    (folder / "results.md").write_text(report + "\n")
    print(report)
    for draw, panels in ((dynamics, 2), (beta_sweep, 2), (pareto, 1)):
        figure, axes = plt.subplots(1, panels, figsize=(6 * panels, 4.5), squeeze=False)
        draw(by_condition(rows), list(axes[0]))
        figure.tight_layout()
        figure.savefig(folder / f"{draw.__name__}.png", dpi=120)
        plt.close(figure)
    print(f"\nrows, table and figures: {folder}")
