"""What one step of training minimises: REGIMES, modules that hold the model and return its loss.

A regime is what DistributedDataParallel wraps and what a checkpoint stores, so that heads, masks
and connectors of a distiller are trained, averaged and resumed like the model itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ses_lab import options as chosen
from ses_lab.augment import AUGMENTATIONS
from ses_lab.distill import DISTILLERS, as_map
from ses_lab.models import Outputs, classified, outputs
from ses_lab.names import ConfigError, lookup
from ses_lab.probes.attacks import attack
from ses_lab.twoviews import OBJECTIVES

Loss = Callable[[Tensor, Tensor], Tensor]


def exact(x: Tensor) -> Tensor:
    """In float64, which sums of many numbers need; in float32 on mps, which has no other."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


class Supervised(nn.Module):
    """The loss of the labels; also what the other regimes start from.

    Args:
        options: the regime's part of the configuration.
        model: of :func:`ses_lab.models.build`.
        loss: of logits (N, K) and targets (N, K).
        example: one batch of images, for those that build heads to size.
        teacher: of :class:`Distill` alone.
    """

    # Around the passes that SES does not shape; the trainer puts that of its regulariser here.
    unshaped = staticmethod(contextlib.nullcontext)
    replays = 1  # steps in a row on the same batch
    idle_parameters = False  # some get no gradient, which DDP has to be told

    def __init__(
        self, options: Any, model: nn.Module, loss: Loss, example: Tensor,
        teacher: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options, self.model, self._loss = options, model, loss

    def forward(self, images: Tensor, targets: Tensor, generator: Generator) -> dict[str, Tensor]:
        """The () loss to minimise, and other numbers of the batch without a gradient."""
        return self._labelled(self.model(images), targets)

    def _labelled(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        # Of mixed targets the share of the class that is predicted, as the usual scripts count.
        share = targets.gather(1, logits.detach().argmax(1, keepdim=True))
        return {"loss": self._loss(logits.float(), targets), "accuracy": share.mean()}

    def evaluate(self, images: Tensor, labels: Tensor, generator: Generator) -> dict[str, Tensor]:
        """Over a batch in eval mode, without gradients: means of cross-entropy and accuracy.

        And ``logits`` (N, K), where the regime has any.
        """
        logits = self.model(images).float()
        correct = logits.argmax(1) == labels
        return {
            "loss": F.cross_entropy(logits, labels),
            "accuracy": exact(correct).mean(),
            "logits": logits,
        }

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters for the optimiser, with a learning rate of their own where it differs."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def prepare(self, batches: Iterable[Tensor]) -> None:
        """Once, before the first step of a run; ``batches`` are images of the training set."""

    def begin_epoch(self) -> None:
        pass

    def after_backward(self) -> None:
        pass


class Finetune(Supervised):
    """Frozen parameters; another learning rate for all that is not the classifier.

    Normalisation layers that are frozen keep normalising by the batch and updating their buffers.
    """

    def __init__(self, options: chosen.Finetune, model: nn.Module, *rest: Any) -> None:
        super().__init__(options, model, *rest)
        names = [name for name, _ in model.named_parameters()]
        for glob in options.freeze:
            if not any(fnmatchcase(name, glob) for name in names):
                raise ConfigError(f"regime.freeze: {glob!r} matches no parameter of {names}")
        for name, parameter in model.named_parameters():
            if any(fnmatchcase(name, glob) for glob in options.freeze):
                parameter.requires_grad_(False)
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(f"regime.freeze: {options.freeze} leaves nothing to train")

    def groups(self, lr: float) -> list[dict[str, Any]]:
        head, rest = [], []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                ours = head if name.startswith(f"{self.model.classifier}.") else rest
                ours.append(parameter)
        backbone = {"params": rest, "lr": lr * self.options.backbone_lr}
        return [group for group in (backbone, {"params": head}) if group["params"]]


class _MaskedPixels(nn.Module):
    """SimMIM for any network with a spatial last stage, convolutional or of tokens.

    Squares of pixels are replaced by a learned square (for a ViT with patches of that size the same
    as a learned token), and one linear layer predicts the normalised pixels below each position of
    the last stage. The loss is the mean |error| over the hidden pixels.

    Source: Xie et al., "SimMIM" (CVPR 2022).
    """

    def __init__(self, model: nn.Module, example: Tensor, mask: float, patch: int) -> None:
        super().__init__()
        if example.dim() != 4 or patch > example.shape[-1]:
            raise ConfigError(
                f"masked-image modelling hides squares of {patch} pixels in images, and this "
                f"dataset has inputs of shape {tuple(example.shape[1:])}"
            )
        with torch.no_grad():
            was_training = model.training
            stage = as_map(outputs(model.eval(), example[:1]).stages[-1])
            model.train(was_training)
        channels, side = example.shape[1], example.shape[-1]
        self.mask, self.patch = mask, patch
        self.scale = math.ceil(side / stage.shape[-1])  # pixels per position of the last stage
        self.square = nn.Parameter(torch.zeros(channels, patch, patch))
        self.predict = nn.Conv2d(stage.shape[1], channels * self.scale**2, 1)

    def forward(self, model: nn.Module, images: Tensor, generator: Generator) -> Tensor:
        side = images.shape[-1]
        hidden = self.hidden(len(images), side, generator)  # (N, 1, S, S)
        repeats = -(-side // self.patch)
        square = self.square.repeat(1, repeats, repeats)[:, :side, :side]
        stage = as_map(outputs(model, torch.where(hidden, square, images)).stages[-1])
        predicted = F.pixel_shuffle(self.predict(stage), self.scale)[..., :side, :side]
        error = (predicted.float() - model.normalize(images)).abs()
        return (error * hidden).sum() / (hidden.sum() * images.shape[1])

    def hidden(self, count: int, side: int, generator: Generator) -> Tensor:
        """(count, 1, side, side) bool: as many squares in every image, at least 1, never all."""
        grid = -(-side // self.patch)
        number = min(max(round(self.mask * grid**2), 1), max(grid**2 - 1, 1))
        noise = torch.rand(count, grid**2, generator=generator, device=generator.device)
        hidden = (noise.argsort(1) < number).view(count, 1, grid, grid)
        whole = hidden.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        return whole[..., :side, :side]


class MaskedImageModelling(Supervised):
    """Pre-training without labels; evaluated by the same loss, on masks that do not change."""

    idle_parameters = True  # those of the classifier

    def __init__(
        self, options: chosen.MaskedImageModelling, model: nn.Module, loss: Loss, example: Tensor,
        teacher: None = None,
    ) -> None:  # fmt: skip
        super().__init__(options, model, loss, example)
        self.masked = _MaskedPixels(model, example, options.mask, options.patch)

    def forward(self, images: Tensor, targets: Tensor, generator: Generator) -> dict[str, Tensor]:
        return {"loss": self.masked(self.model, images, generator)}

    def evaluate(self, images: Tensor, labels: Tensor, generator: Generator) -> dict[str, Tensor]:
        return {"loss": self.masked(self.model, images, generator)}


class Multitask(MaskedImageModelling):
    """loss(labels) + weight * masked pixels, on the same images.

    SES shapes the pass of the whole images, which are what the network is used on: its entropies
    compare with those of the other regimes. That of the masked images goes by its own loss alone.
    """

    idle_parameters = False

    def forward(self, images: Tensor, targets: Tensor, generator: Generator) -> dict[str, Tensor]:
        with self.unshaped():
            masked = self.masked(self.model, images, generator)
        result = self._labelled(self.model(images), targets)
        loss = result["loss"] + self.options.weight * masked
        return {**result, "loss": loss, "masked": masked.detach()}

    evaluate = Supervised.evaluate


class TwoViews(Supervised):
    """Pre-training without labels; evaluated by the same loss, on views that do not change.

    Both views go through the network as one batch of 2 N, which is what batch norms and SES see.
    Under torchrun the objective is that of each rank's share of the batch.
    """

    idle_parameters = True  # those of the classifier

    def __init__(
        self, options: chosen.TwoViews, model: nn.Module, loss: Loss, example: Tensor,
        teacher: None = None,
    ) -> None:  # fmt: skip
        super().__init__(options, model, loss, example)
        if example.dim() != 4:
            raise ConfigError(
                "two views are crops and colours of images, and this dataset has inputs of shape "
                f"{tuple(example.shape[1:])}"
            )
        width = model.get_submodule(model.classifier).in_features
        self.projector = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, options.projection),
        )  # fmt: skip
        objective = lookup("objective", OBJECTIVES, options.objective.name)
        self._objective = partial(objective, **options.objective.params)
        self._objective(*torch.eye(4).split(2))  # what it refuses, it refuses now

    def forward(self, images: Tensor, targets: Tensor, generator: Generator) -> dict[str, Tensor]:
        views = torch.cat([self._view(images, targets, generator) for _ in range(2)])
        a, b = self.projector(classified(self.model, views)).chunk(2)
        with torch.autocast(images.device.type, enabled=False):
            return {"loss": self._objective(a, b)}

    def _view(self, images: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        for choice in self.options.views:
            images, targets = AUGMENTATIONS[choice.name](
                images, targets, generator, **choice.params
            )
        return images

    def evaluate(self, images: Tensor, labels: Tensor, generator: Generator) -> dict[str, Tensor]:
        targets = F.one_hot(labels, int(labels.max()) + 1).float()
        return self(images, targets, generator)


class Adversarial(Supervised):
    """The loss of the labels at x + delta, |delta|_inf <= epsilon; images stay in [0, 1].

    ``pgd``: :func:`ses_lab.probes.attacks.attack` from a random start at each step, against the
    model in eval mode. ``free``: every batch is trained on ``steps`` times in a row, and each
    backward pass moves both the weights and delta, which goes on to the next batch; an epoch costs
    ``steps`` plain ones, and starts from delta = 0 (the published one from the last batch's).

    Sources: Madry et al. (ICLR 2018); Shafahi et al., "Adversarial training for free!" (2019).
    """

    def __init__(self, options: chosen.Adversarial, *rest: Any) -> None:
        super().__init__(options, *rest)
        self.replays = options.steps if options.attack == "free" else 1
        self._delta: Tensor | None = None  # free: what the next batch starts from
        self._live: Tensor | None = None  # free: its copy in the graph of this step

    def forward(self, images: Tensor, targets: Tensor, generator: Generator) -> dict[str, Tensor]:
        attacked = self._free if self.options.attack == "free" else self._pgd
        return self._labelled(self.model(attacked(images, targets, generator)), targets)

    def _pgd(self, images: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        epsilon, steps = self.options.epsilon, self.options.steps
        size = self.options.step_size or 2.5 * epsilon / steps
        self.model.eval()  # the batch statistics and SES see the training pass alone
        attacked = attack(
            self.model, images, targets, epsilon=epsilon, steps=steps, step_size=size,
            random_start=True, generator=generator,
        )  # fmt: skip
        self.model.train()
        return attacked

    def _free(self, images: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        if self._delta is None:
            self._delta = torch.zeros_like(images)
        self._live = self._delta.clone().requires_grad_()
        x = images + self._live
        return x.clamp(0, 1) if x.dim() == 4 else x

    def begin_epoch(self) -> None:
        self._delta = None

    def after_backward(self) -> None:
        if self._live is not None:
            epsilon = self.options.epsilon
            moved = self._live.detach() + epsilon * self._live.grad.sign()
            self._delta, self._live = moved.clamp(-epsilon, epsilon), None


def _whole(found: Outputs) -> Outputs:
    """In float32, whatever the network ran in."""
    return Outputs(found.logits.float(), [stage.float() for stage in found.stages])


class Distill(Supervised):
    """(1 - a) loss(labels) + a distiller(student, teacher), the teacher frozen in eval mode."""

    def __init__(
        self, options: chosen.Distill, model: nn.Module, loss: Loss, example: Tensor,
        teacher: nn.Module,
    ) -> None:  # fmt: skip
        super().__init__(options, model, loss, example)
        self._teacher = (teacher.eval().requires_grad_(False),)  # no submodule: not ours to train
        with torch.no_grad():
            training = model.training
            student, taught = outputs(model.eval(), example), outputs(teacher, example)
            model.train(training)
        distiller = lookup("distiller", DISTILLERS, options.distiller.name)
        self.distiller = distiller(student, taught, **options.distiller.params)

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Outputs:
        return _whole(outputs(self._teacher[0], images))

    def prepare(self, batches: Iterable[Tensor]) -> None:
        self.distiller.prepare(self._taught(images) for images in batches)

    def forward(self, images: Tensor, targets: Tensor, generator: Generator) -> dict[str, Tensor]:
        student = outputs(self.model, images)
        result = self._labelled(student.logits, targets)
        taught = self._taught(images)
        with torch.autocast(images.device.type, enabled=False):  # distances of features
            distilled = self.distiller(_whole(student), taught)
        a = self.options.a
        loss = (1 - a) * result["loss"] + a * distilled
        return {**result, "loss": loss, "distilled": distilled.detach()}


REGIMES: dict[str, type[Supervised]] = {
    "supervised": Supervised,
    "mim": MaskedImageModelling,
    "finetune": Finetune,
    "multitask": Multitask,
    "adversarial": Adversarial,
    "distill": Distill,
    "two_views": TwoViews,
}
