"""Reports: numbers recomputed by hand from run folders that the tests write themselves."""

import csv
import json
import math
import shutil

import matplotlib.image
import numpy as np
import pytest
import yaml
from scipy import stats

from ses_lab import experiments, figures, report
from ses_lab.config import ConfigError
from ses_lab.folder import RunFolder, write_json
from ses_lab.results import collect, paired, table

DOCUMENT = {
    "title": "Every k-th step",
    "question": "What remains?",
    "base": {"dataset": "digits", "model": {"name": "resnet18", "width": 8}, "epochs": 3},
    "variants": {"baseline": {}, "k=1": {"regularizer.ses": {"every_k": 1}},
                 "k=10": {"regularizer.ses": {"every_k": 10}}},
    "seeds": [0, 1, 2],
    "probes": {"corruption": {"severities": [3]}, "collapse": {}},
    "measures": ["accuracy", "best_accuracy", "gap", "corruption.mean", "collapse.nc1", "overhead"],
    "sweep": "regularizer.ses.every_k",
    "pareto": "corruption.mean",
    "reference": [
        {"source": "A paper, table 5", "setting": "CIFAR-100", "seeds": 3,
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
                            "seconds": 100.0 if epoch == 1 else seconds})  # fmt: skip
            write_json(run / "probes.json", {"corruption-severities=_3_": {"mean": robust},
                                             "corruption-severities=_5_": {"mean": 0.0},
                                             "collapse": {"nc1": 3.0}})  # fmt: skip
            write_json(run / "status.json", {"state": "finished"})
    experiments._save(experiment, root)
    return tmp_path / "out"


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
    assert "Published [1]: CIFAR-100. A paper, table 5." in text
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


def test_figures_show_what_was_measured(folder, written):
    results = collect(folder / "periodic" / "smoke")
    drawn = figures.draw(results)
    assert drawn.keys() == {"measures", "pareto"}
    panels = [p for p in drawn["measures"].axes if p.get_title().startswith("accuracy, scale")]
    line = panels[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(orig=False), [1, 10])  # every_k
    np.testing.assert_allclose(line.get_ydata(orig=False), [86, 82])
    assert panels[0].get_xscale() == "log"
    published = [p for p in drawn["measures"].axes if "published [1]" in p.get_title()]
    np.testing.assert_allclose(published[0].lines[0].get_ydata(orig=False), [74.78])
    origin = drawn["pareto"].axes[0].lines[0].get_xydata()  # the control: no time added
    np.testing.assert_allclose(np.asarray(origin, float), [[0, 53]])
    for name in ("periodic-smoke-measures.png", "periodic-smoke-pareto.png"):
        image = matplotlib.image.imread(written.parent / name)[..., :3]
        assert image.std() > 0.05
        assert f"({name})" in written.read_text()


def test_dynamics_has_targets(folder, tmp_path):
    root = tmp_path / "periodic" / "smoke"
    shutil.copytree(folder / "periodic" / "smoke", root)
    results = collect(root)
    experiment = results.experiment.model_copy(update={"probes": {"entropy": {}}})
    runs = {"k=1": results.runs["k=1"], "baseline": {}, "k=10": {}}
    for path, config in experiment.runs(root).items():
        if config.method == "k=1":
            run = RunFolder(path)
            (run / "metrics.jsonl").unlink()
            for epoch in (1, 2):
                run.append({"epoch": epoch, "entropy": {"fc": epoch + config.seed}})
            runs["k=1"][config.seed] |= {"entropy.distance": 1, "entropy.target.fc": 2.5}
    drawn = figures.draw(results._replace(experiment=experiment, runs=runs))["dynamics"]
    (panel,) = drawn.axes
    mean, target = panel.lines
    np.testing.assert_allclose(mean.get_ydata(), [2, 3])  # over seeds 0, 1, 2
    np.testing.assert_allclose(target.get_ydata(), 2.5)
    assert panel.get_title() == "k=1"


def test_paired():
    a, b = {0: 1.0, 1: 3.0, 2: 2.0, 5: 9.0}, {0: 0.5, 1: 1.0, 2: 1.5, 4: 9.0}
    mean, p = paired(a, b)
    assert mean == pytest.approx(1.0)
    assert p == pytest.approx(stats.ttest_1samp([0.5, 2.0, 0.5], 0).pvalue)
    assert paired({0: 1.0}, {0: 0.5}) == (0.5, None)
    assert paired({0: 1.0}, {1: 0.5}) == (None, None)
    assert paired({0: math.inf, 1: 1.0}, {0: 0.5, 1: 0.5}) == (None, None)


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
