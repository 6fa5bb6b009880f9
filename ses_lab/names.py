"""What is not known is refused with the nearest name: keys, entries of registries, parameters."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class ConfigError(ValueError):
    """What is wrong with a configuration, a fault a line, each with its dotted key."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not there: what is nearest, or all there is."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown {kind} {name!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    )


REQUIRED = inspect.Parameter.empty  # in the place of a default


def parameters(function: Callable, given: Iterable[str] = ()) -> dict[str, Any] | None:
    """Parameter -> default of what can be chosen by name; None where it takes any.

    ``given`` are not the user's to choose.
    """
    signature = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in signature):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return {p.name: p.default for p in signature if p.kind not in positional
            and p.name not in given}  # fmt: skip


def check_params(where: str, function: Callable, params: Iterable[str], given: Iterable[str] = ()):
    """ConfigError for a parameter that ``function`` does not take; see :func:`parameters`."""
    known = parameters(function, given)
    for name in params if known is not None else ():
        if name not in known:
            raise ConfigError(f"{where}: {unknown('parameter', name, known or ['none'])}")


def lookup(kind: str, registry: Mapping[str, Any], name: str) -> Any:
    """registry[name], or a ConfigError with the nearest name."""
    if name not in registry:
        raise ConfigError(unknown(kind, name, registry))
    return registry[name]
