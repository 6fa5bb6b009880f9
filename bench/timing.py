"""What a call costs: clocks for each device, paired rounds, and the memory it takes."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path

import torch

Call = Callable[[], object]
Clock = Callable[[], float]  # makes one call and returns its seconds


def cpu_clock(call: Call) -> Clock:
    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


def cuda_clock(call: Call) -> Clock:
    """Seconds between two events around the call, from a cold L2."""
    # Twice the cache, so that writing it evicts all that was there.
    l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
    scratch = torch.empty(2 * max(l2_bytes, 1 << 20), dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds() -> float:
        scratch.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return seconds


def clock_of(device: str) -> Callable[[Call], Clock]:
    return cuda_clock if device == "cuda" else cpu_clock


def captured(call: Call) -> Call:
    """The call as one CUDA graph; a RuntimeError if it synchronises the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # lazy initialisation may synchronise
        # Asked before the capture: a capture that fails half-way leaves the context unusable.
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def paired(
    clocks: Mapping[str, Clock],
    budget: float,
    min_rounds: int = 3,
    max_rounds: int = 200,
) -> dict[str, list[float]]:
    """Seconds of each name, round by round: what drifts, drifts for all of them.

    A name takes part until it has used up `budget` seconds, so entry i of two names is the same
    round i. Each round has its own order, so that no name always follows the same other. The
    caller warms the clocks up.
    """
    shuffle = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    for done in range(max_rounds):
        active = [n for n, s in seconds.items() if len(s) == done]
        active = [n for n in active if done < min_rounds or sum(seconds[n]) < budget]
        for name in shuffle.sample(active, len(active)):
            seconds[name].append(clocks[name]())
    return seconds


def paired_ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, list[float]]:
    """Quartiles of seconds / seconds of `base`, over the rounds that both took part in."""
    return {
        name: quartiles([a / b for a, b in zip(values, seconds[base], strict=False)])
        for name, values in seconds.items()
    }


def quartiles(values: list[float]) -> list[float]:
    return (
        torch.tensor(values, dtype=torch.float64)
        .quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        .tolist()
    )


def extent(values: list[float]) -> list[float]:
    return [min(values), statistics.median(values), max(values)]


def spread(values: list[float]) -> str:
    """Of quartiles or an extent."""
    low, median, high = values
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


def rounded(values: list[float]) -> list[float]:
    """No clock is good for more digits."""
    return [float(f"{value:.5g}") for value in values]


def peak_bytes(call: Call, device: str) -> int:
    """The most memory that torch held at once for the call, beyond what it held before."""
    if device == "cuda":
        call()  # the libraries' workspaces, allocated once, are not the call's
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = [e for e in events if e.get("name") == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    return max(accumulate((e["args"]["Bytes"] for e in events), initial=0))
