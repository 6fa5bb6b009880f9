"""Numbers that change with the step: beta, alpha and lambda_ses of SESRegularizer take them.

A schedule is any function of the step, an int from 0, that returns a float. These are such
functions that can also be compared, pickled and written down in a checkpoint.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A straight line from ``start`` to ``end`` over ``steps`` steps, then ``end``."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * _progress(step, self.steps)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from ``start`` to ``end`` over ``steps`` steps, then ``end``."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        angle = math.pi * _progress(step, self.steps)
        return self.end + (self.start - self.end) * (1 + math.cos(angle)) / 2


@dataclass(frozen=True)
class Steps:
    """``values[0]`` before ``milestones[0]``, ``values[i + 1]`` from ``milestones[i]`` on."""

    values: tuple[float, ...]
    milestones: tuple[int, ...]

    def __call__(self, step: int) -> float:
        return self.values[bisect.bisect_right(self.milestones, step)]


def linear(start: float, end: float, steps: int) -> Linear:
    """``start`` at step 0, ``end`` from step ``steps`` on, a straight line between.

    Examples:
        >>> beta = ses_kernels.schedules.linear(0.9, 0.5, steps=1000)
        >>> beta(0), round(beta(500), 3), beta(2000)
        (0.9, 0.7, 0.5)

    ValueError unless ``steps`` is an int of at least 1.
    """
    return Linear(float(start), float(end), _count(steps))


def cosine(start: float, end: float, steps: int) -> Cosine:
    """``start`` at step 0, ``end`` from step ``steps`` on, half a cosine between.

    Examples:
        >>> beta = ses_kernels.schedules.cosine(0.9, 0.5, steps=1000)
        >>> beta(0), round(beta(500), 3), beta(2000)
        (0.9, 0.7, 0.5)

    ValueError unless ``steps`` is an int of at least 1.
    Source: Loshchilov & Hutter, ICLR 2017, without restarts.
    """
    return Cosine(float(start), float(end), _count(steps))


def step(values: Sequence[float], milestones: Sequence[int]) -> Steps:
    """``values[0]``, then ``values[i]`` from step ``milestones[i - 1]`` on.

    Examples:
        >>> beta = ses_kernels.schedules.step([0.3, 0.7, 0.9], milestones=[100, 200])
        >>> beta(99), beta(100), beta(200)
        (0.3, 0.7, 0.9)

    ValueError unless there is one value more than milestones, and those rise.
    """
    if len(values) != len(milestones) + 1 or list(milestones) != sorted(set(milestones)):
        raise ValueError(
            "step needs one value more than milestones, which rise; got values "
            f"{list(values)} and milestones {list(milestones)}"
        )
    return Steps(tuple(map(float, values)), tuple(map(int, milestones)))


def _progress(step: int, steps: int) -> float:
    return min(max(step / steps, 0.0), 1.0)


def _count(steps: int) -> int:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, got {steps!r}")
    return steps
