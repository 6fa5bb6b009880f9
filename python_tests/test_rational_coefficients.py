"""The coefficients of the rational logarithm in 60 digits, and the tool that derives them."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import mpmath
import pytest
import torch
from mpmath import mpf

from ses_kernels import rational_coefficients
from tools import rational_coefficients as tool

SOURCE = Path(rational_coefficients.__file__)
STATED = re.findall(
    r"# m = (\d+), a = (\S+) on \[(\S+), 1\]: sup \|x\^a e\(x\)\| = (\S+)\n", SOURCE.read_text()
)


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(60):
        yield


def weighted_errors(a, delta, c, t, w, per_pole=50):
    """x^a e(x) on a grid as dense as the poles, beyond the smallest of them where delta is 0."""
    end = -mpmath.log(delta) if delta else 30 - mpmath.log(t[0])
    grid = [mpmath.exp(-end * u**2) for u in mpmath.linspace(0, 1, per_pole * len(t))]
    return [
        x**a * (mpmath.log(x) - c + sum(w_j / (x + t_j) for t_j, w_j in zip(t, w, strict=True)))
        for x in grid
    ]


def alternations(values, least):
    """How many of the values, at most, exceed ``least`` with alternating signs."""
    signs = [v > 0 for v in values if abs(v) >= least]
    return 1 + sum(a != b for a, b in pairwise(signs))


@pytest.mark.parametrize(
    ("dtypes", "stated"), list(zip(rational_coefficients.POLES, STATED, strict=True)), ids=str
)
def test_sets_attain_their_stated_error(dtypes, stated):
    m = int(stated[0])
    a, delta, error = map(mpf, stated[1:])
    c, poles = rational_coefficients.POLES[dtypes]
    t, w = zip(*poles, strict=True)
    assert len(t) == m
    assert t[0] > 0
    assert list(t) == sorted(set(t))
    assert min(w) > 0
    values = weighted_errors(a, delta, c, t, w)
    rounding = mpf(2) ** -51  # of c, in double precision: half a unit in the last place of 4 to 8
    largest = max(map(abs, values))
    assert error * 0.99 - rounding <= largest <= error * 1.001 + rounding
    # de la Vallee Poussin: with 2 m + 2 alternations of that size, no m poles have a smaller sup
    assert alternations(values, 0.98 * error - rounding) == 2 * m + 2


@pytest.mark.parametrize(
    ("m", "a", "delta"),
    [(1, "1", "0"), (6, "1", "0"), (8, "1", "0"), (5, "1/2", "0"), (6, "1/2", "1e-4")],
)
def test_remez_equioscillates(m, a, delta):
    best = tool.remez(m, a, delta)
    assert len(best.t) == len(best.w) == m
    assert min(best.w) > 0
    assert len(best.s) == 2 * m + 2
    assert best.s[0] == 0
    for i, s in enumerate(best.s):
        value = tool.weighted_error(mpmath.exp(-s), mpf(a), best.t, best.w, best.c)
        assert abs((-1) ** i * value / best.error - 1) < 1e-15
    values = weighted_errors(mpf(a), mpf(delta), best.c, best.t, best.w)
    assert max(map(abs, values)) <= best.error * (1 + mpf(10) ** -20)


@pytest.mark.parametrize("m", [6, 8])
def test_error_has_the_asymptotic_rate_and_floor(m):
    best = tool.remez(m, "1", "0")
    # Stahl's constant and rate; a next order of m + 0.645 is seen, and m + 0.64 at m = 36
    stahl = 16 * mpmath.pi * mpmath.exp(-2 * mpmath.pi * mpmath.sqrt(m + 0.645))
    assert abs(best.error / stahl - 1) < 0.01
    assert abs(best.error / best.t[0] - 0.0607) < 1e-4
    root = tool.remez(m, "1/2", "0")
    assert abs(root.error / mpmath.sqrt(root.t[0]) - 0.2047) < 1e-4


def test_remez_refuses_an_interval_beyond_its_poles():
    with pytest.raises(ValueError, match="use 0"):
        tool.remez(4, "1", "1e-12")


def test_tool_checks_and_writes_the_table(monkeypatch, tmp_path):
    """On the fastest set; the others are what the first test certifies."""
    dtypes = ("float32", "float32")
    c, poles = rational_coefficients.POLES[torch.float32, torch.float32]
    copy = tmp_path / "rational_coefficients.py"
    copy.write_text("import torch\n\nPOLES = {}\n")
    monkeypatch.setattr(tool, "TARGET", copy)
    monkeypatch.setattr(tool, "SETS", {dtypes: tool.SETS[dtypes]})

    def run(option):
        monkeypatch.setattr(sys, "argv", ["rational_coefficients.py", option])
        return tool.main()

    assert run("--check") == 1
    assert run("--write") == 0
    assert run("--check") == 0
    namespace = {}
    exec(copy.read_text(), namespace)
    assert namespace["POLES"] == {(torch.float32, torch.float32): (c, poles)}
    copy.write_text(copy.read_text().replace(repr(poles[0][0]), repr(poles[0][0] * (1 + 1e-15))))
    assert run("--check") == 1
