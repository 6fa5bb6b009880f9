"""What the experiments in a folder found: tables, figures, and published numbers beside ours."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ses_lab import experiments, figures
from ses_lab.config import ConfigError
from ses_lab.folder import atomic
from ses_lab.results import Results, collect, table

_HEAD = """# Report

Mean ± sample standard deviation over seeds. Differences are paired by seed with the control, the
first variant; p is that of a two-sided paired t-test, not corrected for the number of
comparisons. Accuracy, gap and corruption are in percent; the gap is the accuracy on the training
set, as trained, with augmentation, less that on the test set; best_accuracy is that of the best
epoch on the test set, as the sources report it. A time is the median over the epochs of their
training steps alone, without evaluation and without writing; memory is the peak of the device in
MiB, on the CPU that of the process. Published numbers belong to other data and networks than ours
at scale smoke.
"""


def write(folder: str | os.PathLike, seeds: Sequence[int] = ()) -> Path:
    """``report.md``, ``report.csv``, ``report.json`` and figures in ``folder/report``; the first.

    ``folder`` is what :func:`ses_lab.experiments.run` wrote to, several experiments and scales; it
    may be unfinished. ``seeds`` are those to take, all if there are none. Cost: reads every run's
    metrics and probes, trains nothing.

    Raises:
        ConfigError: there is no experiment in it.
    """
    folder = Path(folder)
    found: dict[str, list[Results]] = {}
    for path in sorted(folder.glob("*/*/experiment.yaml")):
        results = collect(path.parent, seeds)
        found.setdefault(results.experiment.name, []).append(results)
    if not found:
        raise ConfigError(f"no */*/experiment.yaml in {folder}: run an experiment there first")
    out = folder / "report"
    out.mkdir(exist_ok=True)
    parts, cells = [_HEAD + "\n" + _coverage(found)], []
    for name, scales in found.items():
        parts.append(_section(scales))
        for results in scales:
            scale = results.experiment.scale
            cells += table(results)
            for kind, figure in figures.draw(results).items():
                file = f"{name}-{scale}-{kind}.png"
                with atomic(out / file) as stream:
                    figure.savefig(stream, format="png", dpi=110)
                parts.append(f"![{kind}, scale {scale}]({file})")
    _text(out / "report.md", "\n\n".join(parts) + "\n")
    _text(out / "report.json", json.dumps(cells, indent=1) + "\n")
    with open(out / "report.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, cells[0].keys())
        writer.writeheader()
        for cell in cells:
            published = "; ".join(_published(p["value"]) for p in cell["published"])
            writer.writerow({**cell, "published": published})
    return out / "report.md"


def _text(path: Path, text: str) -> None:
    with atomic(path) as stream:
        stream.write(text.encode())


def _coverage(found: Mapping[str, Sequence[Results]]) -> str:
    lines = ["| experiment | full | smoke |", "|---|---|---|"]
    for name in sorted({*experiments.names(), *found}):
        done = dict.fromkeys(("full", "smoke"), "not run")
        for results in found.get(name, ()):
            experiment = results.experiment
            total = len(experiment.variants) * len(experiment.seeds)
            done[experiment.scale] = f"{results.finished} of {total} runs"
        lines.append(f"| {name} | {done['full']} | {done['smoke']} |")
    return "\n".join(["## What was run, at which scale", "", *lines])


def _section(scales: Sequence[Results]) -> str:
    first = scales[0].experiment
    lines = [f"## {first.title}", "", first.question, ""]
    for results in scales:
        experiment = results.experiment
        configs = experiment.runs(results.root).values()
        settings = dict.fromkeys(f"{c.model.slug} on {c.dataset.slug}, {c.epochs} epochs"
                                 for c in configs)  # fmt: skip
        lines.append(f"Scale {experiment.scale}: {'; '.join(settings)}.")
    for number, reference in enumerate(first.reference, 1):
        lines.append(f"\nPublished [{number}]: {reference.setting}. {reference.source}.")
    if not first.reference:
        lines.append("\nNo published numbers at hand.")
    lines += ["", f"| variant | where | {' | '.join(first.measures)} |"]
    lines.append("|---" * (2 + len(first.measures)) + "|")
    for variant in first.variants:
        for results in scales:
            cells = [cell for cell in table(results) if cell["variant"] == variant]
            n = max((cell["seeds"] for cell in cells), default=0)
            if n:
                where = f"{results.experiment.scale}, n = {n}"
                lines.append(f"| {variant} | {where} | {' | '.join(map(_cell, cells))} |")
        for number, reference in enumerate(first.reference, 1):
            if row := reference.rows.get(variant):
                shown = " | ".join(_published(row.get(measure)) for measure in first.measures)
                lines.append(f"| | published [{number}], n = {reference.seeds} | {shown} |")
    return "\n".join(lines)


def _cell(cell: Mapping[str, Any]) -> str:
    """``97.11 ± 0.22 (+0.15, p = 0.42)``"""
    text = _spread(cell["mean"], cell["std"])
    if cell["difference"] is None:
        return text
    p = f", p = {cell['p']:.2g}" if cell["p"] is not None else ""
    return f"{text} ({_number(cell['difference'], cell['mean'], '+')}{p})"


def _published(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return _spread(*value) if isinstance(value, tuple) else _spread(value, None)


def _spread(mean: float | None, std: float | None) -> str:
    if mean is None:
        return ""
    return _number(mean, mean) + (f" ± {_number(std, mean)}" if std is not None else "")


def _number(value: float, like: float, sign: str = "") -> str:
    digits = 2 if abs(like) >= 1 else 3
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no minus before a zero
