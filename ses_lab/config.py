"""One YAML file -> one RunConfig: everything that decides the numbers of one run.

::

    dataset: {name: shapes, preset: simple}        # or just a name: `dataset: digits`
    model: {name: vit_tiny, depth: 4}
    loss: {name: focal, gamma: 2}
    regime: {name: adversarial, attack: pgd, epsilon: 0.03}
    regularizer: {ses: {beta: 0.7, lambda_ses: 0.01, hook_last_n: 3}, sam: {rho: 0.05}}
    # terms of SES and schedules of its numbers: see ses_lab.shaping
    augmentation: [crop_flip, {name: mixup, alpha: 0.2}]
    optimizer: {name: sgd, lr: 0.1, momentum: 0.9}
    schedule: {name: cosine, warmup: 0.05}
    epochs: 10
    seed: 3

Wherever something is chosen by name, a bare name stands for ``{name: ...}`` and the other keys of
the mapping are its parameters, checked against the signature of what the name stands for. Names
are the keys of the registries (``DATASETS``, ``MODELS``, ``LOSSES``, ``AUGMENTATIONS``,
``DISTILLERS``, ``OBJECTIVES``).

``vit_tiny:depth=4,patch=2`` is the same in one word, for flags and for ``ses-lab probe``.

``load(file, environment, flags)``: the file is overruled by ``SES_LAB__OPTIMIZER__LR=0.2``, and
that by flags, dotted keys such as ``optimizer.lr``. ``merge(document, changes)`` is that rule for
plain mappings and is what a grid is made with: a variant is a mapping of changes, a run is
``RunConfig.parse(merge(base, {**variant, "method": "ses", "seed": 3}))``, and every run has its own
folder ``config.path``, ``{dataset}/{method}/{model}/{seed}``.

Two stages are two runs, the second naming the folder of the first: ``init_from: {run: FOLDER}``
starts from its weights (pre-training -> ``regime: finetune``), ``teacher: {run: FOLDER}`` distils
it (``regime: {name: distill, distiller: kd, a: 0.9}``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field, ValidationError, model_validator

from ses_lab.names import ConfigError, check_params, lookup, parameters, unknown
from ses_lab.options import (
    REGIME_NAMES,
    REGIMES,
    SCHEDULED,
    Choice,
    DatasetChoice,
    Probes,
    Regime,
    Source,
    Strict,
    Supervised,
)
from ses_lab.values import parse_choice, parse_value, parse_yaml


class Regularizer(Strict):
    """Each None or a mapping of options, ``{}`` for the defaults."""

    # Of ses_kernels.SESRegularizer, by ses_lab.shaping; lambda_ses: 0 only measures.
    ses: dict[str, Any] | None = None
    spectral_norm: dict[str, Any] | None = None  # of ses_lab.optim.spectral_norm
    sam: dict[str, Any] | None = None  # of ses_lab.optim.SAM


class RunConfig(Strict):
    """What one run is. Frozen; equal configurations give equal numbers."""

    dataset: DatasetChoice
    model: Choice
    loss: Choice = Choice(name="cross_entropy")
    regime: Regime = Supervised()
    regularizer: Regularizer = Regularizer()
    augmentation: tuple[Choice, ...] = ()
    optimizer: Choice = Choice(name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
    # warmup: the share of the steps on a rising rate, or warmup_epochs; least: the rate at the end
    schedule: Choice = Choice(name="cosine")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of passes; weights and SES are in float32
    clip: float | None = Field(None, gt=0)  # of the norm of the gradient
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(128, ge=1)  # of all ranks together
    # Share of the training images that chooses best.pt; 0: the published split, or else none.
    validation: float = Field(0.0, ge=0, lt=1)
    patience: int | None = Field(None, ge=1)  # epochs without a better validation, then it ends
    seed: int = Field(0, ge=0)
    init_from: Source | None = None
    teacher: Source | None = None
    method: str = Field("", pattern=r"^[\w.=+-]*$")  # name of the variant; "": made from the above
    spectra_every: int | None = Field(None, ge=1)  # epochs; None: of the weights at the end only
    # Held-out samples whose effective ranks are taken after each epoch, in the layers of ses.
    rank_samples: int | None = Field(None, ge=2)
    # Probes of the model that are taken after every so manieth epoch, and after the last.
    probes: Probes = Field({})
    probe_every: int | None = Field(None, ge=1)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...; does not name a run, nor do sinks
    sinks: tuple[Choice, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(regime := value.get("regime"), (str, Mapping)):
            regime = parse_choice(regime) if isinstance(regime, str) else regime
            if regime.get("name") not in REGIME_NAMES:
                raise ValueError(unknown("regime", str(regime.get("name")), REGIME_NAMES))
            value = {**value, "regime": regime}
        if isinstance(value, Mapping):  # `--optimizer.lr 1` alone is a change of the default
            value = dict(value)
            for name in ("loss", "optimizer", "schedule"):
                if isinstance(value.get(name), Mapping) and "name" not in value[name]:
                    value[name] = cls.model_fields[name].default.model_dump() | value[name]
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.regime.name == "distill" and self.teacher is None:
            raise ValueError("regime distill needs a teacher: {run: FOLDER}")
        if self.teacher is not None and self.regime.name != "distill":
            raise ValueError(f"teacher belongs to regime distill, got regime {self.regime.name}")
        if self.regime.name == "finetune" and self.init_from is None:
            raise ValueError("regime finetune needs init_from: {run: FOLDER}")
        # Both look at gradients before a GradScaler has divided them.
        if self.precision == "fp16" and (
            self.regularizer.sam is not None or getattr(self.regime, "attack", "") == "free"
        ):
            raise ValueError("precision fp16 has no SAM and no free adversarial steps: take bf16")
        if self.rank_samples is not None and self.regularizer.ses is None:
            raise ValueError("rank_samples needs regularizer.ses; lambda_ses: 0 only measures")
        if (self.probe_every is None) != (not self.probes):
            raise ValueError(
                "probe_every, in epochs, and probes, what is probed then, go together; got "
                f"{self.probe_every} and {[*self.probes]}"
            )
        _check_registries(self)
        return self

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> RunConfig:
        """From a nested mapping. Raises ConfigError: faults by key, with the nearest name."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            # Members of a discriminated union appear in the location: the user did not write them.
            names = {f"{e['loc'][0]}.{n}": e["loc"][0] for e in error.errors() if e["loc"]
                     for n in REGIME_NAMES}  # fmt: skip
            lines = []
            for fault in error.errors():
                key = ".".join(map(str, fault["loc"]))
                for long, short in names.items():
                    key = key.replace(long, short)
                got = "" if isinstance(fault["input"], Mapping) else f", got {fault['input']!r}"
                message = fault["msg"].removeprefix("Value error, ")
                lines.append(f"{key}: {message}{got}" if key else f"{message}{got}")
            raise ConfigError("\n".join(lines)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML types; ``parse`` of it is this configuration."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """What decides the numbers: all but device, sinks and where the archives lie."""
        fields = self.to_dict()
        for key in ("device", "sinks"):
            del fields[key]
        for key in ("root", "download"):
            del fields["dataset"][key]
        return fields

    @property
    def path(self) -> Path:
        """``{dataset}/{method}/{model}/{seed}``, relative."""
        return Path(
            self.dataset.slug, self.method or self._method(), self.model.slug, f"{self.seed}"
        )

    @property
    def objective(self) -> str:
        """What the training loss is: ``cross_entropy``, ``simclr``, ``focal-gamma=3 + kd``."""
        regime, labels = self.regime, self.loss.slug
        named = {"mim": lambda: "hidden pixels", "multitask": lambda: f"{labels} + hidden pixels",
                 "adversarial": lambda: f"{labels} under {regime.attack}",
                 "distill": lambda: f"{labels} + {regime.distiller.slug}",
                 "two_views": lambda: regime.objective.slug}  # fmt: skip
        return named.get(regime.name, lambda: labels)()

    def _method(self) -> str:
        regime = self.regime
        detail = {"distill": lambda: regime.distiller.slug, "adversarial": lambda: regime.attack,
                  "two_views": lambda: regime.objective.slug}  # fmt: skip
        parts = [detail.get(regime.name, lambda: regime.name)()]
        parts += [
            k for k in ("ses", "spectral_norm", "sam") if getattr(self.regularizer, k) is not None
        ]
        return "-".join(parts + [choice.name for choice in self.augmentation])


# ---- names and parameters against the registries ----


class Registry(NamedTuple):
    """What a configuration chooses by name, and the arguments that are not the user's."""

    entries: Mapping[str, Callable]
    given: tuple[str, ...] = ()
    shared: Mapping[str, Any] = {}  # what every entry takes beside its own -> default

    def check(self, kind: str, chosen: Choice) -> None:
        """ConfigError for an unknown name or parameter, with the nearest there is."""
        function = lookup(kind, self.entries, chosen.name)
        params = [name for name in chosen.params if name not in self.shared]
        check_params(f"{kind} {chosen.name}", function, params, self.given)


def registries() -> dict[str, Registry]:
    """Kind -> registry, of all that a configuration names."""
    # Imported here: torch takes seconds, which the command line's help should not.
    from ses_kernels import SESRegularizer
    from ses_lab import (
        augment,
        data,
        distill,
        losses,
        models,
        optim,
        probes,
        shaping,
        sinks,
        twoviews,
    )

    regimes = {kind.model_fields["name"].default: kind for kind in REGIMES}
    batch = ("images", "targets", "generator")
    return {
        "dataset": Registry(
            data.DATASETS, ("name", "root", "download"), parameters(data.subset, ["dataset"])
        ),
        "model": Registry(models.MODELS, ("normalize", "classes")),
        "loss": Registry(losses.LOSSES, ("logits", "targets")),
        "regime": Registry(regimes, ("name",)),
        "distiller": Registry(distill.DISTILLERS, ("student", "teacher")),
        "objective": Registry(twoviews.OBJECTIVES, ("a", "b")),
        "regularizer": Registry(
            {"ses": SESRegularizer, "spectral_norm": optim.spectral_norm, "sam": optim.SAM},
            ("model", "process_group", "optimizer"),
        ),
        "SES schedule": Registry(shaping.SCHEDULES, shaping.GIVEN),
        "augmentation": Registry(augment.AUGMENTATIONS, batch),
        "optimizer": Registry(optim.OPTIMIZERS, ("params",)),
        "schedule": Registry(
            optim.SCHEDULES, ("t",), {"warmup": 0, "warmup_epochs": None, "least": None}
        ),
        "sink": Registry(sinks.SINKS),
        "probe": Registry(probes.PROBES, probes.GIVEN, {"split": "test"}),
    }


def _check_registries(config: RunConfig) -> None:
    known = registries()
    chosen = [
        (kind, getattr(config, kind)) for kind in ("dataset", "loss", "optimizer", "schedule")
    ]
    if ":" not in config.model.name:  # an importable model: its own constructor complains
        chosen.append(("model", config.model))
    chosen += [("augmentation", choice) for choice in config.augmentation]
    if config.regime.name == "distill":
        chosen.append(("distiller", config.regime.distiller))
    if config.regime.name == "two_views":
        chosen.append(("objective", config.regime.objective))
        chosen += [("augmentation", choice) for choice in config.regime.views]
    chosen += [("sink", choice) for choice in config.sinks]
    chosen += [("probe", choice) for choice in config.probes.values()]
    for kind, choice in chosen:
        known[kind].check(kind, choice)
    regularizers = known["regularizer"]
    for name, function in regularizers.entries.items():
        params = getattr(config.regularizer, name) or ()
        check_params(f"regularizer.{name}", function, params, regularizers.given)
    if config.regularizer.ses is not None:
        from ses_lab import shaping

        # The data tell how many steps an epoch has; what is wrong is so for any number.
        shaping.options(config.regularizer.ses, shaping.Length(config.epochs, 1 << 20))


# ---- file < environment < flags ----


def merge(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``document`` with ``changes``, whose keys may be dotted (``optimizer.lr``).

    Mappings merge key by key, and anything else replaces. A change of ``name`` replaces the whole
    mapping, since parameters belong to what is named; of ``schedule`` too, under :data:`SCHEDULED`.
    There a dot is part of the name or glob of a layer: ``regularizer.ses.beta.layer4.*`` is one of
    four keys.
    """
    result = dict(document)
    for dotted, value in changes.items():
        key, _, rest = dotted.partition(".")
        value = {rest: value} if rest else value
        before = result.get(key)
        if isinstance(value, Mapping):
            before = parse_choice(before) if isinstance(before, str) else before
            kind = "schedule" if key in SCHEDULED else "name"
            if not isinstance(before, Mapping) or value.get(kind, before.get(kind)) != before.get(
                kind
            ):
                before = {}
            result[key] = {**before, **value} if key in SCHEDULED else merge(before, value)
        else:
            result[key] = value
    return result


def from_environment(environment: Mapping[str, str], prefix: str = "SES_LAB__") -> dict[str, Any]:
    """``SES_LAB__OPTIMIZER__LR=0.1`` -> ``{"optimizer.lr": 0.1}``; values are YAML."""
    return {
        name.removeprefix(prefix).lower().replace("__", "."): parse_value(name, value)
        for name, value in environment.items()
        if name.startswith(prefix)
    }


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError when it is none."""
    try:
        document = parse_yaml(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(document).__name__}")
    return document


def load(
    path: str | os.PathLike | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration of a file (or of nothing), overruled by environment, then by flags.

    Args:
        environment: None means ``os.environ``.
        flags: dotted keys to values.

    Raises:
        ConfigError: names the faults, with the nearest key or name there is.
    """
    document = read_yaml(path) if path is not None else {}
    document = merge(document, from_environment(os.environ if environment is None else environment))
    return RunConfig.parse(merge(document, flags or {}))
