"""The objectives of two views against their formulas written out, the regime, and its views."""

import math

import pytest
import torch
from torch import nn

from ses_lab import build, measure, models, training
from ses_lab.config import ConfigError, RunConfig, merge
from ses_lab.folder import RunFolder
from ses_lab.models import classified
from ses_lab.twoviews import barlow_twins, simclr, vicreg

N, D = 5, 3
TINY = {"dataset": {"name": "shapes", "preset": "trivial", "samples": 64, "size": 8},
        "model": {"name": "resnet20", "width": 4}, "optimizer": {"name": "sgd", "lr": 0.05},
        "regime": {"name": "two_views", "projection": 16},
        "epochs": 2, "batch_size": 32}  # fmt: skip


def views(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, N, D, generator=generator).unbind()


def test_simclr_is_nt_xent():
    a, b = views()
    z = [*a, *b]
    total = 0.0
    for i in range(2 * N):
        cosine = [torch.cosine_similarity(z[i], other, dim=0).item() for other in z]
        j = (i + N) % (2 * N)
        others = sum(math.exp(cosine[k] / 0.3) for k in range(2 * N) if k != i)
        total -= math.log(math.exp(cosine[j] / 0.3) / others)
    assert simclr(a, b, temperature=0.3).item() == pytest.approx(total / (2 * N), rel=1e-5)


def test_vicreg_is_its_three_terms():
    a, b = (x.double() for x in views())
    parts = [((a - b) ** 2).mean(), 0.0, 0.0]
    for z in (a, b):
        matrix = torch.cov(z.mT)
        parts[1] += (1 - (matrix.diag() + 1e-4).sqrt()).clamp(min=0).mean() / 2
        parts[2] += (matrix**2).sum() / D - (matrix.diag() ** 2).sum() / D
    for i, name in enumerate(("invariance", "variance", "covariance")):
        only = {k: float(k == name) for k in ("invariance", "variance", "covariance")}
        assert vicreg(a, b, **only).item() == pytest.approx(parts[i].item(), rel=1e-5)
    total = 25 * parts[0] + 25 * parts[1] + parts[2]
    assert vicreg(a, b).item() == pytest.approx(total.item(), rel=1e-5)


def test_barlow_twins_is_the_distance_from_the_identity():
    a, b = views()
    both = torch.corrcoef(torch.cat([a, b], 1).mT)[:D, D:]
    weights = torch.full((D, D), 0.1).fill_diagonal_(1)
    expected = (weights * (both - torch.eye(D)) ** 2).sum()
    assert barlow_twins(a, b, off_diagonal=0.1).item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("objective", [simclr, vicreg, barlow_twins])
def test_equal_views_of_different_images_are_better_than_others(objective):
    a, b = views()
    assert objective(a, a) < objective(a, b)
    half = [x.to(torch.bfloat16) for x in (a, b)]
    found = objective(*half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, objective(*(x.float() for x in half)))


def test_both_views_are_one_batch_and_differ():
    config = RunConfig.parse(TINY)
    dataset, _ = build.dataset(config)
    regime = build.regime(config, dataset, build.model(config, dataset))
    images = build.pixels(dataset.train.images[:6])
    seen = []
    regime.model.normalize.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    targets = torch.zeros(6, 2)
    loss = regime(images, targets, torch.Generator().manual_seed(0))["loss"]
    (batch,) = seen
    assert batch.shape == (12, 3, 8, 8)
    assert (batch[:6] - batch[6:]).abs().amax((1, 2, 3)).min() > 0.01
    regime.eval()  # the same views, and batch norms of the two as one batch
    repeated = regime(images, targets, torch.Generator().manual_seed(0))["loss"]
    z = regime.projector(classified(regime.model, batch)).chunk(2)
    torch.testing.assert_close(repeated, simclr(*z))
    loss.backward()
    assert regime.model.conv1.weight.grad.abs().sum() > 0
    assert regime.model.fc.weight.grad is None


@pytest.mark.parametrize("name", ["resnet20", "vit_tiny"])
def test_the_classifier_takes_what_is_projected(name):
    params = {"width": 4} if name == "resnet20" else {"embed_dim": 12, "depth": 2, "patch": 4}
    model = models.build(name, channels=1, size=8, classes=3, **params)
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(
        model.get_submodule(model.classifier)(classified(model, x)), model(x)
    )
    assert not any(isinstance(m, nn.Linear) and m._forward_pre_hooks for m in model.modules())


# 16 samples cannot have the rank that some of these layers should have.
@pytest.mark.filterwarnings("ignore:SESRegularizer")
@pytest.mark.parametrize(
    "objective", ["simclr", "vicreg:covariance=0.5", "barlow_twins:off_diagonal=0.01"]
)
def test_a_run_learns_and_is_evaluated_again(objective, tmp_path):
    changes = {"regime.objective": objective, "regularizer.ses": {"lambda_ses": 0.1}, "epochs": 4}
    row = training.run(RunConfig.parse(merge(TINY, changes)), tmp_path)
    rows = RunFolder(tmp_path).rows()
    assert row["train_loss"] < rows[0]["train_loss"]
    assert row["entropy"].keys() >= {"layer1.0", "layer3.2"}
    assert "test_accuracy" not in row
    again = measure.evaluate(tmp_path)
    assert again == pytest.approx({"test_loss": row["test_loss"]})


@pytest.mark.parametrize(
    ("regime", "message"),
    [
        ({"objective": "simclrr"}, "unknown objective 'simclrr'; did you mean 'simclr'"),
        ({"objective": "simclr:temprature=1"}, "'temprature'; did you mean 'temperature'"),
        ({"views": ["random_gray"]}, "unknown augmentation 'random_gray'; did you mean"),
        ({"view": []}, "'view'; did you mean 'views'"),
        ({"projection": 0}, "regime.projection: "),
    ],
)
def test_what_no_configuration_can_be(regime, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse(merge(TINY, {"regime": {"name": "two_views", **regime}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regime.objective": "simclr:temperature=0"}, "temperature must be positive, got 0"),
        ({"dataset": "moons", "model": {"name": "mlp"}}, r"inputs of shape \(2,\)"),
    ],
)
def test_what_no_run_can_be(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        training.run(RunConfig.parse(merge(TINY, changes)), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
