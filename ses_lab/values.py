"""Values as people write them, in a file, a flag or the environment: one spelling everywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from ses_lab.names import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 wants 5.0e-4 and reads 5e-4 as a string; YAML 1.2 and people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def parse_value(where: str, text: str) -> Any:
    """One value as YAML; ConfigError with ``where`` it was given."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"{where}: {text!r} is no YAML; quote it, or close its brackets"
        ) from None


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse_list(text: str) -> list[Any]:
    """``0,1`` or ``[0, 1]`` -> ``[0, 1]``; ``""`` -> ``[]``."""
    return [parse_value("list", part) for part in _split(re.sub(r"^\s*\[(.*)\]\s*$", r"\1", text))]


def parse_seeds(text: str) -> list[int]:
    """As :func:`parse_list`. ConfigError for anything but whole numbers from 0 up."""
    seeds = parse_list(text)
    for seed in seeds:
        if type(seed) is not int or seed < 0:
            raise ConfigError(f"--seeds: expected whole numbers as in 0,1,2, got {seed!r}")
    return seeds


def parse_choice(text: str) -> dict[str, Any]:
    """``corruption:names=[fog,jpeg],samples=64`` -> name and parameters; a bare name has none.

    ``package.module:callable`` is a name as a whole: no ``=`` follows its colon.
    """
    name, params = text, ""
    if match := re.fullmatch(r"([^=]*?):([\w.]+=.*)", text):
        name, params = match.groups()
    found: dict[str, Any] = {"name": name}
    for item in _split(params):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"{text!r}: expected KEY=VALUE after the colon, got {item!r}")
        found[key] = parse_value(f"{name}.{key}", value)
    return found


def parse_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """``--optimizer.lr 0.1 --seed=3`` -> ``{"optimizer.lr": 0.1, "seed": 3}``; values are YAML."""
    flags: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        key, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not (equals or rest):
            raise ConfigError(f"expected --KEY VALUE with a key of the configuration, got {flag!r}")
        flags[key] = parse_value(flag, value if equals else rest.pop(0))
    return flags
