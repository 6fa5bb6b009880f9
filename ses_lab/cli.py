"""The command ``ses-lab``. What a command needs is imported when it runs: torch takes seconds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ses_lab import config as configuration
from ses_lab.config import Choice, ConfigError
from ses_lab.folder import FolderInUseError, OtherRunError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML of one run; --KEY VALUE overrules it.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Out = Annotated[Path, typer.Option(help="Folder above those of the runs.")]
Cluster = Annotated[str, typer.Option(help="local or slurm: as jobs, by submitit.")]
Limit = Annotated[int, typer.Option(help="Jobs in the queue at once.")]
Devices = Annotated[str, typer.Option(help="cuda:0,cuda:1: one local job on each.")]
Parameter = Annotated[list[str] | None, typer.Option(help="Of submitit: slurm_partition=gpu.")]
Weights = Annotated[str, typer.Option(help="last or best.")]


@app.callback()
def _about() -> None:
    """Train networks with and without spectral entropy shaping; measure and compare them.

    Any key of a configuration is a flag of train and lr-find: --optimizer.lr 0.1 --seed 3. It
    overrules the environment (SES_LAB__OPTIMIZER__LR=0.1), which overrules the file.
    """


@app.command(context_settings=FLAGS)
def train(
    context: typer.Context,
    config: Config,
    out: Out = Path("experiments"),
    seeds: Annotated[str, typer.Option(help="Several runs: 0,1,2.")] = "",
    cluster: Cluster = "",
    limit: Limit = 2,
    devices: Devices = "",
    parameter: Parameter = None,
) -> None:
    """Train a configuration, or go on with it, in OUT/{dataset}/{method}/{model}/{seed}."""
    flags = parse_flags(context.args)
    changes = [{**flags, "seed": int(seed)} for seed in seeds.split(",")] if seeds else [flags]
    runs = {out / c.path: c for c in (configuration.load(config, None, f) for f in changes)}
    if cluster:
        _launch(runs, out, cluster, limit, devices, parameter)
        return

    from ses_lab import training
    from ses_lab.sinks import Progress

    # A failure is kept in its folder, and does not keep the other seeds from running.
    failures = []
    for path, run_config in runs.items():
        try:
            last = training.run(run_config, path, [Progress()])
        except (FolderInUseError, OtherRunError, FloatingPointError) as error:
            failures.append(f"{path}: {error}")
            continue
        if os.environ.get("RANK", "0") == "0":
            print(path)
            show([{name: value for name, value in last.items() if not isinstance(value, dict)}])
    if failures:
        raise SystemExit("\n".join(failures))


def _launch(runs, out: Path, cluster: str, limit: int, devices: str, parameter) -> None:
    from ses_lab.launch import launch

    chosen = [device for device in devices.split(",") if device]
    parameters = parse_flags([f"--{item}" for item in parameter or ()])
    options = {"cluster": cluster, "limit": limit, "devices": chosen, **parameters}
    failed = launch(runs, logs=out / "jobs", **options)
    if failed:
        raise SystemExit("\n".join(f"{path} failed: {error}" for path, error in failed.items()))


@app.command("eval")
def evaluate(run: Run, weights: Weights = "last") -> None:
    """Measure a run again, on the data of its configuration."""
    from ses_lab import measure

    print(json.dumps(measure.evaluate(run, weights), indent=1))


@app.command("lr-find", context_settings=FLAGS)
def lr_find(
    context: typer.Context,
    config: Config,
    start: float = 1e-6,
    stop: float = 1.0,
    steps: int = 100,
    plot: Path = Path("lr.png"),
) -> None:
    """Raise the learning rate step by step; print where the loss falls fastest, and plot it."""
    from ses_lab import measure, optim

    chosen = configuration.load(config, None, parse_flags(context.args))
    rows = measure.lr_find(chosen, start=start, stop=stop, steps=steps)
    measure.lr_plot(rows).savefig(plot, dpi=120)
    print(f"{optim.steepest(rows):.3g}  (steepest descent of the smoothed loss; curve: {plot})")


@app.command()
def spectra(
    checkpoint: Annotated[Path, typer.Argument(help="A saved model, or the folder of a run.")],
    plot: Annotated[Path | None, typer.Option(help="Histograms and CCDFs, as PNG.")] = None,
    save: Annotated[Path | None, typer.Option(help="Singular values, as .npz.")] = None,
) -> None:
    """Print a table of the weight spectra: entropy, stable rank, alpha, Hill, norms."""
    from ses_lab import spectra as weights

    if checkpoint.is_dir():
        checkpoint = checkpoint / "checkpoint.pt"
    source = weights.load(checkpoint)
    show(weights.table(source))
    if plot is not None:
        weights.plot(source).savefig(plot, dpi=120)
    if save is not None:
        weights.save(save, source)


@app.command()
def probe(
    run: Run,
    names: Annotated[list[str] | None, typer.Argument(help="pgd, 'pgd:steps=5,norm=l2'.")] = None,
    weights: Weights = "last",
) -> None:
    """Probe the test set of a run; results go to its probes.json. Without names: every probe."""
    from ses_lab import measure
    from ses_lab.probes import PROBES

    chosen = [_choice(name) for name in names or PROBES]
    print(json.dumps(measure.probe(run, chosen, weights), indent=1))


@app.command(context_settings=FLAGS)
def run(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="An experiment, by name or as a YAML file.")],
    scale: Annotated[str, typer.Option(help="smoke: bundled data, a minute; or full.")] = "smoke",
    out: Out = Path("experiments"),
    cluster: Cluster = "",
    limit: Limit = 2,
    devices: Devices = "",
    parameter: Parameter = None,
) -> None:
    """Run and probe what is not finished of an experiment; --base.epochs 5 changes its file."""
    from ses_lab import experiments
    from ses_lab.sinks import Progress

    changes = parse_flags(context.args)
    if cluster:
        experiment = experiments.load(name, scale, changes)
        root = out / experiment.name / scale
        _launch(experiment.runs(root), root, cluster, limit, devices, parameter)
    print(experiments.run(name, scale=scale, out=out, changes=changes, sinks=[Progress()]))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What `run` wrote.")] = Path("experiments"),
) -> None:
    """Tables and figures of the runs in a folder, published numbers beside them."""
    from ses_lab import report as reporting

    print(reporting.write(folder))


def parse_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """``--optimizer.lr 0.1 --seed=3`` -> ``{"optimizer.lr": 0.1, "seed": 3}``; values are YAML."""
    flags: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        key, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not (equals or rest):
            raise ConfigError(f"expected --KEY VALUE with a key of the configuration, got {flag!r}")
        flags[key] = configuration.parse_yaml(value if equals else rest.pop(0))
    return flags


def _choice(text: str) -> Choice:
    """``pgd:steps=5,norm=l2``"""
    name, _, params = text.partition(":")
    return Choice(name=name, **parse_flags([f"--{item}" for item in params.split(",") if item]))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of equal keys as a table."""
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values())
        table.add_row(*cells)
    # Into a file or a pipe nothing is cut to the width of a screen.
    console = Console()
    (console if console.is_terminal else Console(width=250)).print(table)


def main() -> None:
    try:
        app()
    except (ConfigError, FolderInUseError, OtherRunError, FileNotFoundError) as error:
        raise SystemExit(f"ses-lab: {error}") from None
