"""ses-lab: every command on a real run, and the errors it prints."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ses_lab import cli, training
from ses_lab.config import ConfigError, RunConfig
from ses_lab.folder import RunFolder
from ses_lab.sinks import Progress

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
    assert figures == {name: row[name] for name in ("test_loss", "test_accuracy")}


def test_spectra(folder, tmp_path):
    out = call("spectra", folder, "--plot", tmp_path / "a.png", "--save", tmp_path / "a.npz")
    layers = {"patch_embed", "blocks.0.attn.qkv.q", "blocks.0.attn.qkv.v", "head"}
    assert layers <= {line.split()[0] for line in out.splitlines() if line}
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "a.npz").exists()
    assert call("spectra", folder / "checkpoint.pt") == call("spectra", folder)


def test_probe(folder):
    out = json.loads(call("probe", folder, "pgd:steps=2,norm=l2", "collapse"))
    assert out.keys() == {"pgd-norm=l2-steps=2", "collapse"}
    assert RunFolder(folder).read_json("probes.json") == out


def test_lr_find(folder, tmp_path):
    flags = ["--steps", 12, "--plot", tmp_path / "lr.png", "--optimizer.momentum", 0]
    out = call("lr-find", folder.parent / "run.yaml", *flags)
    assert 1e-6 <= float(out.split()[0]) <= 1
    assert (tmp_path / "lr.png").stat().st_size > 1000


def test_experiments_and_report_are_handed_over(monkeypatch, tmp_path):
    from ses_lab import experiments, report

    calls = []
    monkeypatch.setattr(experiments, "run", lambda *a, **k: calls.append((a, k)) or tmp_path)
    monkeypatch.setattr(report, "write", lambda folder: tmp_path / "report.md")
    out = call("run", "dynamics", "--scale", "full", "--out", tmp_path, "--base.epochs", 3)
    assert str(tmp_path) in out.replace("\n", "")
    ((arguments, options),) = calls
    assert arguments == ("dynamics",)
    (progress,) = options.pop("sinks")
    assert isinstance(progress, Progress)
    assert options == {"scale": "full", "out": tmp_path, "changes": {"base.epochs": 3}}
    assert "report.md" in call("report", tmp_path).replace("\n", "")


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
    ],
)
def test_errors_are_one_line(arguments, message, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ses-lab", *(a.format(folder) for a in arguments)])
    with pytest.raises(SystemExit, match=r"^ses-lab: ") as stopped:
        cli.main()
    assert message in str(stopped.value)
    assert "Traceback" not in str(stopped.value)


def test_help_is_quick():
    code = (
        "import sys, ses_lab.cli; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
    done = subprocess.run(
        [sys.executable, "-m", "ses_lab", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("train", "eval", "lr-find", "spectra", "probe", "run", "report"):
        assert f" {command} " in done.stdout


def test_flags():
    assert cli.parse_flags(["--a.b", "1e-2", "--c=[x, y]", "--d={k: null}"]) == {
        "a.b": 0.01,
        "c": ["x", "y"],
        "d": {"k": None},
    }
    with pytest.raises(ConfigError):
        cli.parse_flags(["a"])


# ---- sinks ----


def test_sinks(tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    document = {**cli.configuration.parse_yaml(YAML), "regularizer": {"ses": {}}}
    document |= {"sinks": ["tensorboard", {"name": "mlflow", "uri": uri}]}
    path = tmp_path / "run"

    class Stop:  # after the first epoch
        def start(self, *arguments): ...
        def advance(self, samples): ...
        def close(self, finished): ...
        def log(self, row):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.run(RunConfig.parse(document), path, [Stop()])
    training.run(RunConfig.parse(document), path)
    rows = RunFolder(path).rows()
    events = tensorboard.EventAccumulator(str(path / "tensorboard")).Reload()
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ses_lab").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "0"
    for name in ("test_loss", "entropy/blocks.0.attn"):
        key, _, layer = name.partition("/")
        expected = [row[key][layer] if layer else row[key] for row in rows]
        assert [e.value for e in events.Scalars(name)] == pytest.approx(expected)
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda m: m.step)
        assert [(m.step, m.value) for m in history] == [
            (row["step"], value) for row, value in zip(rows, expected, strict=True)
        ]
