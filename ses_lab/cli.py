"""The command ``ses-lab``. What a command needs is imported when it runs: torch takes seconds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ses_lab import config as configuration
from ses_lab.config import Choice, ConfigError
from ses_lab.folder import FolderInUseError, OtherRunError
from ses_lab.values import parse_choice, parse_flags, parse_list, parse_seeds

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML of one run; --KEY VALUE overrules it.")
]
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder of a run; with --seeds, that above it.")
]
Out = Annotated[Path, typer.Option(help="Folder above those of the runs.")]
Seeds = Annotated[str, typer.Option(help="Several runs: 0,1,2.")]
Cluster = Annotated[str, typer.Option(help="local or slurm: as jobs, by submitit.")]
Limit = Annotated[int, typer.Option(help="Jobs in the queue at once.")]
Devices = Annotated[str, typer.Option(help="cuda:0,cuda:1: one local job on each.")]
Parameter = Annotated[list[str] | None, typer.Option(help="Of submitit: slurm_partition=gpu.")]
Weights = Annotated[str, typer.Option(help="last or best.")]


@app.callback()
def _about() -> None:
    """Train networks with and without spectral entropy shaping; measure and compare them.

    Any key of a configuration is a flag of train and lr-find: --optimizer.lr 0.1 --seed 3. It
    overrules the environment (SES_LAB__OPTIMIZER__LR=0.1), which overrules the file. What is chosen
    by name takes its parameters in the same word: --loss focal:gamma=3.
    """


@app.command("list")
def list_(
    kind: Annotated[
        str, typer.Argument(help="studies, datasets, ..., or a study; all without.")
    ] = "",
) -> None:
    """What there is to choose from, with parameters and their defaults.

    Of a study: the sources of its published numbers, and in what these differ from ours.
    """
    from ses_lab import experiments
    from ses_lab.catalogue import catalogue, published
    from ses_lab.names import lookup

    if kind in experiments.names():
        show(published(kind))
        return
    found = catalogue()
    for name, rows in ({kind: lookup("kind", found, kind)} if kind else found).items():
        print(f"\n{name}\n")
        show(rows)


@app.command(context_settings=FLAGS)
def train(
    context: typer.Context,
    config: Config,
    out: Out = Path("experiments"),
    seeds: Seeds = "",
    cluster: Cluster = "",
    limit: Limit = 2,
    devices: Devices = "",
    parameter: Parameter = None,
) -> None:
    """Train a configuration, or go on with it, in OUT/{dataset}/{method}/{model}/{seed}."""
    runs = {out / c.path: c for c in _configs(config, context.args, seeds)}
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


def _configs(config: Path, arguments: Sequence[str], seeds: str) -> list[configuration.RunConfig]:
    """One configuration a seed; without ``seeds`` that of the file."""
    flags = parse_flags(arguments)
    changes = [{**flags, "seed": seed} for seed in parse_seeds(seeds)] or [flags]
    return [configuration.load(config, None, change) for change in changes]


def _runs(run: Path, seeds: str) -> list[Path]:
    return [run / str(seed) for seed in parse_seeds(seeds)] or [run]


def _launch(runs, out: Path, cluster: str, limit: int, devices: str, parameter) -> None:
    from ses_lab.launch import launch

    parameters = parse_flags([f"--{item}" for item in parameter or ()])
    options = {"cluster": cluster, "limit": limit, "devices": parse_list(devices), **parameters}
    failed = launch(runs, logs=out / "jobs", **options)
    if failed:
        raise SystemExit("\n".join(f"{path} failed: {error}" for path, error in failed.items()))


@app.command("eval")
def evaluate(run: Run, weights: Weights = "last", seeds: Seeds = "") -> None:
    """Measure a run again, on the data of its configuration."""
    from ses_lab import measure

    _print_json({path: measure.evaluate(path, weights) for path in _runs(run, seeds)}, seeds)


def _print_json(found: dict[Path, Any], seeds: str) -> None:
    """The numbers of one run; with --seeds those of each, by seed."""
    named = {path.name: numbers for path, numbers in found.items()}
    print(json.dumps(named if seeds else next(iter(named.values())), indent=1))


@app.command("lr-find", context_settings=FLAGS)
def lr_find(
    context: typer.Context,
    config: Config,
    seeds: Seeds = "",
    start: float = 1e-6,
    stop: float = 1.0,
    steps: int = 100,
    plot: Path = Path("lr.png"),
) -> None:
    """Raise the learning rate step by step; print where the loss falls fastest, and plot it."""
    from ses_lab import measure, optim

    options = {"start": start, "stop": stop, "steps": steps}
    configs = _configs(config, context.args, seeds)
    runs = {chosen.seed: measure.lr_find(chosen, **options) for chosen in configs}
    measure.lr_plot(runs).savefig(plot, dpi=120)
    steepest = ", ".join(f"{optim.steepest(rows):.3g}" for rows in runs.values())
    print(f"{steepest}  (steepest descent of the smoothed loss; curve: {plot})")


@app.command()
def spectra(
    checkpoint: Annotated[
        Path, typer.Argument(help="A saved model, or the folder of a run; with --seeds, above it.")
    ],
    plot: Annotated[Path | None, typer.Option(help="Histograms and CCDFs, as PNG.")] = None,
    save: Annotated[Path | None, typer.Option(help="Singular values, as .npz.")] = None,
    seeds: Seeds = "",
) -> None:
    """Print a table of the weight spectra: entropy, stable rank, alpha, Hill, decay, norms."""
    from ses_lab import spectra, weights

    for path in _runs(checkpoint, seeds):
        source = weights.load(path / "checkpoint.pt" if path.is_dir() else path)
        if seeds:
            print(path)
        show(spectra.table(source))
        for file, write in ((plot, _plot), (save, spectra.save)):
            if file is not None:
                name = f"{file.stem}-{path.name}{file.suffix}" if seeds else file.name
                write(file.with_name(name), source)


def _plot(file: Path, source) -> None:
    from ses_lab import spectra

    spectra.plot(source).savefig(file, dpi=120)


@app.command()
def probe(
    run: Run,
    names: Annotated[
        list[str] | None, typer.Argument(help="pgd, corruption:names=[fog,jpeg],samples=64.")
    ] = None,
    weights: Weights = "last",
    seeds: Seeds = "",
) -> None:
    """Probe a run, on its test set or with split=train; results go to its probes.json.

    Without names: every probe that takes a model and samples.
    """
    from ses_lab import measure
    from ses_lab.probes import PROBES

    chosen = [Choice(**parse_choice(name)) for name in names or PROBES]
    _print_json({path: measure.probe(path, chosen, weights) for path in _runs(run, seeds)}, seeds)


@app.command(context_settings=FLAGS)
def run(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="An experiment, by name or as a YAML file.")],
    scale: Annotated[
        str | None, typer.Option(help="smoke, a minute on bundled data, if it has it; or full.")
    ] = None,
    variants: Annotated[str, typer.Option(help="Only these: baseline,ses.")] = "",
    seeds: Seeds = "",
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
    if seeds:
        changes["seeds"] = parse_seeds(seeds)
    only = [str(variant) for variant in parse_list(variants)]
    if cluster:
        experiment = experiments.load(name, scale, changes)
        root = out / experiment.name / experiment.scale
        _launch(experiment.runs(root, only), root, cluster, limit, devices, parameter)
    options = {"scale": scale, "out": out, "changes": changes, "variants": only}
    print(experiments.run(name, sinks=[Progress()], **options))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What `run` wrote.")] = Path("experiments"),
    seeds: Annotated[str, typer.Option(help="Only of these seeds: 0,1,2.")] = "",
) -> None:
    """Tables and figures of the runs in a folder, published numbers beside them."""
    from ses_lab import report as reporting

    print(reporting.write(folder, parse_seeds(seeds)).with_suffix(".html"))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of equal keys as a table."""
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values())
        table.add_row(*map(escape, cells))
    # Into a file or a pipe nothing is cut to the width of a screen.
    console = Console()
    (console if console.is_terminal else Console(width=250)).print(table)


def main() -> None:
    try:
        app()
    except (ConfigError, FolderInUseError, OtherRunError, OSError) as error:
        raise SystemExit(f"ses-lab: {error}") from None
