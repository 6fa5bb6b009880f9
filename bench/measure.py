"""One measurement: the same work by several providers in paired rounds, a row for each."""

from __future__ import annotations

from collections.abc import Mapping

from bench import host
from bench.provenance import provenance
from bench.timing import (
    Call,
    captured,
    cpu_clock,
    cuda_clock,
    paired,
    paired_ratios,
    peak_bytes,
    quartiles,
    rounded,
)

BASE = "ours"


def measure(
    benchmark,
    budget: float,
    calls: Mapping[str, Call],
    facts: dict,
    device: str,
    uncapturable: frozenset[str] = frozenset(),
    base: str = BASE,
) -> None:
    """Rows of ``calls`` into the benchmark; ``facts`` (shape, mode, clock, ...) go into each.

    ``base`` names the call by whose time those of the others are divided.
    """
    rows, clocks = {}, {}
    for name, call in calls.items():
        rows[name] = {"provider": name, **facts, **provenance(device)}
        try:
            rows[name]["peak_bytes"] = peak_bytes(call, device)  # and warms up
            clocks[name] = _clock(call, facts["clock"], name in uncapturable)
        except RuntimeError as error:  # a row all the same: why it could not run here
            rows[name]["skipped"] = str(error).partition("\n")[0]
    if device == "cpu":
        clocks |= host.clocks()
    seconds = benchmark.pedantic(paired, (clocks, budget), rounds=1, iterations=1)
    around = host.take(seconds)
    ratios = paired_ratios(seconds, base) if base in seconds else {}
    for name, values in seconds.items():
        rows[name] |= {
            "rounds": len(values),
            "seconds": rounded(quartiles(values)),
            f"over {base}": rounded(ratios[name]) if ratios else None,
            **around,
        }
    benchmark.extra_info["rows"] = list(rows.values())
    assert facts["clock"] == "graph" or base in seconds, rows[base]["skipped"]


def _clock(call: Call, clock: str, uncapturable: bool):
    if clock == "wall":
        return cpu_clock(call)
    if clock == "graph" and uncapturable:
        raise RuntimeError("not on torch's stream and allocator")
    return cuda_clock(captured(call) if clock == "graph" else call)
