"""ses-lab: every command on a real run, and the errors it prints."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ses_lab import cli, experiments, run_probes, training
from ses_lab.catalogue import catalogue
from ses_lab.config import ConfigError, RunConfig
from ses_lab.folder import RunFolder
from ses_lab.sinks import Progress
from ses_lab.values import parse_choice, parse_flags, parse_list, parse_seeds

YAML = """
dataset: {name: shapes, preset: trivial, samples: 64, size: 8}
model: {name: vit_tiny, embed_dim: 12, depth: 1, heads: 2, patch: 2}
epochs: 2
batch_size: 32
"""


def call(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    (root / "run.yaml").write_text(YAML)
    config = RunConfig.parse({**cli.configuration.read_yaml(root / "run.yaml"), "seed": 5})
    training.run(config, root / "run")
    return root / "run"


def test_train_with_flags_and_seeds(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SES_LAB__EPOCHS", "1")
    monkeypatch.setenv("SES_LAB__OPTIMIZER__LR", "0.5")
    flags = ["--optimizer.lr", "5e-2", "--regularizer={ses: {beta: 0.6}}"]
    out = call("train", folder.parent / "run.yaml", "--out", tmp_path, "--seeds", "0,2", *flags)
    found = sorted(tmp_path.rglob("config.yaml"))
    assert [path.parent.name for path in found] == ["0", "2"]
    config = RunFolder(found[1].parent).config()
    assert (config.seed, config.epochs, config.optimizer.params["lr"]) == (2, 1, 0.05)
    assert config.regularizer.ses == {"beta": 0.6}
    assert "test_accuracy" in out
    assert str(found[1].parent) in out.replace("\n", "")


def test_a_failure_is_told_and_the_other_seeds_run(folder, tmp_path):
    file = folder.parent / "run.yaml"
    for seed in (0, 1):  # one of them of another configuration
        flags = ["--seed", seed, "--clip", 1 + seed, "--method", "m", "--out", tmp_path]
        call("train", file, *flags)
    flags = ["--clip", 2, "--method", "m", "--epochs", 2, "--out", tmp_path]
    result = CliRunner().invoke(cli.app, ["train", str(file), "--seeds", "0,1,2", *map(str, flags)])
    assert result.exit_code == 1
    assert "clip is 1.0 there and 2.0 here" in str(result.exception) + result.output
    assert RunFolder(next(tmp_path.rglob("2/config.yaml")).parent).finished()


def test_eval(folder):
    figures = json.loads(call("eval", folder))
    row = RunFolder(folder).rows()[-1]
    names = ("test_loss", "test_accuracy", "test_f1", "test_auroc", "test_per_class")
    assert figures == {name: row[name] for name in names}
    assert figures["test_per_class"].keys() == {"circle", "square"}


def test_spectra(folder, tmp_path):
    out = call("spectra", folder, "--plot", tmp_path / "a.png", "--save", tmp_path / "a.npz")
    layers = {"patch_embed", "blocks.0.attn.qkv.q", "blocks.0.attn.qkv.v", "head"}
    assert layers <= {line.split()[0] for line in out.splitlines() if line}
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "a.npz").exists()
    assert call("spectra", folder / "checkpoint.pt") == call("spectra", folder)


def test_probe(folder):
    names = ["pgd:steps=2,norm=l2", "collapse:split=train", "knn:k=3", "linear:epochs=2"]
    out = json.loads(call("probe", folder, *names, "corruption:names=[fog,jpeg],severities=[2]"))
    keys = {"pgd-norm=l2-steps=2", "collapse-split=train", "knn-k=3", "linear-epochs=2"}
    assert out.keys() == keys | {"corruption-names=_fog_jpeg_-severities=_2_"}
    assert RunFolder(folder).read_json("probes.json") == out
    assert out["knn-k=3"] == run_probes.knn(folder, k=3)


def test_lr_find(folder, tmp_path):
    flags = ["--steps", 12, "--plot", tmp_path / "lr.png", "--optimizer.momentum", 0]
    out = call("lr-find", folder.parent / "run.yaml", *flags)
    assert 1e-6 <= float(out.split()[0]) <= 1
    assert (tmp_path / "lr.png").stat().st_size > 1000


def test_experiments_and_report_are_handed_over(monkeypatch, tmp_path):
    from ses_lab import experiments, report

    calls = []
    monkeypatch.setattr(experiments, "run", lambda *a, **k: calls.append((a, k)) or tmp_path)
    monkeypatch.setattr(report, "write", lambda folder, seeds: tmp_path / f"report-{seeds}.md")
    flags = ["--base.epochs", 3, "--seeds", "0,1", "--variants", "ses"]
    out = call("run", "dynamics", "--scale", "full", "--out", tmp_path, *flags)
    assert str(tmp_path) in out.replace("\n", "")
    ((arguments, options),) = calls
    assert arguments == ("dynamics",)
    (progress,) = options.pop("sinks")
    assert isinstance(progress, Progress)
    changes = {"base.epochs": 3, "seeds": [0, 1]}
    assert options == {"scale": "full", "out": tmp_path, "changes": changes, "variants": ["ses"]}
    assert "report-[0, 3].html" in call("report", tmp_path, "--seeds", "0,3").replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{}.yaml", "--sede", "1"], "unknown key 'sede'; did you mean 'seed'"),
        (["train", "{}.yaml", "--seed"], "expected --KEY VALUE"),
        (["train", "{}.yaml", "seed"], "expected --KEY VALUE"),
        (["train", "{}.yaml", "--dataset.size", "4"], "need samples >= 8 and size >= 8"),
        (["train", "{}.yaml", "--model.depth", "x"], "model vit_tiny on shapes"),
        (["eval", "nothing"], "nothing holds no run"),
        (["probe", "{}", "pdg"], "did you mean 'pgd'"),
        (
            ["probe", "{}", "pgd:step=3"],
            "probe pgd: unknown parameter 'step'; did you mean 'steps'",
        ),
        (["probe", "{}", "pgd:steps"], "unknown probe 'pgd:steps'"),
        (["probe", "{}", "knm"], "unknown probe 'knm'; did you mean 'knn'"),
        (["probe", "{}", "knn:split=train"], "probe knn: unknown parameter 'split'"),
        (["probe", "{}", "knn:k=[3]"], "probe knn: "),
        (["probe", "{}", "rank"], "has no rank_samples"),
        (["probe", "{}", "fgsm:split=tset"], "unknown split of probe fgsm 'tset'; did you mean"),
        (["probe", "{}", "pgd:norm=l3"], "probe pgd: norm is 'linf' or 'l2', got 'l3'"),
        (["probe", "{}", "corruption:names=[fog"], "is no YAML"),
        (["eval", "{}", "--weights", "bset"], "unknown weights 'bset'; did you mean 'best'"),
        (["spectra", "{}.yaml"], "run.yaml is no checkpoint of tensors"),
        (["train", "{}.yaml", "--device", "gpu"], "device gpu: "),
        (
            ["train", "{}.yaml", "--device", "cuda:99"],
            "device: there is no cuda:99 here, but 1 cpu",
        ),
        (["train", "{}.yaml", "--regularizer.ses.beta", "1.7"], "beta must be between 0 and 1"),
        (["train", "{}.yaml", "--regularizer.ses.layers", "layer9"], "regularizer.ses: "),
        (["train", "{}.yaml", "--regularizer.ses", "{{pool: clss}}"], "regularizer.ses: pool"),
        (["train", "{}.yaml", "--loss", "label_smoothing:smoothing=2"], "loss label_smoothing: "),
        (["train", "{}.yaml", "--augmentation", "[mixup:alpha=-1]"], "augmentation mixup: "),
        (["train", "{}.yaml", "--optimizer.lr", "-1"], "optimizer sgd: Invalid learning rate"),
        (["train", "{}.yaml", "--schedule.warmup", "2"], "schedule cosine: warmup must be in"),
        (["train", "{}.yaml", "--seeds", "0,x"], "--seeds: expected whole numbers"),
        (["train", "{}.yaml", "--cluster", "foo"], "cluster foo: "),
        (["train", "{}.yaml", "--cluster", "local", "--parameter", "nothing=3"], "nothing"),
        (["train", "{}.yaml", "--model", "torch.nn:Nope"], "model torch.nn:Nope on shapes: "),
        (["train", "{}.yaml", "--model", "nothing.at:all"], "No module named 'nothing'"),
        (["lr-find", "{}.yaml", "--steps", "1"], "lr-find: need 0 < start < stop and 2 steps"),
        (["run", "beta", "--variants", "bta=0.3"], "unknown variant 'bta=0.3'; did you mean"),
        (["list", "model"], "unknown kind 'model'; did you mean 'models'"),
    ],
)
def test_errors_are_one_line(arguments, message, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ses-lab", *(a.format(folder) for a in arguments)])
    with pytest.raises(SystemExit, match=r"^ses-lab: ") as stopped:
        cli.main()
    assert message in str(stopped.value)
    assert "Traceback" not in str(stopped.value)
    assert not list(tmp_path.rglob("config.yaml"))  # a corrected start is not another run


def test_a_word_holds_a_name_and_its_parameters():
    assert parse_choice("corruption:names=[fog,jpeg],samples=64") == {
        "name": "corruption", "names": ["fog", "jpeg"], "samples": 64,
    }  # fmt: skip
    assert parse_choice("torch.nn:Linear") == {"name": "torch.nn:Linear"}
    assert parse_list("[0, 1]") == parse_list("0,1") == [0, 1]
    assert parse_seeds("") == []


def test_seeds_of_what_reads_runs(folder, tmp_path):
    """The same runs by one folder each and by the folder above them."""
    call("train", folder.parent / "run.yaml", "--method", "m", "--seeds", "3,4", "--out", tmp_path)
    above = next(tmp_path.rglob("3/config.yaml")).parents[1]
    both = json.loads(call("eval", above, "--seeds", "3,4"))
    assert both == {seed: json.loads(call("eval", above / seed)) for seed in ("3", "4")}
    both = json.loads(call("probe", above, "corruption:names=[fog],severities=[2]", "--seeds", "3"))
    assert both["3"]["corruption-names=_fog_-severities=_2_"].keys() == {
        "clean", "fog/2", "fog", "mean",
    }  # fmt: skip
    out = call("spectra", above, "--seeds", "3,4", "--save", tmp_path / "s.npz")
    assert out.count("patch_embed") == 2
    assert {p.name for p in tmp_path.glob("*.npz")} == {"s-3.npz", "s-4.npz"}
    flags = ["--seeds", "0,1", "--steps", 12, "--plot", tmp_path / "lr.png"]
    rates = call("lr-find", folder.parent / "run.yaml", *flags).split("  ")[0].split(", ")
    assert len(rates) == 2


def test_list():
    out = call("list")
    words = out.split()
    for name in (
        "weight_spectra",
        "cifar100",
        "resnet18",
        "focal",
        "mim",
        "pgd",
        "rkd",
        "onecycle",
    ):
        assert name in words
    for default in ("gamma=2", "epsilon=0.0313725", "mask=0.6", "embed_dim=192", "beta=0.7"):
        assert default in out
    for hidden in ("logits", "generator", "normalize", "process_group"):  # not the user's
        assert f"{hidden}," not in out
        assert f"{hidden}=" not in out
    assert "every dataset" in out
    for shared in ("label_noise=0", "warmup_epochs=null"):
        assert out.count(shared) == 1
    lines = call("list", "losses").splitlines()
    assert [line.split()[0] for line in lines if line][:4] == [
        "losses", "name", "cross_entropy", "focal",
    ]  # fmt: skip
    assert "resnet18" not in "".join(lines)


def test_no_study_is_named_like_a_kind():  # `list NAME` shows either
    assert catalogue().keys().isdisjoint(experiments.names())


def test_list_says_where_published_numbers_are_defined_otherwise():
    words = " ".join(call("list", "distillation").split())
    assert "Experiment Beta" in words
    assert "accuracy is that of the best epoch" in words
    assert "no published numbers at hand" in call("list", "two_views")


def test_help_is_quick():
    code = (
        "import sys, ses_lab.cli; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
    done = subprocess.run(
        [sys.executable, "-m", "ses_lab", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("list", "train", "eval", "lr-find", "spectra", "probe", "run", "report"):
        assert f" {command} " in done.stdout


def test_flags():
    assert parse_flags(["--a.b", "1e-2", "--c=[x, y]", "--d={k: null}"]) == {
        "a.b": 0.01,
        "c": ["x", "y"],
        "d": {"k": None},
    }
    with pytest.raises(ConfigError):
        parse_flags(["a"])
