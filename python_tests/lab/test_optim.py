"""Schedules against torch's, SAM and the range test against closed forms of quadratics."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import lr_scheduler

from ses_kernels import SESRegularizer
from ses_lab import models, optim

STEPS = 50


def sgd(lr=0.1):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(optimizer, scheduler, steps=STEPS):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "params", "torchs"),
    [
        ("constant", {}, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
        ("multistep", {}, lambda o: lr_scheduler.MultiStepLR(o, [25, 38])),
        (
            "multistep",
            {"milestones": [0.2, 0.6, 0.8], "gamma": 0.2},
            lambda o: lr_scheduler.MultiStepLR(o, [10, 30, 40], 0.2),
        ),
        ("cosine", {}, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
        ("cosine", {"final": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, 0.01)),
        (  # torch's last step is its total less one, and its peak comes one step early
            "onecycle",
            {},
            lambda o: lr_scheduler.OneCycleLR(
                o, 0.1, STEPS + 1, pct_start=(0.3 * STEPS + 1) / (STEPS + 1), cycle_momentum=False
            ),
        ),
    ],
)
def test_schedules_equal_those_of_torch(name, params, torchs):
    ours, theirs = sgd(), sgd()
    expected = rates(theirs, torchs(theirs))
    assert rates(ours, optim.schedule(name, ours, STEPS, **params)) == pytest.approx(expected)


def test_warmup_comes_before_the_schedule():
    ours, theirs = sgd(), sgd()
    reference = lr_scheduler.SequentialLR(
        theirs,
        [
            lr_scheduler.LinearLR(theirs, 1 / 10, total_iters=9),
            lr_scheduler.CosineAnnealingLR(theirs, STEPS - 10),
        ],
        [10],
    )
    expected = rates(theirs, reference)
    assert rates(ours, optim.schedule("cosine", ours, STEPS, warmup=10)) == pytest.approx(expected)


def test_a_schedule_ends_at_its_least_rate():
    ours = sgd(0.2)
    last = rates(ours, optim.schedule("cosine", ours, STEPS, warmup=5, least=0.01))
    ours = sgd(0.2)
    share = optim.schedule("cosine", ours, STEPS, warmup=5, final=0.05)
    assert last == pytest.approx(rates(ours, share), rel=1e-12)
    assert last[4] == pytest.approx(0.2)
    # The last of 45 steps after the warm-up.
    assert last[-1] == pytest.approx(0.01 + 0.19 * (1 + math.cos(math.pi * 44 / 45)) / 2)
    for least, params in ((0.3, {}), (0.01, {"final": 0.1})):
        with pytest.raises(ValueError, match="least is a rate from 0 to lr"):
            optim.schedule("cosine", sgd(0.2), STEPS, least=least, **params)


def test_a_schedule_resumes():
    whole, part = sgd(), sgd()
    expected = rates(whole, optim.schedule("onecycle", whole, STEPS, warmup=5))
    first = optim.schedule("onecycle", part, STEPS, warmup=5)
    found = rates(part, first, 20)
    resumed = sgd()
    scheduler = optim.schedule("onecycle", resumed, STEPS, warmup=5)
    scheduler.load_state_dict(first.state_dict())
    resumed.load_state_dict(part.state_dict())
    assert found + rates(resumed, scheduler, STEPS - 20) == expected


def test_names_and_ranges():
    parameter = torch.nn.Parameter(torch.zeros(1))
    made = optim.optimizer("adamw", [parameter], lr=0.2, weight_decay=0.3)
    assert type(made) is torch.optim.AdamW
    assert made.param_groups[0]["weight_decay"] == 0.3
    with pytest.raises(ValueError, match="unknown optimizer 'adamww', nearest 'adamw'"):
        optim.optimizer("adamww", [parameter], lr=0.1)
    with pytest.raises(ValueError, match="unknown schedule 'cos', nearest 'cosine'"):
        optim.schedule("cos", made, 10)
    with pytest.raises(ValueError, match="warmup must be in"):
        optim.schedule("cosine", made, 10, warmup=10)
    with pytest.raises(ValueError, match="rho must be positive"):
        optim.SAM(made, rho=0.0)
    with pytest.raises(ValueError, match="start < stop"):
        optim.lr_range_test(lambda: 0.0, made, start=1.0, stop=0.1)


# ---- SAM ----------------------------------------------------------------------------------------


def quadratic(weights, matrix, optimizer):
    """Closure of 1/2 w A w, over parameters that are the parts of w."""

    def closure():
        optimizer.zero_grad()
        w = torch.cat(list(weights))
        loss = w @ matrix @ w / 2
        loss.backward()
        return loss.detach()

    return closure


@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_sam_on_a_quadratic(rho):
    root = torch.randn(5, 5, dtype=torch.float64)
    A = root @ root.mT
    start = torch.randn(5, dtype=torch.float64)
    unused = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    weights = [torch.nn.Parameter(start[:2].clone()), torch.nn.Parameter(start[2:].clone())]
    base = torch.optim.SGD(
        [{"params": weights[:1]}, {"params": [*weights[1:], unused], "lr": 0.02}], lr=0.01
    )
    loss = optim.SAM(base, rho=rho).step(quadratic(weights, A, base))

    # The ascent has the norm of the whole gradient, whatever the groups
    g = A @ start
    there = A @ (start + rho * g / g.norm())
    lr = torch.tensor([0.01, 0.01, 0.02, 0.02, 0.02], dtype=torch.float64)
    torch.testing.assert_close(torch.cat(list(weights)).detach(), start - lr * there)
    assert loss.item() == pytest.approx((start @ A @ start / 2).item())
    assert unused.item() == 1


def test_sam_returns_to_the_same_bits_and_stays_at_a_stationary_point():
    w = torch.nn.Parameter(torch.randn(1000))
    before = w.detach().clone()
    base = torch.optim.SGD([w], lr=0.0)
    optim.SAM(base, rho=0.3).step(quadratic([w], torch.eye(1000), base))
    assert torch.equal(w, before)
    base = torch.optim.SGD([w], lr=0.1)
    optim.SAM(base).step(quadratic([w], torch.zeros(1000, 1000), base))
    assert torch.equal(w, before)


# ---- spectral norm ------------------------------------------------------------------------------


def test_spectral_norm_of_every_layer_is_one():
    model = models.build("resnet20", channels=1, size=8, classes=10, width=4)
    plain = {n: m.weight for n, m in model.named_modules() if hasattr(m, "weight")}
    layers = [n for n, weight in plain.items() if weight.dim() > 1]
    assert len(layers) == 20
    assert optim.spectral_norm(model) is model
    for _ in range(50):
        model(torch.rand(4, 1, 8, 8))
    for name in layers:
        weight = model.get_submodule(name).weight.flatten(1)
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, rel=0.02)
        ratio = weight / plain[name].flatten(1)
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-4, atol=1e-4)
    assert len(SESRegularizer(model).layers) == 10


# ---- range test ---------------------------------------------------------------------------------


def descend(curvature):
    """Gradient descent on curvature w^2 / 2, which diverges above lr = 2 / curvature."""
    w = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([w], lr=0.123)

    def step():
        optimizer.zero_grad()
        loss = curvature * w.square() / 2
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, optimizer


@pytest.mark.parametrize("curvature", [0.5, 20.0])
def test_range_test_finds_where_descent_diverges(curvature):
    step, optimizer = descend(curvature)
    rows = optim.lr_range_test(step, optimizer, start=1e-4, stop=1e3, steps=200)
    lrs = torch.tensor([row["lr"] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(lrs[1:] / lrs[:-1], torch.full_like(lrs[1:], 1e7 ** (1 / 199)))
    assert optimizer.param_groups[0]["lr"] == 0.123
    assert 2 / curvature < lrs[-1] < 100 / curvature  # ended soon after
    losses = [row["loss"] for row in rows]
    below = sum(lr < 2 / curvature for lr in lrs.tolist())
    assert losses[:below] == sorted(losses[:below], reverse=True)
    assert optim.steepest(rows) < 2 / curvature


@pytest.mark.parametrize("last", [200.0, math.inf, math.nan])  # 200 makes the mean > 4 * least
def test_smoothing_and_the_steepest_fall(last):
    losses = iter([3.0, 3.0, 3.0, 1.0, 1.0, last])
    rows = optim.lr_range_test(lambda: next(losses), sgd(), start=1e-3, stop=1.0, steps=10)
    assert [row["loss"] for row in rows] == [3, 3, 3, 1, 1]
    weights = [0.9**i for i in range(4)]  # newest first
    mean = (1 * weights[0] + 3 * sum(weights[1:])) / sum(weights)
    assert rows[3]["smooth"] == pytest.approx(mean)
    assert optim.steepest(rows) == rows[2]["lr"]
    with pytest.raises(ValueError, match="lower start"):
        optim.steepest(rows[:1])
