"""python -m bench.large: one matrix with two long sides, error against time, float32 samples.

For square matrices and three families of spectra: seconds of H and dH/dx by the exact solvers, by
solver="lowrank", and by a stochastic trace estimator (bench/slq.py), with the errors of each beside
them. A call's errors are taken from its timed result, and the signs of the estimator are drawn anew
for each: its errors are medians over the rounds.

What to look for: a gradient right to 1 % in less time than "rational" takes. A gradient of zeros
has an error of 1. About nine minutes on two quiet cores, two of them for the float64 references.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench import accuracy, host, slq
from bench.provenance import add_isa, add_output, with_commit, write
from bench.providers import gram_closed, ours
from bench.timing import Clock, clock_of, extent, paired, paired_ratios, quartiles, rounded, spread

SIZES = (1536, 2048, 3072, 4096)
RANKS = (32, 128, 512)
PROBES = (8, 32, 128)
STEPS = (10, 30)
DEFLATED_STEPS = 20  # with as many leading directions as probes; at 10 the bias is the larger error
BASE = "rational"
MODE = "large"  # of the rows


def _noisy_rank(B: int, d: int, g: torch.Generator) -> Tensor:
    """Rank 20, of variance 1, and Gaussian noise of variance 0.01."""
    signal = torch.randn(B, 20, generator=g) @ torch.randn(20, d, generator=g) / 20**0.5
    return signal + 0.1 * torch.randn(B, d, generator=g)


FAMILIES: dict[str, accuracy.Family] = {
    "Gaussian": accuracy.FAMILIES["Gaussian"],
    "rank 20 + 1 % noise": _noisy_rank,
    "i^-2": accuracy.FAMILIES["i^-2"],
}


@dataclass(frozen=True)
class Method:
    curve: str
    point: str  # on the curve; "" where it has one alone
    estimate: Callable[[Tensor], slq.Estimate]

    @property
    def name(self) -> str:
        return _name(self.curve, self.point)


def _name(curve: str, point: str) -> str:
    return f"{curve}, {point}" if point else curve


def _by_autograd(entropies: Callable[[list[Tensor]], Tensor], x: Tensor) -> slq.Estimate:
    x = x.detach().requires_grad_()
    h = entropies([x]).sum()
    return slq.Estimate(h.detach(), *torch.autograd.grad(h, x), None)


def _value_alone(x: Tensor) -> slq.Estimate:
    return slq.Estimate(ours([x], solver="rational").sum(), None, None)


def methods(generator: torch.Generator) -> list[Method]:
    exact = {
        BASE: partial(ours, solver="rational"),
        "eigh": partial(ours, solver="eigh"),
        "torch Gram + eigh, closed form": gram_closed,
    }
    found = [Method(name, "", partial(_by_autograd, route)) for name, route in exact.items()]
    found.append(Method("rational, H alone", "", _value_alone))
    for k in RANKS:
        route = partial(ours, solver="lowrank", rank=k)
        found.append(Method("lowrank", f"rank {k}", partial(_by_autograd, route)))
    for steps, deflates in [(s, False) for s in STEPS] + [(DEFLATED_STEPS, True)]:
        for p in PROBES:
            options = {"probes": p, "steps": steps, "deflated": p * deflates}
            estimate = partial(slq.estimate, generator=generator, **options)
            curve = f"{'deflated ' * deflates}SLQ, {steps} steps"
            found.append(Method(curve, f"{p} probes", estimate))
    return found


def reference(x: Tensor) -> tuple[Tensor, Tensor]:  # (B, d) -> (), (B, d) float64
    """H and dH/dx by eigh of the float64 Gram matrix, a third of the time of the SVD.

    On these families, from float32 samples, the same to 1e-8 (a test says so of smaller sides).
    """
    x = x.double()
    xc = x - x[:1]
    xc = xc - xc.mean(0)
    gram = xc @ xc.mT
    trace = gram.trace()
    p, q = torch.linalg.eigh(gram / trace)
    log_p = p.clamp_min(1e-30).log()
    h = -(p * log_p).sum()
    return h, (q * (-2 / trace * (log_p + h))) @ (q.mT @ xc)


@dataclass
class Errors:
    """Of all rounds of one method."""

    value: list[float]
    gradient: list[float]
    standard_error: list[float]

    def add(self, estimate: slq.Estimate, h64: Tensor, g64: Tensor) -> None:
        self.value.append((estimate.entropy - h64).abs().item())
        if estimate.gradient is not None:
            self.gradient.append(((estimate.gradient - g64).norm() / g64.norm()).item())
        if estimate.standard_error is not None:
            self.standard_error.append(estimate.standard_error.item())

    def medians(self) -> dict[str, float | None]:
        return {name: median(values) if values else None for name, values in vars(self).items()}


def _clock(
    device: str, call: Callable[[], slq.Estimate], keep: Callable[[slq.Estimate], None]
) -> Clock:
    """Of the call alone; its result goes to ``keep`` after that."""
    last: list[slq.Estimate] = []
    timed = clock_of(device)(lambda: last.append(call()))

    def seconds() -> float:
        value = timed()
        keep(last.pop())
        return value

    return seconds


def measure(device: str, sizes: list[int], budget: float) -> list[dict]:
    """A row for each size, family and method: quartiles of its time, medians of its errors."""
    facts = {"mode": MODE, "dtype": "float32", **with_commit(device)}
    facts["date"] = datetime.now(timezone.utc).isoformat()
    chosen = methods(torch.Generator(device).manual_seed(0))
    smallest = _samples("Gaussian", min(sizes), device)
    for method in chosen:
        method.estimate(smallest)  # warms up
    rows = []
    for n in sizes:
        for family in FAMILIES:
            x = _samples(family, n, device)
            h64, g64 = reference(x)
            errors = {method.name: Errors([], [], []) for method in chosen}
            clocks = {
                m.name: _clock(
                    device,
                    partial(m.estimate, x),
                    partial(errors[m.name].add, h64=h64, g64=g64),
                )
                for m in chosen
            }
            if device == "cpu":
                clocks |= host.clocks()
            seconds = paired(clocks, budget, min_rounds=1, max_rounds=20)
            around = host.take(seconds)
            ratios = paired_ratios(seconds, BASE)
            rows += [
                {
                    "n": n,
                    "family": family,
                    "entropy": h64.item(),
                    "curve": method.curve,
                    "point": method.point,
                    "rounds": len(seconds[method.name]),
                    "seconds": rounded(quartiles(seconds[method.name])),
                    f"over {BASE}": rounded(ratios[method.name]),
                    **errors[method.name].medians(),
                    **facts,
                    **around,
                }
                for method in chosen
            ]
    return rows


def _samples(family: str, n: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return FAMILIES[family](n, n, generator).float().to(device)


# ---- rows to text and picture ----


def table(rows: list[dict]) -> str:
    """For each n: a line for each method, its time over the families, its errors on each."""
    parts = []
    families = list(dict.fromkeys(row["family"] for row in rows))
    for n in dict.fromkeys(row["n"] for row in rows):
        by_method: dict[str, dict[str, dict]] = {}
        for row in rows:
            if row["n"] == n:
                name = _name(row["curve"], row["point"])
                by_method.setdefault(name, {})[row["family"]] = row
        titles = [f"n = {n}", "seconds", f"over {BASE}", *families]
        lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
        for name, by_family in by_method.items():
            seconds = spread(extent([row["seconds"][1] for row in by_family.values()]))
            ratio = spread(extent([row[f"over {BASE}"][1] for row in by_family.values()]))
            cells = [_errors(by_family[family]) for family in families]
            lines.append(f"| {' | '.join([name, seconds, ratio, *cells])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _errors(row: dict) -> str:
    """Gradient / H, and the standard error that the method says of its H."""
    gradient = "-" if row["gradient"] is None else f"{row['gradient']:.0e}"
    said = "" if row["standard_error"] is None else f" (± {row['standard_error']:.0e})"
    return f"{gradient} / {row['value']:.0e}{said}"


def plot(rows: list[dict], path: Path) -> None:
    """A column for each n; a row for the gradient of each family, then one for its H.

    Dotted: 1 %. The bars of H are standard errors.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    sizes, families, curves = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("n", "family", "curve")
    )
    panels = [(kind, family) for kind in ("gradient", "value") for family in families]
    figure, axes = plt.subplots(
        len(panels), len(sizes), sharex="col", sharey=True, squeeze=False,
        figsize=(4 * len(sizes), 2.6 * len(panels)), layout="constrained",
    )  # fmt: skip
    for line, (kind, family) in zip(axes, panels, strict=True):
        label = "|g - g64| / |g64|" if kind == "gradient" else "|H - H64| / H64"
        line[0].set_ylabel(f"{family}\n{label}")
        for panel, n in zip(line, sizes, strict=True):
            panel.set(xscale="log", yscale="log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))  # it may be a decade or less
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.axhline(0.01, color="grey", linestyle=":")
            panel.grid(alpha=0.3)
            found = [r for r in rows if (r["n"], r["family"]) == (n, family)]
            for colour, curve in enumerate(curves):
                _plot_curve(panel, [r for r in found if r["curve"] == curve], kind, f"C{colour}")
    for panel, n in zip(axes[0], sizes, strict=True):
        panel.set_title(f"n = {n}")
    for panel in axes[-1]:
        panel.set_xlabel("seconds")
    handles = [
        plt.Line2D([], [], color=f"C{colour}", marker="o", label=curve)
        for colour, curve in enumerate(curves)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    first = rows[0]
    figure.supxlabel(f"float32 samples: {first['device']}, {first['threads']} threads", fontsize=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _plot_curve(panel, rows: list[dict], kind: str, colour: str) -> None:
    rows = [row for row in rows if row[kind] is not None]  # H alone has no gradient
    unit = [row["entropy"] if kind == "value" else 1 for row in rows]
    bars = [(row["standard_error"] or 0) if kind == "value" else 0 for row in rows]
    panel.errorbar(
        [row["seconds"][1] for row in rows],
        [row[kind] / u for row, u in zip(rows, unit, strict=True)],
        yerr=([0] * len(rows), [bar / u for bar, u in zip(bars, unit, strict=True)]),
        fmt="o-", color=colour, elinewidth=0.8,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N")
    parser.add_argument(
        "--budget", type=float, default=1.0, help="seconds a method, size and family, or one round"
    )
    add_isa(parser)
    add_output(parser)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = measure(device, options.sizes, options.budget)
    write(rows, options.output)
    print(table(rows))


if __name__ == "__main__":
    main()
