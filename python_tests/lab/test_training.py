"""The training loop: resumed bit for bit, killed at any moment, over ranks, deterministic."""

import functools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from ses_lab import build, curves, engine, measure, training
from ses_lab.config import ConfigError, RunConfig, merge
from ses_lab.engine import Ranks, Training, device_of
from ses_lab.folder import FolderInUseError, RunFolder

TINY = {"dataset": {"name": "moons", "samples": 96},
        "model": {"name": "mlp", "width": 8, "depth": 2},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "epochs": 4, "batch_size": 32,
        "regularizer": {"ses": {"beta": 0.5, "every_k": 2}}, "spectra_every": 2}  # fmt: skip
IMAGES = {"dataset": {"name": "shapes", "preset": "trivial", "samples": 64, "size": 8},
          "model": {"name": "vit_tiny", "embed_dim": 12, "depth": 2, "heads": 2, "patch": 2},
          "epochs": 3, "batch_size": 32}  # fmt: skip
PROBED = {"probe_every": 2, "probes": {"dead_units": {"samples": 8},
          "attack": "pgd:steps=2,samples=16,split=train", "gradient_alignment": {}}}  # fmt: skip


def numbers(folder):
    """All that a run leaves that must not depend on when it was killed."""
    folder = RunFolder(folder)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in folder.rows()]
    spectra = {
        path.name: json.loads(path.read_text()) for path in folder.path.glob("spectra/*.json")
    }
    return rows, folder.load("best.pt"), folder.load("checkpoint.pt"), spectra


def assert_same(got, expected):
    """Equal to the last bit."""
    assert type(got) is type(expected)
    if isinstance(got, dict):
        assert got.keys() == expected.keys()
        for key in got:
            assert_same(got[key], expected[key])
    elif isinstance(got, (list, tuple)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
    elif isinstance(got, torch.Tensor):
        assert torch.equal(got, expected)
    else:
        assert got == expected


class Stop(Exception):  # noqa: N818
    pass


class Sink:
    """Stops a run in the middle of its n-th step."""

    def __init__(self, steps):
        self.left = steps

    def start(self, config, folder, rows, samples):
        pass

    def advance(self, samples):
        self.left -= 1
        if self.left == 0:
            raise Stop

    def log(self, row):
        pass

    def close(self, finished):
        pass


def dropping(num_classes):
    """A model whose forward pass draws from torch's global generator."""
    layers = nn.Flatten(), nn.Linear(3 * 64, 16), nn.Dropout(0.5), nn.Linear(16, num_classes)
    return nn.Sequential(*layers)


@functools.cache
def teacher(root):
    training.run(RunConfig.parse(merge(IMAGES, {"epochs": 1})), root / "teacher")
    return str(root / "teacher")


@pytest.mark.parametrize(
    "changes",
    [
        {"augmentation": ["crop_flip", "cutmix"], "optimizer": {"name": "adamw", "lr": 0.01},
         **PROBED,
         "regularizer.ses": {"every_k": 4}, "clip": 0.5, "validation": 0.25, "batch_size": 16},
        {"regularizer": {"sam": {}, "ses": {"every_k": 2}, "spectral_norm": {}},
         "schedule": {"name": "onecycle", "warmup": 0.1},
         "model": {"name": "resnet20", "width": 4}},
        {"regime": {"name": "adversarial", "attack": "free", "steps": 2},
         "augmentation": ["mixup"]},
        {"regime": {"name": "multitask", "patch": 2}},
        {"model": {"name": f"{__name__}:dropping", "stages": ["1"]}},
        {"regime": {"name": "distill", "distiller": "factor"}, "precision": "bf16"},
        {"precision": "bf16", "regularizer.ses": {}, "regularizer.sam": {}, "clip": 0.5,
         "model.drop_path": 0.3, "augmentation": ["randaugment", "mixup"]},
        {"regime": "two_views:objective=vicreg", "precision": "bf16", "rank_samples": 8,
         "regularizer.ses": {"beta": {"schedule": "linear", "start": 0.9, "end": 0.3}}},
        {"precision": "fp16", "regularizer.ses": {}, "clip": 0.5,
         "schedule": {"name": "cosine", "warmup_epochs": 1, "least": 1e-3}},
    ],
    ids=["augmented", "sam", "free", "multitask", "dropout", "factor", "bf16", "two_views", "fp16"],
)  # fmt: skip
def test_resumed_bit_for_bit(changes, tmp_path, tmp_path_factory):
    if "distill" in str(changes):
        changes = {**changes, "teacher.run": teacher(tmp_path_factory.getbasetemp())}
    config = RunConfig.parse(merge(IMAGES, changes))
    training.run(config, tmp_path / "straight")
    torch.manual_seed(99)  # the caller's generator is not ours
    with pytest.raises(Stop):
        training.run(config, tmp_path / "broken", [Sink(5)])
    status = RunFolder(tmp_path / "broken").status()
    assert (status["state"], status["epoch"] >= 1) == ("failed", True)
    assert "raise Stop" in status["error"]
    torch.manual_seed(7)
    random_before = torch.get_rng_state()
    training.run(config, tmp_path / "broken")
    assert torch.equal(torch.get_rng_state(), random_before)
    assert_same(numbers(tmp_path / "broken"), numbers(tmp_path / "straight"))
    status = RunFolder(tmp_path / "broken").status()
    assert (status["state"], status["error"], status["epoch"]) == ("finished", None, 3)


def test_probing_changes_nothing_and_is_that_of_a_finished_run(tmp_path):
    changes = {"model": {"name": "resnet20", "width": 4}, "regularizer.ses": {}, "validation": 0.2}
    plain = RunConfig.parse(merge(IMAGES, {**changes, "batch_size": 16}))
    probed = RunConfig.parse(merge(plain.to_dict(), PROBED))
    training.run(plain, tmp_path / "plain")
    training.run(probed, tmp_path / "probed")
    rows, *rest = numbers(tmp_path / "probed")
    taken = {row["epoch"]: row.pop("probes") for row in rows if "probes" in row}
    assert taken.keys() == {2, 3}  # every second, and the last
    assert_same((rows, *rest), numbers(tmp_path / "plain"))
    assert taken[2]["gradient_alignment"] != taken[3]["gradient_alignment"]
    again = measure.probe(tmp_path / "probed", [*probed.probes.values()])
    assert [*again.values()] == [*taken[3].values()]
    split = RunConfig.parse(merge(plain.to_dict(), {"probe_every": 1, "probes.pgd.split": "val"}))
    with pytest.raises(ConfigError, match="unknown split of probe pgd 'val'; there are test, tr"):
        training.run(split, tmp_path / "split")
    assert not (tmp_path / "split").exists()


def test_probes_are_named_and_come_with_when():
    with pytest.raises(ConfigError, match=r"probe_every, in epochs, .*got None and \['pgd'\]"):
        RunConfig.parse({**TINY, "probes": {"pgd": {}}})
    for probes, message in (
        ({"pdg": {}}, "unknown probe 'pdg'; did you mean 'pgd'"),
        ({"attack": "pgd:step=2"}, "probe pgd: unknown parameter 'step'; did you mean 'steps'"),
        ({"attack": {"name": "pgd", "splits": "train"}}, "unknown parameter 'splits'"),
    ):
        with pytest.raises(ConfigError, match=message):
            RunConfig.parse({**TINY, "probe_every": 1, "probes": probes})


# ---- kill -9 ----

# The last two are imported by the first step and by the curves.
_PRELOAD = ["ses_lab.training", "torch._dynamo", "matplotlib.backends.backend_agg"]


def _run(folder, die_at=None):
    """In a process of its own. die_at: by its own hand, at the so-manieth write to the disk."""
    torch.set_num_threads(1)
    if die_at is not None:
        written, fsync = [0], os.fsync

        def fatal(descriptor):
            fsync(descriptor)
            written[0] += 1
            if written[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fatal
    training.run(RunConfig.parse(TINY), folder)


@pytest.fixture(scope="module")
def processes():
    """Forked from a process that has imported torch and started no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


@pytest.fixture(scope="module")
def reference(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    seconds = []
    for name in "ab":  # the first waits for the imports of the server
        began = time.perf_counter()
        process = processes.Process(target=_run, args=(folder / name,))
        process.start()
        process.join()
        seconds.append(time.perf_counter() - began)
    return numbers(folder / "a"), seconds[1]


def test_killed_at_random_moments(processes, reference, tmp_path):
    expected, seconds = reference
    rng, killed = random.Random(0), 0
    for run in range(20):
        folder = tmp_path / str(run)
        process = processes.Process(target=_run, args=(folder,))
        process.start()
        process.join(rng.uniform(0, seconds))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        process = processes.Process(target=_run, args=(folder,))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert_same(numbers(folder), expected)
    assert killed >= 10


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_writes(processes, reference, tmp_path, seed):
    """Between any two files: killed again and again, each time some writes further."""
    rng, deaths = random.Random(seed), 0
    for _ in range(40):
        process = processes.Process(target=_run, args=(tmp_path, rng.randint(5, 20)))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
    assert deaths >= 2
    assert_same(numbers(tmp_path), reference[0])


# ---- one run, one folder ----


def test_a_finished_run_is_left_alone(tmp_path):
    config = RunConfig.parse(TINY)
    row = training.run(config, tmp_path)
    before = {
        p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.rglob("*") if p.is_file()
    }
    assert training.run(config, tmp_path, [Sink(1)]) == row
    after = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.rglob("*") if p.is_file()}
    assert before == after
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "status.json", "best.pt", "checkpoint.pt",
                     "curves.png", "spectra", "lock"}  # fmt: skip
    assert {p.name for p in tmp_path.glob("spectra/*")} == {
        "0002.json", "0002.npz", "0004.json", "0004.npz"
    }  # fmt: skip
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_keep_losses_of_two_kinds_apart():
    rows = [{"epoch": i, "train_loss": 9.0 - i, "train_accuracy": 0.5, "test_loss": 1.0 / i,
             "test_accuracy": 0.4, "val_loss": 2.0, "val_accuracy": 0.3, "test_f1": 0.2,
             **({"entropy": {"a/0": 1.0}, "target": {"a": 3.0}} if i == 2 else {})}
            for i in (1, 2)]  # fmt: skip
    figure = curves.curves(rows, "focal-gamma=2")
    shown = {
        panel.get_ylabel(): {line.get_label(): list(line.get_ydata()) for line in panel.lines}
        for panel in figure.axes
    }
    assert shown["training loss: focal-gamma=2"] == {"train": [8.0, 7.0]}
    assert shown["held-out loss: cross_entropy, nats"] == {"test": [1.0, 0.5], "val": [2.0, 2.0]}
    assert {name: y[0] for name, y in shown["accuracy, %"].items()} == {
        "train": 50, "test": 40, "val": 30
    }  # fmt: skip
    assert shown["spectral entropy, nats"] == {"a/0": [1.0], "_target": [3.0]}
    legend = figure.axes[-1].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["a/0", "target"]
    (mim,) = curves.curves([{"epoch": 1, "train_loss": 1.0}], "hidden pixels").axes
    assert mim.get_ylabel() == "training loss: hidden pixels"
    views = curves.curves([{"epoch": 1, "train_loss": 1.0, "test_loss": 2.0}], "simclr").axes
    assert views[1].get_ylabel() == "held-out loss: simclr"


@pytest.mark.parametrize(
    ("regime", "objective"),
    [
        ({}, "focal"),
        ({"name": "adversarial"}, "focal under pgd"),
        ({"name": "mim"}, "hidden pixels"),
        ({"name": "two_views", "objective": "vicreg"}, "vicreg"),
    ],
)
def test_the_objective_of_a_configuration(regime, objective):
    document = {**TINY, "loss": "focal", "regime": {"name": "supervised", **regime}}
    assert RunConfig.parse(document).objective == objective


def test_a_folder_in_use_is_refused(tmp_path):
    config = RunConfig.parse(TINY)
    folder = RunFolder(tmp_path)
    with folder.claim(config), pytest.raises(FolderInUseError):
        training.run(config, tmp_path)
    assert folder.status() == {}


def test_a_configuration_that_fits_no_model_leaves_the_folder_free(tmp_path):
    wrong = RunConfig.parse(merge(TINY, {"regularizer.ses": {"beta": 1.7}}))
    with pytest.raises(ConfigError, match=r"regularizer\.ses: beta must be between 0 and 1"):
        training.run(wrong, tmp_path)
    assert not (tmp_path / "config.yaml").exists()
    training.run(RunConfig.parse(merge(TINY, {"epochs": 1})), tmp_path)
    assert RunFolder(tmp_path).finished()


@pytest.mark.filterwarnings("error")
def test_what_is_tried_before_leaves_no_trace():
    """Dropout, batch norms and SES are as they would be without."""
    changes = {"model": {"name": "resnet20", "width": 4}, "augmentation": ["cutmix"]}
    config = RunConfig.parse(merge(IMAGES, {**changes, "regularizer.ses": {}}))
    dataset, _ = build.dataset(config)
    regime = build.regime(config, dataset, build.model(config, dataset))
    before = {name: value.clone() for name, value in regime.state_dict().items()}
    random_before = torch.get_rng_state()
    build.check(config, dataset, regime)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert_same(dict(regime.state_dict()), before)
    assert not any(m._forward_hooks for m in regime.modules())


def test_devices(monkeypatch):
    def device(name):
        return str(device_of(RunConfig.parse({**TINY, "device": name})))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device("auto") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (device("auto"), device("cuda"), device("cuda:0")) == ("cuda:1", "cuda:1", "cuda:0")
    with pytest.raises(ConfigError, match="device: there is no cuda:2 here, but 1 cpu, 2 cuda"):
        device("cuda:2")


@pytest.mark.cuda
def test_cuda_without_an_index(tmp_path):
    training.run(RunConfig.parse({**TINY, "device": "cuda"}), tmp_path)
    status = RunFolder(tmp_path).status()
    assert status["device"] == "cuda:0"
    assert 0 < status["peak_memory"] < 2**30  # of tensors, not of the process


def test_peak_memory_is_kept(tmp_path):
    training.run(RunConfig.parse({**TINY, "epochs": 1}), tmp_path)
    peak = RunFolder(tmp_path).status()["peak_memory"]
    assert 50e6 < peak < 1e12  # of a process that has torch in it


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux can reset the peak")
def test_peak_memory_is_that_of_the_run():
    """What was given back before does not count."""
    cpu = torch.device("cpu")
    big = torch.ones(2**26)  # 256 MiB, mapped for itself, so that it goes back to the system
    before = engine.peak_memory(cpu)
    del big
    engine.reset_peak_memory(cpu)
    after = engine.peak_memory(cpu)
    assert after < before - 2**27
    torch.ones(2**26)
    assert engine.peak_memory(cpu) > after + 2**27


def test_deterministic_by_seed(tmp_path):
    found = []
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        training.run(RunConfig.parse(merge(TINY, {"seed": seed})), tmp_path / name)
        found.append(numbers(tmp_path / name))
    assert_same(found[0], found[1])
    assert found[0][0] != found[2][0]


def test_divergence_is_kept(tmp_path):
    config = RunConfig.parse(merge(TINY, {"optimizer.lr": 1e30}))
    with pytest.raises(training.DivergedError, match="lower the learning rate"):
        training.run(config, tmp_path)
    assert RunFolder(tmp_path).status()["state"] == "failed"


def test_the_best_epoch_is_that_of_the_validation_set(tmp_path):
    config = RunConfig.parse(merge(TINY, {"validation": 0.25, "epochs": 8, "optimizer.lr": 0.3}))
    training.run(config, tmp_path)
    rows = RunFolder(tmp_path).rows()
    accuracies = [row["val_accuracy"] for row in rows]
    best = max(range(8), key=lambda i: (accuracies[i], -i))
    assert RunFolder(tmp_path).load("best.pt")["epoch"] == best + 1
    assert len(set(accuracies)) > 1
    for weights, row in ("best", rows[best]), ("last", rows[-1]):
        again = measure.evaluate(tmp_path, weights)
        assert again == {name: row[name] for name in again}
        names = ("loss", "accuracy", "f1", "auroc", "per_class")
        assert set(again) == {f"{split}_{name}" for split in ("test", "val") for name in names}


def test_patience_ends_a_run_where_it_is_resumed_too(tmp_path):
    changes = {"validation": 0.25, "epochs": 40, "patience": 2, "optimizer.lr": 0.3}
    config = RunConfig.parse(merge(TINY, changes))
    training.run(config, tmp_path / "a")
    folder = RunFolder(tmp_path / "a")
    accuracies = [row["val_accuracy"] for row in folder.rows()]
    best = accuracies.index(max(accuracies)) + 1
    assert len(accuracies) == best + 2 < 40
    assert folder.finished()
    assert (tmp_path / f"a/spectra/{best + 2:04d}.json").exists()
    folder.write_status(state="running")  # a kill after the last checkpoint
    training.run(config, tmp_path / "a")
    assert len(folder.rows()) == best + 2
    alone = RunConfig.parse(merge(TINY, {"patience": 2}))
    with pytest.raises(ConfigError, match=r"patience: .* set validation"):
        training.run(alone, tmp_path / "b")


def test_validation_takes_nothing_twice():
    dataset, held_out = build.dataset(RunConfig.parse(merge(TINY, {"validation": 0.25})))
    whole, _ = build.dataset(RunConfig.parse(TINY))
    assert (len(dataset.train.labels), len(held_out.labels)) == (72, 24)
    together = torch.cat([dataset.train.images, held_out.images])
    assert torch.equal(together[together[:, 0].argsort()],
                       whole.train.images[whole.train.images[:, 0].argsort()])  # fmt: skip


def test_masked_runs_are_evaluated_by_their_own_loss(tmp_path):
    training.run(RunConfig.parse(merge(IMAGES, {"regime": {"name": "mim", "patch": 2}})), tmp_path)
    rows = RunFolder(tmp_path).rows()
    assert measure.evaluate(tmp_path) == {"test_loss": rows[-1]["test_loss"]}
    best = min(rows, key=lambda row: row["test_loss"])
    assert measure.evaluate(tmp_path, "best") == {"test_loss": best["test_loss"]}


def test_it_learns(tmp_path):
    config = {"dataset": "digits", "model": {"name": "resnet20", "width": 8}, "epochs": 3,
              "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
              "loss": "class_balanced",
              "regularizer.ses": {"beta": 0.6, "hook_last_n": 3}}  # fmt: skip
    row = training.run(RunConfig.parse(merge({}, config)), tmp_path)
    assert row["test_accuracy"] > 0.9
    assert row["entropy"].keys() == {"layer3.1", "layer3.2", "avgpool"}


def test_every_sample_once_an_epoch(processes):
    here = Training(RunConfig.parse(TINY), Ranks(0, 1, torch.device("cpu"), None))
    orders = [here.order(epoch) for epoch in (1, 2)]
    assert all(order.flatten().sort().values.tolist() == list(range(96)) for order in orders)
    assert not torch.equal(*orders)
    halves = [here.batch(orders[0][0])[0]]
    for rank in range(2):
        here.ranks = Ranks(rank, 2, torch.device("cpu"), None)
        halves.append(here.batch(orders[0][0])[0])
    assert torch.equal(torch.stack(halves[1:], 1).flatten(0, 1), halves[0])


def test_sam_measures_both_passes_at_one_step():
    """every_k counts steps, not passes: entropies of steps 1, 3, ... and none in between."""
    config = RunConfig.parse(merge(TINY, {"regularizer.sam": {}}))
    here = Training(config, Ranks(0, 1, torch.device("cpu"), None))
    here.regime.train()
    penalties = [here.step(1, i, 0, rows)["penalty"].item() for i, rows in enumerate(here.order(1))]
    assert [p > 0 for p in penalties] == [True, False, True]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_that_of_the_passes_alone(precision, tmp_path):
    """Activations are in 16 bits; weights, loss and entropies are in 32, and near those of fp32."""
    changes = {"regularizer.ses": {}, "epochs": 1, "clip": 1.0}
    found = {}
    for name in ("fp32", precision):
        config = RunConfig.parse(merge(IMAGES, {**changes, "precision": name}))
        here = Training(config, Ranks(0, 1, torch.device("cpu"), None))
        seen = []
        here.model.blocks[0].mlp.register_forward_hook(
            lambda m, i, out, s=seen: s.append(out.dtype)
        )
        here.regime.train()
        result = here.step(1, 0, 0, here.order(1)[0])
        assert {p.dtype for p in here.model.parameters()} == {torch.float32}
        assert result["loss"].dtype == result["penalty"].dtype == torch.float32
        norm = torch.nn.utils.get_total_norm([p.grad for p in here.regime.parameters()])
        assert norm <= 1 + 1e-4  # clipped after the scale of fp16 was divided out
        found[name] = (seen[0], result["loss"].item(), result["penalty"].item(), norm.item())
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert (found["fp32"][0], found[precision][0]) == (torch.float32, low)
    assert found[precision][1:] == pytest.approx(found["fp32"][1:], rel=0.05)
    assert found[precision][1] != found["fp32"][1]
    training.run(config, tmp_path)
    row = RunFolder(tmp_path).rows()[-1]
    again = measure.evaluate(tmp_path)
    assert again == {name: row[name] for name in again}


@pytest.mark.parametrize(
    "changes", [{"regularizer.sam": {}}, {"regime": "adversarial:attack=free"}]
)
def test_a_scaled_loss_has_no_use_for_gradients_in_between(changes):
    with pytest.raises(ConfigError, match="precision fp16 has no SAM and no free"):
        RunConfig.parse(merge(IMAGES, {"precision": "fp16", **changes}))


def test_clip(tmp_path):
    config = RunConfig.parse(merge(TINY, {"clip": 1e-3}))
    here = Training(config, Ranks(0, 1, torch.device("cpu"), None))
    here.regime.train()
    here.step(1, 0, 0, here.order(1)[0])
    norm = torch.nn.utils.get_total_norm([p.grad for p in here.regime.parameters()])
    torch.testing.assert_close(norm, torch.tensor(1e-3))


# ---- ranks ----


def test_two_ranks_equal_one_process(tmp_path):
    """Layer norms, no augmentation: the joined batch is then the sum of what the ranks see."""
    configs = [
        merge(IMAGES, {"regularizer.ses": {"beta": 0.5, "lambda_ses": 1.0}, "rank_samples": 12}),
        merge(IMAGES, {"regime": {"name": "mim", "patch": 2}, "epochs": 1}),
        merge(IMAGES, {"regime": "two_views", "epochs": 1}),
    ]
    arguments = []
    for i, document in enumerate(configs):
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump(document))
        arguments += [str(tmp_path / f"{i}.yaml"), str(tmp_path / f"two{i}")]
    script = Path(__file__).with_name("distributed_training_cases.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, script, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "rank 0 done" in done.stdout
    assert "rank 1 done" in done.stdout
    training.run(RunConfig.parse(configs[0]), tmp_path / "one")
    for one, two in zip(RunFolder(tmp_path / "one").rows(), RunFolder(tmp_path / "two0").rows(),
                        strict=True):  # fmt: skip
        names = ("train_loss", "train_penalty", "test_loss", "train_accuracy", "test_accuracy")
        for name in (*names, "test_f1", "test_auroc"):
            # Rounding that the steps amplify.
            assert two[name] == pytest.approx(one[name], rel=1e-5 * 10 ** one["epoch"]), name
        for name in ("entropy", "target", "rank", "rank_ratio"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), name
    assert RunFolder(tmp_path / "two0").status()["ranks"] == 2
    ours, theirs = (build.trained(tmp_path / name).state_dict() for name in ("one", "two0"))
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=2e-4)
    for folder in ("two1", "two2"):  # with parameters that get no gradient
        assert RunFolder(tmp_path / folder).finished()


def test_batches_divide_over_ranks():
    with pytest.raises(ConfigError, match="batch_size: 32 over 3 ranks is uneven"):
        Training(RunConfig.parse(TINY), Ranks(0, 3, torch.device("cpu"), None))


def test_lr_find():
    rows = measure.lr_find(RunConfig.parse(TINY), start=1e-4, stop=1.0, steps=20)
    rates = [row["lr"] for row in rows]
    assert rates == sorted(rates)
    assert rates[0] == 1e-4
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert len(measure.lr_plot({0: rows, 1: rows}).axes[0].lines) == 2 * 3


def test_probes_are_written(tmp_path):
    from ses_lab.config import Choice

    training.run(RunConfig.parse(merge(IMAGES, {"epochs": 1})), tmp_path)
    first = measure.probe(tmp_path, [Choice(name="fgsm", epsilon=0.0)])
    accuracy = RunFolder(tmp_path).rows()[-1]["test_accuracy"]
    assert first["fgsm-epsilon=0.0"] == {"clean": accuracy, "robust": accuracy}
    second = measure.probe(tmp_path, [Choice(name="pgd", steps=2)])
    assert RunFolder(tmp_path).read_json("probes.json") == {**first, **second}
    assert measure.probe(tmp_path, [Choice(name="pgd", steps=2)]) == second
    with pytest.raises(ConfigError, match="unknown probe 'pdg'; did you mean 'pgd'"):
        measure.probe(tmp_path, [Choice(name="pdg")])
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        measure.probe(tmp_path, [Choice(name="pgd", step=2)])
