"""Derives POLES of ses_kernels/rational_coefficients.py: log x ~ c - sum_j w_j / (x + t_j).

    python tools/rational_coefficients.py            # print the table
    python tools/rational_coefficients.py --write    # put it into that file
    python tools/rational_coefficients.py --check    # exit code 1 if it is not what stands there
    python tools/rational_coefficients.py --plot docs/img/rational.svg    # the error of what does

Less than a minute on one core; every digit of the double precision numbers is compared.

Problem. With e(x) = log x - c + sum_j w_j / (x + t_j), minimise the sup of |x^a e(x)| over
[delta, 1], delta = 0 included. There are 2 m + 1 parameters; at the minimum the weighted error
takes its extreme value E with alternating signs at 2 m + 2 points x_0 = 1 > x_1 > ..., the last of
them delta unless that is 0. In between e has 2 m + 1 zeros, so that c - sum_j w_j / (x + t_j) is a
multipoint Pade approximant of log x = int_0^inf (1 / (1 + t) - 1 / (x + t)) dt: t_j and w_j are
nodes and weights of a Gauss quadrature, hence positive.

Method. Remez exchange in s = -log x, which spreads the points evenly. Each round solves
x_i^a e(x_i) = (-1)^i E for log t, log w, c and E by Newton, then moves each inner point by one
Newton step to the extremum beside it. Both converge quadratically.

Initial guess. With t = 4 exp(tau), let (A + a tau) / (2 pi^2) be the density of poles in tau: a
trapezoidal rule of step h in log t has the error exp(-2 pi^2 / h), and this density makes x^a times
that the same everywhere, E ~ exp(-A). On [0, 1] the poles begin where it is zero, at
L = -2 pi sqrt(m / a), so that E ~ exp(-2 pi sqrt(a m)). The ends reflect, as in
Zolotarev's problem: a pole at distance d from tau = 0 moves to 2 log(2 sinh(d / 2)) from it, a
point of the interval to 2 log(2 cosh(d / 2)), and where delta > 0 the same holds at
L = log(delta / 16).

Rate. For x^alpha on [0, 1] the error of best rational approximation is asymptotically
4^(1 + alpha) |sin pi alpha| exp(-2 pi sqrt(alpha m)); its derivative at alpha = 1 suggests
16 pi exp(-2 pi sqrt m) for a = 1. What comes out is that with m + 0.64 for m.

Sources. Root-exponential rate at a branch point: Newman, Michigan Math. J. 11 (1964); Gonchar,
Math. USSR Sbornik 34 (1978). Its constant: Stahl, Bull. AMS 28 (1993), Acta Math. 190 (2003).
Matrix logarithms by partial fractions: Hale, Higham & Trefethen, SIAM J. Numer. Anal. 46 (2008).
Exchange, alternation, Stieltjes functions: Braess, "Nonlinear Approximation Theory" (1986).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from mpmath import exp, expm1, log, lu_solve, matrix, mp, mpf, nstr, pi, sqrt

TARGET = Path(__file__).parents[1] / "ses_kernels" / "rational_coefficients.py"
DIGITS = 60
SETS = {  # dtypes of the Gram matrix and of the result: m, a, delta
    ("float32", "float32"): (12, "1/2", "5e-6"),
    ("float64", "float32"): (24, "1", "0"),
    ("float64", "float64"): (36, "1", "0"),
}


class Minimax(NamedTuple):
    t: list[mpf]  # (m,) ascending
    w: list[mpf]  # (m,)
    c: mpf
    error: mpf  # E, the sup of |x^a e(x)|
    s: list[mpf]  # (2 m + 2,) ascending: x^a e(x) = (-1)^i E at x = exp(-s_i)


def weighted_error(x: mpf, a: mpf, t: list[mpf], w: list[mpf], c: mpf) -> mpf:
    return x**a * (log(x) - c + sum(w_j / (x + t_j) for t_j, w_j in zip(t, w, strict=True)))


@mp.workdps(DIGITS)
def remez(m: int, a: str, delta: str) -> Minimax:
    """The best m >= 1 poles; ValueError where delta > 0 is below what they resolve on [0, 1]."""
    a, delta = mpf(a), mpf(delta)
    t, w, s = _initial_guess(m, a, delta)
    c, error = sum(w_j / (1 + t_j) for t_j, w_j in zip(t, w, strict=True)), mpf(0)
    for _ in range(30):
        t, w, c, error = _level(a, t, w, c, error, s)
        s, moved = _exchange(a, t, w, c, s, fixed_end=delta > 0)
        if moved < mpf(10) ** (-DIGITS // 3):  # squared by the step just made
            return Minimax(t, w, c, error, s)
    raise ArithmeticError(f"no convergence at m = {m}, a = {a}, delta = {delta}")


def _initial_guess(m: int, a: mpf, delta: mpf) -> tuple[list[mpf], list[mpf], list[mpf]]:
    reflects = delta > 0
    L = -2 * pi * sqrt(m / a)
    if reflects:
        if log(delta / 16) <= L:
            raise ValueError(f"the best {m} poles on [0, 1] do not reach down to {delta}: use 0")
        L = log(delta / 16)
    A = -2 * pi**2 * m / L - a * L / 2

    def tau(k):  # as many poles lie in (L, tau) as k says
        b = A + a * L
        return L + (sqrt(b * b + 4 * pi**2 * a * k) - b) / a

    def log_end(distance, sign):  # how far a reflection moves
        return 2 * log(1 + sign * exp(-distance))

    # The offsets need only be near enough for Newton. Too small an x_(2 m + 1) loses an extremum.
    t, w, s = [], [], []
    for j in range(m):
        u = tau((j + mpf(5) / 8) * m / (m + mpf(1) / 2))
        t.append(4 * exp(u + (log_end(u - L, -1) if reflects else 0) - log_end(-u, -1)))
        slope = 1 + 2 / expm1(-u) + (2 / expm1(u - L) if reflects else 0)  # d log t / d tau
        w.append(t[-1] * slope * 2 * pi**2 / (A + a * u))  # dt / dk
    last = 0 if reflects else mpf(1) / 8
    for i in range(2 * m + 2):
        u = tau(m - i * (m - last) / (2 * m + 1))
        s.append(log_end(-u, 1) - log(4) - u - (log_end(u - L, 1) if reflects else 0))
    s[0] = mpf(0)
    if reflects:
        s[-1] = -log(delta)
    return t, w, s


def _level(a, t, w, c, error, s):
    """Newton for x_i^a e(x_i) = (-1)^i E at the points exp(-s_i), until a step is below 1e-12."""
    m = len(t)
    for _ in range(50):
        jacobian, residual = matrix(2 * m + 2, 2 * m + 2), matrix(2 * m + 2, 1)
        for i, s_i in enumerate(s):
            x = exp(-s_i)
            residual[i] = (-1) ** i * error - weighted_error(x, a, t, w, c)
            for j in range(m):
                term = x**a * w[j] / (x + t[j])
                jacobian[i, j] = -term * t[j] / (x + t[j])  # by log t_j
                jacobian[i, m + j] = term  # by log w_j
            jacobian[i, 2 * m] = -(x**a)
            jacobian[i, 2 * m + 1] = -((-1) ** i)
        step = lu_solve(jacobian, residual)
        largest = max(abs(step[j]) for j in range(2 * m))
        step /= max(1, largest)
        t = [t_j * exp(step[j]) for j, t_j in enumerate(t)]
        w = [w_j * exp(step[m + j]) for j, w_j in enumerate(w)]
        c, error = c + step[2 * m], error + step[2 * m + 1]
        if largest < mpf(10) ** -12:
            return t, w, c, error
    raise ArithmeticError(f"Newton's method did not converge at m = {m}")


def _exchange(a, t, w, c, s, fixed_end):
    """Each inner point to the extremum of the error beside it; the new points, the largest move."""
    moved = list(s)
    for i in range(1, len(s) - fixed_end):
        x = exp(-s[i])
        # e and its derivatives by log x; those of x^a e are x^a times the two combinations below
        e, e1, e2 = log(x) - c, mpf(1), mpf(0)
        for t_j, w_j in zip(t, w, strict=True):
            term = w_j / (x + t_j)
            e, term = e + term, term * x / (x + t_j)
            e1, e2 = e1 - term, e2 - term * (t_j - x) / (x + t_j)
        step = (a * e + e1) / (a * a * e + 2 * a * e1 + e2)
        low = (s[i - 1] - s[i]) / 3
        high = (s[i + 1] - s[i]) / 3 if i + 1 < len(s) else mpf(1)
        moved[i] += max(low, min(high, step))
    return moved, max(abs(new - old) for new, old in zip(moved, s, strict=True))


def table() -> str:
    """The Python source of POLES."""
    lines = ["POLES = {  # dtypes of the Gram matrix, of the result: (c, ((t_1, w_1), ...))"]
    for (gram, result), (m, a, delta) in SETS.items():
        best = remez(m, a, delta)
        error = nstr(best.error, 4, strip_zeros=False)
        lines += [
            f"    # m = {m}, a = {a} on [{delta}, 1]: sup |x^a e(x)| = {error}",
            f"    (torch.{gram}, torch.{result}): (",
            f"        {float(best.c)!r},",
            "        (",
            *(
                f"            ({float(t)!r}, {float(w)!r}),"
                for t, w in zip(best.t, best.w, strict=True)
            ),
            "        ),",
            "    ),",
        ]
    return "\n".join([*lines, "}", ""])


def plot(path: Path) -> None:
    """|x e(x)| and |x^(1/2) e(x)| of the numbers in that file, rounded to double precision."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rational"  # the same file each time
    import matplotlib.pyplot as plt

    from ses_kernels.rational_coefficients import POLES, columns

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    titles = {"1": "|x e(x)|: of the entropy", "1/2": "|x^(1/2) e(x)|: of its gradient"}
    xs = [mpf(10) ** (-mpf(i) / 15) for i in range(16 * 15 + 1)]
    for axis, (a, title) in zip(axes, titles.items(), strict=True):
        for gram, result in POLES:
            c, t, w = columns(gram, result)
            with mp.workdps(DIGITS):
                error = [abs(weighted_error(x, mpf(a), t, w, c)) for x in xs]
            label = f"{len(t)} poles: K {gram}, H {result}".replace("torch.", "")
            axis.loglog(xs, error, label=label, linewidth=1)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("x, an eigenvalue of K / tr K")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize="x-small", loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help=f"rewrite {TARGET.name}")
    mode.add_argument("--check", action="store_true", help=f"compare with {TARGET.name}")
    mode.add_argument("--plot", type=Path, metavar="SVG", help=f"the error of {TARGET.name}")
    options = parser.parse_args()
    if options.plot:
        plot(options.plot)
        return 0
    head, name, old = TARGET.read_text().partition("POLES = {")
    new = table()
    if options.check:
        return int(name + old != new)
    if options.write:
        TARGET.write_text(head + new)
    else:
        print(new, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
