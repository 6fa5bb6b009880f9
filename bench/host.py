"""How busy the host is: the clock of its CPU, and the time of a loop of fixed work.

Other guests of a host lower its clock, and take units of a core that two of them share: wide
registers suffer first. Both loops are in reference.cpp, and are timed in every round between the
calls that are measured.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path

from bench.provenance import isa
from bench.timing import Clock, cpu_clock, quartiles, rounded

SOURCE = Path(__file__).with_name("reference.cpp")
ADDITIONS, MULTIPLY_ADDS = 400_000, 100_000  # 0.1 ms and 0.2 to 0.4 ms at 3.5 GHz
REGISTER_BYTES = {"avx512": 64, "avx2": 32}
CLOCK, LOOP = "additions", "multiply-adds"


@cache
def _library() -> ctypes.CDLL:
    """reference.cpp, compiled; an OSError or a CalledProcessError without a compiler."""
    compiler = os.environ.get("CXX", "c++").split()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "reference.so")
        command = [*compiler, "-O3", "-shared", "-fPIC", str(SOURCE), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True)
        library = ctypes.CDLL(str(target))
    library.additions.argtypes = [ctypes.c_long]
    library.multiply_adds.argtypes = [ctypes.c_int, ctypes.c_long]
    return library


def clocks() -> dict[str, Clock]:
    """Of both loops; none without a compiler.

    The second is in registers of the instruction set in use, and on one thread: workers of torch
    that spin for a while after a call would slow a second.
    """
    try:
        library = _library()
    except (OSError, subprocess.CalledProcessError):
        return {}
    width = REGISTER_BYTES.get(isa(), 16)
    return {
        CLOCK: cpu_clock(partial(library.additions, ADDITIONS)),
        LOOP: cpu_clock(partial(library.multiply_adds, width, MULTIPLY_ADDS)),
    }


def take(seconds: dict[str, list[float]]) -> dict[str, list[float] | float]:
    """What a row says of the host: the loops' seconds, which are taken out of the others'.

    Quartiles of the clock; of the fixed loop the least, and the mean, in which a few rounds count
    that had to wait for the CPU.
    """
    if CLOCK not in seconds:
        return {}
    ticks, loop = seconds.pop(CLOCK), seconds.pop(LOOP)
    return {
        "clock_ghz": rounded(quartiles([1e-9 * ADDITIONS / s for s in ticks])),
        "loop_least": min(loop),
        "loop_mean": statistics.fmean(loop),
    }
