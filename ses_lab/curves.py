"""Curves against epochs: the picture of one run, and the panels of those of many runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ses_lab.rank import layer_of

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl
DPI = 110
WIDTH, ABREAST = 12.0, 4  # inches, panels: more is wider than a screen

# Key of a row -> label of its axis, and what a layer of that row should be at.
LAYERS = {
    "entropy": ("spectral entropy, nats", lambda row, layer: row["target"][layer_of(layer)]),
    "rank": ("effective rank", lambda row, layer: row["rank"][layer] / row["rank_ratio"][layer]),
    "rank_ratio": ("effective rank / d^beta", lambda row, layer: 1.0),
}


def grid(
    count: int, columns: int = ABREAST, height: float = 2.8, layout: str | None = "constrained"
) -> tuple[Figure, list[Axes]]:
    """A figure no wider than a screen, and ``count`` panels in rows of ``columns`` at the most."""
    columns = max(1, min(count, columns, ABREAST))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(min(4.5 * columns, WIDTH), height * rows), layout=layout)
    panels = [*figure.subplots(rows, columns, squeeze=False).flat]
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def style(i: int) -> dict[str, Any]:
    """Of the i-th variant, in every picture of a study."""
    return {"color": f"C{i % 10}", "linestyle": ("-", "-.", ":")[i // 10 % 3]}


def padded(runs: Sequence[Sequence[float | None]]) -> np.ndarray:
    """(runs, epochs), NaN where a run ended before, or has no number."""
    values = np.full((len(runs), max(map(len, runs))), np.nan)
    for line, run in zip(values, runs, strict=True):
        line[: len(run)] = run
    return values


def draw(
    panel: Axes, lines: Mapping[str, np.ndarray], styles: Mapping[str, Any], logarithmic: bool
) -> None:
    """Mean over the runs of each line (runs, epochs), their range shaded.

    ``logarithmic``: where a scale of losses would show the first epoch and nothing else.
    """
    for name, values in lines.items():
        epochs = np.flatnonzero(~np.isnan(values).all(0))  # those in which there was a number
        values = values[:, epochs]
        point = "o" if len(epochs) == 1 else None  # which makes no line
        panel.plot(epochs + 1, np.nanmean(values, 0), label=name, marker=point, **styles[name])
        low, high = np.nanmin(values, 0), np.nanmax(values, 0)
        color = styles[name]["color"]
        panel.fill_between(epochs + 1, low, high, color=color, alpha=0.2, linewidth=0)
    every = np.concatenate([values[~np.isnan(values)] for values in lines.values()])
    if logarithmic and len(every) and 0 < every.min() < every.max() / 20:
        panel.set_yscale("log")
    panel.set_xlabel("epoch", fontsize="small")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_layers(panel: Axes, runs: Sequence[Rows], key: str) -> list[Line2D]:
    """Every layer that ``key`` of :data:`LAYERS` was taken of, first to last from dark to light.

    Dashed: the targets of the first run. Returns what a legend explains: ten layers at the most.
    """
    label, goal = LAYERS[key]
    layers = [*dict.fromkeys(name for rows in runs for row in rows for name in row.get(key, {}))]
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    styles = {layer: {"color": color} for layer, color in zip(layers, colors, strict=True)}
    lines = {
        layer: padded([[row.get(key, {}).get(layer) for row in rows] for rows in runs])
        for layer in layers
    }
    draw(panel, lines, styles, logarithmic=False)
    panel.set_ylabel(label, fontsize="small")
    shown = [panel.lines[i] for i in np.unique(np.linspace(0, len(layers) - 1, 10).astype(int))]
    for layer in layers:
        targets = padded([[goal(row, layer) if layer in row.get(key, {}) else None
                           for row in runs[0]]])  # fmt: skip
        epochs = np.flatnonzero(~np.isnan(targets[0]))
        dashed = {"linestyle": "--", "linewidth": 1, "label": "_target"}
        panel.plot(epochs + 1, targets[0, epochs], **dashed, **styles[layer])
    return [*shown, Line2D([], [], color="grey", linestyle="--", linewidth=1, label="target")]


def curves(rows: Rows, objective: str) -> Figure:
    """Losses, and what else was taken of a run: accuracy, entropies, effective ranks.

    The loss that is minimised, ``objective``, has a panel of its own: the others need not be the
    same function.
    """
    splits = [split for split in ("train", "test", "val") if f"{split}_loss" in rows[0]]
    kinds = [(f"training loss: {objective}", "loss", 1, splits[:1]),
             (held_out_loss(rows[0], objective), "loss", 1, splits[1:]),
             ("accuracy, %", "accuracy", 100, splits)]  # fmt: skip
    found = []
    for label, key, scale, of in kinds:
        lines = {split: scale * padded([[row[f"{split}_{key}"] for row in rows]])
                 for split in of if f"{split}_{key}" in rows[0]}  # fmt: skip
        if lines:
            found.append((label, lines))
    layered = [key for key in LAYERS if any(row.get(key) for row in rows)]
    # A layout engine would draw everything twice.
    figure, panels = grid(len(found) + len(layered), layout=None)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(0.7 / width, 0.5 / height, 1 - 0.1 / width, 1 - 0.15 / height, 0.35, 0.3)
    styles = {split: style(i) for i, split in enumerate(("train", "test", "val"))}
    for panel, (label, lines) in zip(panels, found, strict=False):
        draw(panel, lines, styles, logarithmic="loss" in label)
        panel.set_ylabel(label, fontsize="small")
        panel.legend(fontsize="x-small")
    for panel, key in zip(panels[len(found) :], layered, strict=True):
        panel.legend(handles=draw_layers(panel, [rows], key), fontsize="x-small", ncols=2)
    return figure


def held_out_loss(row: Mapping[str, Any], objective: str) -> str:
    """What ``test_loss`` is: the objective itself where there are no labels to be right about."""
    return f"held-out loss: {'cross_entropy, nats' if 'test_accuracy' in row else objective}"
