"""python -m bench.crossover: which solver and which eigh is the faster, into the package's table.

Measures on this machine's GPU, or its CPU, and rewrites the rows of that device in
ses_kernels/crossover.py; the other device keeps its own. Run it on a quiet machine, commit the
table, and measure the rest with the table in force. The three largest n take most of its time.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from bench.provenance import add_output, with_commit, write
from bench.providers import Provider, ours
from bench.shapes import affordable, batch_of
from bench.timing import Call, clock_of, paired, paired_ratios
from ses_kernels import crossover, ops

TABLE_FILE = Path(crossover.__file__)
LINE = "# ---- written by python -m bench.crossover ----"
NOISE = 0.95  # a ratio from here to 1 is noise: a tie goes to what never synchronises
LARGEST_ON_CUDA = 1536  # the kernels end far below, and bench/gpu.sh has 40 s for all of this


def _solvers(device: str, dtype: torch.dtype, n: int, batch: int) -> dict[str, Call]:
    if device == "cuda" and n > LARGEST_ON_CUDA:
        return {}
    xs = [x.requires_grad_() for x in batch_of(batch, n).tensors(device, dtype)]
    by_solver = {name: Provider(name, partial(ours, solver=name)) for name in ("rational", "eigh")}
    return {name: partial(provider.step, xs) for name, provider in by_solver.items()}


def _eigh(device: str, dtype: torch.dtype, n: int, batch: int) -> dict[str, Call]:
    if n > ops.eigh_limit(device, 0 if device == "cuda" else None, dtype.itemsize):
        return {}
    (x,) = batch_of(batch, n).tensors(device, dtype)
    a = x @ x.mT
    return {backend: partial(ops.eigh, a, backend) for backend in ("fused", "torch")}


@dataclass(frozen=True)
class Decision:
    """When is the first of two calls the faster?"""

    meaning: str
    calls: Callable[[str, torch.dtype, int, int], dict[str, Call]]  # none: n is out of reach
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]
    batches: tuple[int, ...]


DECISIONS = {  # in this order: the solvers are compared with the decided eigh in force
    "EIGH": Decision(
        "{largest n: smallest batch} between which the extension's eigh is the faster.",
        _eigh,
        (torch.float32, torch.float64),
        (4, 8, 16, 32, 40, 48, 64, 80, 96, 112, 128, 144, 160),
        (1, 2, 3, 4, 8, 64),
    ),
    "RATIONAL": Decision(
        "{largest n = min(B, d): smallest batch} between which the rational solver is the faster.",
        _solvers,
        (torch.float32, torch.float64, torch.bfloat16),
        (4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
        (1, 8, 64, 512),
    ),
}


def measure(device: str, budget: float) -> list[dict]:
    """A row for each table, dtype, n and batch: quartiles of the second call's time over ours.

    The tables in memory follow.
    """
    facts = with_commit(device)
    facts["date"] = datetime.now(timezone.utc).date().isoformat()
    rows = []
    for name, decision in DECISIONS.items():
        for dtype in decision.dtypes:
            ratios = _ratios(decision, device, dtype, budget)
            getattr(crossover, name)[device, dtype] = winning(
                {size: median for size, (_, median, _) in ratios.items()}
            )
            rows += [
                {"table": name, "dtype": _name(dtype), "n": n, "batch": batch, "ratio": r, **facts}
                for (n, batch), r in ratios.items()
            ]
    said = ("device", "threads", "torch", "commit", "dirty", "date")
    flat = facts | facts["versions"]
    crossover.MEASURED[device] = {key: flat[key] for key in said}
    return rows


def _ratios(
    decision: Decision, device: str, dtype: torch.dtype, budget: float
) -> dict[tuple[int, int], list[float]]:
    clock = clock_of(device)
    ratios = {}
    for n, batch in itertools.product(decision.sizes, decision.batches):
        calls = decision.calls(device, dtype, n, batch) if affordable(batch, n) else {}
        if not calls:
            continue
        for call in calls.values():
            call()  # warms up
        seconds = paired({k: clock(call) for k, call in calls.items()}, budget, max_rounds=50)
        first, second = calls
        ratios[n, batch] = paired_ratios(seconds, first)[second]
    return ratios


def winning(ratios: Mapping[tuple[int, int], float]) -> dict[int, int]:
    """{(n, batch): time of the other over ours} -> {largest n: smallest batch}, ascending in both.

    Of all such stairs the one with the largest product of the ratios that lie below it, so that one
    disturbed measurement does not outweigh its neighbours. Where nothing was measured, nothing is
    claimed.
    """
    batches = [*sorted({batch for _, batch in ratios}), math.inf]
    best: dict[float, tuple[float, tuple]] = {0: (0.0, ())}  # the last step: gain, steps until here
    sizes = sorted({n for n, _ in ratios})
    for size in sizes:
        gains = {
            step: sum(
                math.log(ratio / NOISE)
                for (n, batch), ratio in ratios.items()
                if n == size and batch >= step
            )
            for step in batches
        }
        best = {
            step: max(
                (gain + gains[step], (*s, step)) for last, (gain, s) in best.items() if last <= step
            )
            for step in batches
        }
    _, steps = max(best.values())
    last = {step: n for n, step in zip(sizes, steps, strict=True) if step < math.inf}
    return {n: step for step, n in last.items()}


def source(text: str) -> str:
    """``text``, that of crossover.py, with the tables in memory below its line, as ruff would."""
    lines = [text.partition(LINE)[0] + LINE, "", "MEASURED = {"]
    for device, facts in crossover.MEASURED.items():
        entries = [f"        {_quoted(key)}: {_quoted(value)}," for key, value in facts.items()]
        lines += [f"    {_quoted(device)}: {{", *entries, "    },"]
    lines.append("}")
    for name, decision in DECISIONS.items():
        table = getattr(crossover, name)
        keys = itertools.product(crossover.MEASURED, decision.dtypes)
        lines += ["", f"# {decision.meaning}", f"{name} = {{"]
        lines += [f"    ({_quoted(d)}, {dtype}): {table[d, dtype]}," for d, dtype in keys]
        lines.append("}")
    return "\n".join(lines) + "\n"


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def report(rows: list[dict]) -> str:
    """The ratios of each table and dtype, n down and batch across."""
    parts = []
    for name, dtype in dict.fromkeys((r["table"], r["dtype"]) for r in rows):
        found = [r for r in rows if (r["table"], r["dtype"]) == (name, dtype)]
        ratios = {(r["n"], r["batch"]): f"{r['ratio'][1]:.2f}" for r in found}
        batches = sorted({batch for _, batch in ratios})
        lines = [f"| {name}, {dtype}: n | {' | '.join(f'batch {b}' for b in batches)} |"]
        lines.append("|" + "---|" * (1 + len(batches)))
        for n in dict.fromkeys(n for n, _ in ratios):
            lines.append(f"| {n} | {' | '.join(ratios.get((n, b), '-') for b in batches)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=0.1, help="seconds a call and size")
    add_output(parser)
    options = parser.parse_args()
    if ops.EXTENSION_MISSING:
        parser.error(f"nothing to choose from: {ops.EXTENSION_MISSING}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = measure(device, options.budget)
    write(rows, options.output)
    print(report(rows))
    TABLE_FILE.write_text(source(TABLE_FILE.read_text()))
    print(f"\nWritten: {TABLE_FILE}")


if __name__ == "__main__":
    main()
