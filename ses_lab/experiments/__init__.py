"""Experiments as data: a YAML file of variants, seeds, probes and scales, and what runs it.

::

    base: {dataset: cifar100, model: resnet18, ...}   # a RunConfig, without method and seed
    variants:                                          # changes of it; the first is the control
      baseline: {}
      k=10: {regularizer.ses: {every_k: 10}}
    # These two are all that a study needs.
    title: Shaping at every k-th step
    question: How much of the effect remains, and of the cost?
    seeds: [42]
    probes: {corruption: {severities: [1, 3, 5]}}
    weights: best                                      # that are probed; the last by default
    against: {ses+mixup: mixup}                        # compared with that, not with the control
    measures: [accuracy, gap, corruption.mean]         # columns of the report
    profiles: [rank.layer]                             # measures by layer, a table each
    sweep: regularizer.ses.every_k                     # an axis of its figure
    reference:                                         # ``definition``: where it is not as ours
      - {source: ..., setting: ..., definition: ..., rows: {k=10: {accuracy: 75.85}}}
    scales: {full: {}, smoke: {base.dataset: digits, seeds: [0, 1, 2]}}

A scale is changes of the document, by the rule of :func:`ses_lab.config.merge`; ``full`` changes
nothing unless it is given, and ``smoke`` is what runs by default where there is one. A variant that
learns from another one of the same seed names it, as ``teacher: {run: teacher}`` or ``init_from``,
and comes after it. Published numbers are those that the named source gives, and no others.

``grid`` makes variants as a product of axes: of ``[{tiny: ..., small: ...}, {a: ..., b: ...}]``
there are ``tiny+a``, ``tiny+b``, ``small+a`` and ``small+b``, each compared with that in which the
first entry stands in for its own on one axis: ``small+b`` with ``tiny+b``, and ``tiny+b`` with
``tiny+a``. ``variants`` and ``against`` change and add to them.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from ses_lab.config import (
    ConfigError,
    RunConfig,
    Strict,
    from_environment,
    lookup,
    merge,
    read_yaml,
    unknown,
)
from ses_lab.folder import RunFolder, atomic
from ses_lab.options import Probes
from ses_lab.sinks import Sink

# Of every run: last and best accuracy on the test set, its last macro F1 and AUROC, last accuracy
# on the validation set, and on the training set less that on the test set, in percent; median over
# the epochs of the seconds of their training steps, without evaluation, and by how many percent it
# is longer than the control's; peak memory of the device in MiB.
METRICS = (
    *("accuracy", "best_accuracy", "f1", "auroc", "validation", "gap"),
    *("seconds", "overhead", "memory"),
)


class Reference(Strict):
    """Published numbers, in the units of ours; ``definition`` says in what they differ still."""

    source: str
    setting: str
    definition: str = ""
    seeds: int = 1
    # variant -> measure -> number, mean and deviation, or the source's words; of a profile,
    # ``rank.layer``, a mapping from the layers
    rows: dict[str, dict[str, float | tuple[float, float] | str]]

    @model_validator(mode="before")
    @classmethod
    def _by_layer(cls, value: Any) -> Any:
        rows = value.get("rows") if isinstance(value, Mapping) else None
        if not isinstance(rows, Mapping) or not all(isinstance(r, Mapping) for r in rows.values()):
            return value
        flat: dict[str, dict[str, Any]] = {variant: {} for variant in rows}
        for variant, row in rows.items():
            for measure, number in row.items():
                layers = number if isinstance(number, Mapping) else {None: number}
                for layer, x in layers.items():
                    flat[variant][measure if layer is None else f"{measure}.{layer}"] = x
        return {**value, "rows": flat}


class Experiment(Strict):
    """One experiment at one scale; frozen and valid down to the last run."""

    name: str
    scale: str
    title: str
    question: str = ""
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    probes: Probes = Field({})
    weights: Literal["last", "best"] = "last"  # of the runs, that are probed
    measures: tuple[str, ...] = ("accuracy",)
    profiles: tuple[str, ...] = ()  # of measures by layer, what they have in common: rank.layer
    sweep: str | None = None
    pareto: str | None = None  # a measure, to be drawn against overhead
    against: dict[str, str] = Field({})  # variant -> what it is compared with; else the control
    reference: tuple[Reference, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        from ses_lab import run_probes

        for choice in self.probes.values():
            run_probes.check(choice)
        during = self.base.get("probes") or ()
        for label in during:
            if label in self.probes:
                raise ValueError(f"probes.{label} is the label of one of base.probes: take another")
        labels = (*self.probes, *during)
        measures = (*self.measures, *self.profiles, *([self.pareto] if self.pareto else []))
        for measure in measures:
            if measure.partition(".")[0] not in (*METRICS, *labels):
                raise ValueError(unknown("measure", measure, (*METRICS, *labels)))
        for pair in self.against.items():
            for variant in pair:
                lookup("variant of against", self.variants, variant)
        for reference in self.reference:
            for variant in reference.rows:
                lookup("variant of reference", self.variants, variant)
        self.runs(Path())
        return self

    @property
    def control(self) -> str:
        return next(iter(self.variants))

    def opponent(self, variant: str) -> str | None:
        """What a variant is compared with; None for the control itself."""
        other = self.against.get(variant, self.control)
        return None if other == variant else other

    def swept(self, variant: str) -> float | None:
        """The value of ``sweep`` in a variant; None where there is none."""
        value: Any = self.variants[variant] if self.sweep else None
        for key in self.sweep.split(".") if self.sweep else ():
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def runs(self, root: Path, variants: Sequence[str] = ()) -> dict[Path, RunConfig]:
        """Folder -> configuration of every run, those that others learn from before them.

        Of all variants; or of ``variants`` and those they learn from, ConfigError for another name.
        """
        for variant in variants:
            lookup("variant", self.variants, variant)
        found: dict[Path, RunConfig] = {}
        for seed in self.seeds:
            folders: dict[str, Path] = {}
            for variant, changes in self.variants.items():
                document = merge(self.base, {**changes, "method": variant, "seed": seed})
                for key in ("init_from", "teacher"):
                    if isinstance(source := document.get(key), Mapping):
                        if (other := source.get("run")) not in folders:
                            raise ConfigError(
                                f"variants.{variant}.{key}.run: expected a variant before it, "
                                f"{list(folders)}, got {other!r}"
                            )
                        document[key] = {**source, "run": str(folders[other])}
                try:
                    config = RunConfig.parse(document)
                except ConfigError as error:
                    raise ConfigError(f"variants.{variant}: {error}") from None
                folders[variant] = root / config.path
                found[folders[variant]] = config
        if not variants:
            return found
        needed: set[Path] = set()
        for path, config in reversed(found.items()):  # those that learn before their sources
            if config.method in variants or path in needed:
                needed |= {path, *(Path(s.run) for s in (config.teacher, config.init_from) if s)}
        return {path: config for path, config in found.items() if path in needed}


def names() -> tuple[str, ...]:
    """The experiments that come with the package."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.yaml")))


def load(
    name: str, scale: str | None = None, changes: Mapping[str, Any] | None = None
) -> Experiment:
    """An experiment by name, or of a YAML file, at one of its scales.

    Args:
        scale: None means "smoke" where the file has it, else "full".
        changes: dotted keys of the document, ``{"base.dataset.root": "data", "seeds": [0]}``;
            they overrule the environment (``SES_LAB__DATASET__ROOT``, of the base), and that the
            file.

    Raises:
        ConfigError: names every fault, with the nearest key or name there is.
    """
    if Path(name).suffix == ".yaml":
        path = Path(name)
    elif name in names():
        path = Path(__file__).parent / f"{name}.yaml"
    else:
        raise ConfigError(unknown("experiment", name, names()))
    document = read_yaml(path)
    # Dotted keys to nested ones, so that changes of a variant meet what they change.
    for part in ("base", "variants"):
        document[part] = document.get(part) or {}
    document["variants"] = {k: merge({}, v or {}) for k, v in document["variants"].items()}
    scales = {"full": {}, **(document.pop("scales", None) or {})}
    if scale is None:
        scale = "smoke" if "smoke" in scales else "full"
    document = merge(document, lookup("scale", scales, scale) or {})
    document["base"] = merge(document["base"], from_environment(os.environ))
    document = merge(document, changes or {})
    if grid := document.pop("grid", None):
        document |= _product(grid, document["variants"], document.get("against") or {}, path)
    title = path.stem.replace("_", " ")
    return _parse({"title": title, **document, "name": path.stem, "scale": scale}, path)


def _product(
    grid: Any, variants: Mapping[str, Any], against: Mapping[str, str], where: Path
) -> dict[str, Any]:
    """``variants`` and ``against`` of a grid; what is given for one of its variants comes last."""
    if not isinstance(grid, list) or not all(isinstance(axis, Mapping) and axis for axis in grid):
        raise ConfigError(
            f"{where}: grid: expected a list of axes, {{label: changes, ...}}, got {grid!r}"
        )
    found: dict[str, dict[str, Any]] = {}
    others: dict[str, str] = {}
    for labels in itertools.product(*grid):
        name, changes = "+".join(labels), {}
        for axis, label in zip(grid, labels, strict=True):
            changes = merge(changes, axis[label] or {})
        found[name] = changes
        firsts = [next(iter(axis)) for axis in grid]
        for i, first in enumerate(firsts):
            if labels[i] != first:
                others[name] = "+".join([*labels[:i], first, *labels[i + 1 :]])
                break
    found |= {name: merge(found.get(name, {}), changes) for name, changes in variants.items()}
    return {"variants": found, "against": {**others, **against}}


def _parse(document: Mapping[str, Any], where: Path) -> Experiment:
    try:
        return Experiment.model_validate(document)
    except ValidationError as error:
        faults = [
            f"{where}: {'.'.join(map(str, f['loc']))}: {f['msg'].removeprefix('Value error, ')}"
            for f in error.errors()
        ]
        raise ConfigError("\n".join(faults)) from None


def saved(path: Path) -> Experiment:
    """The experiment that :func:`run` wrote to ``path``, ``experiment.yaml``."""
    return _parse(read_yaml(path), path)


def run(
    name: str,
    scale: str | None = None,
    out: str | os.PathLike = "experiments",
    changes: Mapping[str, Any] | None = None,
    sinks: Sequence[Sink] = (),
    variants: Sequence[str] = (),
) -> Path:
    """Trains and probes every run that is not finished, in ``out/name/scale``; that folder.

    Args:
        variants: only these, and those that they start or learn from; all if there are none.

    Called again it goes on where it was ended, and does nothing where all is done. A run that
    diverges stays unfinished, with a warning, and the others go on.

    Raises as :func:`load`, and OtherRunError where the folder holds runs of another configuration.
    """
    from ses_lab import measure, training

    experiment = load(name, scale, changes)
    root = Path(out) / experiment.name / experiment.scale
    for folder, config in experiment.runs(root, variants).items():
        try:
            training.run(config, folder, sinks)
        except FloatingPointError as error:
            warnings.warn(f"{folder}: {error}", stacklevel=2)
        if os.environ.get("RANK", "0") != "0":  # under torchrun one rank writes and probes
            continue
        _save(experiment, root)
        run = RunFolder(folder)
        done = run.read_json("probes.json")
        missing = [choice for choice in experiment.probes.values() if choice.slug not in done]
        if run.finished() and missing:
            measure.probe(folder, missing, experiment.weights)
    return root


def _save(experiment: Experiment, root: Path) -> None:
    with atomic(root / "experiment.yaml") as file:
        file.write(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False).encode())
