"""The parts of a configuration: what is chosen by name, other runs, and the regimes' options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ses_lab.names import unknown
from ses_lab.values import parse_choice


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and cls.model_config["extra"] == "forbid":
            for key in value:
                if key not in cls.model_fields:
                    raise ValueError(unknown("key", str(key), cls.model_fields))
        return value


class Choice(Strict):
    """``name`` and the parameters of what it names; or both as a string, ``focal:gamma=2``."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return parse_choice(value) if isinstance(value, str) else value

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra)

    @property
    def slug(self) -> str:
        """Part of a path: ``shapes-preset=simple``."""
        parts = [self.name, *(f"{k}={v}" for k, v in sorted(self.params.items()))]
        return re.sub(r"[^\w.=+-]+", "_", "-".join(parts))


def _named_by_label(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    whole = (str, Choice)
    return {k: v if isinstance(v, whole) else {"name": k, **(v or {})} for k, v in value.items()}


# Label -> probe: that of this name unless it says another, ``{on_train: "pgd:split=train"}``.
Probes = Annotated[dict[str, Choice], BeforeValidator(_named_by_label)]


class DatasetChoice(Choice):
    root: str | None = None  # where archives lie; neither it nor download changes a number
    download: bool = False


class Source(Strict):
    """The weights of another run."""

    run: str  # its folder
    weights: Literal["best", "last"] = "last"


# Of SESRegularizer: a number or a schedule; but for lambda_ses also one for each glob of layers.
SCHEDULED = ("alpha", "beta", "lambda_ses")


# ---- regimes: what one step of training minimises ----


class Supervised(Strict):
    """The loss of the labels."""

    name: Literal["supervised"] = "supervised"


class MaskedImageModelling(Strict):
    """SimMIM: squares of ``patch`` pixels hidden, the share ``mask`` of them, pixels predicted."""

    name: Literal["mim"] = "mim"
    mask: float = Field(0.6, gt=0, lt=1)
    patch: int = Field(4, ge=1)


class Finetune(Strict):
    """Supervised, from ``init_from``; parameters that match a glob of ``freeze`` stay as they are.

    ``backbone_lr`` multiplies the learning rate of all but the classifier.
    """

    name: Literal["finetune"] = "finetune"
    freeze: tuple[str, ...] = ()
    backbone_lr: float = Field(1.0, gt=0)


class Multitask(Strict):
    """The loss of the labels plus ``weight`` times that of masked-image modelling."""

    name: Literal["multitask"] = "multitask"
    weight: float = Field(1.0, ge=0)
    mask: float = Field(0.6, gt=0, lt=1)
    patch: int = Field(4, ge=1)


class Adversarial(Strict):
    """L-inf of radius ``epsilon``: ``steps`` of PGD, or of free replays of each batch."""

    name: Literal["adversarial"] = "adversarial"
    attack: Literal["pgd", "free"] = "pgd"
    epsilon: float = Field(8 / 255, gt=0)
    steps: int = Field(7, ge=1)
    step_size: float | None = None  # of PGD; None: 2.5 epsilon / steps


class Distill(Strict):
    """(1 - a) loss(labels) + a distiller(student, teacher)."""

    name: Literal["distill"] = "distill"
    distiller: Choice = Choice(name="kd")
    a: float = Field(0.5, ge=0, le=1)


class TwoViews(Strict):
    """An ``objective`` of two augmented views of each image, without labels.

    ``views`` are augmentations, drawn anew for either view. ``projection`` is the width of what
    the objective takes: of a linear layer as wide as the classifier's input, a batch norm, a ReLU
    and another linear layer, behind the classifier's input.
    """

    name: Literal["two_views"] = "two_views"
    objective: Choice = Choice(name="simclr")
    projection: int = Field(128, ge=1)
    views: tuple[Choice, ...] = (
        Choice(name="random_resized_crop"),
        Choice(name="crop_flip", padding=0),
        Choice(
            name="color_jitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, share=0.8
        ),
        Choice(name="random_grey"),
    )


REGIMES = (Supervised, MaskedImageModelling, Finetune, Multitask, Adversarial, Distill, TwoViews)
REGIME_NAMES = tuple(regime.model_fields["name"].default for regime in REGIMES)
Regime = Annotated[Union[REGIMES], Field(discriminator="name")]  # noqa: UP007
