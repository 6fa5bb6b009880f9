"""The experiments: every file is valid at every scale and runs; running again goes on."""

import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

from ses_lab import (
    build,
    experiments,
    figures,
    measure,
    optim,
    report,
    run_probes,
    spectra,
    training,
)
from ses_lab.config import Choice, ConfigError, merge
from ses_lab.data import BUNDLED
from ses_lab.experiments import load, run
from ses_lab.folder import OtherRunError, RunFolder
from ses_lab.results import collect, table

PAPER = {
    "dynamics", "beta", "corruption", "toy_jacobian", "cifar10_seeds", "cifar100_seeds", "lambda",
    "spectral_norm", "layers", "periodic", "tiny_imagenet", "mixup_cutmix", "wide_resnet",
    "vit", "vit_augmentation", "vit_beta", "vit_layers", "beta_schedules", "targets",
    "rank_dynamics", "two_views", "bert",
}  # fmt: skip
SPECTRA = {"weight_spectra", "loss_spectra", "data_complexity", "architectures", "pretraining",
           "regularizer_comparison"}  # fmt: skip
TOY = {
    "title": "Toy",
    "question": "Does it run?",
    "base": {"dataset": {"name": "moons", "samples": 64}, "model": {"name": "mlp", "width": 8},
             "epochs": 2, "batch_size": 32},
    "variants": {"baseline": None, "ses": {"regularizer.ses": {"beta": 0.5}}},
    "seeds": [0],
    "measures": ["accuracy"],
    "reference": [],
    "scales": {"full": {}, "smoke": {"base.epochs": 1}},
}  # fmt: skip


def toy(path: Path, **changes) -> str:
    file = path / "toy.yaml"
    file.write_text(yaml.safe_dump(merge(TOY, changes), sort_keys=False))
    return str(file)


# ---- the files that come with the package ----


def test_the_studies_are_there():
    assert {*experiments.names()} == {*PAPER, *SPECTRA, "distillation", "little_data"}
    search = Path(__file__).parents[2] / "examples" / "little_data_search.yaml"
    assert load(str(search)).base["dataset"] == load("little_data", "full").base["dataset"]


@pytest.mark.parametrize("name", experiments.names())
@pytest.mark.parametrize("scale", ["full", "smoke"])
def test_every_file_is_valid(name, scale):
    experiment = load(name, scale)
    runs = experiment.runs(Path("experiments"))
    assert len(runs) == len(experiment.variants) * len(experiment.seeds)
    assert experiment.question.endswith("?")
    assert all(r.source and r.setting for r in experiment.reference)
    if scale == "smoke":
        assert {config.dataset.name for config in runs.values()} <= BUNDLED.keys()
        assert len(experiment.seeds) >= 3  # or the paired test says nothing


def tiny(name: str) -> dict:
    """Changes with which an experiment takes a second or two: one seed and epoch, 64 images."""
    corner = {}
    if name == "architectures":  # of its 4 x 4
        text = (Path(experiments.__file__).parent / f"{name}.yaml").read_text()
        axes = yaml.safe_load(text)["scales"]["smoke"]["grid"]
        corner = {"grid": [dict([*axis.items()][:2]) for axis in axes]}
    experiment = load(name, "smoke", corner)
    points = experiment.base["dataset"] if name == "toy_jacobian" else {}
    # patches of a ViT tile 28 pixels as they do at scale smoke
    size = 28 if name == "weight_spectra" else 8
    images = {"name": "shapes", "preset": "trivial", "samples": 64, "size": size}
    dataset = {**points, "samples": 64} if points else images
    if name == "bert":
        pytest.importorskip("transformers")
        dataset = {**experiment.base["dataset"], "samples": 64}
    changes = {**corner, "base.dataset": dataset, "base.epochs": 1, "base.batch_size": 32,
               "seeds": [0]}  # fmt: skip
    for variant, own in experiment.variants.items():
        if "dataset" in own:
            changes |= {f"variants.{variant}.{k}": changes[f"base.{k}"]
                        for k in ("dataset", "epochs", "batch_size")}  # fmt: skip
    if "corruption" in experiment.probes:
        changes["probes.corruption"] = {"severities": [3], "samples": 16}
    for label in experiment.base.get("probes", {}):
        changes[f"base.probes.{label}.samples"] = 8
    return changes


def assert_complete(root: Path):
    """Every run is finished, and every measure of the report has its number."""
    results = collect(root)
    for cell in table(results):
        expected = len(results.experiment.seeds)
        if cell["measure"] == "overhead" and cell["variant"] == results.experiment.control:
            expected = 0
        if cell["measure"] == "accuracy" and cell["variant"] == "masked":  # it has no labels
            expected = 0
        assert cell["seeds"] == expected, cell


# A ResNet's warning that 32 images cannot have the rank of 64 channels is right.
@pytest.mark.filterwarnings("ignore:SESRegularizer")
@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_runs_on_a_few_images(name, tmp_path):
    assert_complete(run(name, "smoke", tmp_path, tiny(name)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SESRegularizer")
@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_runs_at_scale_smoke(name, tmp_path):
    if name == "bert":
        pytest.importorskip("transformers")
    assert_complete(run(name, "smoke", tmp_path))


# ---- reading ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measures": ["acuracy"]}, "did you mean 'accuracy'"),
        ({"pareto": "corruption.mean"}, "unknown measure 'corruption.mean'"),
        ({"probes": {"corupt": {}}}, "did you mean 'corruption'"),
        ({"probes": {"pgd": {"step": 3}}}, "did you mean 'steps'"),
        ({"base.epoch": 3}, "variants.baseline: unknown key 'epoch'; did you mean 'epochs'"),
        ({"variants.ses": {"regularizer.ses": {"betta": 1}}}, "variants.ses: .*'beta'"),
        ({"seed": [1]}, "did you mean 'seeds'"),
        ({"seeds": []}, "seeds: "),
        (
            {"variants.baseline": {"regime": "distill", "teacher": {"run": "ses"}}},
            r"variants.baseline.teacher.run: expected a variant before it, \[\], got 'ses'",
        ),
        (
            {"reference": [{"source": "s", "setting": "t", "rows": {"sess": {"accuracy": 1}}}]},
            "unknown variant of reference 'sess'; did you mean 'ses'",
        ),
        ({"reference": [{"source": "s", "rows": {}}]}, "reference.0.setting: Field required"),
    ],
)
def test_faults_are_named(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(toy(tmp_path, **changes), "full")


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"unknown experiment 'distilation'; did you mean 'disti"):
        load("distilation")
    with pytest.raises(ConfigError, match=r"unknown scale 'smok'; did you mean 'smoke'"):
        load("beta", "smok")


def test_base_and_variants_are_all_that_a_study_needs(tmp_path):
    file = tmp_path / "my_own.yaml"
    file.write_text(yaml.safe_dump({key: TOY[key] for key in ("base", "variants")}))
    experiment = load(str(file))
    assert (experiment.title, experiment.scale, experiment.seeds) == ("my own", "full", (0,))
    root = run(str(file), out=tmp_path, changes={"base.epochs": 1})
    assert root == tmp_path / "my_own" / "full"
    assert_complete(root)
    assert "| my_own | 2 of 2 runs | not run |" in report.write(tmp_path).read_text()
    with pytest.raises(ConfigError, match="unknown scale 'smoke'; there are full"):
        load(str(file), "smoke")
    file.write_text(yaml.safe_dump({"base": TOY["base"]}))
    with pytest.raises(ConfigError, match=r"my_own\.yaml: variants: "):
        load(str(file))


def test_the_study_of_the_documentation(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "lab.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_own.yaml").write_text(block)
    experiment = load(str(tmp_path / "my_own.yaml"))
    assert experiment.opponent("ses+mixup") == "mixup"
    configs = {c.method: c for c in experiment.runs(tmp_path).values()}
    assert configs["ses"].dataset.params["label_noise"] == 0.1
    assert configs["ses"].regularizer.ses["beta"] == {"blocks.1*": 0.6, "*": 0.5}


def test_scale_then_environment_then_changes(tmp_path, monkeypatch):
    file = toy(tmp_path)
    assert load(file, "full").base["epochs"] == 2
    assert load(file, "smoke").base["epochs"] == 1
    monkeypatch.setenv("SES_LAB__EPOCHS", "5")
    monkeypatch.setenv("SES_LAB__DATASET__ROOT", "/archives")
    assert load(file, "smoke").base["epochs"] == 5
    experiment = load(file, "smoke", {"base.epochs": 7, "variants.ses.epochs": 9})
    epochs = {c.method: c.epochs for c in experiment.runs(tmp_path).values()}
    assert epochs == {"baseline": 7, "ses": 9}
    assert experiment.variants["ses"]["regularizer"] == {"ses": {"beta": 0.5}}
    assert {c.dataset.root for c in experiment.runs(tmp_path).values()} == {"/archives"}


@pytest.mark.parametrize(
    ("name", "images", "epochs"),
    [("mixup_cutmix", 50_000, {20, 35, 45}), ("beta_schedules", 50_000, {20, 35, 45}),
     ("wide_resnet", 50_000, {20, 35, 45}), ("periodic", 50_000, {20, 35, 45}),
     ("tiny_imagenet", 100_000, {25, 40, 52})],
)  # fmt: skip
def test_the_rate_falls_to_a_fifth_at_the_epochs_of_the_source(name, images, epochs):
    config = next(iter(load(name, "full").runs(Path()).values()))
    steps = images // config.batch_size  # the last batch is dropped, there and here
    # The first and the last step of each epoch.
    ends = [epoch * steps + i for epoch in range(config.epochs) for i in (0, steps - 1)]
    total = steps * config.epochs
    rates = [optim.multistep(step / total, **config.schedule.params) for step in ends]
    falls = {i for i in range(1, len(rates)) if rates[i] == pytest.approx(rates[i - 1] / 5)}
    assert falls == {2 * epoch for epoch in epochs}
    assert rates[-1] == pytest.approx(1 / 125)


def test_students_learn_from_the_teacher_of_their_seed():
    runs = load("distillation", "full").runs(Path("out"))
    teachers = {c.seed: path for path, c in runs.items() if c.method == "teacher"}
    order = list(runs)
    for path, config in runs.items():
        if config.method not in ("student", "teacher"):
            assert config.teacher.run == str(teachers[config.seed])
            assert config.teacher.weights == "best"
            assert order.index(teachers[config.seed]) < order.index(path)


GRID = [{"one": None, "two": {"model.depth": 2}}, {"a": {}, "b": {"epochs": 7}}]


def test_a_grid_is_a_product(tmp_path):
    changes = {"grid": GRID, "variants": {"two+b": {"clip": 1.0}, "other": {}}}
    document = {**TOY, **changes, "against": {"two+b": "two+a"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    experiment = load(str(tmp_path / "own.yaml"), "full", {"variants.two+a.clip": 2.0})
    assert [*experiment.variants] == ["one+a", "one+b", "two+a", "two+b", "other"]
    configs = {c.method: c for c in experiment.runs(tmp_path).values()}
    found = {name: (c.model.params.get("depth"), c.epochs, c.clip) for name, c in configs.items()}
    assert found == {"one+a": (None, 2, None), "one+b": (None, 7, None), "two+a": (2, 2, 2.0),
                     "two+b": (2, 7, 1.0), "other": (None, 2, None)}  # fmt: skip
    opponents = {name: experiment.opponent(name) for name in experiment.variants}
    assert opponents == {"one+a": None, "one+b": "one+a", "two+a": "one+a", "two+b": "two+a",
                         "other": "one+a"}  # fmt: skip
    assert load(str(tmp_path / "own.yaml"), "full", {"against": {}}).opponent("two+b") == "two+a"
    for grid in ({"a": {}}, [["a"]], [{}]):
        with pytest.raises(ConfigError, match=r"own\.yaml: grid: expected a list of axes"):
            load(str(tmp_path / "own.yaml"), "full", {"grid": grid})


def test_a_report_of_grids_that_differ(tmp_path):
    document = {"base": {**TOY["base"], "epochs": 1}, "grid": [{"one": {}}, {"a": {}}],
                "scales": {"smoke": {"grid": [{"one": {}}, {"b": {}}]}}}  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(document))
    scales = [
        collect(run(str(tmp_path / "own.yaml"), scale, tmp_path)) for scale in ("full", "smoke")
    ]
    (shown,) = (b.rows for b in report._section(scales) if isinstance(b, report.Table))
    assert [row[:2] for row in shown] == [("one+a", "full, n = 1"), ("one+b", "smoke, n = 1")]


# ---- running ----


@pytest.fixture
def trained(monkeypatch):
    """Folders in which a run was really trained."""
    found = []
    real = training._train

    def counted(training_, folder, *rest):
        found.append(folder.path)
        return real(training_, folder, *rest)

    monkeypatch.setattr(training, "_train", counted)
    return found


def test_running_again_does_what_is_missing(tmp_path, trained):
    file = toy(tmp_path, probes={"fgsm": {"samples": 16}}, measures=["accuracy", "fgsm.robust"])
    root = run(file, "smoke", tmp_path / "out")
    assert len(trained) == 2
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    run(file, "smoke", tmp_path / "out", {"seeds": [0, 1]})
    assert len(trained) == 4
    changed = {path for path, t in before.items() if path.stat().st_mtime_ns != t}
    assert changed <= {root / "experiment.yaml"} | {*root.rglob("lock")}
    folder = RunFolder(trained[1])
    (folder / "probes.json").unlink()
    run(file, "smoke", tmp_path / "out", {"probes.collapse": {}, "seeds": [0, 1]})
    assert len(trained) == 4
    assert folder.read_json("probes.json").keys() == {"fgsm-samples=16", "collapse"}


def test_some_variants_by_name(tmp_path, trained):
    file = toy(tmp_path, **{"variants.other": {"clip": 1.0}})
    root = run(file, "smoke", tmp_path / "out", variants=["ses"])
    assert [RunFolder(path).config().method for path in trained] == ["ses"]
    assert collect(root).finished == 1
    run(file, "smoke", tmp_path / "out")
    assert len(trained) == 3
    runs = load("distillation", "smoke").runs(tmp_path, ["kd", "rkd"])
    assert {config.method for config in runs.values()} == {"teacher", "kd", "rkd"}
    with pytest.raises(ConfigError, match="unknown variant 'sse'; did you mean 'ses'"):
        run(file, "smoke", tmp_path / "out", variants=["sse"])


def test_a_changed_experiment_is_refused(tmp_path):
    file = toy(tmp_path)
    root = run(file, "smoke", tmp_path / "out")
    before = (root / "experiment.yaml").read_text()
    with pytest.raises(OtherRunError, match="epochs is 1 there and 3 here"):
        run(file, "smoke", tmp_path / "out", {"base.epochs": 3})
    assert (root / "experiment.yaml").read_text() == before


def test_one_run_that_diverges_does_not_stop_the_others(tmp_path):
    diverging = {"optimizer": {"name": "sgd", "lr": 1e38}}
    file = toy(tmp_path, variants={"baseline": diverging})
    with pytest.warns(UserWarning, match=r"baseline.*is nan|baseline.*is inf"):
        root = run(file, "full", tmp_path / "out")
    runs = collect(root).runs
    assert not runs["baseline"]
    assert runs["ses"].keys() == {0}


def test_pretraining_then_finetuning(tmp_path):
    base = {
        "dataset": {"name": "shapes", "preset": "trivial", "samples": 64, "size": 8},
        "model": {"name": "vit_tiny", "embed_dim": 16, "depth": 1, "patch": 4},
        "epochs": 1,
    }
    variants = {"scratch": {}, "pretrain": {"regime": "mim"},
                "finetune": {"regime": "finetune", "init_from": {"run": "pretrain"}}}  # fmt: skip
    file = tmp_path / "stages.yaml"
    document = {**TOY, "base": base, "variants": variants}
    file.write_text(yaml.safe_dump({**document, "scales": {"full": {}}}, sort_keys=False))
    runs = collect(run(str(file), "full", tmp_path)).runs
    assert "accuracy" in runs["finetune"][0]
    assert "accuracy" not in runs["pretrain"][0]  # has no labels


# ---- probes of runs ----


def test_probes_of_the_epochs(tmp_path):
    probes = {"dead": {"name": "dead_units", "samples": 16}, "pgd": "pgd:steps=1,samples=16"}
    changes = {"base.epochs": 3, "base.probe_every": 2, "base.probes": probes, "seeds": [0, 1],
               "measures": ["accuracy", "dead.share", "pgd.robust"]}  # fmt: skip
    root = run(toy(tmp_path, **changes), "full", tmp_path / "out")
    results = collect(root)
    assert_complete(root)
    paths = {(c.method, c.seed): p for p, c in results.experiment.runs(root).items()}
    rows = [RunFolder(paths["ses", seed]).rows() for seed in (0, 1)]
    numbers = results.runs["ses"][1]
    assert numbers["dead.share"] == rows[1][-1]["probes"]["dead"]["share"]
    assert numbers["pgd.robust"] == 100 * rows[1][-1]["probes"]["pgd"]["robust"]  # in percent
    panels = figures.draw(results)["probes"].axes
    assert [panel.get_title() for panel in panels] == ["dead.share", "pgd.robust, %"]
    np.testing.assert_allclose(
        panels[1].lines[1].get_ydata()[-1],
        np.mean([results.runs["ses"][seed]["pgd.robust"] for seed in (0, 1)]),
    )
    line = panels[0].lines[1]
    means = [np.mean([r[epoch]["probes"]["dead"]["share"] for r in rows]) for epoch in (1, 2)]
    assert (list(line.get_xdata()), line.get_label()) == ([2, 3], "ses")
    assert line.get_ydata() == pytest.approx(means)
    with pytest.raises(ConfigError, match=r"probes\.dead is the label of one of base\.probes"):
        load(toy(tmp_path, **changes, probes={"dead": {"name": "dead_units"}}))


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    path = tmp_path_factory.mktemp("shaped")
    base = {"dataset": {"name": "shapes", "preset": "trivial", "samples": 64, "size": 8},
            "model": {"name": "resnet18", "width": 8}, "epochs": 1, "batch_size": 64}  # fmt: skip
    variants = {"ses": {"regularizer.ses": {"beta": 0.6}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = run(toy(path, base=base, variants=variants), "full", path)
    (folder,) = [f for f, c in experiments.saved(root / "experiment.yaml").runs(root).items()
                 if c.method == "ses"]  # fmt: skip
    return folder


def test_entropy_targets_are_beta_log_d(shaped):
    found = run_probes.entropy_targets(shaped)
    entropies = RunFolder(shaped).rows()[-1]["entropy"]
    widths = {f"layer{i + 1}.{j}": 8 << i for i in range(4) for j in (0, 1)} | {"avgpool": 64}
    targets = {layer: 0.6 * math.log(d) for layer, d in widths.items()}
    assert {k: found[f"target.{k}"] for k in targets} == pytest.approx(targets)
    distance = np.mean([abs(entropies[k] - targets[k]) for k in targets])
    assert found["distance"] == pytest.approx(distance)
    ratios = [math.exp(entropies[k]) / widths[k] ** 0.6 for k in targets]
    assert found["ratio"] == pytest.approx(np.mean(ratios))
    assert found["last_ratio"] == pytest.approx(math.exp(entropies["avgpool"]) / 64**0.6)
    assert found["near"] == np.mean([0.9 <= r <= 1.1 for r in ratios])


def test_entropy_targets_need_ses(tmp_path):
    file = toy(tmp_path, probes={"entropy": {}})
    with pytest.raises(ConfigError, match=r"probe entropy: .*baseline.* has no regularizer.ses"):
        run(file, "smoke", tmp_path)


def test_weight_spectra_are_means_and_changes(shaped):
    found = run_probes.weight_spectra(shaped, layers="layer4.*")
    config = RunFolder(shaped).config()
    fresh = build.model(config, build.dataset(config)[0])
    for key in ("stable_rank", "entropy"):
        last, first = (
            np.mean([r[key] for r in spectra.table(m) if r["layer"].startswith("layer4.")])
            for m in (build.trained(shaped, "last"), fresh)
        )
        assert found[key] == pytest.approx(last)
        assert found[f"{key}_change"] == pytest.approx(last - first, abs=1e-6)
        assert last != first
    assert 0 < found["stable_rank_share"] <= 1
    with pytest.raises(ConfigError, match=r"probe spectra: layers 'blocks\.\*' matches no weight"):
        run_probes.weight_spectra(shaped, layers="blocks.*")


def test_probes_leave_those_before_them(shaped):
    before = RunFolder(shaped).read_json("probes.json")
    found = measure.probe(shaped, [Choice(name="collapse")])
    assert RunFolder(shaped).read_json("probes.json") == {**before, **found}
