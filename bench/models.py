"""The networks whose training step is measured, for images of 32 x 32: those of ses_lab."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from ses_lab.models import build

_cifar = partial(build, channels=3, size=32, classes=10)


@dataclass(frozen=True)
class Network:
    name: str
    build: Callable[[], nn.Module]
    cpu_batch: int  # a step of less than a second on two cores
    hook_last_n: int | None = None  # None: every layer that SESRegularizer hooks by default


NETWORKS = [
    Network("ResNet-18", partial(_cifar, "resnet18"), cpu_batch=64),
    Network("ViT-tiny", partial(_cifar, "vit_tiny"), cpu_batch=32),
    Network("WRN-28-10", partial(_cifar, "wrn28_10"), cpu_batch=8),
    Network("ResNet-50", partial(_cifar, "resnet50"), cpu_batch=16, hook_last_n=4),
]
