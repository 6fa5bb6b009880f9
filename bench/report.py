"""Rows to a Markdown table and a plot: python -m bench.report bench/results/<device>.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.measure import BASE

Row = dict


def table(rows: list[Row]) -> str:
    """One line per shape, dtype, mode and clock; one column per provider that was there.

    Ours in milliseconds, the others as their time over ours in the same round: median (quartiles).
    """
    measured = [row for row in rows if "seconds" in row]
    parts = [[r for r in measured if (r["mode"] == "eigh") == eigh] for eigh in (False, True)]
    return "\n\n".join(_table(part) for part in parts if part)


def _table(measured: list[Row]) -> str:
    names = list(dict.fromkeys(row["provider"] for row in measured if row["provider"] != BASE))
    lines = [
        f"| shape | mode | {BASE}, ms | {' | '.join(f'{name} / {BASE}' for name in names)} |",
        "|" + "---|" * (3 + len(names)),
    ]
    for key, by_name in _grouped(measured).items():
        shape, dtype, mode, clock = key
        base = by_name.get(BASE)
        cells = [_ratio(by_name.get(name), base) for name in names]
        label = mode if clock == "wall" else f"{mode}, {dtype}, {clock}"
        own = _milliseconds(base) if base else "-"
        lines.append(f"| {shape} | {label} | {own} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
    # One panel for one setting: a step where it was measured, in the first dtype and clock.
    first = next((row for row in measured if row["mode"] == "forward+backward"), measured[0])
    setting = ("mode", "dtype", "clock")
    measured = [row for row in measured if all(row[key] == first[key] for key in setting)]
    by_shape = _grouped(measured)
    names = list(dict.fromkeys(row["provider"] for row in measured))
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), width_ratios=[2, 1])

    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for name in names:
        found = [(g[name], y) for y, g in enumerate(by_shape.values()) if name in g and BASE in g]
        ratios = [row[f"over {BASE}"][1] for row, _ in found]
        left.plot(ratios, [y for _, y in found], "o", color=colours[name], label=name)
    left.grid(alpha=0.3)
    left.set_xscale("log")
    left.set_yticks(range(len(by_shape)), [key[0] for key in by_shape])
    left.invert_yaxis()
    left.set_xlabel(f"time over {BASE}, median of paired rounds")
    left.legend(fontsize="small")

    # Batches of B < d: how the cost of a matrix grows with n = B.
    for name in names:
        points = sorted(
            (side, row["seconds"][1] / batch)
            for row in measured
            if row["provider"] == name and len(row["layers"][0]) == 3
            for batch, side, d in row["layers"]
            if side < d
        )
        if points:
            sides, costs = zip(*points, strict=True)
            right.loglog(sides, [1e6 * cost for cost in costs], marker="o", color=colours[name])
    right.set_xlabel("n = B < d, batched")
    right.set_ylabel("microseconds per matrix")

    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items() if v)
    conditions = f"{first['mode']}, {first['dtype']}, {first['clock']} clock"
    figure.suptitle(f"{conditions}: {first['device']}, {first['threads']} threads", fontsize=11)
    figure.supxlabel(versions, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(results: Path) -> None:
    rows = json.loads(results.read_text())["rows"]
    text = table(rows)
    results.with_suffix(".md").write_text(text + "\n")
    plot(rows, results.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
