"""Rows to Markdown tables and a plot: python -m bench.report bench/results/<device>.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench import accuracy
from bench.bench_sweep import FIXED_BATCHES, FIXED_SIZES
from bench.bench_training import BY_ITSELF, PLAIN, SES
from bench.measure import BASE

Row = dict

IN_SHORT = {  # shapes of the table that the README has, and their names there
    "single-256x2048": "one layer, 256 x 2048",
    "ResNet-18-B256": "ResNet-18, 9 layers, B = 256",
    "ResNet-50-B256": "ResNet-50, 4 layers, B = 256",
    "ViT-B-heads-3072x197x64": "ViT-B heads, 3072 of 197 x 64",
    "4096x16x32": "4096 of 16 x 32",
}
OTHERS = {  # its providers, and their names there
    "paper": "paper's recipe",
    "svdvals": "svdvals",
    "gram, autograd": "Gram, autograd",
    "gram, closed form": "Gram, closed form",
}
PARTS = {  # modes that share a table
    "Entropies of a network's layers": ("forward", "forward+backward"),
    "From Gram matrices to entropy and gradient": ("solver",),
    "Batched eigendecomposition": ("eigh",),
    "Entropy and gradient by size": ("sweep",),
}


def table(rows: list[Row]) -> str:
    """One line per shape, dtype, mode and clock; one column per provider that was there.

    Ours in milliseconds, the others as their time over ours in the same round: median (quartiles).
    """
    if errors := [row for row in rows if "family" in row]:
        return f"## Errors on hard spectra\n\n{accuracy.table(errors)}"
    measured = [row for row in rows if "seconds" in row]
    parts = {title: [r for r in measured if r["mode"] in modes] for title, modes in PARTS.items()}
    tables = {title: _table(part) for title, part in parts.items() if part}
    if short := in_short(measured):
        tables = {"In short": short} | tables
    if steps := [row for row in measured if row["mode"] == "training"]:
        tables["A training step, without SES and with it"] = _training_table(steps)
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in tables.items())


def text(rows: list[Row]) -> str:
    """What stands beside the rows: their tables, and where they come from."""
    return f"{table(rows)}\n\n{origin(rows)}\n"


def in_short(measured: list[Row]) -> str:
    """The other's time over ours, forward and backward in float32: medians of paired rounds."""
    lines = []
    wanted = {"dtype": "float32", "mode": "forward+backward"}
    chosen = [row for row in measured if wanted.items() <= row.items() and row["shape"] in IN_SHORT]
    for by_name in _grouped(chosen).values():
        found = [by_name.get(name) for name in OTHERS]
        cells = [f"{row[f'over {BASE}'][1]:.3g}" if row else "-" for row in found]
        shape = next(iter(by_name.values()))["shape"]
        lines.append(f"| {IN_SHORT[shape]} | {' | '.join(cells)} |")
    if not lines:
        return ""
    titles = ["forward + backward, float32", *OTHERS.values()]
    return "\n".join([f"| {' | '.join(titles)} |", "|" + "---|" * len(titles), *lines])


def origin(rows: list[Row]) -> str:
    """Where, with what and at which commit the rows were measured."""
    facts = {}
    for row in rows:
        versions = ", ".join(f"{name} {v}" for name, v in row.get("versions", {}).items() if v)
        commit = row.get("commit", "unknown")[:10] + " and changes" * bool(row.get("dirty"))
        key = f"{row['device']}, {row['threads']} threads, {versions}; commit {commit}"
        facts[key] = max(facts.get(key, ""), row.get("date", "")[:10])
    return "\n\n".join(f"{key}{date and ', '}{date}" for key, date in facts.items())


def _table(measured: list[Row]) -> str:
    names = list(dict.fromkeys(row["provider"] for row in measured if row["provider"] != BASE))
    rooflines = any("roofline_seconds" in row for row in measured)
    titles = ["shape", "mode", f"{BASE}, ms", *["its roofline, ms"] * rooflines]
    titles += [f"{name} / {BASE}" for name in names]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for key, by_name in _grouped(measured).items():
        shape, dtype, mode, clock = key
        base = by_name.get(BASE)
        cells = [_ratio(by_name.get(name), base) for name in names]
        if rooflines:
            cells.insert(0, f"{1e3 * base['roofline_seconds']:.3g}" if base else "-")
        label = mode if clock == "wall" else f"{mode}, {dtype}, {clock}"
        own = _milliseconds(base) if base else "-"
        lines.append(f"| {shape} | {label} | {own} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _training_table(steps: list[Row]) -> str:
    """What each penalty adds to the plain step, in % of its time: median of paired rounds, and its
    95 % interval by the notches of McGill, Tukey & Larsen (1978), 1.57 IQR / sqrt(rounds).

    SES by itself has outputs computed before and no network around it: its share of a plain step.
    """
    names = list(dict.fromkeys(row["provider"] for row in steps if row["provider"] != PLAIN))
    counted = {"operations": 1, "launches": 1, "host_syncs": 1, "peak_bytes": 1 << 20}
    counted = {field: unit for field, unit in counted.items() if any(field in r for r in steps)}
    titles = ["step", "plain, ms", "its peak, MiB", "rounds", *(f"{name}, %" for name in names)]
    titles += [f"SES adds: {field.replace('bytes', 'MiB').replace('_', ' ')}" for field in counted]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for (shape, dtype, _, clock), by_name in _grouped(steps).items():
        plain, ses = by_name[PLAIN], by_name.get(SES, {})
        cells = [f"{shape}, {dtype}, {clock}", _milliseconds(plain)]
        cells += [f"{plain['peak_bytes'] / 2**20:.0f}", str(plain["rounds"])]
        cells += [_added_time(by_name.get(name), plain) for name in names]
        for field, unit in counted.items():
            known = field in ses and field in plain
            digits = 0 if unit == 1 else 1
            cells.append(f"{(ses[field] - plain[field]) / unit:.{digits}f}" if known else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _added_time(row: Row | None, plain: Row) -> str:
    if row is None:
        return "-"
    low, median, high = (100 * ratio for ratio in row[f"over {PLAIN}"])
    half = 1.57 * (high - low) / min(row["rounds"], plain["rounds"]) ** 0.5
    return f"{median - 100 * (row['provider'] != BY_ITSELF):+.2f} ± {half:.2f}"


def _grouped(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[field] for field in ("shape", "dtype", "mode", "clock"))
        groups.setdefault(key, {})[row["provider"]] = row
    return groups


def _milliseconds(row: Row) -> str:
    low, median, high = (1e3 * value for value in row["seconds"])
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


def _ratio(row: Row | None, base: Row | None) -> str:
    if row is None:
        return "-"
    if base is None:  # ours has no time here, so there is no ratio: the time itself
        return f"{_milliseconds(row)} ms"
    low, median, high = row[f"over {BASE}"]
    return f"{median:.3g}x ({low:.3g}-{high:.3g})"


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [row for row in rows if "seconds" in row]
    sweep = [row for row in measured if row["mode"] == "sweep"]
    # One panel for one setting: a step where it was measured, in the first dtype and clock.
    first = next((row for row in measured if row["mode"] == "forward+backward"), measured[0])
    setting = ("mode", "dtype", "clock")
    figure = plt.figure(figsize=(16, 10))
    axes = figure.subplot_mosaic([["ratios", "n"], ["ratios", "batch"]], width_ratios=[5, 4])
    _plot_ratios(axes["ratios"], [r for r in measured if all(r[k] == first[k] for k in setting)])
    # layers of a sweep: one (batch, n, 2 n)
    _plot_sweep(axes["n"], sweep, "n", 1, "batch", 0, FIXED_BATCHES)
    _plot_sweep(axes["batch"], sweep, "batch", 0, "n", 1, FIXED_SIZES)

    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items() if v)
    conditions = f"{first['mode']}, {first['dtype']}, {first['clock']} clock"
    figure.suptitle(f"{conditions}: {first['device']}, {first['threads']} threads", fontsize=11)
    figure.supxlabel(versions, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_ratios(axes, rows: list[Row]) -> None:
    by_shape = _grouped(rows)
    for name in dict.fromkeys(row["provider"] for row in rows):
        found = [(g[name], y) for y, g in enumerate(by_shape.values()) if name in g and BASE in g]
        ratios = [row[f"over {BASE}"][1] for row, _ in found]
        axes.plot(ratios, [y for _, y in found], "o", label=name)
    axes.grid(alpha=0.3)
    axes.set_xscale("log")
    axes.set_yticks(range(len(by_shape)), [key[0] for key in by_shape])
    axes.invert_yaxis()
    axes.set_xlabel(f"time over {BASE}, median of paired rounds")
    axes.legend(fontsize="small")


def _plot_sweep(axes, rows, along: str, x: int, of: str, fixed: int, values: list[int]) -> None:
    """A line for each provider, by style, and for each of the fixed ``values``, by colour."""
    styles = dict(
        zip(dict.fromkeys(row["provider"] for row in rows), ("-", "--", ":"), strict=False)
    )
    for name, style in styles.items():
        axes.plot([], style, color="black", label=name)
        for colour, value in enumerate(values):
            points = sorted(
                (row["layers"][0][x], 1e6 * row["seconds"][1] / row["layers"][0][0])
                for row in rows
                if row["provider"] == name and row["layers"][0][fixed] == value
            )
            label = f"{of} = {value}" if name == BASE else None
            axes.plot(*zip(*points, strict=True), f".{style}", color=f"C{colour}", label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.set_xlabel(along)
    axes.set_ylabel("microseconds a matrix")
    if styles:
        axes.legend(fontsize="small")


def write(results: Path) -> None:
    rows = json.loads(results.read_text())["rows"]
    made = text(rows)
    results.with_suffix(".md").write_text(made)
    if shapes := [row for row in rows if row.get("mode", "training") != "training"]:
        plot(shapes, results.with_suffix(".png"))
    print(made, end="")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
