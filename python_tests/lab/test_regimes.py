"""What each regime minimises, against formulas written out; SES beside every one of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ses_lab import build, config, models, training
from ses_lab.config import ConfigError, RunConfig, merge
from ses_lab.distill import DISTILLERS
from ses_lab.engine import Ranks, Training
from ses_lab.losses import cross_entropy
from ses_lab.models import outputs
from ses_lab.regimes import (
    REGIMES,
    Adversarial,
    Finetune,
    MaskedImageModelling,
    Multitask,
    Supervised,
)


def network(name="resnet20", size=8, channels=1, **params):
    torch.manual_seed(0)
    small = {"width": 4} if name.startswith("resnet") else {"embed_dim": 12, "depth": 2}
    return models.build(name, channels=channels, size=size, classes=3, mean=0.4, std=0.3,
                        **{**small, **params})  # fmt: skip


def batch(n=6, size=8, channels=1):
    images = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))
    return images, F.one_hot(torch.arange(n) % 3, 3).float()


def generator():
    return torch.Generator().manual_seed(2)


def options(**fields):
    document = {"dataset": "digits", "model": "resnet20", "regime": fields}
    document |= {"teacher": {"run": "t"}} if fields["name"] == "distill" else {}
    document |= {"init_from": {"run": "t"}} if fields["name"] == "finetune" else {}
    return RunConfig.parse(document).regime


def test_accuracy_on_mixed_targets_is_the_share_of_the_class():
    images, targets = batch()
    model = network()
    mixed = 0.7 * targets + 0.3 * targets.roll(1, 0)
    result = Supervised(None, model, cross_entropy, images)(images, mixed, generator())
    predicted = model(images).argmax(1)
    shares = [mixed[i, k].item() for i, k in enumerate(predicted.tolist())]
    assert result["accuracy"].item() == pytest.approx(sum(shares) / 6)
    assert 0 < result["accuracy"] < 1


# ---- masked-image modelling ----


@pytest.mark.parametrize(("size", "patch", "mask", "squares"), [(8, 2, 0.5, 8), (9, 4, 0.99, 8)])
def test_every_image_hides_as_many_squares(size, patch, mask, squares):
    images, _ = batch(5, size)
    chosen = options(name="mim", mask=mask, patch=patch)
    regime = MaskedImageModelling(chosen, network(size=size), cross_entropy, images)
    hidden = regime.masked.hidden(5, size, generator())
    grid = hidden[:, 0, ::patch, ::patch]  # the corner of each square
    assert grid.sum((1, 2)).tolist() == [squares] * 5
    assert len(torch.unique(grid, dim=0)) > 1
    whole = grid.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :size, :size]
    assert torch.equal(hidden[:, 0], whole)


@pytest.mark.parametrize(("name", "size"), [("resnet20", 8), ("resnet20", 9), ("vit_tiny", 8)])
def test_hidden_pixels_are_predicted_and_not_seen(name, size):
    extra = {"patch": 2} if name == "vit_tiny" else {}
    model, (images, targets) = network(name, size, 2, **extra), batch(6, size, 2)
    chosen = options(name="mim", mask=0.5, patch=2)
    regime = MaskedImageModelling(chosen, model, cross_entropy, images).eval()
    hidden = regime.masked.hidden(6, size, generator())
    seen = []
    model.normalize.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        nn.init.normal_(regime.masked.square)
        (loss,) = regime(images, targets, generator()).values()
    square = regime.masked.square.detach()
    inside = seen[0][0, :, hidden[0, 0]]
    assert torch.isin(inside, square).all()
    assert torch.equal(seen[0][0, :, ~hidden[0, 0]], images[0, :, ~hidden[0, 0]])
    # Predicting 0, the mean of a channel, costs the mean |normalised pixel|, over hidden ones.
    for parameter in regime.masked.predict.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        (zero,) = regime(images, targets, generator()).values()
    normalised = ((images - 0.4) / 0.3).abs()
    torch.testing.assert_close(zero, normalised[hidden.expand_as(images)].mean())
    assert loss != zero


def test_points_have_no_pixels():
    points = torch.rand(4, 2)
    model = models.build("mlp", channels=2, size=None, classes=2)
    with pytest.raises(ConfigError, match=r"inputs of shape \(2,\)"):
        MaskedImageModelling(options(name="mim"), model, cross_entropy, points)


def test_multitask_is_the_sum():
    model, (images, targets) = network(), batch()
    regime = Multitask(options(name="multitask", weight=0.3), model, cross_entropy, images).eval()
    result = regime(images, targets, generator())
    masked = regime.masked(model, images, generator())
    expected = cross_entropy(model(images), targets) + 0.3 * masked
    torch.testing.assert_close(result["loss"], expected)
    torch.testing.assert_close(result["masked"], masked.detach())


@pytest.mark.filterwarnings("error")
def test_multitask_shapes_whole_images():
    """The entropies of a step are those of the pass with the labels alone."""
    document = merge(TINY, {"regime": {"name": "multitask", "patch": 2}, **SES})
    trainer = Training(RunConfig.parse(document), Ranks(0, 1, torch.device("cpu"), None))
    trainer.regime.train()
    indices = trainer.order(1)[0]
    trainer.regime.model(trainer.batch(indices)[0])
    trainer.ses.loss()
    expected = trainer.ses.entropies
    trainer.step(1, 0, 0, indices)
    assert trainer.ses.entropies == pytest.approx(expected)


# ---- adversarial ----


def test_pgd_trains_on_the_attack_within_epsilon():
    model, (images, targets) = network(), batch()
    nn.init.normal_(model.fc.weight)  # logits that depend on the images
    chosen = options(name="adversarial", epsilon=0.1, steps=3)
    regime = Adversarial(chosen, model, cross_entropy, images).train()
    modes, seen = [], []

    def watch(module, inputs):
        modes.append(module.training)
        seen.append(inputs[0])

    model.register_forward_pre_hook(watch)
    result = regime(images, targets, generator())
    assert modes == [False] * 3 + [True]
    assert model.training
    delta = (seen[-1] - images).detach()
    assert 0.05 < delta.abs().max() <= 0.1 + 1e-6
    assert seen[-1].min() >= 0
    assert seen[-1].max() <= 1
    model.eval()
    with torch.no_grad():  # uphill from the clean images, and from where it started
        losses = [cross_entropy(model(x), targets) for x in (images, seen[0], seen[-1])]
    assert losses[2] > max(losses[:2])
    assert result["loss"].requires_grad


def test_free_is_the_published_algorithm():
    """Shafahi et al., algorithm 1, by hand on logistic regression with plain SGD."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    points, epsilon, lr = torch.randn(2, 5, 4), 0.2, 0.5
    targets = F.one_hot(torch.randint(3, (2, 5)), 3).float()
    chosen = options(name="adversarial", attack="free", epsilon=epsilon, steps=3)
    regime = Adversarial(chosen, model, cross_entropy, points[0])
    assert regime.replays == 3
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    regime.begin_epoch()
    for x, y in zip(points, targets, strict=True):
        for _ in range(regime.replays):
            optimizer.zero_grad()
            regime(x, y, generator())["loss"].backward()
            optimizer.step()
            regime.after_backward()
    delta = torch.zeros(5, 4)
    for x, y in zip(points, targets, strict=True):
        for _ in range(3):
            error = ((x + delta) @ w.T + b).softmax(1) - y  # of each sample, 5 x the batch's mean
            gradients = error.T @ (x + delta) / 5, error.mean(0), error @ w
            w, b = w - lr * gradients[0], b - lr * gradients[1]
            delta = (delta + epsilon * gradients[2].sign()).clamp(-epsilon, epsilon)
    torch.testing.assert_close(model.weight.detach(), w)
    torch.testing.assert_close(model.bias.detach(), b)


# ---- fine-tuning, distillation ----


def test_finetune_freezes_and_slows():
    model, (images, _) = network(), batch()
    chosen = options(name="finetune", freeze=["conv1*", "layer1*"], backbone_lr=0.1)
    regime = Finetune(chosen, model, cross_entropy, images)
    backbone, head = regime.groups(2.0)
    assert backbone["lr"] == 0.2
    assert head["params"] == [model.fc.weight, model.fc.bias]
    names = {p: name for name, p in model.named_parameters()}
    free = {names[p] for p in [*backbone["params"], *head["params"]]}
    assert free == {n for n in names.values() if not n.startswith(("conv1", "layer1"))}
    assert {n for p, n in names.items() if p.requires_grad} == free
    with pytest.raises(ConfigError, match="'layer9' matches no parameter"):
        Finetune(options(name="finetune", freeze=["layer9"]), model, cross_entropy, images)
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        Finetune(options(name="finetune", freeze=["*"]), model, cross_entropy, images)


@pytest.mark.parametrize("name", DISTILLERS)
def test_distill_mixes_labels_and_teacher(name):
    student, (images, targets) = network(), batch()
    teacher = network(width=6).train()
    chosen = options(name="distill", distiller=name, a=0.25)
    torch.manual_seed(3)
    regime = REGIMES["distill"](chosen, student, cross_entropy, images, teacher)
    regime.prepare([images])
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    regime.train()
    result = regime(images, targets, generator())
    assert not teacher.training
    taught, learned = outputs(teacher, images), outputs(student.train(), images)
    expected = 0.75 * cross_entropy(learned.logits, targets)
    expected = expected + 0.25 * regime.distiller(learned, taught)
    torch.testing.assert_close(result["loss"], expected, rtol=1e-4, atol=1e-6)
    result["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(k.startswith("teacher") for k in regime.state_dict())
    assert student.conv1.weight.grad.abs().sum() > 0


# ---- SES beside every regime, in whole runs ----

TINY = {"dataset": {"name": "shapes", "preset": "trivial", "samples": 64, "size": 8},
        "model": {"name": "vit_tiny", "embed_dim": 12, "depth": 2, "heads": 2, "patch": 2},
        "optimizer": {"name": "sgd", "lr": 0.05}, "epochs": 1, "batch_size": 32}  # fmt: skip
SES = {"regularizer.ses": {"lambda_ses": 1.0, "beta": 0.5}}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    training.run(RunConfig.parse(merge(TINY, {"regime": "mim", **SES})), folder)
    return folder


@pytest.mark.parametrize(
    "regime",
    [
        {"name": "supervised"},
        {"name": "mim"},
        {"name": "finetune"},
        {"name": "multitask"},
        {"name": "adversarial", "steps": 2},
        {"name": "adversarial", "steps": 2, "attack": "free"},
        {"name": "distill", "distiller": "rkd"},
        {"name": "two_views", "objective": "vicreg"},
    ],
    ids=lambda regime: "-".join(map(str, regime.values())),
)
def test_ses_shapes_every_regime(regime, pretrained, tmp_path):
    changes = {"regime": regime}
    if regime["name"] in ("finetune", "distill"):
        key = {"finetune": "init_from", "distill": "teacher"}[regime["name"]]
        changes[key] = {"run": str(pretrained)}
    weights = []
    for ses in (SES, {}):
        folder = tmp_path / str(len(weights))
        row = training.run(RunConfig.parse(merge(TINY, {**changes, **ses})), folder)
        weights.append(build.trained(folder).state_dict()["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(*weights)
    assert "entropy" not in row
    with_ses = config.parse_yaml((tmp_path / "0" / "metrics.jsonl").read_text())
    assert with_ses["entropy"].keys() == {"blocks.0", "blocks.1"}
    assert with_ses["train_penalty"] > 0


def test_finetuning_starts_from_the_other_run(pretrained, tmp_path):
    start = merge(TINY, {"regime": {"name": "finetune", "freeze": ["blocks*"]},
                         "init_from.run": str(pretrained), "dataset.classes": 4})  # fmt: skip
    training.run(RunConfig.parse(start), tmp_path)
    ours, theirs = build.trained(tmp_path).state_dict(), build.trained(pretrained).state_dict()
    for name in theirs:
        if name.startswith("blocks"):
            assert torch.equal(ours[name], theirs[name]), name
    assert ours["head.weight"].shape[0] == 4  # its own, for its own classes
    assert not torch.equal(ours["patch_embed.weight"], theirs["patch_embed.weight"])
    other = merge(start, {"model.embed_dim": 18})
    with pytest.raises(ConfigError, match="do not fit"):
        training.run(RunConfig.parse(other), tmp_path / "other")
