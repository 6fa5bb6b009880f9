"""One YAML gives a RunConfig; what is not known is refused with the nearest name."""

import re

import pytest

from ses_lab import config
from ses_lab.config import ConfigError, RunConfig, merge

BASE = {"dataset": "digits", "model": "resnet20"}


def parse(**changes):
    return RunConfig.parse(merge(BASE, changes))


def test_file_environment_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "dataset: digits\nmodel: mlp\nepochs: 3\nseed: 1\noptimizer: {name: sgd, lr: 1e-1}"
    )
    environment = {"SES_LAB__SEED": "2", "SES_LAB__OPTIMIZER__LR": "2e-1", "HOME": "/"}
    read = config.load(file, environment, {"optimizer.lr": 0.3, "dataset.root": "/data"})
    assert (read.epochs, read.seed, read.optimizer.params) == (3, 2, {"lr": 0.3})
    assert (read.dataset.name, read.dataset.root) == ("digits", "/data")
    assert config.load(file, {}).optimizer.params == {"lr": 0.1}  # 1e-1 is a number here
    with pytest.raises(ConfigError, match=r"SES_LAB__SEED: '\[' is no YAML"):
        config.load(file, {"SES_LAB__SEED": "["})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": "sgd"}, "unknown key 'optimiser'; did you mean 'optimizer'"),
        ({"dataset": "digit"}, "unknown dataset 'digit'; did you mean 'digits'"),
        (
            {"dataset": {"name": "shapes", "sample": 3}},
            "parameter 'sample'; did you mean 'samples'",
        ),
        ({"model": "resnet21"}, "unknown model 'resnet21'; did you mean 'resnet20'"),
        ({"model": {"name": "vit_tiny", "dept": 2}}, "'dept'; did you mean 'depth'"),
        ({"loss": "crossentropy"}, "did you mean 'cross_entropy'"),
        ({"loss": {"name": "focal", "gama": 1}}, "'gama'; did you mean 'gamma'"),
        ({"augmentation": ["mixupp"]}, "did you mean 'mixup'"),
        ({"augmentation": [{"name": "mixup", "alfa": 1}]}, "did you mean 'alpha'"),
        ({"optimizer": {"name": "adam", "bet": 1}}, "did you mean 'betas'"),
        ({"optimizer": "adan"}, "did you mean 'adam'"),
        ({"schedule": {"name": "cosine", "finale": 0}}, "did you mean 'final'"),
        ({"schedule": "cos"}, "did you mean 'cosine'"),
        ({"regime": "supervized"}, "regime 'supervized'; did you mean 'supervised'"),
        ({"regime": {"name": "mim", "maks": 0.5}}, "did you mean 'mask'"),
        ({"regularizer": {"sess": {}}}, "did you mean 'ses'"),
        ({"regularizer": {"ses": {"lambda_sse": 1}}}, "did you mean 'lambda_ses'"),
        ({"regularizer": {"ses": {"process_group": 1}}}, "unknown parameter 'process_group'"),
        ({"regularizer": {"sam": {"roh": 1}}}, "did you mean 'rho'"),
        ({"regularizer": {"spectral_norm": {"power": 1}}}, "'power'; there are power_iterations"),
        ({"sinks": ["mlflo"]}, "did you mean 'mlflow'"),
        ({"regime": {"name": "distill", "distiller": "rdk"}, "teacher": {"run": "x"}}, "'rkd'"),
        ({"epochs": 0}, "epochs: .* greater than or equal to 1, got 0"),
        ({"regime": {"name": "mim", "mask": 1.5}}, r"regime\.mask: .* less than 1, got 1\.5"),
        ({"method": "a/b"}, "method: .*got 'a/b'"),
        ({"regime": "distill"}, "distill needs a teacher"),
        ({"teacher": {"run": "x"}}, "teacher belongs to regime distill"),
        ({"regime": "finetune"}, "finetune needs init_from"),
    ],
)
def test_refused_with_the_reason(changes, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse({**BASE, **changes})


def test_unreadable_files(tmp_path):
    (tmp_path / "a.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="expected a mapping of keys, got list"):
        config.load(tmp_path / "a.yaml", {})
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "b.yaml", {})


CHANGES = [
    {},
    {"regime": "mim", "regularizer.ses": {"beta": 0.6, "layers": ["layer3*"]}},
    {"regime": {"name": "distill", "distiller": {"name": "kd", "temperature": 2}, "a": 0.9},
     "teacher": {"run": "t", "weights": "best"}},
    {"regime": "finetune", "init_from.run": "p", "augmentation": ["crop_flip", "cutmix"]},
    {"regime.name": "adversarial", "regime.attack": "free", "clip": 1.0, "sinks": ["tensorboard"]},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES)
def test_yaml_round_trip(changes):
    import yaml

    chosen = parse(**changes)
    assert RunConfig.parse(config.parse_yaml(yaml.safe_dump(chosen.to_dict()))) == chosen


def test_paths():
    paths = [parse(**changes).path for changes in CHANGES]
    assert list(map(str, paths)) == [
        "digits/supervised/resnet20/0",
        "digits/mim-ses/resnet20/0",
        "digits/kd-temperature=2/resnet20/0",
        "digits/finetune-crop_flip-cutmix/resnet20/0",
        "digits/free/resnet20/0",
    ]
    chosen = parse(dataset={"name": "shapes", "preset": "medium", "root": "/x/y"}, method="mine")
    assert str(chosen.path) == "shapes-preset=medium/mine/resnet20/0"
    assert str(parse(seed=3, **{"model.width": 8}).path) == "digits/supervised/resnet20-width=8/3"
    imported = parse(model={"name": "torch.nn:Linear", "stages": ["a", "b"]}).path.parts[2]
    assert re.fullmatch(r"[\w.=+-]+", imported)


def test_identity_leaves_out_what_changes_no_number():
    one = parse(device="cpu", sinks=["mlflow"], **{"dataset.root": "/a"})
    assert one.identity() == parse(device="cuda:1", **{"dataset.download": True}).identity()
    assert one.identity() != parse(seed=1).identity()


def test_merge():
    document = {"loss": "focal", "optimizer": {"name": "sgd", "lr": 1, "momentum": 0.9}, "x": [1]}
    before = {**document, "optimizer": dict(document["optimizer"])}
    assert merge(document, {"loss.gamma": 2})["loss"] == {"name": "focal", "gamma": 2}
    assert merge(document, {"optimizer": {"lr": 2}})["optimizer"]["momentum"] == 0.9
    # Parameters belong to what is named.
    changed = merge(document, {"optimizer": {"name": "adam", "lr": 2}})["optimizer"]
    assert changed == {"name": "adam", "lr": 2}
    assert merge(document, {"x": [2, 3], "a.b.c": 1}) == {
        **before,
        "x": [2, 3],
        "a": {"b": {"c": 1}},
    }
    assert merge({"regularizer": {"ses": {"beta": 1}}}, {"regularizer.ses": None}) == {
        "regularizer": {"ses": None}
    }
    assert document == before


def test_globs_of_layers_keep_their_dots():
    document = {"regularizer": {"ses": {"beta": {"layer3.*": 0.6}}}}
    merged = merge(document, {"regularizer.ses.beta.layer4.*": 0.8, "regularizer.ses.alpha": 2})
    assert merged["regularizer"]["ses"] == {
        "beta": {"layer3.*": 0.6, "layer4.*": 0.8}, "alpha": 2,
    }  # fmt: skip
    assert merge(merged, {"regularizer.ses": {"beta": 0.5}})["regularizer"]["ses"]["beta"] == 0.5
    chosen = parse(**{"regularizer.ses": {"alpha": {"layer1.*": 0, "layer2.0": 3}}})
    assert chosen.regularizer.ses["alpha"] == {"layer1.*": 0, "layer2.0": 3}


def test_a_choice_in_one_word():
    chosen = parse(loss="focal:gamma=3", augmentation=["mixup:alpha=0.2"], regime="mim:mask=0.5")
    assert (chosen.loss.params, chosen.augmentation[0].params) == ({"gamma": 3}, {"alpha": 0.2})
    assert chosen.regime.mask == 0.5
    changed = merge({"loss": "focal:gamma=3"}, {"loss.gamma": 4})
    assert changed["loss"] == {"name": "focal", "gamma": 4}
