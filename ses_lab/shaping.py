"""The options of SESRegularizer as a file has them: terms as mappings, schedules in epochs.

::

    ses: {beta: {schedule: linear, start: 0.9, end: 0.3, epochs: 50}}
    ses: {beta: {"blocks.1*": {schedule: step, values: [0.3, 0.7], epochs: [20]}, "*": 0.5}}
    ses: {beta: 0.5, terms: [{layers: blocks, last: 4}, {layers: attention_weights, alpha: 0.5}]}

A schedule stands wherever ``beta``, ``alpha`` or ``lambda_ses`` takes a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ses_kernels import Term, schedules
from ses_kernels.options import Number, at
from ses_lab.names import ConfigError, check_params, lookup
from ses_lab.options import SCHEDULED


class Length(NamedTuple):
    """Of a run."""

    epochs: int
    steps: int  # of an epoch

    def after(self, epochs: float) -> int:
        """The step at the end of so many epochs. ConfigError unless they are positive."""
        if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not epochs > 0:
            raise ConfigError(f"epochs of a schedule are numbers above 0, got {epochs!r}")
        return max(1, round(epochs * self.steps))


def linear(run: Length, *, start: float, end: float, epochs: float | None = None) -> Number:
    """A straight line from ``start`` to ``end`` over ``epochs``, those of the run if None."""
    return schedules.linear(start, end, run.after(run.epochs if epochs is None else epochs))


def cosine(run: Length, *, start: float, end: float, epochs: float | None = None) -> Number:
    """Half a cosine from ``start`` to ``end`` over ``epochs``, those of the run if None."""
    return schedules.cosine(start, end, run.after(run.epochs if epochs is None else epochs))


def step(run: Length, *, values: Sequence[float], epochs: Sequence[float]) -> Number:
    """``values[0]``, then ``values[i]`` after ``epochs[i - 1]``."""
    return schedules.step(values, [run.after(epoch) for epoch in epochs])


SCHEDULES: dict[str, Callable[..., Number]] = {"linear": linear, "cosine": cosine, "step": step}
GIVEN = ("run",)  # the arguments of SCHEDULES that are not the user's


def options(ses: Mapping[str, Any], run: Length, layers: Any = None) -> dict[str, Any]:
    """The keyword arguments of SESRegularizer for ``regularizer.ses``.

    Args:
        layers: what is hooked where ``ses``, or a term of it, does not say.

    Raises:
        ConfigError: a schedule or a term that is none, an unknown key, a value of a schedule out of
            its range; with its dotted key.
    """
    found = _scheduled("regularizer.ses", ses, run)
    if "terms" not in ses:
        return {"layers": layers, **found}
    where, terms = "regularizer.ses.terms", ses["terms"]
    if not isinstance(terms, Sequence) or not all(isinstance(term, Mapping) for term in terms):
        raise ConfigError(f"{where}: expected a list of mappings, got {terms!r}")
    for i, term in enumerate(terms):
        check_params(f"{where}.{i}", Term, term)
    found["terms"] = [
        Term(**{"layers": layers, **_scheduled(f"{where}.{i}", term, run)})
        for i, term in enumerate(terms)
    ]
    return found


def _scheduled(where: str, given: Mapping[str, Any], run: Length) -> dict[str, Any]:
    return {
        key: _number(f"{where}.{key}", key, value, run) if key in SCHEDULED else value
        for key, value in given.items()
    }


def _number(where: str, option: str, value: Any, run: Length) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "schedule" not in value:
        if option == "lambda_ses":
            raise ConfigError(f"{where}: expected a number or a schedule, got {value!r}")
        return {layer: _number(f"{where}.{layer}", option, v, run) for layer, v in value.items()}
    params = {key: v for key, v in value.items() if key != "schedule"}
    make = lookup(f"schedule of {where}", SCHEDULES, value["schedule"])
    check_params(where, make, params, GIVEN)
    try:
        scheduled = make(run, **params)
        # Between these it is monotone or constant, so that no other step is out of range.
        for place in (0, *getattr(scheduled, "milestones", [getattr(scheduled, "steps", 0)])):
            at(scheduled, place, option)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
    return scheduled
