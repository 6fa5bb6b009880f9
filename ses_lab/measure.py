"""Measuring runs that are there: evaluation again, probes; and the learning-rate range test."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from ses_lab import build, engine, optim, run_probes
from ses_lab.config import Choice, RunConfig
from ses_lab.data import Split
from ses_lab.folder import RunFolder, write_json
from ses_lab.probes import PROBES
from ses_lab.regimes import REGIMES


def evaluate(folder: str | os.PathLike, weights: str = "last") -> dict[str, Any]:
    """Figures of a run on its test and validation sets, as they were while it trained."""
    folder = RunFolder(folder)
    config = folder.config()
    dataset, validation = build.dataset(config)
    # How a network was trained only matters where that is what is evaluated.
    pretext = config.regime.name in ("mim", "two_views")
    kind = REGIMES[config.regime.name if pretext else "supervised"]
    example = build.pixels(dataset.train.images[:8])
    regime = kind(config.regime, build.trained(folder.path, weights), None, example)
    if pretext:
        build.load_weights(regime, build.load(folder, weights))
    device = engine.device_of(config)
    regime.to(device)
    found: dict[str, Any] = {}
    for name, split in (("test", dataset.test), ("val", validation)):
        if split is not None:
            split = Split(*(x.to(device) for x in split))
            sums, logits = engine.evaluate(regime, split, config)
            means = {key: value.item() / len(split.labels) for key, value in sums.items()}
            figures = engine.figures(means, logits, split.labels.cpu(), dataset.classes)
            found |= {f"{name}_{key}": value for key, value in figures.items()}
    return found


def probe(
    folder: str | os.PathLike, probes: Sequence[Choice], weights: str = "last"
) -> dict[str, dict[str, Any]]:
    """Numbers of each probe of a run; also written to its ``probes.json``.

    Args:
        probes: of ``PROBES``, which take ``split="train"`` beside their own parameters, and of
            ``RUN_PROBES``; results are under ``Choice.slug``.
        weights: those of the run, for the probes that look at weights.
    """
    folder = RunFolder(folder)
    config = folder.config()
    for choice in probes:
        run_probes.check(choice)
    of_models = {choice.slug: choice for choice in probes if choice.name in PROBES}
    found = {}
    if of_models:
        dataset, _ = build.dataset(config)
        model = build.trained(folder.path, weights).to(engine.device_of(config))
        splits = {"test": dataset.test, "train": dataset.train}
        found = build.probe(config, of_models, model, splits)
    for choice in probes:
        if choice.name not in PROBES:
            found[choice.slug] = run_probes.probe(folder.path, choice, weights)
    with folder.claim(config):
        write_json(folder / "probes.json", {**folder.read_json("probes.json"), **found})
    return found


def lr_find(config: RunConfig, **options: Any) -> list[dict[str, float]]:
    """The learning-rate range test of a configuration: rows of lr, loss and smoothed loss.

    Args:
        options: start, stop and steps, of :func:`ses_lab.optim.lr_range_test`.
    """
    with torch.random.fork_rng():
        training = engine.Training(config, engine.ranks(config))
        training.regime.train()
        training.regime.prepare(training.batch(rows)[0] for rows in training.order(0))
        training.start()
        places = ((epoch, *place) for epoch in range(1, 10**9)
                  for place in enumerate(training.order(epoch)))  # fmt: skip

        def step() -> float:
            epoch, number, indices = next(places)
            return training.step(epoch, number, 0, indices)["loss"].item()

        with build.as_config_error("lr-find"):
            return optim.lr_range_test(step, training.optimizer, **options)


def lr_plot(runs: Mapping[int, Sequence[dict[str, float]]]) -> Figure:
    """Loss against learning rate, of each seed; a line where the smoothed loss falls fastest."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    panel = figure.subplots()
    for i, (seed, rows) in enumerate(runs.items()):
        rates, color = [row["lr"] for row in rows], f"C{i % 10}"
        panel.plot(rates, [row["loss"] for row in rows], ".", markersize=3, color=color)
        panel.plot(rates, [row["smooth"] for row in rows], color=color, label=f"seed {seed}")
        best = optim.steepest(rows)
        panel.axvline(best, linestyle=":", color=color, label=f"steepest: {best:.2g}")
    panel.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    panel.legend()
    return figure
