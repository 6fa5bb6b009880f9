"""What the experiments in a folder found: tables, figures, and published numbers beside ours."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ses_lab import document, experiments, figures
from ses_lab.config import ConfigError
from ses_lab.curves import DPI
from ses_lab.document import Block, Heading, Paragraph, Picture, Table
from ses_lab.folder import atomic
from ses_lab.predictions import findings
from ses_lab.results import Contrast, Results, by_difficulty, collect, over_studies, table

_HEAD = """\
Mean ± sample standard deviation over seeds. Differences are paired by seed with the control, the
first variant, or with the variant that the study names; p is that of a two-sided paired t-test, not
corrected for the number of comparisons, Holm p is corrected for those of one measure in one study.
d is Cohen's, over the pooled deviation, and rank p that of a Mann-Whitney test, which knows of no
pairs. Accuracy, F1, AUROC, gap and corruption are in percent; the gap is the accuracy on the
training set, as trained, with augmentation and by the shares of mixed targets, less that on the
test set; best_accuracy is that of the best epoch on the test set, as the sources report it, and
validation the last accuracy on the images that choose the weights. A time is the median over the
epochs of their training steps alone, without evaluation and without writing; memory is the peak of
the device in MiB, on the CPU that of the process. Published numbers belong to
other data and networks than ours at scale smoke."""


def write(folder: str | os.PathLike, seeds: Sequence[int] = ()) -> Path:
    """``report.md``, ``.html``, ``.csv``, ``.json`` and figures in ``folder/report``; the first.

    ``folder`` is what :func:`ses_lab.experiments.run` wrote to, several experiments and scales; it
    may be unfinished. ``seeds`` are those to take, all if there are none. The HTML file holds its
    figures and opens by itself. Cost: reads every run's metrics and probes, trains nothing.

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
    everything = [results for scales in found.values() for results in scales]
    blocks = [
        Heading("Report", 1),
        Paragraph(_HEAD),
        *_coverage(found),
        *_studies(everything),
        *_predictions(everything),
    ]
    for scales in found.values():
        blocks += [*_section(scales), *(p for results in scales for p in _pictures(results))]
    for block in blocks:
        if isinstance(block, Picture):
            with atomic(out / block.file) as stream:
                stream.write(block.png)
    _text(out / "report.md", document.markdown(blocks))
    _text(out / "report.html", document.html("Report", blocks))
    cells = [cell for results in everything for cell in table(results)]
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


def _coverage(found: Mapping[str, Sequence[Results]]) -> list[Block]:
    rows = []
    for name in sorted({*experiments.names(), *found}):
        done = dict.fromkeys(("full", "smoke"), "not run")
        for results in found.get(name, ()):
            experiment = results.experiment
            total = len(experiment.variants) * len(experiment.seeds)
            done[experiment.scale] = f"{results.finished} of {total} runs"
        rows.append((name, done["full"], done["smoke"]))
    return [
        Heading("What was run, at which scale"), Table(("experiment", "full", "smoke"), rows)
    ]  # fmt: skip


def _studies(everything: Sequence[Results]) -> list[Block]:
    pairs = over_studies(everything)
    rows = [
        (
            row["study"], row["scale"], row["variant"], row["against"], row["on"],
            f"{row['task']:.2f}", *(_contrast(row[k]) for k in ("accuracy", "gap", "corruption")),
            "" if row["published"] is None else _number(row["published"], 1.0, "+"),
        )
        for row in pairs
    ]  # fmt: skip
    if not rows:
        return []
    found = by_difficulty(pairs)
    trends = "; ".join(f"{key} {rho:+.2f} over {n} pairs" for key, (rho, n) in found.items())
    head = ("study", "scale", "variant", "against", "network and data", "accuracy without",
            "accuracy", "gap", "under corruption", "published, best accuracy")  # fmt: skip
    return [
        Heading("What shaping changed, over the studies"),
        Paragraph(
            "Pairs that are the same but for the penalty, the hardest task first, by the accuracy "
            "without it; differences in percentage points. Spearman's correlation of these with "
            "that accuracy, and of published ones with the published accuracy, is negative where "
            f"harder tasks gain more: {trends or 'too few pairs'}. The same runs count once. Many "
            "pairs share what they are compared with, so that no p is given."
        ),
        Table(head, rows),
    ]


def _predictions(everything: Sequence[Results]) -> list[Block]:
    rows = []
    for prediction, found in findings(everything):
        first = (
            f"{prediction.name}: {prediction.claim}", prediction.expected, prediction.published
        )  # fmt: skip
        shown = [(f.where, f.measured, "yes" if f.met else "no") for f in found]
        for row in shown or [("", "not measured", "")]:
            rows.append((*first, *row))
            first = "", "", ""
    head = ("prediction", "expected", "published", "where", "measured here", "as expected")
    return [
        Heading("The predictions of the paper"),
        Paragraph(
            "By the means of what was run, in settings other than those of the predictions, and "
            "whatever their noise."
        ),
        Table(head, rows),
    ]


def _contrast(found: Contrast) -> str:
    if found.difference is None:
        return ""
    p = f" (p = {found.p:.2g})" if found.p is not None else ""
    return f"{_number(found.difference, 1.0, '+')}{p}"


def _section(scales: Sequence[Results]) -> list[Block]:
    first = scales[0].experiment
    blocks: list[Block] = [Heading(first.title)]
    if first.question:
        blocks.append(Paragraph(first.question))
    for results in scales:
        experiment = results.experiment
        configs = experiment.runs(results.root).values()
        settings = dict.fromkeys(f"{c.model.slug} on {c.dataset.slug}, {c.epochs} epochs"
                                 for c in configs)  # fmt: skip
        blocks.append(Paragraph(f"Scale {experiment.scale}: {'; '.join(settings)}."))
    for number, reference in enumerate(first.reference, 1):
        text = f"Published [{number}]: {reference.setting}. {reference.source}."
        differs = reference.definition
        blocks.append(Paragraph(f"{text} Not as ours: {differs}." if differs else text))
    if not first.reference:
        blocks.append(Paragraph("No published numbers at hand."))
    rows = []
    tables = {results.experiment.scale: table(results) for results in scales}
    for variant in _variants(scales):
        for scale, cells in tables.items():
            mine = [cell for cell in cells if cell["variant"] == variant]
            n = max((cell["seeds"] for cell in mine), default=0)
            if n:
                rows.append((variant, f"{scale}, n = {n}", *map(_cell, mine)))
        for number, reference in enumerate(first.reference, 1):
            if row := reference.rows.get(variant):
                shown = (_published(row.get(measure)) for measure in first.measures)
                rows.append(("", f"published [{number}], n = {reference.seeds}", *shown))
    blocks.append(Table(("variant", "where", *first.measures), rows))
    blocks += [_profile(scales, prefix) for prefix in first.profiles]
    compared = [cell for cells in tables.values() for cell in cells if cell["p"] is not None]
    if compared:
        head = ("variant", "against", "scale", "measure", "difference", "p", "Holm p", "d",
                "rank p")  # fmt: skip
        blocks.append(Table(head, [_comparison(cell) for cell in compared]))
    return blocks


def _variants(scales: Sequence[Results]) -> list[str]:
    """Of all scales: a grid need not be the same in two of them."""
    return list(dict.fromkeys(v for results in scales for v in results.experiment.variants))


def _profile(scales: Sequence[Results], prefix: str) -> Table:
    """A row for each layer, ours and published numbers of every variant side by side."""
    columns: dict[str, dict[str, str]] = {}
    for variant in _variants(scales):
        for results in scales:
            of_seeds: dict[str, list[float]] = {}
            for numbers in results.runs.get(variant, {}).values():
                for measure, value in numbers.items():
                    if measure.startswith(f"{prefix}."):
                        of_seeds.setdefault(measure.removeprefix(f"{prefix}."), []).append(value)
            columns[f"{variant}, {results.experiment.scale}"] = {
                layer: _spread(np.mean(x), np.std(x, ddof=1) if len(x) > 1 else None)
                for layer, x in of_seeds.items()
            }
        for number, reference in enumerate(scales[0].experiment.reference, 1):
            columns[f"{variant}, published [{number}]"] = {
                measure.removeprefix(f"{prefix}."): _published(value)
                for measure, value in reference.rows.get(variant, {}).items()
                if measure.startswith(f"{prefix}.")
            }
    columns = {head: cells for head, cells in columns.items() if cells}
    layers = dict.fromkeys(layer for cells in columns.values() for layer in cells)
    rows = [(layer, *(cells.get(layer, "") for cells in columns.values())) for layer in layers]
    return Table((prefix, *columns), rows)


def _comparison(cell: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = (f"{cell[k]:.2g}" if cell[k] is not None else "" for k in ("p", "p_holm"))
    d = f"{cell['d']:+.2f}" if cell["d"] is not None else ""
    difference = _number(cell["difference"], cell["mean"], "+")
    return (
        cell["variant"], cell["against"], cell["scale"], cell["measure"], difference, *numbers, d,
        f"{cell['p_rank']:.2g}",
    )  # fmt: skip


def _pictures(results: Results) -> list[Block]:
    experiment, found = results.experiment, []
    for kind, figure in figures.draw(results).items():
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=DPI)
        file = f"{experiment.name}-{experiment.scale}-{kind}.png"
        found.append(Picture(f"{kind}, scale {experiment.scale}", file, stream.getvalue()))
    return found


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
