"""Options: a number or a schedule, one for all layers or a mapping from their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase

from ses_kernels import layers, schedules

Number = float | Callable[[int], float]  # a number, or a schedule: a function of the step

_RANGES = {
    "beta": ("between 0 and 1", lambda v: 0 < v < 1),
    "alpha": ("finite, at least 0", lambda v: 0 <= v < math.inf),
    "lambda_ses": ("finite and at least 0", lambda v: 0 <= v < math.inf),
}
_KINDS = (schedules.Linear, schedules.Cosine, schedules.Steps)
_SCHEDULES = {kind.__name__: kind for kind in _KINDS}


def require(condition: bool, option: str, range_: str, got) -> None:
    if not condition:
        raise ValueError(f"{option} must be {range_}, got {got!r}")


def is_count(value) -> bool:
    return isinstance(value, int) and value >= 1


def number(option: str, value: Number) -> Number:
    """A schedule as it is, to be checked when it is called; else a number in its range."""
    if callable(value):
        return value
    words, inside = _RANGES[option]
    require(inside(value), option, words, value)
    return float(value)


def at(value: Number, step: int, option: str) -> float:
    """The number at a step."""
    if not callable(value):
        return value
    now = value(step)
    number(option, now)
    return now


def per_layer(option: str, value, names, default) -> dict:
    """The value of each layer; from a mapping, that of the first pattern that matches."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    for pattern in value:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise layers.no_match(option, pattern, names)
    return {
        name: next((v for p, v in value.items() if fnmatchcase(name, p)), default) for name in names
    }


def written(value: Number):
    """A number or a schedule as a checkpoint can have it; None for a function of someone's own."""
    if not callable(value):
        return value
    if isinstance(value, _KINDS):
        return {type(value).__name__: asdict(value)}
    return None


def read(value) -> Number:
    """The opposite of :func:`written`, also after JSON made lists of tuples."""
    if not isinstance(value, Mapping):
        return value
    ((name, fields),) = value.items()
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return _SCHEDULES[name](**fields)
