"""From a configuration to what it names: data, model, regime, optimiser."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ses_kernels import SESRegularizer
from ses_lab import data, models, optim, shaping
from ses_lab.augment import AUGMENTATIONS
from ses_lab.config import Choice, ConfigError, RunConfig, Source
from ses_lab.data import Dataset, Split
from ses_lab.folder import RunFolder
from ses_lab.losses import LOSSES
from ses_lab.names import lookup
from ses_lab.probes import PROBES
from ses_lab.regimes import REGIMES, Supervised

EVALUATION_BATCH = 512


def seed_of(*parts: int | str) -> int:
    """A seed of 63 bits for one use of randomness: equal parts, equal numbers, on any machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def pixels(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 images -> floats in [0, 1]; points and text as they are."""
    images = images.to(device)
    return images.float() / 255 if images.dtype == torch.uint8 else images


@contextlib.contextmanager
def as_config_error(what: str) -> Iterator[None]:
    """What functions say of values that no schema knows to be wrong, with where they were given."""
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, ImportError) as error:
        raise ConfigError(f"{what}: {error}") from error


def dataset(config: RunConfig) -> tuple[Dataset, Split | None]:
    """The data, and its validation set: the published one, or a share of the training set.

    The latter, ``config.validation``, is taken out of the training set.
    """
    chosen = config.dataset
    root = {} if chosen.root is None else {"root": chosen.root}
    with as_config_error(f"dataset {chosen.name}"):
        loaded = data.load(chosen.name, download=chosen.download, **root, **chosen.params)
    held_out = round(config.validation * len(loaded.train.labels))
    if not config.validation:
        return loaded, loaded.validation
    generator = torch.Generator().manual_seed(seed_of(config.seed, "validation"))
    order = torch.randperm(len(loaded.train.labels), generator=generator)
    validation, train = (
        Split(loaded.train.images[rows], loaded.train.labels[rows])
        for rows in (order[:held_out], order[held_out:])
    )
    if not len(validation.labels) or not len(train.labels):
        raise ConfigError(f"validation: {config.validation} of {len(order)} images leaves no image")
    return loaded._replace(train=train), validation


def _fresh(config: RunConfig, dataset: Dataset) -> nn.Module:
    images = dataset.train.images
    if dataset.vocabulary is not None:
        with as_config_error(f"model {config.model.name} on {dataset.name}"):
            return models.text(
                config.model.name,
                classes=len(dataset.classes),
                vocabulary=dataset.vocabulary,
                **config.model.params,
            )
    sample = pixels(images[:: max(1, len(images) // 5000)])  # 5000 images tell the mean and std
    axes = [axis for axis in range(sample.dim()) if axis != 1]
    with as_config_error(f"model {config.model.name} on {dataset.name}"):
        return models.build(
            config.model.name,
            channels=images.shape[1],
            size=images.shape[-1] if images.dim() == 4 else None,
            classes=len(dataset.classes),
            mean=sample.mean(axes).tolist(),
            std=sample.std(axes).clamp_min(1e-3).tolist(),  # of a channel that is constant: 0
            **config.model.params,
        )


def model(config: RunConfig, dataset: Dataset) -> nn.Module:
    """The network at the start of the run; torch's global generator is left seeded."""
    torch.manual_seed(seed_of(config.seed, "weights"))
    network = _fresh(config, dataset)
    if config.init_from is not None:
        _start_from(network, config.init_from)
    _normalise(config, network)
    return network


def _normalise(config: RunConfig, network: nn.Module) -> None:
    if config.regularizer.spectral_norm is not None:
        with as_config_error("regularizer.spectral_norm"):
            optim.spectral_norm(network, **config.regularizer.spectral_norm)


def _start_from(network: nn.Module, source: Source) -> None:
    """All weights of another run; its classifier only where the classes are as many."""
    other = trained(source.run, source.weights)
    for module in other.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    state, ours = other.state_dict(), network.state_dict()
    for name in list(state):
        head = name.startswith(f"{other.classifier}.")
        if head and name in ours and ours[name].shape != state[name].shape:
            state[name] = ours[name]
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"init_from: the weights of {source.run} do not fit: {error}") from None


def weights(regime: Supervised) -> dict[str, dict[str, Tensor]]:
    """``model``, and ``others``: heads, masks and connectors of the regime. Files hold them so."""
    state = regime.state_dict()
    others = {name: value for name, value in state.items() if not name.startswith("model.")}
    return {"model": regime.model.state_dict(), "others": others}


def load_weights(regime: Supervised, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    model = {f"model.{name}": value for name, value in state["model"].items()}
    regime.load_state_dict({**model, **state["others"]})


def load(folder: str | Path | RunFolder, weights: str) -> dict[str, Any]:
    """The file of a run's "best" or "last" weights."""
    folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    return folder.load(lookup("weights", {"best": "best.pt", "last": "checkpoint.pt"}, weights))


def trained(folder: str | Path, weights: str = "last") -> nn.Module:
    """The model of a run in eval mode on the CPU, with its "last" or its "best" weights.

    Raises ConfigError where there is no run, FileNotFoundError where it has not got so far.
    """
    config = RunFolder(folder).config()
    with torch.random.fork_rng(devices=[]):
        network = _fresh(config, dataset(config)[0])
        _normalise(config, network)
    network.load_state_dict(load(folder, weights)["model"])
    return network.eval()


def loss(config: RunConfig, dataset: Dataset) -> Callable[[Tensor, Tensor], Tensor]:
    function, params = LOSSES[config.loss.name], config.loss.params
    if "counts" in inspect.signature(function).parameters:  # those of the training set
        counts = torch.bincount(dataset.train.labels, minlength=len(dataset.classes))
        params = {"counts": counts.tolist(), **params}
    return partial(function, **params)


def regime(config: RunConfig, dataset: Dataset, network: nn.Module) -> Supervised:
    """The regime around ``network``, on the device of the latter."""
    device = next(network.parameters()).device
    example = pixels(dataset.train.images[:8], device)
    teacher = trained(config.teacher.run, config.teacher.weights) if config.teacher else None
    with as_config_error(f"regime {config.regime.name}"):
        return REGIMES[config.regime.name](
            config.regime,
            network,
            loss(config, dataset),
            example,
            None if teacher is None else teacher.to(device),
        ).to(device)


def probe(
    config: RunConfig, chosen: Mapping[str, Choice], network: nn.Module, splits: Mapping[str, Split]
) -> dict[str, dict[str, Any]]:
    """Key -> numbers of each probe of a model, on that of ``splits`` which it names, else "test".

    The draws depend on the seed of the run and on the probe alone: the same samples at any time.
    """
    device = next(network.parameters()).device
    found, images = {}, {}
    for key, choice in chosen.items():
        params = choice.params
        name = params.pop("split", "test")
        split = lookup(f"split of probe {choice.name}", splits, name)
        if name not in images:
            images[name] = pixels(split.images, device)
        generator = torch.Generator().manual_seed(seed_of(config.seed, choice.slug))
        with as_config_error(f"probe {choice.name}"):
            found[key] = PROBES[choice.name](
                network, images[name], split.labels.to(device), generator, **params
            )
    return found


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """In which passes forward run: ``config.precision``; nothing changes in float32."""
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=config.precision != "fp32")


def regularizer(
    config: RunConfig,
    network: nn.Module,
    steps: int,
    group: torch.distributed.ProcessGroup | None = None,
) -> SESRegularizer | None:
    """SES on the model, or None; entropies are those of the global batch of ``group``.

    ``steps`` are those of an epoch.
    """
    if config.regularizer.ses is None:
        return None
    length = shaping.Length(config.epochs, steps)
    options = shaping.options(config.regularizer.ses, length, network.ses_layers)
    with as_config_error("regularizer.ses"):
        # Text: the part that is called with its mask, which leaves padding out.
        shaped = getattr(network, "shaped", network)
        return SESRegularizer(shaped, process_group=group, **options)


def optimizer(
    config: RunConfig, regime: Supervised, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Optimiser and schedule, to be stepped ``steps`` times in the epochs of the run."""
    params = {"lr": 0.1, **config.optimizer.params}
    with as_config_error(f"optimizer {config.optimizer.name}"):
        built = optim.optimizer(config.optimizer.name, regime.groups(params["lr"]), **params)
    options = config.schedule.params
    with as_config_error(f"schedule {config.schedule.name}"):
        epochs = options.pop("warmup_epochs", None)
        if epochs is not None and "warmup" in options:
            raise ConfigError("schedule: warmup is a share and warmup_epochs the same: give one")
        share = options.pop("warmup", 0) if epochs is None else epochs / config.epochs
        warmup = round(share * steps)
        return built, optim.schedule(config.schedule.name, built, steps, warmup=warmup, **options)


def check(config: RunConfig, dataset: Dataset, regime: Supervised) -> None:
    """Tries on a few samples what only the first step would: SES, augmentations, the loss.

    Nothing of ``regime`` and of the generators is changed by it. Cost: one pass of 8 samples.

    Raises:
        ConfigError: a value that the functions refuse, with their reason.
    """
    if dataset.vocabulary is not None:
        if config.augmentation:
            raise ConfigError("augmentation: there is none for text")
        if config.regime.name not in ("supervised", "finetune"):
            raise ConfigError(f"regime: {config.regime.name} is for images, and this is text")
    device = next(regime.parameters()).device
    images = pixels(dataset.train.images[:8], device)
    targets = F.one_hot(dataset.train.labels[:8].to(device), len(dataset.classes)).float()
    devices = [device] if device.type == "cuda" else []
    buffers = [(buffer, buffer.clone()) for buffer in regime.buffers()]
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of 8 samples: not the user's batch
        with as_config_error(f"loss {config.loss.name}"):
            loss(config, dataset)(torch.zeros_like(targets), targets)
        if config.regularizer.ses is not None:
            ses = regularizer(config, regime.model, steps=1)
            with ses, as_config_error("regularizer.ses"):
                regime.model.train()
                regime.model(images)
                ses.loss()
        for choice in config.augmentation:
            with as_config_error(f"augmentation {choice.name}"):
                generator = torch.Generator(device).manual_seed(0)
                augment = AUGMENTATIONS[choice.name]
                images, targets = augment(images, targets, generator, **choice.params)
        some = slice(None, None, -(-len(dataset.train.labels) // 8))  # of several classes if sorted
        split = Split(dataset.train.images[some], dataset.train.labels[some])
        probe(config, config.probes, regime.model, {"train": split, "test": split})
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
