"""Models by name, and what one forward pass of a model gives: logits and stages."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ses_kernels import SESRegularizer
from ses_kernels.layers import unwrap
from ses_lab import networks
from ses_lab.networks import Normalize, Statistic


class Outputs(NamedTuple):
    """Logits (N, K) and stages, each (N, C, H, W), (N, T, D) or (N, D), of one forward pass."""

    logits: Tensor
    stages: list[Tensor]


def outputs(model: nn.Module, x: Tensor) -> Outputs:
    """Logits and stages of ``model(x)``, the latter by hooks for this one pass.

    ``model`` is one that :func:`build` made, bare or inside DistributedDataParallel. RuntimeError
    if a stage does not run, as inside ``torch.compile``, which does not look for new hooks.
    """
    root, found = unwrap(model), {}
    handles = [
        root.get_submodule(name).register_forward_hook(partial(_keep, found, name))
        for name in root.stages
    ]
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in root.stages if name not in found]:
        raise RuntimeError(f"stages {missing} did not run; a compiled model needs its original")
    return Outputs(logits, [found[name] for name in root.stages])


def classified(model: nn.Module, x: Tensor) -> Tensor:
    """(N, D) inputs of the classifier of ``model(x)``, a model of :func:`build`, bare."""
    found: list[Tensor] = []
    handle = model.get_submodule(model.classifier).register_forward_pre_hook(
        lambda module, inputs: found.append(inputs[0])
    )
    try:
        model(x)
    finally:
        handle.remove()
    return found[0]


def _keep(found: dict[str, Tensor], name: str, module: nn.Module, inputs, output) -> None:
    found[name] = output if isinstance(output, Tensor) else output[0]


class Imported(nn.Module):
    """Any model that returns logits, or an object or tuple that has them, behind our interface."""

    def __init__(
        self,
        normalize: Normalize,
        model: nn.Module,
        stages: Sequence[str] | None,
        classifier: str | None,
    ) -> None:
        super().__init__()
        self.normalize, self.model = normalize, model
        self.ses_layers = None
        if stages is None:
            with SESRegularizer(self) as regularizer:
                self.stages = regularizer.layers
        else:
            self.stages = tuple(f"model.{name}" for name in stages)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self.classifier = f"model.{classifier or linear[-1]}"

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(self.normalize(x))
        if isinstance(out, Tensor):
            return out
        return out.logits if hasattr(out, "logits") else out[0]


class Text(nn.Module):
    """A classifier of transformers on (N, 2, T) ids and segments, 0 being padding.

    ``shaped`` is what SES hooks: the model that is called with the mask of the padding.
    """

    ses_layers = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        with SESRegularizer(model) as regularizer:
            self.stages = tuple(f"model.{name}" for name in regularizer.layers)
        self.classifier = "model.classifier"

    @property
    def shaped(self) -> nn.Module:
        return self.model

    def forward(self, x: Tensor) -> Tensor:
        ids, segments = x.unbind(1)
        return self.model(
            input_ids=ids, attention_mask=(ids != 0).long(), token_type_ids=segments
        ).logits


def text(path: str, *, classes: int, vocabulary: int, pretrained: str | None = None, **params):
    """A :class:`Text` of ``"transformers:BertForSequenceClassification"`` and the like.

    Args:
        path: as for :func:`build`; its classifier is named so.
        vocabulary: ids are below it.
        pretrained: a folder of transformers' files whose weights it starts from; None: fresh ones.
        params: of its configuration.
    """
    if ":" not in path:
        raise ValueError(f"text needs a model of transformers, package.module:class; got {path!r}")
    module, _, name = path.partition(":")
    make = attrgetter(name)(importlib.import_module(module))
    if pretrained is not None:
        if not Path(pretrained).is_dir():
            raise ValueError(f"pretrained: there is no folder {pretrained}")
        return Text(make.from_pretrained(pretrained, num_labels=classes, local_files_only=True,
                                         **params))  # fmt: skip
    return Text(make(make.config_class(num_labels=classes, vocab_size=vocabulary, **params)))


def _imported(
    path: str,
    normalize: Normalize,
    classes: int,
    *,
    stages: Sequence[str] | None = None,
    classifier: str | None = None,
    **params,
) -> Imported:
    module, _, name = path.partition(":")
    make = attrgetter(name)(importlib.import_module(module))
    if config := getattr(make, "config_class", None):  # a model class of transformers
        known = {"num_labels": classes, "num_channels": normalize.channels}
        model = make(config(**{**known, "image_size": normalize.size, **params}))
    else:
        model = make(**{"num_classes": classes, **params})
    return Imported(normalize, model, stages, classifier)


def _cifar(depth: int) -> Callable[..., networks.ResNet]:  # depth = 6 n + 2
    return partial(
        networks.ResNet, depths=3 * ((depth - 2) // 6,), width=16, shortcut=networks.Padding
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(networks.ResNet, depths=(2, 2, 2, 2)),
    "resnet50": partial(networks.ResNet, depths=(3, 4, 6, 3), block=networks.Bottleneck),
    "wrn28_10": networks.WideResNet,
    "resnet20": _cifar(20),
    "resnet56": _cifar(56),
    "resnet112": _cifar(112),  # by the count that takes two projections in; He et al.'s ResNet-110
    "vit_tiny": networks.VisionTransformer,
    "vit_small": partial(networks.VisionTransformer, embed_dim=384),
    "mlp": networks.MLP,
}


def build(
    name: str,
    *,
    channels: int,
    size: int | None,
    classes: int,
    mean: Statistic = None,
    std: Statistic = None,
    **params,
) -> nn.Module:
    """A network with fresh weights that takes (N, channels, size, size) floats in [0, 1].

    Args:
        name: one of :data:`MODELS`, or ``"package.module:callable"``, called with ``num_classes``
            and ``params``; a model class of transformers with ``params`` as its configuration.
        size: side of the images; None for points (N, channels), which ``mlp`` takes.
        mean, std: of the inputs, one number or one a channel; 0 and 1 by default.
        params: ``width`` of the ResNets' stem; ``depth``, ``widen`` (wrn28_10); ``embed_dim``,
            ``depth``, ``heads``, ``patch``, ``drop_path``, ``dropout``, ``attention_weights``
            (vit_tiny, vit_small); ``width``, ``depth`` (mlp); ``stages`` and ``classifier``, names
            inside an imported model, which default to the layers that SESRegularizer hooks and the
            last linear layer.

    The module has ``stages`` and ``classifier``, the dotted names of the modules whose outputs are
    its stages and of the last linear layer, and ``ses_layers`` for SESRegularizer. ValueError for
    an unknown name or sizes that do not fit; TypeError for an unknown parameter.
    """
    normalize = Normalize(channels, size, mean, std)
    if name in MODELS:
        return MODELS[name](normalize, classes, **params)
    if ":" in name:
        return _imported(name, normalize, classes, **params)
    (near,) = difflib.get_close_matches(name, MODELS, n=1, cutoff=0)
    raise ValueError(
        f"unknown model {name!r}, nearest {near!r}; one of {', '.join(MODELS)}, or an import path "
        '"package.module:callable"'
    )
