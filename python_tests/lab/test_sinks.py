"""Trackers: every epoch once, whatever was killed when; what they are told beside the epochs."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import yaml

from ses_lab import sinks, training
from ses_lab.config import ConfigError, RunConfig
from ses_lab.folder import RunFolder

DOCUMENT = {
    "dataset": {"name": "shapes", "preset": "trivial", "samples": 64, "size": 8},
    "model": {"name": "vit_tiny", "embed_dim": 12, "depth": 1, "heads": 2, "patch": 2},
    "regularizer": {"ses": {"beta": {"blocks.0*": 0.6, "*": 0.5}}},
    "augmentation": ["crop_flip", "mixup:alpha=0.2"],
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "epochs": 3,
    "batch_size": 32,
    "spectra_every": 1,
}  # fmt: skip


class KilledError(BaseException):
    """Nothing catches it, and no sink is closed after it: what SIGKILL leaves."""


def kill_after_commit(patch, epoch):
    commit = training._commit

    def killed(folder, trained, rows, *arguments, **options):
        commit(folder, trained, rows, *arguments, **options)
        if rows[-1]["epoch"] == epoch:
            raise KilledError

    patch.setattr(training, "_commit", killed)
    for sink in (sinks.MLflow, sinks.TensorBoard):
        patch.setattr(sink, "close", lambda self, finished: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run killed twice, and what MLflow has of it."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("tensorboard")
    root = tmp_path_factory.mktemp("sinks")
    with pytest.MonkeyPatch.context() as always:
        # Without the migrations of a new sqlite file, which take ten seconds.
        always.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = f"{root}/mlruns"
        chosen = ["tensorboard", {"name": "mlflow", "uri": uri}]
        config = RunConfig.parse({**DOCUMENT, "sinks": chosen})
        path = root / "it's/ses/0"
        with pytest.MonkeyPatch.context() as patch:
            kill_after_commit(patch, 1)
            with pytest.raises(KilledError):
                training.run(config, path)
        with pytest.MonkeyPatch.context() as patch:  # and in the middle of telling MLflow
            log = mlflow.MlflowClient.log_batch

            def half(self, run, metrics=(), **others):
                log(self, run, metrics[: len(metrics) // 2], **others)
                if metrics and metrics[0].step == 4:
                    raise KilledError

            patch.setattr(mlflow.MlflowClient, "log_batch", half)
            kill_after_commit(patch, None)
            with pytest.raises(KilledError):
                training.run(config, path)
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name("ses_lab").experiment_id
        (found,) = client.search_runs([experiment])
        assert found.info.status == "RUNNING"
        assert {m.step for m in client.get_metric_history(found.info.run_id, "lr")} == {2, 4}
        training.run(config, path)
        (found,) = client.search_runs([experiment])
        yield RunFolder(path), client, found


def expected(folder):
    """name -> step -> number, from the files of the run."""
    found = {}
    for row in folder.rows():
        table = json.loads((folder / f"spectra/{row['epoch']:04d}.json").read_text())
        flat = {k: v for k, v in row.items() if isinstance(v, (int, float))}
        flat |= {f"entropy/{layer}": h for layer, h in row["entropy"].items()}
        for line in table:
            for key in ("alpha", "decay", "stable_rank", "entropy"):
                if line[key] is not None:  # fits of few values
                    flat[f"spectra.{key}/{line['layer']}"] = line[key]
        for name, value in flat.items():
            found.setdefault(name, {})[row["step"]] = value
    return found


def test_mlflow_has_every_epoch_once_after_kills(run):
    folder, client, found = run
    numbers = expected(folder)
    assert len(folder.rows()) == 3
    assert {name.partition("/")[0] for name in numbers} >= {
        "test_accuracy", "entropy", "spectra.alpha", "spectra.decay", "spectra.stable_rank",
    }  # fmt: skip
    for name, steps in numbers.items():
        history = client.get_metric_history(found.info.run_id, name)
        assert sorted((m.step, m.value) for m in history) == sorted(steps.items()), name


def test_tensorboard_has_every_epoch_once_after_kills(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = run
    # Not the viewer's rule for what was written twice: all that is in the files.
    (file,) = (folder / "tensorboard").iterdir()
    events = EventAccumulator(str(file), {"histograms": 0}, purge_orphaned_data=False)
    events.Reload()
    for name, steps in expected(folder).items():
        got = [(e.step, e.value) for e in events.Scalars(name)]
        assert got == [(step, pytest.approx(value)) for step, value in steps.items()], name
    for epoch, event in enumerate(events.Histograms("singular_values/head"), 1):
        with np.load(folder / f"spectra/{epoch:04d}.npz") as layers:
            sigma = layers["head"]
        assert event.step == 2 * epoch
        assert event.histogram_value.num == len(sigma)
        assert event.histogram_value.max == pytest.approx(sigma[0])
    assert epoch == 3
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optimizer.lr" in plugin


def test_mlflow_has_flat_parameters_files_and_a_name(run):
    folder, client, found = run
    assert found.info.status == "FINISHED"
    assert found.info.run_name == str(folder.path)
    params = found.data.params
    assert params["optimizer.lr"] == "0.001"
    assert params["regularizer.ses.beta.blocks.0_"] == "0.6"  # no * in a name of MLflow
    assert params["augmentation.1.alpha"] == "0.2"
    assert not any(value.startswith(("{", "[{")) for value in params.values())
    assert not {"device", "clip"} & params.keys()  # decides no number; is not set
    files = {f.path for f in client.list_artifacts(found.info.run_id, "spectra")}
    assert files == {f"spectra/000{i}.{kind}" for i in (1, 2, 3) for kind in ("json", "npz")}
    local = client.download_artifacts(found.info.run_id, "best.pt")
    with open(local, "rb") as file:
        assert file.read() == (folder / "best.pt").read_bytes()


def test_a_folder_begun_anew_is_another_run_of_mlflow(run):
    folder, client, found = run
    config = folder.config()
    (sink,) = sinks.connect([config.sinks[1]])
    sink.start(config, folder.path, folder.rows(), 64)
    assert sink.run == found.info.run_id
    sink.start(config, folder.path, folder.rows()[:1], 64)  # without epochs that MLflow has
    assert sink.run != found.info.run_id
    client.delete_run(sink.run)
    changed = RunConfig.parse({**config.to_dict(), "clip": 1.0})
    sink.start(changed, folder.path, folder.rows(), 64)
    assert sink.run != found.info.run_id
    client.delete_run(sink.run)
    sink.start(config, folder.path, folder.rows(), 64)
    sink.close(finished=True)


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    row = {"epoch": 1, "step": 2, "a": math.nan, "b": {"x": math.inf, "y": 1.0}, "c": None}
    assert sinks.scalars(tmp_path, row) == {"epoch": 1, "step": 2, "b/y": 1.0}


@pytest.mark.parametrize(
    ("name", "legal"),
    [("entropy/blocks.0.attn:heads/3", "entropy/blocks.0.attn:heads/3"),
     ("per_class/don't (know)", "per_class/don_t _know_"), ("a//b/.", "a/_/b/_")],
)  # fmt: skip
def test_names_that_mlflow_takes(name, legal):
    validation = pytest.importorskip("mlflow.utils.validation")
    assert sinks._legal(name) == legal
    validation._validate_metric_name(legal)


@pytest.mark.parametrize("uri", ["nonsense://x", "http://127.0.0.1:9"])
def test_a_wrong_uri_is_one_line_and_takes_no_folder(uri, tmp_path):
    pytest.importorskip("mlflow")
    chosen = [{"name": "mlflow", "uri": uri}]
    config = RunConfig.parse({**DOCUMENT, "sinks": chosen})
    with pytest.raises(ConfigError, match=r"^sink mlflow: .+$") as caught:
        training.run(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"pip install 'ses_kernels\[trackers\]'"):
        sinks.connect(RunConfig.parse({**DOCUMENT, "sinks": ["mlflow"]}).sinks)


# ---- with the real thing ----

_KILLED = """
import os, signal, sys
from ses_lab import cli, training
commit = training._commit
def killed(folder, trained, rows, *arguments, **options):
    commit(folder, trained, rows, *arguments, **options)
    if rows[-1]["epoch"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
training._commit = killed
cli.app(["train", "run.yaml"])
"""


@pytest.mark.slow
def test_mlflow_ui_shows_a_run_that_was_killed(tmp_path):
    """The command of the extra ``trackers``, on the database that a run leaves by default."""
    pytest.importorskip("flask", reason="mlflow-skinny has no server: pip install mlflow")
    document = {**DOCUMENT, "sinks": ["mlflow"], "method": "m"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}}
    killed = subprocess.run([sys.executable, "-c", _KILLED], **options)
    assert killed.returncode == -signal.SIGKILL
    subprocess.run([sys.executable, "-m", "ses_lab", "train", "run.yaml"], check=True, **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", "sqlite:///mlflow.db"]
    with subprocess.Popen([*command, "--port", str(port), "--workers", "1"], **options) as server:

        def ask(path, **body):
            data = json.dumps(body).encode() if body else None
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read().decode()

        def api(path, **body):
            return json.loads(ask(f"/api/2.0/mlflow/{path}", **body))

        try:
            for _ in range(120):
                try:
                    page = ask("/")
                    break
                except OSError:
                    assert server.poll() is None
                    time.sleep(0.5)
            assert '<div id="root"' in page  # the interface, not the note that it is not built
            experiment = api("experiments/get-by-name?experiment_name=ses_lab")["experiment"]
            (run,) = api("runs/search", experiment_ids=[experiment["experiment_id"]])["runs"]
            assert run["info"]["run_name"].startswith("experiments/shapes-")
            assert run["info"]["status"] == "FINISHED"
            history = f"metrics/get-history?run_id={run['info']['run_id']}&metric_key=epoch"
            assert [m["value"] for m in api(history)["metrics"]] == [1, 2, 3]
            files = api(f"artifacts/list?run_id={run['info']['run_id']}")["files"]
            assert {file["path"] for file in files} == {"best.pt", "spectra"}
        finally:
            server.terminate()
