"""Rows of one run or of many to Markdown tables and a plot.

python -m bench.report bench/results/<device>.json, of which each run of python -m bench adds some.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from bench import accuracy, large
from bench.bench_sweep import FIXED_BATCHES, FIXED_SIZES
from bench.bench_training import BY_ITSELF, PLAIN, SES
from bench.host import REGISTER_BYTES
from bench.measure import BASE
from bench.timing import extent, spread

Row = dict

IN_SHORT = {  # shapes of the table that the README has, and their names there
    "single-256x2048": "one layer, 256 x 2048",
    "ResNet-18-B256": "ResNet-18, 9 layers, B = 256",
    "ResNet-50-B256": "ResNet-50, 4 layers, B = 256",
    "ViT-B-heads-3072x197x64": "ViT-B heads, 3072 of 197 x 64",
    "4096x16x32": "4096 of 16 x 32",
}
SHAPES = IN_SHORT | {
    "4096x8x16": "4096 of 8 x 16",
    "1024x32x64": "1024 of 32 x 64",
    "1x512x1024": "one of 512 x 1024",
    "2x512x1024": "two of 512 x 1024",
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


BY_ISA = ("gram, closed form", "paper")  # of these a table with a column per instruction set

# ---- many runs ----


def _key(row: Row) -> tuple:
    return tuple(row.get(field) for field in ("shape", "dtype", "mode", "clock", "isa"))


def over_runs(rows: list[Row]) -> list[Row]:
    """One row for each key and provider, with the least, the median and the largest of the medians
    of its runs in the place of the quartiles of one.

    Of training steps the last: their intervals are those of one run.
    """
    runs: dict[tuple, list[Row]] = {}
    for row in rows:
        runs.setdefault((*_key(row), row["provider"]), []).append(row)
    return [_over_runs(each) if len(each) > 1 else each[0] for each in runs.values()]


def _over_runs(rows: list[Row]) -> Row:
    last = rows[-1]
    if last["mode"] == "training":
        return last
    merged = last | {"runs": len(rows)}
    for field in ("seconds", f"over {BASE}"):
        medians = [row[field][1] for row in rows if row.get(field)]
        merged[field] = extent(medians) if medians else None
    return merged


def slowdowns(rows: list[Row]) -> list[float]:
    """Of each row: the mean time of the fixed loop of bench/host.py over the least that rows of
    this device, instruction set and number of threads have.
    """
    best: dict[tuple, float] = {}
    for row in rows:
        here = _host(row)
        best[here] = min(row["loop_least"], best.get(here, row["loop_least"]))
    return [row["loop_mean"] / best[_host(row)] for row in rows]


def _host(row: Row) -> tuple:
    return row["device"], row.get("isa"), row["threads"]


# ---- tables ----


def table(rows: list[Row]) -> str:
    """One line per shape, dtype, mode and clock; one column per provider that was there.

    Ours in milliseconds, the others as their time over ours in the same round: median (quartiles),
    or of several runs the median of their medians (least-largest).
    """
    if any(row.get("mode") == large.MODE for row in rows):
        tables = {"Two long sides: errors of gradient / H": large.table(rows)}
        return _titled(tables | _hosts(rows))
    if errors := [row for row in rows if "family" in row]:
        return _titled({"Errors on hard spectra": accuracy.table(errors)})
    timed = [row for row in rows if "seconds" in row]
    measured = over_runs(timed)
    tables = {"In short": short} if (short := in_short(measured)) else {}
    tables |= {
        f"{name} / {BASE}, by instruction set": text
        for name in BY_ISA
        if (text := _table_by_isa(measured, name))
    }
    parts = {title: [r for r in measured if r["mode"] in modes] for title, modes in PARTS.items()}
    tables |= {title: _table(part) for title, part in parts.items() if part}
    if steps := [row for row in measured if row["mode"] == "training"]:
        tables["A training step, without SES and with it"] = _training_table(steps)
    return _titled(tables | _hosts(timed))


def _titled(tables: dict[str, str]) -> str:
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in tables.items())


def _hosts(timed: list[Row]) -> dict[str, str]:
    known = [row for row in timed if "loop_mean" in row]
    return {"How busy the host was": _table_of_hosts(known)} if known else {}


def text(rows: list[Row]) -> str:
    """What stands beside the rows: their tables, and where they come from."""
    return f"{table(rows)}\n\n{origin(rows)}\n"


def in_short(measured: list[Row]) -> str:
    """The other's time over ours, forward and backward in float32, of the widest registers."""
    wanted = {"dtype": "float32", "mode": "forward+backward"}
    chosen = [row for row in measured if wanted.items() <= row.items() and row["shape"] in IN_SHORT]
    widest = max((REGISTER_BYTES.get(row.get("isa"), 0) for row in chosen), default=0)
    chosen = [row for row in chosen if REGISTER_BYTES.get(row.get("isa"), 0) == widest]
    lines = []
    for by_name in _grouped(chosen).values():
        shape = next(iter(by_name.values()))["shape"]
        cells = [by_name.get(name) for name in OTHERS]
        lines.append([IN_SHORT[shape], *(_over(row) if row else "-" for row in cells)])
    return _lines(["forward + backward, float32", *OTHERS.values()], lines) if lines else ""


def _over(row: Row) -> str:
    """Our time in that of the other: the median of a run; of several their median and range."""
    ratios = row[f"over {BASE}"]
    return spread(ratios) if "runs" in row else f"{ratios[1]:.3g}"


def origin(rows: list[Row]) -> str:
    """Where, with what and at which commit the rows were measured."""
    facts = {}
    for row in rows:
        versions = ", ".join(f"{name} {v}" for name, v in row.get("versions", {}).items() if v)
        commit = row.get("commit", "unknown")[:10] + " and changes" * bool(row.get("dirty"))
        key = f"{row['device']}, {row['threads']} threads, {versions}; commit {commit}"
        facts[key] = max(facts.get(key, ""), row.get("date", "")[:10])
    return "\n\n".join(f"{key}{date and ', '}{date}" for key, date in facts.items())


def _lines(titles: list[str], lines: Iterable[list[str]]) -> str:
    rule = "|" + "---|" * len(titles)
    return "\n".join([f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(x)} |" for x in lines)])


def _table_by_isa(measured: list[Row], name: str) -> str:
    """Empty where there is only one."""
    steps = [r for r in measured if r["mode"] in ("forward+backward", "sweep")]
    isas = {row["isa"] for row in steps if row.get("isa")}
    isas = sorted(isas, key=lambda isa: -REGISTER_BYTES.get(isa, 0))
    by_shape: dict[str, dict[str, str]] = {}
    for (shape, _, _, clock, isa), by_name in _grouped(steps).items():
        line = SHAPES.get(shape, shape) + (f", {clock}" if clock != "wall" else "")
        if name in by_name and BASE in by_name:
            by_shape.setdefault(line, {})[isa] = spread(by_name[name][f"over {BASE}"])
    lines = [[shape, *(cells.get(i, "-") for i in isas)] for shape, cells in by_shape.items()
             if len(cells) > 1]  # fmt: skip
    return _lines(["forward + backward", *isas], lines) if lines else ""


def _table_of_hosts(rows: list[Row]) -> str:
    """A line for each run: medians, and the range over what it measured."""
    runs: dict[tuple, list[tuple[float, float]]] = {}
    for row, slowdown in zip(rows, slowdowns(rows), strict=True):
        changed = " and changes" if row.get("dirty") else ""
        commit = f"{row.get('commit', '-')[:9]}{changed}"
        run = f"{row.get('date', '-')[:16]}", commit, row.get("isa") or "-", str(row["threads"])
        runs.setdefault(run, []).append((row["clock_ghz"][1], slowdown))
    titles = ["run", "commit", "instruction set", "threads", "CPU clock, GHz",
              "fixed loop over its best"]  # fmt: skip
    return _lines(
        titles,
        (
            [*run, *(spread(extent(list(values))) for values in zip(*each, strict=True))]
            for run, each in runs.items()
        ),
    )


def _table(measured: list[Row]) -> str:
    names = list(dict.fromkeys(row["provider"] for row in measured if row["provider"] != BASE))
    rooflines = any("roofline_seconds" in row for row in measured)
    titles = ["shape", "mode", f"{BASE}, ms", *["its roofline, ms"] * rooflines]
    titles += [f"{name} / {BASE}" for name in names]
    lines = []
    for (shape, dtype, mode, clock, isa), by_name in _grouped(measured).items():
        base = by_name.get(BASE)
        cells = [_ratio(by_name.get(name), base) for name in names]
        if rooflines:
            cells.insert(0, f"{1e3 * base['roofline_seconds']:.3g}" if base else "-")
        label = mode if clock == "wall" else f"{mode}, {dtype}, {clock}"
        label += f", {isa}" if isa else ""
        runs = max(row.get("runs", 1) for row in by_name.values())
        label += f", {runs} runs" if runs > 1 else ""
        lines.append([shape, label, _milliseconds(base) if base else "-", *cells])
    return _lines(titles, lines)


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
    lines = []
    for (shape, dtype, _, clock, _), by_name in _grouped(steps).items():
        plain, ses = by_name[PLAIN], by_name.get(SES, {})
        cells = [f"{shape}, {dtype}, {clock}", _milliseconds(plain)]
        cells += [f"{plain['peak_bytes'] / 2**20:.0f}", str(plain["rounds"])]
        cells += [_added_time(by_name.get(name), plain) for name in names]
        for field, unit in counted.items():
            known = field in ses and field in plain
            digits = 0 if unit == 1 else 1
            cells.append(f"{(ses[field] - plain[field]) / unit:.{digits}f}" if known else "-")
        lines.append(cells)
    return _lines(titles, lines)


def _added_time(row: Row | None, plain: Row) -> str:
    if row is None:
        return "-"
    low, median, high = (100 * ratio for ratio in row[f"over {PLAIN}"])
    half = 1.57 * (high - low) / min(row["rounds"], plain["rounds"]) ** 0.5
    return f"{median - 100 * (row['provider'] != BY_ITSELF):+.2f} ± {half:.2f}"


def _grouped(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), {})[row["provider"]] = row
    return groups


def _milliseconds(row: Row) -> str:
    return spread([1e3 * value for value in row["seconds"]])


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

    measured = over_runs([row for row in rows if "seconds" in row])
    sweep = [row for row in measured if row["mode"] == "sweep"]
    # One panel for one setting: a step where it was measured, in the first dtype and clock.
    first = next((row for row in measured if row["mode"] == "forward+backward"), measured[0])
    setting = ("mode", "dtype", "clock", "isa")
    sweep = [row for row in sweep if row.get("isa") == first.get("isa")]
    figure = plt.figure(figsize=(16, 10))
    axes = figure.subplot_mosaic([["ratios", "n"], ["ratios", "batch"]], width_ratios=[5, 4])
    _plot_ratios(
        axes["ratios"], [r for r in measured if all(r.get(k) == first.get(k) for k in setting)]
    )
    # layers of a sweep: one (batch, n, 2 n)
    _plot_sweep(axes["n"], sweep, "n", 1, "batch", 0, FIXED_BATCHES)
    _plot_sweep(axes["batch"], sweep, "batch", 0, "n", 1, FIXED_SIZES)

    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items() if v)
    conditions = f"{first['mode']}, {first['dtype']}, {first['clock']} clock"
    conditions += f", {first['isa']}" if first.get("isa") else ""
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


# ---- files ----


def append(results: Path, rows: list[Row]) -> None:
    """The rows of a run behind those in the file, one a line."""
    earlier = json.loads(results.read_text())["rows"] if results.exists() else []
    lines = ",\n".join(json.dumps(row) for row in earlier + rows)
    results.write_text(f'{{"rows": [\n{lines}\n]}}\n')


def write(results: Path) -> None:
    rows = json.loads(results.read_text())["rows"]
    made = text(rows)
    results.with_suffix(".md").write_text(made)
    if any(row.get("mode") == large.MODE for row in rows):
        large.plot(rows, results.with_suffix(".png"))
    elif shapes := [row for row in rows if row.get("mode", "training") != "training"]:
        plot(shapes, results.with_suffix(".png"))
    print(made, end="")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
