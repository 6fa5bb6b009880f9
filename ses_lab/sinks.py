"""Where a run reports to while it trains: SINKS, behind one interface of four calls.

The run folder is the record; a sink is a view of it for people, and may be left out. All that it
shows of an epoch is in ``metrics.jsonl`` and ``spectra/``, so that a run that goes on makes good
what a kill kept from its sinks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ses_lab.names import ConfigError

if TYPE_CHECKING:  # which looks the names of SINKS up here
    from ses_lab.config import Choice, RunConfig


class Sink(Protocol):
    def start(
        self, config: RunConfig, folder: Path, rows: Sequence[Mapping[str, Any]], samples: int
    ) -> None:
        """A run begins, or goes on after ``rows``; an epoch has ``samples`` samples."""

    def advance(self, samples: int) -> None:
        """A step on so many samples."""

    def log(self, row: Mapping[str, Any]) -> None:
        """An epoch, as in ``metrics.jsonl``."""

    def close(self, finished: bool) -> None:
        """The run ended, or broke off."""


def connect(chosen: Sequence[Choice]) -> list[Sink]:
    """The sinks of a configuration.

    Raises ConfigError, in one line, for a package or a server that is not there.
    """
    sinks = []
    for choice in chosen:
        try:
            sinks.append(SINKS[choice.name](**choice.params))
        except Exception as error:  # each driver of a database has exceptions of its own
            said = " ".join(str(error).split())
            if isinstance(error, ImportError):
                said += "; pip install 'ses_kernels[trackers]' has what files and sqlite need"
            raise ConfigError(f"sink {choice.name}: {said}") from error
    return sinks


# Columns of ses_lab.spectra.table that are shown of every layer and epoch.
_OF_WEIGHTS = ("entropy", "stable_rank", "alpha", "decay")


def scalars(folder: Path, row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of an epoch without nesting, ``entropy/layer4.1`` in nats.

    After an epoch whose spectra were taken also those of the weights, ``spectra.alpha/fc``.
    """
    table = folder / f"spectra/{row['epoch']:04d}.json"
    found = dict(row)
    for line in json.loads(table.read_text()) if table.exists() else ():
        for key in _OF_WEIGHTS:
            found.setdefault(f"spectra.{key}", {})[line["layer"]] = line[key]
    return _numbers(found)


def _numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            flat[prefix + key] = value
    return flat


def parameters(config: RunConfig) -> dict[str, str | int | float]:
    """What decides the numbers of a run, ``optimizer.lr``; without what is not set."""
    return _flat(config.identity())


def _flat(value: Any, prefix: str = "") -> dict[str, str | int | float]:
    if isinstance(value, Mapping):
        items = [*value.items()]
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        items = [*enumerate(value)]
    else:
        if value is None or value == "" or value == []:
            return {}
        return {prefix: str(value) if isinstance(value, list) else value}
    flat: dict[str, str | int | float] = {}
    for key, item in items:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


class Progress:
    """A bar of rich with the rate, the time left and the metrics of the last epoch."""

    def start(self, config, folder, rows, samples) -> None:
        from rich import progress

        self.samples = samples
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[last]}"),
        )
        self.bar.start()
        _, method, _, seed = config.path.parts
        self.task = self.bar.add_task(
            f"{method} {seed}", total=config.epochs, completed=len(rows), rate="", last=_last(rows)
        )

    def advance(self, samples: int) -> None:
        self.bar.advance(self.task, samples / self.samples)
        speed = self.bar.tasks[0].speed
        if speed:
            self.bar.update(self.task, rate=f"{speed * self.samples:.0f}/s")

    def log(self, row) -> None:
        # Shares of an epoch do not add up to a whole one exactly.
        self.bar.update(self.task, completed=row["epoch"], last=_last([row]))

    def close(self, finished: bool) -> None:
        self.bar.stop()


def _last(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [name for name in ("test_accuracy", "test_loss") if rows and name in rows[-1]]
    return f"{shown[0]} {rows[-1][shown[0]]:.3f}" if shown else ""


class TensorBoard:
    """Event files in the run folder, for ``tensorboard --logdir experiments``.

    Scalars, the configuration as hparams, and histograms of the singular values where spectra were
    taken. A run that goes on writes the epochs that it has once more, in place of the old files:
    their wall time is then that of the new start.
    """

    def __init__(self) -> None:
        from torch.utils import tensorboard

        self.writer_of = tensorboard.SummaryWriter

    def start(self, config, folder, rows, samples) -> None:
        from torch.utils.tensorboard.summary import hparams

        self.folder = folder
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        # purge_step: a viewer that has read the old files forgets what was in them.
        self.writer = self.writer_of(str(folder / "tensorboard"), purge_step=0)
        # Names the scalars that are columns of the table of runs; their values are those logged.
        columns = dict.fromkeys(("test_accuracy", "test_loss", "train_loss"), 0.0)
        for summary in hparams(parameters(config), columns):
            self.writer.file_writer.add_summary(summary)
        for row in rows:
            self.log(row)

    def advance(self, samples: int) -> None:
        pass

    def log(self, row) -> None:
        for name, value in scalars(self.folder, row).items():
            self.writer.add_scalar(name, value, row["step"])
        file = self.folder / f"spectra/{row['epoch']:04d}.npz"
        if file.exists():
            with np.load(file) as layers:
                for layer, sigma in layers.items():
                    if np.isfinite(sigma).all():
                        self.writer.add_histogram(f"singular_values/{layer}", sigma, row["step"])
        self.writer.flush()

    def close(self, finished: bool) -> None:
        self.writer.close()


class MLflow:
    """One MLflow run for each run folder, in a database of sqlite unless ``uri`` says otherwise.

    Metrics, flat parameters, the spectra as artifacts ``spectra/0010.npz`` (singular values) and
    ``.json`` (table), and ``best.pt`` when the run has finished. The MLflow run has the name of the
    folder. By its path and configuration it is found again, and gets the epochs that it misses.
    """

    def __init__(self, uri: str = "sqlite:///mlflow.db", experiment: str = "ses_lab") -> None:
        from mlflow import MlflowClient

        # By default seven tries, for minutes: good while a run trains, not before it starts.
        tries = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
        before = os.environ.get(tries)
        os.environ[tries] = "0"
        try:
            self.client = MlflowClient(uri)
            self.experiment = self._experiment(experiment)
        finally:
            del os.environ[tries]
            if before is not None:
                os.environ[tries] = before

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.create_experiment(name)
        except MlflowException:  # it is there, or another process makes it at this moment
            found = self.client.get_experiment_by_name(name)
            if found is None or found.lifecycle_stage != "active":
                raise
            return found.experiment_id

    def start(self, config, folder, rows, samples) -> None:
        from mlflow.entities import Param

        client, self.folder = self.client, folder
        self.run = self._run(config, folder, {row["step"] for row in rows})
        params = [Param(_legal(name), str(value)) for name, value in parameters(config).items()]
        for i in range(0, len(params), 100):  # as many as a request may have
            client.log_batch(self.run, params=params[i : i + 100])
        there = {
            name: {metric.step for metric in client.get_metric_history(self.run, name)}
            for name in client.get_run(self.run).data.metrics
        }
        self.files = {f.path: f.file_size for f in client.list_artifacts(self.run, "spectra")}
        for row in rows:
            self._log(row, there)

    def _run(self, config: RunConfig, folder: Path, steps: set[int]) -> str:
        """That of this folder, if it can be of the run that is in it now; else a new one."""
        path = str(folder.resolve())
        text = json.dumps([path, config.identity()], sort_keys=True)
        tags = {"folder": path, "identity": hashlib.sha256(text.encode()).hexdigest()}
        query = f"tags.identity = '{tags['identity']}'"
        for run in self.client.search_runs([self.experiment], query):
            # A folder that was deleted and begun anew has the path, but not the epochs.
            logged = self.client.get_metric_history(run.info.run_id, "epoch")
            if {metric.step for metric in logged} <= steps:
                self.client.update_run(run.info.run_id, "RUNNING")
                return run.info.run_id
        return self.client.create_run(self.experiment, tags=tags, run_name=str(folder)).info.run_id

    def advance(self, samples: int) -> None:
        pass

    def log(self, row) -> None:
        self._log(row, {})

    def _log(self, row: Mapping[str, Any], there: Mapping[str, set[int]]) -> None:
        """An epoch, but for the metrics and files that are there: a kill may have cut it short."""
        from mlflow.entities import Metric

        now, step = int(1000 * time.time()), row["step"]
        values = {_legal(name): value for name, value in scalars(self.folder, row).items()}
        metrics = [
            Metric(name, value, now, step)
            for name, value in values.items()
            if step not in there.get(name, ())
        ]
        for i in range(0, len(metrics), 1000):
            self.client.log_batch(self.run, metrics[i : i + 1000])
        for file in sorted(self.folder.glob(f"spectra/{row['epoch']:04d}.*")):
            if self.files.get(f"spectra/{file.name}") != file.stat().st_size:
                self.client.log_artifact(self.run, str(file), "spectra")

    def close(self, finished: bool) -> None:
        if finished:
            self.client.log_artifact(self.run, str(self.folder / "best.pt"))
        self.client.set_terminated(self.run, "FINISHED" if finished else "FAILED")


def _legal(name: str) -> str:
    """Names of classes and layers, and globs, have characters that MLflow refuses."""
    parts = (re.sub(r"[^\w.\-: ]", "_", part) for part in name.split("/"))
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)


SINKS: dict[str, type[Sink]] = {"progress": Progress, "tensorboard": TensorBoard, "mlflow": MLflow}
