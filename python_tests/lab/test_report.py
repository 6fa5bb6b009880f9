"""Reports: numbers recomputed by hand from run folders that the tests write themselves."""

import base64
import csv
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
import yaml
from scipy import stats

from ses_lab import curves, document, experiments, figures, report
from ses_lab.config import Choice, ConfigError
from ses_lab.folder import RunFolder, write_json
from ses_lab.predictions import findings
from ses_lab.results import (
    Contrast,
    by_difficulty,
    collect,
    contrast,
    holm,
    over_studies,
    table,
    units,
)

DOCUMENT = {
    "title": "Every k-th step",
    "question": "What remains?",
    "base": {"dataset": "digits", "model": {"name": "resnet18", "width": 8}, "epochs": 3},
    "variants": {"baseline": {}, "k=1": {"regularizer.ses": {"every_k": 1}},
                 "k=10": {"regularizer.ses": {"every_k": 10}}},
    "seeds": [0, 1, 2],
    "probes": {"corruption": {"severities": [3]}, "collapse": {}},
    "measures": [
        *("accuracy", "best_accuracy", "validation", "gap"),
        *("corruption.mean", "collapse.nc1", "overhead"),
    ],
    "sweep": "regularizer.ses.every_k",
    "pareto": "corruption.mean",
    "reference": [
        {"source": "A paper, table 5", "setting": "CIFAR-100", "seeds": 3,
         "definition": "images are mirrored too",
         "rows": {"baseline": {"accuracy": [74.31, 0.26], "corruption.mean": 45.97},
                  "k=10": {"accuracy": [74.78, 0.10], "corruption.mean": 46.6, "overhead": 19}}},
        {"source": "A report", "setting": "in words", "rows": {"k=1": {"accuracy": "70 to 72"}}},
    ],
    "scales": {"full": {}, "smoke": {"seeds": [0, 1, 2]}},
}  # fmt: skip
# variant -> seed -> test accuracies of the last two epochs, robust accuracy, seconds of each
RUNS = {
    "baseline": [([0.90, 0.80], 0.50, 2.0), ([0.80, 0.82], 0.52, 2.0), ([0.70, 0.84], 0.57, 4.0)],
    "k=1": [([0.90, 0.85], 0.60, 6.0), ([0.80, 0.83], 0.61, 5.0), ([0.70, 0.90], 0.68, 8.0)],
    "k=10": [([0.90, 0.81], 0.51, 2.2), ([0.80, 0.83], 0.53, 2.4)],  # its third is unfinished
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What running would leave, with numbers that are known."""
    tmp_path = tmp_path_factory.mktemp("periodic")
    file = tmp_path / "periodic.yaml"
    file.write_text(yaml.safe_dump(DOCUMENT, sort_keys=False))
    experiment = experiments.load(str(file), "smoke")
    root = tmp_path / "out" / "periodic" / "smoke"
    for path, config in experiment.runs(root).items():
        run = RunFolder(path)
        with run.claim(config):
            write_json(run / "status.json", {"state": "running"})
            if config.seed >= len(RUNS[config.method]):
                continue
            accuracies, robust, seconds = RUNS[config.method][config.seed]
            for epoch, accuracy in enumerate([0.1, *accuracies], 1):
                run.append({"epoch": epoch, "test_accuracy": accuracy, "train_accuracy": 0.95,
                            "val_accuracy": accuracy - 0.1,
                            "seconds": 100.0 if epoch == 1 else seconds})  # fmt: skip
            write_json(run / "probes.json", {"corruption-severities=_3_": {"mean": robust},
                                             "corruption-severities=_5_": {"mean": 0.0},
                                             "collapse": {"nc1": 3.0}})  # fmt: skip
            write_json(run / "status.json", {"state": "finished"})
    experiments._save(experiment, root)
    return tmp_path / "out"


@pytest.fixture(scope="module")
def drawn(folder):
    return figures.draw(collect(folder / "periodic" / "smoke"))


@pytest.fixture(scope="module")
def written(folder):
    return report.write(folder)


def cell(cells, variant, measure):
    (found,) = [c for c in cells if (c["variant"], c["measure"]) == (variant, measure)]
    return found


def test_cells_by_hand(folder):
    cells = table(collect(folder / "periodic" / "smoke"))
    assert len(cells) == 3 * len(DOCUMENT["measures"])
    base, shaped = np.array([80.0, 82, 84]), np.array([85.0, 83, 90])
    got = cell(cells, "k=1", "accuracy")
    assert got["seeds"] == 3
    assert got["mean"] == pytest.approx(86)
    assert got["std"] == pytest.approx(math.sqrt((1 + 9 + 16) / 2))
    assert got["difference"] == pytest.approx(4)
    d = shaped - base  # 5, 1, 6: the t-test by its definition
    t = d.mean() / (d.std(ddof=1) / math.sqrt(3))
    assert got["p"] == pytest.approx(2 * stats.t.sf(t, 2))
    assert cell(cells, "baseline", "best_accuracy")["mean"] == pytest.approx((90 + 82 + 84) / 3)
    assert cell(cells, "baseline", "validation")["mean"] == pytest.approx(72)
    assert cell(cells, "baseline", "gap")["mean"] == pytest.approx(95 - 82)
    assert cell(cells, "baseline", "corruption.mean")["mean"] == pytest.approx(53)
    assert cell(cells, "k=1", "collapse.nc1")["mean"] == 3.0  # no share: not in percent
    overhead = cell(cells, "k=1", "overhead")
    assert overhead["mean"] == pytest.approx((200 + 150 + 100) / 3)
    assert overhead["p"] is None  # is itself a comparison
    assert cell(cells, "baseline", "overhead")["mean"] is None


def test_unfinished_runs_are_left_out_and_counted(folder, written):
    cells = table(collect(folder / "periodic" / "smoke"))
    got = cell(cells, "k=10", "accuracy")
    assert got["seeds"] == 2
    assert got["difference"] == pytest.approx(1)  # 81 - 80, 83 - 82: of the seeds of both
    assert got["p"] is None  # both differ by the same: no deviation to test with
    text = written.read_text()
    assert "| periodic | not run | 8 of 9 runs |" in text
    assert "| k=10 | smoke, n = 2 |" in text


def test_published_numbers_are_beside_ours(written):
    text = written.read_text()
    lines = text.splitlines()
    ours = next(line for line in lines if line.startswith("| k=1 | smoke"))
    assert "86.00 ± 3.61 (+4.00, p = 0.12)" in ours
    after = lines[lines.index(ours) + 1]
    assert after.startswith("| | published [2], n = 1 | 70 to 72 |")
    assert "| | published [1], n = 3 | 74.78 ± 0.10 |" in text
    differs = "Not as ours: images are mirrored too."
    assert f"Published [1]: CIFAR-100. A paper, table 5. {differs}" in text
    assert "Published [2]: in words. A report.\n" in text
    cells = json.loads((written.parent / "report.json").read_text())
    (first,) = cell(cells, "k=10", "accuracy")["published"]
    assert first["definition"] == "images are mirrored too"
    assert "Scale smoke: resnet18-width=8 on digits, 3 epochs." in text


def test_files_say_the_same(folder, written):
    cells = json.loads((written.parent / "report.json").read_text())
    assert cells == json.loads(json.dumps(table(collect(folder / "periodic" / "smoke"))))
    with open(written.parent / "report.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["mean"] for row in rows] == [
        "" if c["mean"] is None else str(c["mean"]) for c in cells
    ]
    assert rows[0]["published"] == "74.31 ± 0.26"


def test_figures_show_what_was_measured(drawn, written):
    assert drawn.keys() == {"measures", "curves", "pareto"}
    panels = [p for p in drawn["measures"].axes if p.get_title().startswith("accuracy, scale")]
    line = panels[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(orig=False), [1, 10])  # every_k
    np.testing.assert_allclose(line.get_ydata(orig=False), [86, 82])
    assert panels[0].get_xscale() == "log"
    published = [p for p in drawn["measures"].axes if "published [1]" in p.get_title()]
    np.testing.assert_allclose(published[0].lines[0].get_ydata(orig=False), [74.78])
    widest = max(panel.get_subplotspec().get_gridspec().ncols for panel in panels)
    assert widest == 4 < len(DOCUMENT["measures"])
    origin = drawn["pareto"].axes[0].lines[0].get_xydata()  # the control: no time added
    np.testing.assert_allclose(np.asarray(origin, float), [[0, 53]])
    for name in ("periodic-smoke-measures.png", "periodic-smoke-pareto.png"):
        image = matplotlib.image.imread(written.parent / name)[..., :3]
        assert image.std() > 0.05
        assert f"({name})" in written.read_text()


def test_curves_are_means_with_the_range_of_the_seeds(drawn):
    figure = drawn["curves"]
    panel, train = figure.axes  # no losses were kept
    assert panel.get_title() == "accuracy on the test set, %"
    assert train.get_title() == "accuracy in training, %"
    lines = {line.get_label(): line.get_ydata() for line in panel.lines}
    np.testing.assert_allclose(lines["baseline"], [10, 80, 82])
    np.testing.assert_allclose(lines["k=10"], [10, 85, 82])  # of the two that are finished
    band = panel.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 2][:, 1].min() == pytest.approx(70)
    assert band[band[:, 0] == 2][:, 1].max() == pytest.approx(90)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["baseline", "k=1", "k=10"]


def test_a_loss_has_a_panel_of_its_own(folder, tmp_path):
    document = yaml.safe_load((folder / "periodic/smoke/experiment.yaml").read_text())
    document["variants"] = {"a": {}, "b": {"loss": "focal"}, "c": {"clip": 1.0}}
    document |= {"seeds": [0], "sweep": None, "pareto": None, "reference": [], "name": "losses"}
    root = tmp_path / "losses" / "smoke"
    root.mkdir(parents=True)
    (root / "experiment.yaml").write_text(yaml.safe_dump(document))
    for path, config in experiments.saved(root / "experiment.yaml").runs(root).items():
        run = RunFolder(path)
        with run.claim(config):
            run.append({"train_loss": 2.0, "test_loss": 1.0, "test_accuracy": 0.5,
                        "train_accuracy": 0.5, "seconds": 1.0})  # fmt: skip
            write_json(run / "status.json", {"state": "finished"})
    results = collect(root)
    panels = figures._curves(results.experiment, figures._histories(results)).axes
    lines = {p.get_title(): {line.get_label(): line.get_color() for line in p.lines}
             for p in panels}  # fmt: skip
    assert lines["held-out loss: cross_entropy, nats"].keys() == {"a", "b", "c"}
    assert lines["training loss: cross_entropy"].keys() == {"a", "c"}
    assert lines["training loss: focal"].keys() == {"b"}
    assert lines["training loss: focal"]["b"] == lines["accuracy on the test set, %"]["b"]


def test_titles_keep_to_their_panels(folder):
    experiment = collect(folder / "periodic" / "smoke").experiment
    label = "training loss: label_smoothing + rkd-angle=50-distance=25"
    found = {label + " " * i: {"baseline": np.ones((2, 3))} for i in range(curves.ABREAST)}
    figure = figures._curves(experiment, found)
    figure.draw_without_rendering()
    boxes = [panel.title.get_window_extent() for panel in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert boxes[0].x0 > 0
    assert boxes[-1].x1 < figure.bbox.x1


def test_names_of_many_variants_do_not_overlap(folder):
    experiment = collect(folder / "periodic" / "smoke").experiment
    experiment = experiment.model_copy(update={"sweep": None})
    figure, panels = curves.grid(curves.ABREAST)
    for panel in panels:
        panel.tick_params(labelsize="x-small")
        points = {f"narrow+digits {i}": (i, 1.0) for i in range(16)}
        figures._draw(experiment, panel, points)
    figure.draw_without_rendering()
    boxes = [tick.get_window_extent() for tick in panels[0].get_xticklabels()]
    assert len(boxes) == 16
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize(("losses", "scale"), [([100, 2, 1], "log"), ([3, 2, 1], "linear")])
def test_a_first_epoch_does_not_spoil_the_scale(losses, scale):
    ended_early = np.array([losses, [*losses[:2], np.nan]], float)
    _, (panel,) = curves.grid(1)
    curves.draw(panel, {"a": ended_early}, {"a": curves.style(0)}, logarithmic=True)
    np.testing.assert_allclose(panel.lines[0].get_ydata(), losses)
    assert panel.get_yscale() == scale


def test_figures_are_no_wider_than_a_screen(drawn):
    for count in (1, 3, 9):
        figure, panels = curves.grid(count)
        assert len(panels) == count
        assert figure.get_figwidth() * curves.DPI <= 1366
    for figure in drawn.values():
        assert figure.get_figwidth() * curves.DPI <= 1366


def test_measures_have_units(folder, drawn):
    results = collect(folder / "periodic" / "smoke")
    found = units(results.experiment.model_copy(update={"measures": (
        "accuracy", "seconds", "memory", "corruption.fog", "collapse.nc1"
    )}))  # fmt: skip
    assert found == {"accuracy": "%", "seconds": "s", "memory": "MiB", "corruption.fog": "%",
                     "collapse.nc1": "", "corruption.mean": "%"}  # fmt: skip
    panel = drawn["measures"].axes[0]
    assert (panel.get_title(), panel.get_ylabel()) == ("accuracy, scale smoke", "%")


def test_a_bar_for_each_corruption_and_variant(folder):
    results = collect(folder / "periodic" / "smoke")
    for variant, add in (("baseline", 0), ("k=1", 5)):
        for seed, numbers in results.runs[variant].items():
            numbers |= {"corruption.fog": 50 + add + seed, "corruption.jpeg": 60 + add,
                        "corruption.fog/3": 0, "corruption.clean": 99}  # fmt: skip
    (panel,) = figures.draw(results)["corruption"].axes
    assert [label.get_text() for label in panel.get_xticklabels()] == ["fog", "jpeg"]
    bars = {c.get_label(): [bar.get_height() for bar in c] for c in panel.containers
            if hasattr(c, "patches")}  # fmt: skip
    assert bars["baseline"] == pytest.approx([51, 60])
    assert bars["k=1"] == pytest.approx([56, 65])


def test_dynamics_has_targets(folder, tmp_path):
    root = tmp_path / "periodic" / "smoke"
    shutil.copytree(folder / "periodic" / "smoke", root)
    results = collect(root)
    experiment = results.experiment.model_copy(
        update={"probes": {"entropy": Choice(name="entropy")}}
    )
    runs = {"k=1": results.runs["k=1"], "baseline": {}, "k=10": {}}
    for path, config in experiment.runs(root).items():
        if config.method == "k=1":
            run = RunFolder(path)
            (run / "metrics.jsonl").unlink()
            for epoch in (1, 2):
                entropy = {"fc:heads/0": epoch + config.seed}
                run.append({"epoch": epoch, "entropy": entropy, "target": {"fc:heads": 2 + epoch}})
            runs["k=1"][config.seed] |= {"entropy.distance": 1}
    drawn = figures.draw(results._replace(experiment=experiment, runs=runs))["dynamics"]
    (panel,) = drawn.axes
    mean, target = panel.lines
    np.testing.assert_allclose(mean.get_ydata(), [2, 3])  # over seeds 0, 1, 2
    np.testing.assert_allclose(target.get_ydata(), [3, 4])
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["fc:heads/0", "target"]
    assert panel.get_title() == "k=1"


def test_contrast():
    a, b = {0: 1.0, 1: 3.0, 2: 2.0, 5: 9.0}, {0: 0.5, 1: 1.0, 2: 1.5, 4: 9.0}
    found = contrast(a, b)
    assert found.difference == pytest.approx(1.0)
    assert found.p == pytest.approx(stats.ttest_1samp([0.5, 2.0, 0.5], 0).pvalue)
    assert found.d == pytest.approx(1.0 / math.sqrt((1.0 + 0.25) / 2))  # variances 1 and 1 / 4
    assert found.p_rank == pytest.approx(stats.mannwhitneyu([1, 3, 2], [0.5, 1, 1.5]).pvalue)
    apart = contrast({0: 5.0, 1: 6.0, 2: 7.5}, {0: 1.0, 1: 3.0, 2: 2.0})
    assert apart.p_rank == pytest.approx(0.1)  # 2 of 20 orders
    assert contrast({0: 1.0}, {0: 0.5}) == (0.5, None, None, None)
    assert contrast({0: 1.0}, {1: 0.5}) == (None,) * 4
    assert contrast({0: math.inf, 1: 1.0}, {0: 0.5, 1: 0.5}) == (None,) * 4


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_variants_are_compared_with_what_the_study_names(folder):
    results = collect(folder / "periodic" / "smoke")
    experiment = results.experiment.model_copy(update={"against": {"k=1": "k=10"}})
    cells = table(results._replace(experiment=experiment))
    got = cell(cells, "k=1", "accuracy")
    assert (got["against"], got["difference"]) == ("k=10", pytest.approx(2))  # 85 - 81, 83 - 83
    assert cell(cells, "k=10", "accuracy")["against"] == "baseline"
    assert cell(cells, "baseline", "accuracy")["against"] is None
    file = folder.parent / "periodic.yaml"
    with pytest.raises(ConfigError, match="unknown variant of against 'k=2'; did you mean"):
        experiments.load(str(file), "smoke", {"against": {"k=2": "k=1"}})


def test_holm_is_over_the_variants_of_a_measure(folder):
    results = collect(folder / "periodic" / "smoke")
    results.runs["k=10"][2] = {"corruption.mean": 58.5}  # 51, 53, and a third
    cells = [c for c in table(results) if c["measure"] == "corruption.mean"]
    ps = [c["p"] for c in cells if c["p"] is not None]
    assert len(ps) == 2
    assert [c["p_holm"] for c in cells[1:]] == holm(ps)
    assert min(c["p_holm"] for c in cells[1:]) == 2 * min(ps)


def test_over_studies_is_in_the_order_of_difficulty(folder, tmp_path):
    results = collect(folder / "periodic" / "smoke")
    harder = results._replace(runs={
        variant: {seed: {**n, "accuracy": n["accuracy"] - 50} for seed, n in runs.items()}
        for variant, runs in results.runs.items()
    })  # fmt: skip
    rows = over_studies([results, harder])
    assert [row["task"] for row in rows] == pytest.approx([32, 32, 82, 82])
    assert [row["variant"] for row in rows] == ["k=1", "k=10"] * 2
    assert rows[0]["accuracy"].difference == pytest.approx(4)
    assert rows[0]["gap"].difference == pytest.approx(-4)
    assert rows[0]["corruption"].difference == pytest.approx(10)
    # Another one that changes more than the penalty is no pair.
    variants = {**results.experiment.variants, "k=10": {"clip": 1.0, "regularizer.ses": {}}}
    experiment = results.experiment.model_copy(update={"variants": variants})
    (row,) = over_studies([results._replace(experiment=experiment)])
    assert row["variant"] == "k=1"


def test_by_difficulty(folder):
    results = collect(folder / "periodic" / "smoke")
    rows = over_studies([results])
    assert (rows[0]["gap_without"], rows[0]["corruption_without"]) == pytest.approx((13, 53))
    assert [row["published"] for row in rows] == [None, None]  # of best accuracy there is none
    sources = [
        {"source": "s", "setting": "t", "rows": {v: {"best_accuracy": n} for v, n in rows.items()}}
        for rows in ({"k=1": "70 to 72"}, {"baseline": [70, 1], "k=1": 71.5})
    ]
    changed = {**results.experiment.model_dump(), "reference": sources}
    experiment = experiments.Experiment.model_validate(changed)
    (row, _) = over_studies([results._replace(experiment=experiment)])
    assert (row["published"], row["published_without"]) == (pytest.approx(1.5), 70)
    rows = [{"task": task, "accuracy": Contrast(gain), "gap": Contrast(), "published": gain,
             "published_without": 100 - task, "corruption": Contrast(gain if task < 90 else None)}
            for task, gain in ((50, 3.0), (60, 2.5), (70, 1.0), (90, 2.0), (50, 3.0))]  # fmt: skip
    found = by_difficulty(rows)
    # Ranks 1 2 3 4 against 4 3 1 2: 1 - 6 sum d^2 / (n^3 - n)
    assert found["accuracy"] == (pytest.approx(1 - 6 * 18 / 60), 4)  # the fifth is the first
    assert found["published"] == (pytest.approx(6 * 18 / 60 - 1), 4)
    assert found["corruption"] == (pytest.approx(-1), 3)
    assert "gap" not in found
    assert by_difficulty(rows[:2]) == {}


def test_predictions_by_hand(folder, written):
    results = collect(folder / "periodic" / "smoke")
    for variant, numbers in (("baseline", (40.0, 0.1, 0.3)), ("k=1", (16.0, 1.0, 0.8)),
                             ("k=10", (32.0, 0.9, 0.4))):  # fmt: skip
        for seed, run in results.runs[variant].items():
            condition, near, last = numbers
            run |= {"jacobian.mean_condition": condition, "entropy.near": near,
                    "entropy.last_ratio": last + 0.01 * seed, "entropy.ratio": 0.95}  # fmt: skip
    found = {p.name: fs for p, fs in findings([results])}
    # gaps: 13 without; 9 and 13, of two seeds 14 without: -4 / 13, -1 / 13 of it
    (gap,) = found["P1"]
    assert gap.measured.startswith("median -19.2 %, less in 2 of 2 pairs, by 15 % or more in 1")
    assert gap.met
    (error,) = found["P2"]  # errors: 47 without, 10 and 1 points less
    assert error.measured.startswith("median -11.7 %")
    assert [f.met for f in found["P3"]] == [True, False]
    assert found["P3"][1].measured == (
        "90 % of the layers within 10 %, 0.95 on average; without the penalty 10 %"
    )
    assert [f.measured for f in found["P4"]] == [
        "40.0 to 16.0, 2.50 times less", "40.0 to 32.0, 1.25 times less",
    ]  # fmt: skip
    assert [f.met for f in found["P4"]] == [True, False]
    assert [f.met for f in found["P5"]] == [True, False]
    assert found["P5"][0].where == "periodic k=1, smoke, 3 epochs"
    assert found["P6"] == []  # sweeps another option
    for gap in results.runs["k=10"].values():
        gap["gap"] = 15.0
    for betas, shown, met in (
        ((0.5, 0.3, 0.9), "gap 9.00 at 0.3, 13.00 at 0.5, 15.00 at 0.9", True),
        ((0.5, 0.9, 0.3), "gap 15.00 at 0.3, 13.00 at 0.5, 9.00 at 0.9", False),
    ):
        variants = {name: {"regularizer": {"ses": {"beta": beta}}}
                    for name, beta in zip(results.runs, betas, strict=True)}  # fmt: skip
        changes = {"sweep": "regularizer.ses.beta", "variants": variants}
        experiment = results.experiment.model_copy(update=changes)
        _, (sweep,) = findings([results._replace(experiment=experiment)])[-1]
        assert sweep == ("periodic, smoke", shown, met)
    text = written.read_text()
    assert "test accuracy, where there is one | 15 to 30 % less;" in text
    assert "| P4: lower condition number of the Jacobian |" in text
    assert "| not measured | |" in text


class Page(HTMLParser):
    """Cells of every table, and where the pictures come from."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.sources, self.cell, self.open = [], [], None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.sources += [attributes[key] for key in ("src", "href") if key in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def test_html_is_one_file_that_says_the_same(written):
    page = Page((written.parent / "report.html").read_text())
    assert not page.open
    lines = written.read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and not line.startswith("|---")]
    shown = [[cell.strip() for cell in line[1:-1].split("|")] for line in rows]
    assert [row for table in page.tables for row in table] == shown
    # The figures; no style, script or font from elsewhere.
    for source, kind in zip(page.sources, ("measures", "curves", "pareto"), strict=True):
        data = source.removeprefix("data:image/png;base64,")
        file = written.parent / f"periodic-smoke-{kind}.png"
        assert base64.b64decode(data) == file.read_bytes()


def test_html_escapes_what_it_shows():
    page = document.html("<t>", [document.Table(("a & b",), [("<b>x</b>",)])])
    assert "<td>&lt;b&gt;x&lt;/b&gt;</td>" in page
    assert "<title>&lt;t&gt;</title>" in page
    assert Page(page).tables == [[["a & b"], ["<b>x</b>"]]]


# A table with just what the script touches.
_DOM = """
const row = cells => ({cells: cells.map(textContent => ({textContent}))});
const rows = %s.map(row);
const body = {rows, append(...sorted) { this.rows = sorted; }};
const heads = %s.map((_, cellIndex) => ({cellIndex, closest: () => ({tBodies: [body]}),
  removeAttribute() { delete this.ariaSort; },
  addEventListener(_, click) { this.click = click; }}));
heads.forEach(th => th.parentNode = {querySelectorAll: () => heads});
globalThis.document = {querySelectorAll: () => heads};
%s
const shown = () => body.rows.map(r => r.cells.map(c => c.textContent));
const seen = [];
for (const i of %s) { heads[i].click(); seen.push(shown()); }
console.log(JSON.stringify(seen));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the script with")
def test_html_tables_sort():
    rows = [["b", "10 ± 1"], ["", "published"], ["a", "9.5 (+1)"], ["c", ""]]
    code = _DOM % (json.dumps(rows), json.dumps(rows[0]), document._SCRIPT, [1, 1, 0])
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    up, down, by_name = json.loads(done.stdout)
    b, published, a, c = rows
    assert up == [a, b, published, c]
    assert down == [c, b, published, a]
    assert by_name == [a, b, published, c]


_IN_PAGE = """<script>
const named = table => table.tHead.textContent.startsWith("variant");
const table = [...document.querySelectorAll("table")].find(named);
const column = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
const seen = [column()];
for (const _ of "12") { table.tHead.rows[0].cells[2].click(); seen.push(column()); }
document.title = JSON.stringify({failed, seen, page: document.documentElement.scrollWidth,
  window: innerWidth, images: [...document.images].map(i => i.complete && i.naturalWidth)});
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page in")
def test_a_browser_opens_the_report_on_a_narrow_screen(written, tmp_path):
    page = written.with_name("report.html").read_text()
    errors = "<head><script>const failed = []; onerror = said => failed.push(said)</script>"
    (tmp_path / "report.html").write_text(
        page.replace("<head>", errors, 1).replace("</body>", _IN_PAGE)
    )
    command = ["chromium", "--headless", "--no-sandbox", f"--user-data-dir={tmp_path}/profile",
               "--window-size=500,900", "--dump-dom", f"file://{tmp_path}/report.html"]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", shown)[1]))
    assert found["failed"] == []
    assert found["page"] <= found["window"]  # what is wider scrolls by itself
    assert len(found["images"]) == 3
    assert all(found["images"])
    before, up, down = found["seen"]
    assert before == ["baseline", "", "k=1", "", "k=10", ""]
    assert up == ["k=10", "", "baseline", "", "k=1", ""]  # 82.00 ± 1.41, 82.00 ± 2.00, 86.00
    assert down == up[4:] + up[2:4] + up[:2]


def test_numbers_that_are_not_finite_leave_valid_json(folder, tmp_path):
    root = tmp_path / "periodic" / "smoke"
    shutil.copytree(folder / "periodic" / "smoke", root)
    for path in root.rglob("probes.json"):
        write_json(path, {"collapse": {"nc1": math.inf}})
    cells = json.loads(json.dumps(table(collect(root))), parse_constant=pytest.fail)
    assert cell(cells, "k=1", "collapse.nc1")["mean"] is None
    assert cell(cells, "k=1", "accuracy")["mean"] == pytest.approx(86)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no \*/\*/experiment.yaml"):
        report.write(tmp_path)
