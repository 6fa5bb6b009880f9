"""Where a run reports to while it trains: SINKS, behind one interface of four calls.

``metrics.jsonl`` is the record; a sink is a view of it for people, and may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # which looks the names of SINKS up here
    from ses_lab.config import RunConfig


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


def numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """A row of metrics without nesting: ``entropy/layer4.1``."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            flat[prefix + key] = value
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
    """Event files in the run folder, for ``tensorboard --logdir experiments``."""

    def start(self, config, folder, rows, samples) -> None:
        from torch.utils.tensorboard import SummaryWriter

        after = rows[-1]["step"] + 1 if rows else None  # hides what a kill left behind
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=after)

    def advance(self, samples: int) -> None:
        pass

    def log(self, row) -> None:
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self, finished: bool) -> None:
        self.writer.close()


class MLflow:
    """One MLflow run for each run folder, in a database of sqlite unless ``uri`` says otherwise."""

    def __init__(self, uri: str = "sqlite:///mlflow.db", experiment: str = "ses_lab") -> None:
        self.uri, self.experiment = uri, experiment

    def start(self, config, folder, rows, samples) -> None:
        from mlflow import MlflowClient

        self.client = client = MlflowClient(self.uri)
        found = client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else client.create_experiment(self.experiment)
        name = str(folder.resolve())
        runs = client.search_runs([experiment], f"tags.folder = '{name}'")
        if runs:
            self.run = runs[0].info.run_id
            client.update_run(self.run, "RUNNING")
            return
        self.run = client.create_run(experiment, tags={"folder": name}).info.run_id
        for key, value in config.to_dict().items():
            client.log_param(self.run, key, value)

    def advance(self, samples: int) -> None:
        pass

    def log(self, row) -> None:
        for name, value in numbers(row).items():
            self.client.log_metric(self.run, name, value, step=row["step"])

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if finished else "FAILED")


SINKS: dict[str, type[Sink]] = {"progress": Progress, "tensorboard": TensorBoard, "mlflow": MLflow}
