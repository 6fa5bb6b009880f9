"""One step, one epoch, one evaluation: on one process, or on a rank among those of torchrun."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ses_lab import build, optim, rank
from ses_lab.augment import AUGMENTATIONS
from ses_lab.config import ConfigError, RunConfig
from ses_lab.data import Split
from ses_lab.metrics import classification
from ses_lab.regimes import exact
from ses_lab.sinks import Sink


class Ranks(NamedTuple):
    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None  # None: a single process

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, self.group)
        return box[0]

    def total(self, values: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values


def device_of(config: RunConfig) -> torch.device:
    """The device that the configuration names: "cuda" is the GPU of this rank.

    "auto" is "cuda" where there is one, else "mps", Apple's, else "cpu". ConfigError for a name
    that PyTorch does not know and for a device that is not there.
    """
    name = config.device
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    with build.as_config_error(f"device {name}"):
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        there = {"cpu": 1, "cuda": torch.cuda.device_count(),
                 "mps": int(torch.backends.mps.is_available())}  # fmt: skip
        if (device.index or 0) >= there.get(device.type, 0):
            found = ", ".join(f"{count} {kind}" for kind, count in there.items())
            raise ConfigError(f"device: there is no {name} here, but {found}")
    return device


def reset_peak_memory(device: torch.device) -> None:
    """:func:`peak_memory` counts from here; not off CUDA and Linux, where it cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak resident set


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that tensors took; on mps what they take now, as no peak is kept.

    On the CPU the most that this process had in memory, code and what earlier runs left included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of macOS: bytes


def ranks(config: RunConfig) -> Ranks:
    """This process among those that torchrun started, or alone."""
    device = device_of(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    reset_peak_memory(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks(0, 1, device, None)
    if not dist.is_initialized():  # once a process: torchrun's store admits no second group
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)


def _leave() -> None:
    gc.collect()  # models that still hold the group
    dist.destroy_process_group()


class Training:
    """Everything that one run trains with; :meth:`step` is one optimiser step."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        dataset, validation = build.dataset(config)
        self.classes, self.names = len(dataset.classes), dataset.classes
        # Whole in the device's memory: these datasets fit, and no worker processes are needed.
        self.train, self.test, self.validation = (
            split and Split(*(x.to(ranks.device) for x in split))
            for split in (dataset.train, dataset.test, validation)
        )
        size = min(config.batch_size, len(self.train.labels))
        if config.batch_size % ranks.world:
            raise ConfigError(f"batch_size: {config.batch_size} over {ranks.world} ranks is uneven")
        if config.patience is not None and validation is None:
            raise ConfigError(
                "patience: the test set is no judge of when to stop; set validation to a share of "
                "the training images"
            )
        self.batch_size = size - size % ranks.world
        self.batches = len(self.train.labels) // self.batch_size  # a smaller last one is left out

        self.model = build.model(config, dataset).to(ranks.device)
        self.regime = build.regime(config, dataset, self.model)
        build.check(config, dataset, self.regime)
        steps = self.batches * self.regime.replays
        self.ses = build.regularizer(config, self.model, steps, ranks.group)
        if self.ses is not None:
            self.regime.unshaped = self.ses.disabled
        self.steps = config.epochs * steps
        self.optimizer, self.schedule = build.optimizer(config, self.regime, self.steps)
        sam = config.regularizer.sam
        with build.as_config_error("regularizer.sam"):
            self.stepper = self.optimizer if sam is None else optim.SAM(self.optimizer, **sam)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
        self.generator = torch.Generator(ranks.device)
        self.module: nn.Module = self.regime

    def start(self) -> None:
        """After the state is loaded, before the first step."""
        if self.ranks.group is not None:
            self.module = nn.parallel.DistributedDataParallel(
                self.regime, find_unused_parameters=self.regime.idle_parameters
            )

    def order(self, epoch: int) -> Tensor:  # (batches, batch_size) indices of the training set
        generator = torch.Generator().manual_seed(build.seed_of(self.config.seed, "order", epoch))
        order = torch.randperm(len(self.train.labels), generator=generator)
        return order[: self.batches * self.batch_size].view(self.batches, -1)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's images in [0, 1] and labels of a global batch."""
        mine = indices[self.ranks.rank :: self.ranks.world].to(self.ranks.device)
        return build.pixels(self.train.images[mine], self.ranks.device), self.train.labels[mine]

    def step(self, epoch: int, number: int, replay: int, indices: Tensor) -> dict[str, Tensor]:
        """One optimiser step on a global batch; the numbers of its first forward pass."""
        config, place = self.config, (epoch, number, self.ranks.rank)
        images, labels = self.batch(indices)
        targets = F.one_hot(labels, self.classes).float()
        self.generator.manual_seed(build.seed_of(config.seed, "augment", *place))
        for choice in config.augmentation:
            augment = AUGMENTATIONS[choice.name]
            images, targets = augment(images, targets, self.generator, **choice.params)
        seed = build.seed_of(config.seed, "step", *place, replay)
        steps = self._before(epoch, number) + replay
        passes: list[dict[str, Tensor]] = []

        def closure() -> Tensor:
            # SAM calls it twice: the same dropout, masks and SES step at both points.
            torch.manual_seed(seed)
            self.generator.manual_seed(seed)
            self.optimizer.zero_grad()
            if self.ses is not None:
                self.ses.step = steps  # of the run: no checkpoint has to say so
            with build.autocast(config, self.ranks.device):
                result = self.module(images, targets, self.generator)
            loss = result["loss"]
            if self.ses is not None:
                penalty = self.ses.loss()
                result["penalty"] = penalty.detach().to(loss.device)
                loss = loss + penalty
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            if config.clip is not None:
                nn.utils.clip_grad_norm_(self.regime.parameters(), config.clip)
            passes.append({name: value.detach() for name, value in result.items()})
            return loss

        if self.scaler.is_enabled():  # leaves a step out whose gradients overflowed
            closure()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.stepper.step(closure)
        self.regime.after_backward()
        self.schedule.step()
        return passes[0]

    def _before(self, epoch: int, number: int) -> int:
        return ((epoch - 1) * self.batches + number) * self.regime.replays

    def epoch(self, epoch: int, sinks: Sequence[Sink]) -> dict[str, Any]:
        """Trains for one epoch; means over its steps, and of the last that measured ``entropy`` and
        ``target`` of each layer in nats; the heads of one have an entropy each, ``layer/0``.
        """
        self.regime.train()
        self.regime.begin_epoch()
        totals: dict[str, Tensor] = {}
        for number, indices in enumerate(self.order(epoch)):
            for replay in range(self.regime.replays):
                for name, value in self.step(epoch, number, replay, indices).items():
                    totals[name] = totals.get(name, 0) + exact(value)
                for sink in sinks:
                    sink.advance(len(indices))
        sums = self.ranks.total(torch.stack(list(totals.values())))
        means = (sums / (self.ranks.world * self.batches * self.regime.replays)).tolist()
        first, end = self._before(epoch, 0), self._before(epoch + 1, 0)
        every = (self.config.regularizer.ses or {}).get("every_k", 1)
        row = {f"train_{name}": mean for name, mean in zip(totals, means, strict=True)}
        last = (end - 1) // every * every  # step that measured
        if self.ses is None or last < first:
            return row
        self.ses.step = last  # of the targets, which may be schedules
        return {**row, "entropy": self.ses.flat_entropies(), "target": self.ses.targets}

    @torch.no_grad()
    def evaluate(self, split: Split) -> dict[str, Any]:
        """Figures of a split in eval mode, every rank measuring its share; see :func:`figures`."""
        if self.ranks.group is not None:
            for buffer in self.regime.buffers():  # rank 0's batch norms are those that are saved
                dist.broadcast(buffer, 0, self.ranks.group)
        share = Split(*(x[self.ranks.rank :: self.ranks.world] for x in split))
        totals, logits = evaluate(self.regime, share, self.config)
        sums = self.ranks.total(torch.stack([*totals.values()]))
        means = (sums / len(split.labels)).tolist()
        labels = share.labels.cpu()
        if self.ranks.group is not None and logits is not None:
            shares: list[Any] = [None] * self.ranks.world
            dist.all_gather_object(shares, (logits, labels), self.ranks.group)
            logits, labels = (torch.cat(parts) for parts in zip(*shares, strict=True))
        return figures(dict(zip(totals, means, strict=True)), logits, labels, self.names)

    def effective_ranks(self, epoch: int) -> dict[str, dict[str, float]]:
        """:func:`ses_lab.rank.ranks` after an epoch, on samples that are the same in all runs.

        Of the validation set, or else of the test set. Of one rank: it asks nothing of the others.
        """
        split = self.test if self.validation is None else self.validation
        generator = torch.Generator().manual_seed(build.seed_of("ranks"))
        order = torch.randperm(len(split.labels), generator=generator)
        chosen = order[: self.config.rank_samples].to(split.images.device)
        images = build.pixels(split.images[chosen], self.ranks.device)
        self.regime.eval()
        first, end = self._before(epoch, 0), self._before(epoch + 1, 0)
        probe = build.regularizer(self.config, self.model, end - first)
        with probe, self.ses.disabled(), build.autocast(self.config, self.ranks.device):
            return rank.ranks(probe, self.model, images, end - 1)

    def probe(self) -> dict[str, dict[str, Any]]:
        """Label -> numbers of ``config.probes``, as of a finished run. Of one rank."""
        splits = {"test": self.test, "train": self.train}
        with self.ses.disabled() if self.ses else contextlib.nullcontext():
            return build.probe(self.config, self.config.probes, self.model, splits)

    def state_dict(self) -> dict[str, Any]:
        return {
            **build.weights(self.regime),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        build.load_weights(self.regime, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def figures(
    means: dict[str, float], logits: Tensor | None, labels: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """``means``, and those of :func:`ses_lab.metrics.classification` where there are logits.

    ``per_class`` is a mapping from the names of the classes.
    """
    if logits is None:
        return means
    found = classification(logits.double().softmax(1), labels)
    return {**means, **found, "per_class": dict(zip(names, found["per_class"], strict=True))}


@torch.no_grad()
def evaluate(
    regime: nn.Module, split: Split, config: RunConfig
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Sums over a split in eval mode, by :func:`ses_lab.regimes.exact`; logits (N, K) on the CPU.

    Logits are None where the regime has none.
    """
    regime.eval()
    device = split.labels.device
    generator = torch.Generator(device)
    totals: dict[str, Tensor] = {}
    logits: list[Tensor] = []
    for start in range(0, len(split.labels), build.EVALUATION_BATCH):
        rows = slice(start, start + build.EVALUATION_BATCH)
        images, labels = build.pixels(split.images[rows], device), split.labels[rows]
        generator.manual_seed(build.seed_of(config.seed, "evaluate", start))
        with build.autocast(config, device):
            result = regime.evaluate(images, labels, generator)
        if "logits" in result:
            logits.append(result.pop("logits").cpu())
        for name, mean in result.items():
            totals[name] = totals.get(name, 0) + exact(mean) * len(labels)
    return totals, torch.cat(logits) if logits else None
