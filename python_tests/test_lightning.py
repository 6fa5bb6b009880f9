"""SESCallback in Lightning's own Trainer, on the CPU."""

import copy
import functools
import inspect
import itertools
import math
import os
import pathlib
import pickle
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lightning")
import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.compile import from_compiled

from ses_kernels import SESRegularizer
from ses_kernels.integrations.lightning import SESCallback

HERE = pathlib.Path(__file__).parent
LAYERS = ["net.1", "net.3"]
BETA, LAMBDA, WIDTHS = 0.7, 0.5, (8, 16)
ses = functools.partial(SESCallback, layers=LAYERS, beta=BETA, lambda_ses=LAMBDA)


class Module(pl.LightningModule):
    """A small convolutional classifier that remembers its task losses."""

    returns = staticmethod(lambda loss: loss)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(256, 4),
        )  # fmt: skip
        self.tasks = []

    def training_step(self, batch):  # without batch_idx: Lightning looks at the signature
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.tasks.append(loss.detach())
        return self.returns(loss)

    def validation_step(self, batch):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Probe(pl.Callback):
    """What is optimised, beside the features that the test's own hooks see."""

    def __init__(self):
        self.features, self.losses, self.gradients, self.scale = [], [], [], 1.0

    def on_train_start(self, trainer, module):
        for name in LAYERS:
            module.get_submodule(name).register_forward_hook(self.capture)

    def capture(self, layer, inputs, output):
        if layer.training:
            self.features.append(output.detach())

    def on_before_backward(self, trainer, module, loss):
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.losses.append(loss.item() / (scaler.get_scale() if scaler else 1))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [p.grad for p in module.parameters()]
        self.gradients.append([g if g is None else g.clone() for g in gradients])

    def penalties(self):
        steps = zip(self.features[::2], self.features[1::2], strict=True)
        return [penalty(features).item() for features in steps]


def entropy(features):
    """nats, by svdvals in float64, of channels averaged over space."""
    x = features.double().mean((2, 3))
    s = torch.linalg.svdvals(x - x.mean(0))
    p = s[s > 1e-9 * s[0]] ** 2 / (s**2).sum()  # a dead channel has a singular value of 0
    return -(p * p.log()).sum()


def penalty(features):
    widths = [f.shape[1] for f in features]
    return LAMBDA * sum(
        (entropy(f) - BETA * math.log(d)) ** 2 for f, d in zip(features, widths, strict=True)
    )


def data(batches=4):
    g = torch.Generator().manual_seed(1)
    images = torch.randn(batches * 32, 1, 8, 8, generator=g)
    labels = torch.randint(4, (batches * 32,), generator=g)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 32)


def trainer(tmp_path, *callbacks, **options):
    options = {"max_epochs": 1, "log_every_n_steps": 1, "logger": False, "devices": 1, **options}
    for noise in ("progress_bar", "model_summary", "checkpointing"):
        options[f"enable_{noise}"] = False
    callbacks = list(callbacks)
    return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **options)


def is_as_before(module):
    layers = [module, *module.modules()]
    hooked = [m for m in layers if m._forward_pre_hooks or m._forward_hooks]
    return "training_step" not in vars(module) and not hooked


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_optimised_loss_is_task_plus_penalty(tmp_path, accumulate, kind):
    module, probe = Module(), Probe()
    if kind == "dict":
        module.returns = lambda loss: {"loss": loss, "other": 1}
    before = copy.deepcopy(module)
    trainer(tmp_path, ses(), probe, accumulate_grad_batches=accumulate).fit(module, data())
    expected = [
        (task.item() + p) / accumulate
        for task, p in zip(module.tasks, probe.penalties(), strict=True)
    ]
    assert probe.losses == pytest.approx(expected, rel=1e-5)
    assert len(probe.gradients) == 4 // accumulate

    # The first gradient: the mean over the micro-batches of task and penalty, all in float64.
    before.double()
    for images, labels in itertools.islice(data(), accumulate):
        x = images.double()
        features = [before.net[: i + 1](x) for i in (1, 3)]
        loss = F.cross_entropy(before.net(x), labels) + penalty(features)
        (loss / accumulate).backward()
    for mine, parameter in zip(probe.gradients[0], before.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), parameter.grad, rtol=1e-4, atol=1e-6)


def test_float16_with_a_scaler(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module, probe = Module(), Probe()
    trainer(tmp_path, ses(), probe, plugins=plugin).fit(module, data())
    expected = [t.item() + p for t, p in zip(module.tasks, probe.penalties(), strict=True)]
    assert probe.losses == pytest.approx(expected, rel=1e-3)  # the features are float16


def test_two_ranks_equal_one(tmp_path):
    """DDP runs `training_step` inside its forward; its mean is the gradient of the joined batch."""
    script = tmp_path / "ranks.py"
    script.write_text(
        """
import torch
from test_lightning import Module, Probe, data, ses, trainer
probe = Probe()
run = trainer(".", ses(sync_dist=True), probe, strategy="ddp", devices=2)
run.fit(Module(), data(2))  # 32 of the 64 samples on each rank
if run.global_rank == 0:
    torch.save(probe.gradients, "gradients.pt")
"""
    )
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    module, probe = Module(), Probe()
    joined = torch.utils.data.DataLoader(data(2).dataset, 64)
    trainer(tmp_path, ses(), probe).fit(module, joined)
    (ours,), (expected,) = torch.load(tmp_path / "gradients.pt"), probe.gradients
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_module(tmp_path):
    module, probe = from_compiled(torch.compile(Module(), backend="eager")), Probe()
    compiled = module.training_step
    trainer(tmp_path, ses(), probe).fit(module, data())
    expected = [t.item() + p for t, p in zip(module.tasks, probe.penalties(), strict=True)]
    assert probe.losses == pytest.approx(expected, rel=1e-5)
    assert module.training_step is compiled


def distance(module):
    """Of the entropies of the trained module from their targets."""
    images = next(iter(data(1)))[0]
    h = [entropy(module.net[: i + 1](images)).item() for i in (1, 3)]
    return sum(abs(H - BETA * math.log(d)) for H, d in zip(h, WIDTHS, strict=True))


def test_entropies_move_to_the_target(tmp_path):
    shaped, plain = Module(), Module()
    start = distance(plain)
    trainer(tmp_path, ses(), max_epochs=8).fit(shaped, data())
    trainer(tmp_path, max_epochs=8).fit(plain, data())
    assert distance(shaped) < 0.5 * min(start, distance(plain))


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_module_as_it_was(tmp_path, fails):
    module, callback = Module(), ses()

    class Fails(pl.Callback):
        def on_train_batch_end(self, *arguments):
            assert "training_step" in vars(module)
            raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            trainer(tmp_path, callback, Fails()).fit(module, data())
    else:
        trainer(tmp_path, callback).fit(module, data())
    assert is_as_before(module)
    assert set(callback.regularizer.entropies) == set(LAYERS)  # still to be read
    trainer(tmp_path, callback).validate(module, data(), verbose=False)
    assert is_as_before(module)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_during_fit_run_their_own_step(tmp_path, how):
    """An average of weights, or a saved module: of its own weights, and without a penalty."""
    copies = []

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, module, *arguments):
            copies.append(how(module))

    module, callback = Module(), ses()
    trainer(tmp_path, callback, Copies(), max_steps=1).fit(module, data())
    (copied,) = copies
    assert copied.training_step.__self__ is copied
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    steps = callback.regularizer.step
    loss = copied.training_step(next(iter(data())))
    assert loss.item() == pytest.approx(math.log(4))  # of weights that are zero
    assert len(module.tasks) == 1
    assert callback.regularizer.step == steps


def test_skipped_step(tmp_path):
    """A step that returns None is skipped, and what its forward pass left is not counted later."""
    module, probe, callback = Module(), Probe(), ses()
    module.returns = lambda loss: None if len(module.tasks) == 2 else loss
    trainer(tmp_path, callback, probe).fit(module, data())
    tasks, penalties = ([v for i, v in enumerate(vs) if i != 1] for vs in
                        (module.tasks, probe.penalties()))  # fmt: skip
    expected = [t.item() + p for t, p in zip(tasks, penalties, strict=True)]
    assert probe.losses == pytest.approx(expected, rel=1e-5)
    assert callback.state_dict()["step"] == 3


def test_resumes_bitwise_with_the_step(tmp_path):
    whole, first, second = Module(), Module(), Module()
    trainer(tmp_path, ses(every_k=3), max_epochs=2).fit(whole, data())
    half = trainer(tmp_path, ses(every_k=3))
    half.fit(first, data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    callback, probe = ses(every_k=3), Probe()
    resumed = trainer(tmp_path, callback, probe, max_epochs=2)
    resumed.fit(second, data(), ckpt_path=tmp_path / "half.ckpt")
    assert callback.state_dict()["step"] == 8
    # Steps 4 to 7: only 6 is a multiple of 3.
    added = [loss - task.item() for loss, task in zip(probe.losses, second.tasks, strict=True)]
    assert [a > 1e-6 for a in added] == [False, False, True, False]
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_logs_at_logging_steps_only(tmp_path, monkeypatch):
    read = []
    measure = SESRegularizer.entropies.fget
    monkeypatch.setattr(
        SESRegularizer, "entropies", property(lambda self: read.append(1) or measure(self))
    )

    class Logger(pl.loggers.Logger):
        name, version, rows = "test", 0, []

        def log_metrics(self, metrics, step):
            self.rows.append(metrics)

        def log_hyperparams(self, *arguments):
            pass

    module, probe, logger = Module(), Probe(), Logger()
    options = {"logger": logger, "log_every_n_steps": 3, "max_epochs": 2}
    trainer(tmp_path, ses(), probe, **options).fit(module, data(), data(1))
    assert len(read) == 2  # steps 3 and 6 of 8
    rows = [row for row in logger.rows if "ses/loss" in row]
    assert len(rows) == 2
    for step, row in zip((3, 6), rows, strict=True):
        assert row["ses/loss"] == pytest.approx(probe.penalties()[step - 1], rel=1e-4)
        features = probe.features[2 * step - 2 : 2 * step]
        for name, f in zip(LAYERS, features, strict=True):
            assert row[f"ses/H/{name}"] == pytest.approx(entropy(f).item(), rel=1e-4)


def test_refuses_manual_optimization(tmp_path):
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"automatic_optimization is False.*manual_backward"):
        trainer(tmp_path, ses()).fit(module, data())
    assert is_as_before(module)


def test_works_with_pytorch_lightning_alone(monkeypatch):
    older = pytest.importorskip("pytorch_lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)  # makes its import raise
    namespace = runpy.run_path(inspect.getfile(SESCallback))
    assert issubclass(namespace["SESCallback"], older.Callback)
