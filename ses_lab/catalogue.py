"""What there is to choose from: every registry, each entry with its parameters and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ses_lab import experiments, run_probes
from ses_lab.config import Choice, registries
from ses_lab.names import REQUIRED, parameters


def _plural(kind: str) -> str:
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def catalogue() -> dict[str, list[dict[str, str]]]:
    """Kind, in the plural -> rows of ``name``, ``parameters`` as ``key=default`` and ``about``.

    The parameters of a study are its variants. A parameter without a default is a bare name.
    """
    found = {"studies": [_study(name) for name in experiments.names()]}
    kinds = {**registries(), "run probe": run_probes.REGISTRY}
    for kind, registry in kinds.items():
        rows = [
            {
                "name": name,
                "parameters": _shown_all(parameters(entry, registry.given)),
                "about": _about(entry),
            }
            for name, entry in registry.entries.items()
        ]
        if registry.shared:
            shared = _shown_all(registry.shared)
            rows.append({"name": f"every {kind}", "parameters": shared, "about": "beside its own"})
        found[_plural(kind)] = rows
    return found


def published(study: str) -> list[dict[str, str]]:
    """A row for each source of a study's published numbers: where they are not defined as ours."""
    rows = [r.model_dump(exclude={"rows", "seeds"}) for r in experiments.load(study).reference]
    return rows or [{"source": "no published numbers at hand"}]


def _study(name: str) -> dict[str, str]:
    experiment = experiments.load(name)
    variants = f"variants: {', '.join(experiment.variants)}"
    return {"name": name, "parameters": variants, "about": experiment.question}


def _shown_all(known: Mapping[str, Any] | None) -> str:
    if known is None:
        return "any"
    return ", ".join(
        key if default is REQUIRED else f"{key}={_shown(default)}" for key, default in known.items()
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, Choice):
        return value.slug
    return "null" if value is None else getattr(value, "__name__", str(value))


def _about(entry: Callable) -> str:
    """The first sentence of its docstring."""
    text = inspect.cleandoc(getattr(entry, "func", entry).__doc__ or "")
    return " ".join(text.partition("\n\n")[0].split())
