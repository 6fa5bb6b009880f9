"""What frozen features are worth: a linear classifier and neighbours, against other solvers."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from ses_lab import build, experiments, measure, run_probes, training
from ses_lab.config import Choice, ConfigError, RunConfig
from ses_lab.results import collect

CONFIG = {"dataset": "digits", "model": {"name": "resnet20", "width": 8}, "epochs": 1,
          "batch_size": 512, "regime": {"name": "two_views", "projection": 16},
          "optimizer": {"name": "sgd", "lr": 0.01}}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("transfer")
    training.run(RunConfig.parse(CONFIG), path)
    return path


def test_features_are_the_classifiers_inputs_in_eval_mode(folder):
    found = run_probes.features(folder)
    model = build.trained(folder)
    dataset, _ = build.dataset(RunConfig.parse(CONFIG))
    with torch.no_grad():
        logits = model(build.pixels(dataset.test.images))
    torch.testing.assert_close(model.fc(found.test), logits)
    assert torch.equal(found.train_labels, dataset.train.labels)
    assert found.train.shape == (1347, 32)


def test_the_linear_probe_is_a_logistic_regression(folder):
    found = run_probes.features(folder)
    x, y = found.train.numpy(), found.train_labels.numpy()
    mean, deviation = x.mean(0), x.std(0)
    fitted = LogisticRegression(C=1e4, max_iter=2000).fit((x - mean) / deviation, y)
    expected = fitted.score((found.test.numpy() - mean) / deviation, found.test_labels.numpy())
    probed = run_probes.linear_probe(folder)
    assert probed["accuracy"] == pytest.approx(expected, abs=0.03)
    assert 0.6 < probed["accuracy"] <= probed["train"]
    assert probed == run_probes.linear_probe(folder)  # the same numbers again


def test_one_neighbour_and_a_vote(folder):
    found = run_probes.features(folder)
    x, y = found.train.numpy(), found.train_labels.numpy()
    tests = found.test.numpy(), found.test_labels.numpy()
    for k, weights in ((1, "uniform"), (7, lambda d: np.exp(-d / 0.07))):
        neighbours = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(x, y)
        assert run_probes.knn(folder, k=k)["accuracy"] == pytest.approx(neighbours.score(*tests))
    everyone = run_probes.knn(folder, k=5000)["accuracy"]  # more than there are
    assert everyone == run_probes.knn(folder, k=1347)["accuracy"]


def test_the_weights_that_are_asked_for(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    best = torch.load(tmp_path / "run" / "best.pt")
    best["model"]["fc.weight"][1:] = 0
    torch.save(best, tmp_path / "run" / "best.pt")
    chosen = [Choice(name="spectra", layers="fc")]
    last, best = (measure.probe(tmp_path / "run", chosen, w) for w in ("last", "best"))
    assert last == {"spectra-layers=fc": run_probes.weight_spectra(folder, layers="fc")}
    assert best["spectra-layers=fc"]["stable_rank"] == pytest.approx(1)
    assert last["spectra-layers=fc"]["stable_rank"] > 1.1


def test_a_study_probes_what_was_learned(folder, tmp_path):
    base = {**CONFIG, "dataset": {"name": "digits", "samples": 64}, "batch_size": 32}
    document = {"base": base, "variants": {"simclr": {}}, "probes": {"knn": {"k": 3}},
                "measures": ["knn.accuracy"]}  # fmt: skip
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(document))
    root = experiments.run(str(file), out=tmp_path)
    (path,) = experiments.load(str(file)).runs(root)
    percent = collect(root).runs["simclr"][0]["knn.accuracy"]
    assert percent == pytest.approx(100 * run_probes.knn(path, k=3)["accuracy"])
    with pytest.raises(ConfigError, match="probe knn: knn needs k >= 1"):
        experiments.run(str(file), out=tmp_path, changes={"probes.knn.k": 0})
