"""Effective ranks of the hooked layers on held-out samples, after every epoch of a run."""

import math

import pytest
import torch
import yaml

from ses_kernels import effective_rank
from ses_lab import (
    build,
    curves,
    engine,
    experiments,
    figures,
    models,
    report,
    run_probes,
    training,
)
from ses_lab.config import ConfigError, RunConfig, merge
from ses_lab.folder import RunFolder
from ses_lab.results import collect

BASE = {"dataset": {"name": "shapes", "preset": "trivial", "samples": 64, "size": 8},
        "model": {"name": "vit_tiny", "embed_dim": 12, "depth": 2, "heads": 2, "patch": 2,
                  "drop_path": 0.5},
        "epochs": 2, "batch_size": 32, "rank_samples": 12,
        "regularizer": {"ses": {"beta": 0.5, "every_k": 3}}}  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"model": {"name": "resnet20", "width": 4}}, {"regime": "mim"}]
)
@pytest.mark.filterwarnings("ignore:SESRegularizer")
def test_ranks_are_those_of_an_evaluation(changes, tmp_path):
    """No batch statistics and no dropped paths, on the held-out samples alone."""
    config = RunConfig.parse(merge(BASE, changes))
    row = training.run(config, tmp_path)
    setup = engine.Training(config, engine.ranks(config))
    build.load_weights(setup.regime, build.load(tmp_path, "last"))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(build.seed_of("ranks")))
    images = build.pixels(setup.test.images[order[:12]])
    found, handles = {}, []
    for name in row["rank"]:

        def keep(module, inputs, output, name=name):
            found[name] = output

        handles.append(setup.model.get_submodule(name).register_forward_hook(keep))
    models.outputs(setup.model.eval(), images)
    for handle in handles:
        handle.remove()
    for name, x in found.items():
        pooled = x.flatten(2).mean(2) if x.dim() == 4 else x.mean(1)
        assert row["rank"][name] == pytest.approx(effective_rank(pooled).item(), rel=1e-4)
        ratio = row["rank"][name] / math.sqrt(pooled.shape[1])
        assert row["rank_ratio"][name] == pytest.approx(ratio)
    assert len(found) == len(setup.ses.layers)


@pytest.mark.filterwarnings("ignore:SESRegularizer")
def test_measuring_changes_nothing(tmp_path):
    rows = []
    for samples in (12, None):
        folder = tmp_path / str(samples)
        training.run(RunConfig.parse({**BASE, "rank_samples": samples}), folder)
        kept = ("seconds", "rank", "rank_ratio")
        rows.append([{k: v for k, v in row.items() if k not in kept}
                     for row in RunFolder(folder).rows()])  # fmt: skip
    assert rows[0] == rows[1]


def test_ranks_need_layers():
    with pytest.raises(ConfigError, match="rank_samples needs regularizer"):
        RunConfig.parse({**BASE, "regularizer": {}})


@pytest.mark.filterwarnings("ignore:SESRegularizer")
def test_a_study_of_ranks(tmp_path, monkeypatch):
    document = {
        "base": BASE, "probes": {"rank": {}}, "measures": ["rank.ratio", "rank.spread"],
        "profiles": ["rank.layer"], "reference": [{"source": "S", "setting": "T", "rows": {
            "fixed": {"rank.ratio": 0.5, "rank.layer": {"blocks.1": 7.25, "blocks.2": 9}}}}],
        "variants": {"fixed": {}, "schedule": {"regularizer.ses": {
            "terms": [{"layers": "heads"}], "every_k": 1,
            "beta": {"schedule": "linear", "start": 0.9, "end": 0.3, "epochs": 1}}}},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    results = collect(experiments.run(str(tmp_path / "own.yaml"), out=tmp_path))
    paths = {c.method: p for p, c in results.experiment.runs(results.root).items()}
    rows = RunFolder(paths["fixed"]).rows()
    numbers = results.runs["fixed"][0]
    for measure, row in (("rank.ratio", rows[-1]), ("rank.first_ratio", rows[0])):
        assert numbers[measure] == pytest.approx(sum(row["rank_ratio"].values()) / 2)
    ranks = rows[-1]["rank"].values()
    assert numbers["rank.spread"] == pytest.approx(max(ranks) / min(ranks))
    first, last = RunFolder(paths["schedule"]).rows()
    # two steps an epoch, d = 6: beta is 0.6 after the first, 0.3 at the last
    for row, beta in ((first, 0.6), (last, 0.3)):
        name = "blocks.1.attn:heads/1"
        assert row["rank"][name] / row["rank_ratio"][name] == pytest.approx(6**beta)
    text = report.write(tmp_path).read_text()
    own = rows[-1]["rank"]
    assert "| rank.layer | fixed, full | fixed, published [1] | schedule, full |" in text
    assert f"| blocks.0 | {own['blocks.0']:.2f} | | |" in text
    assert f"| blocks.1 | {own['blocks.1']:.2f} | 7.25 | |" in text
    assert "| blocks.2 | | 9.00 | |" in text
    assert "| 0.500 |" in text
    drawn = figures.draw(results)["ranks"]
    labels = [panel.get_ylabel() for panel in drawn.axes]
    assert labels == 2 * ["effective rank"] + 2 * ["effective rank / d^beta"]
    assert drawn.axes[0].get_ylim() == drawn.axes[1].get_ylim()
    monkeypatch.setattr(curves, "ABREAST", 1)
    (column,) = {panel.get_subplotspec().colspan for panel in figures.draw(results)["ranks"].axes}
    assert column == range(1)
    line, target = (drawn.axes[0].lines[i] for i in (0, len(rows[0]["rank"])))
    assert line.get_ydata() == pytest.approx([row["rank"]["blocks.0"] for row in rows])
    assert target.get_ydata() == pytest.approx([12**0.5] * 2)
    labels = [panel.get_ylabel() for panel in curves.curves(rows, "cross_entropy").axes]
    assert labels[-2:] == ["effective rank", "effective rank / d^beta"]
    RunFolder(paths["fixed"]).cut(0)
    with pytest.raises(ConfigError, match=r"probe rank: .* has no rank_samples"):
        run_probes.rank_dynamics(paths["fixed"])
