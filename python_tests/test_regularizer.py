"""SESRegularizer on small models: the formula, which layers, when it measures, what it leaves."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ses_kernels import SESRegularizer


class BasicBlock(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(d_in, d_out, 3, padding=1), nn.BatchNorm2d(d_out))
        self.skip = nn.Conv2d(d_in, d_out, 1)

    def forward(self, x):
        return torch.relu_(self.branch(x) + self.skip(x))


class Net(nn.Module):
    """Four layers by default: three blocks of 8, 12 and 16 features, and the pooled ones."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 12), BasicBlock(12, 16))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.avgpool(self.blocks(self.stem(x))).flatten(1))


def batch(samples=40, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 10, 10, generator=generator).to(dtype)
    return images, torch.randint(10, (samples,), generator=generator)


def recipe(features, beta=0.7, lambda_ses=0.01, alpha=1.0):
    """The published penalty, in float64 from eigenvalues of the d x d covariance by autograd."""
    total = 0
    for x in features:
        x = x.double() - x.double().mean(0)
        w = torch.linalg.eigvalsh(x.mT @ x / (len(x) - 1))
        p = (w / w.sum()).clamp_min(1e-14)
        h = -(p * p.log()).sum()
        total = total + alpha * (h - beta * math.log(x.shape[1])) ** 2
    return lambda_ses * total


class Recorder:
    """The outputs of some modules, by hooks of the test's own."""

    def __init__(self, *modules, pool=lambda x: x.double().mean((2, 3))):
        self.features = [None] * len(modules)
        for i, module in enumerate(modules):
            module.register_forward_hook(self._hook(i, pool))

    def _hook(self, i, pool):
        def hook(module, inputs, output):
            self.features[i] = pool(output)

        return hook


def gradients(loss, model):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten().double() for g in grads if g is not None])


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


# ---- the formula ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_three_lines(dtype):
    model = Net().to(dtype)
    x, y = batch(dtype=dtype)
    recorder = Recorder(*model.blocks[1:], model.avgpool)

    reg = SESRegularizer(model, beta=0.7, lambda_ses=0.01, hook_last_n=3, every_k=1)
    task = F.cross_entropy(model(x), y)
    penalty = reg.loss()
    expected = recipe(recorder.features)

    assert reg.layers == ("blocks.1", "blocks.2", "avgpool")
    assert penalty.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    assert abs(penalty.item() / expected.item() - 1) < tolerance
    both = gradients(task + penalty, model)
    x, y = batch(dtype=dtype)
    reference = gradients(F.cross_entropy(model(x), y) + recipe(recorder.features), model)
    assert relative(both, reference) < tolerance


def test_the_penalty_s_own_gradient():
    """Of the penalty alone, which the task's gradient would hide."""
    model = Net()
    recorder = Recorder(*model.blocks, model.avgpool)
    reg = SESRegularizer(model, lambda_ses=1.0)
    model(batch()[0])
    ours = gradients(reg.loss(), model)
    model(batch()[0])
    assert relative(ours, gradients(recipe(recorder.features, lambda_ses=1.0), model)) < 1e-5


def test_entropies_and_targets():
    model = Net()
    recorder = Recorder(*model.blocks)
    reg = SESRegularizer(model, layers="blocks.?", beta=0.5)
    assert reg.entropies == {}
    assert reg.targets == {}
    model(batch()[0])
    reg.loss()
    for name, x in zip(reg.layers, recorder.features, strict=True):
        s = torch.linalg.svdvals(x - x.mean(0)) ** 2
        expected = torch.special.entr(s / s.sum()).sum().item()
        assert reg.entropies[name] == pytest.approx(expected, abs=1e-5)
        assert reg.targets[name] == pytest.approx(0.5 * math.log(x.shape[1]))


def test_beta_and_alpha_per_layer():
    model = Net()
    recorder = Recorder(*model.blocks)
    reg = SESRegularizer(
        model, layers="blocks.?", beta={"blocks.0": 0.4, "blocks.[12]": 0.6}, alpha={"*.2": 3}
    )
    model(batch()[0])
    f = recorder.features
    expected = recipe(f[:1], beta=0.4) + recipe(f[1:2], beta=0.6) + recipe(f[2:], beta=0.6, alpha=3)
    assert reg.loss().item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_weight_of_zero_measures_without_a_gradient():
    model = Net()
    reg = SESRegularizer(model, lambda_ses=0)
    model(batch()[0])
    assert not reg.loss().requires_grad
    assert len(reg.entropies) == 4
    reg.lambda_ses = 0.1  # a warm-up
    model(batch()[0])
    assert reg.loss().requires_grad


def test_summary():
    model = Net()
    reg = SESRegularizer(model, beta=0.5, alpha={"avgpool": 2})
    header, *rows = reg.summary().splitlines()
    assert header.split() == ["layer", "module", "d", "beta", "target", "alpha", "samples",
                              "shape", "averaged", "rule"]  # fmt: skip
    unknown = ["?"] * 4
    assert rows[0].split() == ["blocks.0", "BasicBlock", "?", "0.5", "?", "1", *unknown]
    model(batch()[0])
    reg.loss()
    last = reg.summary().splitlines()[-1]
    numbers = ["16", "0.5", f"{0.5 * math.log(16):.3f}", "2", "40"]
    assert last.split()[:7] == ["avgpool", "AdaptiveAvgPool2d", *numbers]
    assert last.endswith("(40, 16, 1, 1)  2, 3      features of AdaptiveAvgPool2d; "
                         "the batch of the input")  # fmt: skip


# ---- which layers ----


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("blocks.1", ["blocks.1"]),
        ("blocks.?", ["blocks.0", "blocks.1", "blocks.2"]),
        (BasicBlock, ["blocks.0", "blocks.1", "blocks.2"]),
        (["head", "stem"], ["stem", "head"]),
        ([nn.Linear, "*.skip"], ["blocks.0.skip", "blocks.1.skip", "blocks.2.skip", "head"]),
        (lambda name, module: name.endswith("branch"), [f"blocks.{i}.branch" for i in range(3)]),
        (None, ["blocks.0", "blocks.1", "blocks.2", "avgpool"]),
    ],
)
def test_layers(layers, expected):
    assert list(SESRegularizer(Net(), layers=layers).layers) == expected
    assert list(SESRegularizer(Net(), layers=layers, hook_last_n=2).layers) == expected[-2:]


def test_default_layers_of_transformers():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    assert SESRegularizer(encoder).layers == ("layers.0", "layers.1")
    reg = SESRegularizer(encoder, layers=["attention", "mlp"])
    assert reg.layers == tuple(f"layers.{i}.{n}" for i in (0, 1) for n in ("self_attn", "linear2"))
    encoder(torch.randn(20, 5, 16))  # attention puts out a tuple: (features, weights)
    assert reg.loss() > 0


def test_default_layers_where_attention_is_made_of_attention_and_output():
    """As in the ViT of transformers 4: the inner pair is part of the outer one."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.output = nn.Linear(4, 4), nn.Linear(4, 4)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.output = Attention(), nn.Linear(4, 4)

    model = nn.Sequential(Block(), Block())
    assert SESRegularizer(model).layers == ("0", "1")
    reg = SESRegularizer(model, layers=["attention", "mlp"])
    assert reg.layers == ("0.attention", "0.output", "1.attention", "1.output")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "block.1"}, r"nothing matches 'block.1'; the nearest names are \['blocks.1'"),
        ({"layers": nn.LSTM}, "nothing matches 'LSTM'"),
        ({"layers": []}, "layers= is empty"),
        ({"beta": {"blocks.7": 0.5}}, "beta: nothing matches 'blocks.7'; the nearest.*blocks"),
        ({"beta": 1.0}, "beta must be between 0 and 1, got 1.0"),
        ({"beta": {"avgpool": 0}}, "beta must be between 0 and 1, got 0"),
        ({"lambda_ses": -1}, "lambda_ses must be finite and at least 0, got -1"),
        ({"alpha": -0.5}, "alpha must be finite, at least 0, got -0.5"),
        ({"every_k": 0}, "every_k must be an int of 1 or more, got 0"),
        ({"every_k": None}, "every_k must be an int of 1 or more, got None"),
        ({"hook_last_n": 0}, "hook_last_n must be an int of 1 or more, got 0"),
        ({"hook_last_n": 1.5}, "hook_last_n must be an int of 1 or more, got 1.5"),
        ({"pool": "max"}, "pool must be one of .*'mean'.* got 'max'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SESRegularizer(Net(), **options)


def test_wrong_models():
    with pytest.raises(ValueError, match=r"Sequential has no residual or attention blocks.*'0'"):
        SESRegularizer(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(TypeError, match="use DistributedDataParallel"):
        SESRegularizer(nn.DataParallel(Net()))
    with pytest.raises(TypeError, match="got 3"):
        SESRegularizer(Net(), layers=3)


def test_rank_bound_is_reported_once_by_name():
    model = Net()
    reg = SESRegularizer(model, layers=["blocks.0", "blocks.2"])
    # exp(0.7 log 16) = 6.96 needs 8 samples, exp(0.7 log 8) = 4.29 needs 6
    model(batch(7)[0])
    with pytest.warns(UserWarning, match="blocks.2 cannot reach its target.* 8 samples would do"):
        reg.loss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch(7)[0])
        reg.loss()
        enough = SESRegularizer(model, layers="blocks.2")
        model(batch(8)[0])
        enough.loss()


# ---- what is measured ----


class Tokens(nn.Module):
    """Puts out what it is given, through a parameter."""

    def __init__(self, wrap=lambda x: x):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x * self.weight)


@pytest.mark.parametrize(
    ("pool", "shape", "matrix"),
    [
        ("mean", (30, 6), lambda x: x),
        ("mean", (30, 5, 6), lambda x: x.mean(1)),
        ("mean", (30, 6, 3, 4), lambda x: x.mean((2, 3))),
        ("mean", (30, 6, 3, 4, 2), lambda x: x.mean((2, 3, 4))),
        ("none", (30, 5, 6), lambda x: x.reshape(-1, 6)),
        ("none", (30, 6, 3, 4), lambda x: x.permute(0, 2, 3, 1).reshape(-1, 6)),
        ("tokens", (30, 5, 6), lambda x: x.reshape(-1, 6)),
        ("cls", (30, 5, 6), lambda x: x[:, 0]),
        (lambda x: x[:, 1:3].flatten(0, 1), (30, 5, 6), lambda x: x[:, 1:3].reshape(-1, 6)),
    ],
)
def test_pool(pool, shape, matrix):
    model = nn.Sequential(Tokens())
    reg = SESRegularizer(model, layers="0", pool=pool)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model(x)
    (ours,) = torch.autograd.grad(reg.loss(), x)
    expected = recipe([matrix(x)])
    assert relative(ours, torch.autograd.grad(expected, x)[0]) < 1e-5


@pytest.mark.parametrize(
    ("wrap", "select"),
    [
        (lambda x: (x, None), None),
        (lambda x: (None, x), 1),
        (lambda x: {"other": x[:2], "last_hidden_state": x}, None),
        (lambda x: {"hidden": x, "aux": None}, "hidden"),
        (lambda x: {"a": [None, x]}, lambda output: output["a"][1]),
    ],
)
def test_select(wrap, select):
    model = nn.Sequential(Tokens(wrap))
    reg = SESRegularizer(model, layers="0", select=select)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    model(x)
    assert reg.loss().item() == pytest.approx(recipe([x]).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((30, 6, 3, 4), {"pool": "cls"}, ValueError, r'0: pool="cls" needs.*\(30, 6, 3, 4\)'),
        ((30,), {}, ValueError, r"0: expected 2 or more axes.*\(30,\)"),
        ((30, 5, 6), {"pool": lambda x: x}, ValueError, r"0: pool= returned \(30, 5, 6\)"),
        ((30, 6), {"select": lambda output: None}, TypeError, "0: expected a tensor.*NoneType"),
    ],
)  # fmt: skip
def test_wrong_outputs(shape, options, error, message):
    model = nn.Sequential(Tokens())
    SESRegularizer(model, layers="0", **options)
    with pytest.raises(error, match=message):
        model(torch.randn(shape))


def test_a_layer_that_runs_twice_counts_as_the_mean_of_its_calls():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.other(self.layer(self.layer(x)))

    model = Shared()
    recorded = []
    model.layer.register_forward_hook(lambda m, i, o: recorded.append(o))
    model.other.register_forward_hook(lambda m, i, o: recorded.append(o))
    reg = SESRegularizer(model, layers="*")
    model(torch.randn(30, 6))
    expected = recipe(recorded[:2]) / 2 + recipe(recorded[2:])
    assert reg.loss().item() == pytest.approx(expected.item(), rel=1e-5)
    assert list(reg.entropies) == ["layer", "other"]


def test_two_views_count_as_the_mean():
    """Two forward passes before one loss(): neither is dropped, and it is said once."""
    model = Net()
    reg = SESRegularizer(model)
    recorder = Recorder(*model.blocks, model.avgpool)
    for warned in (True, False):
        model(batch(seed=2)[0])
        first = list(recorder.features)
        model(batch(seed=3)[0])
        expected = (recipe(first) + recipe(recorder.features)) / 2
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            penalty = reg.loss()
        assert [("2 forward passes" in str(w.message)) for w in caught] == [True] * warned
        assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)
        weights = list(model.blocks.parameters())
        ours, reference = (
            torch.cat([g.flatten().double() for g in torch.autograd.grad(
                loss, weights, retain_graph=True)])
            for loss in (penalty, expected)
        )  # fmt: skip
        assert relative(ours, reference) < 1e-5


def test_a_pass_that_was_differentiated_is_left_out():
    """Where loss() is not called in every step: by then such a graph is freed, its weights gone."""
    model = Net()
    reg = SESRegularizer(model)
    recorder = Recorder(*model.blocks, model.avgpool)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(4):
            F.cross_entropy(model(batch(seed=seed)[0]), batch()[1]).backward()
            assert len(reg._features) == 4
            if seed > 1:
                optimizer.step()
    assert ["left out, since a backward pass" in str(w.message) for w in caught] == [True]
    model(batch(seed=9)[0])
    loss = reg.loss()
    assert loss.item() == pytest.approx(recipe(recorder.features).item(), rel=1e-5)
    loss.backward()


def test_a_forward_pass_that_failed_is_left_out():
    class Fails(Net):
        fails = False

        def forward(self, x):
            x = self.blocks(self.stem(x))
            if self.fails:
                raise ZeroDivisionError
            return self.head(self.avgpool(x).flatten(1))

    model = Fails()
    reg = SESRegularizer(model)
    model.fails = True
    with pytest.raises(ZeroDivisionError):
        model(batch(seed=2)[0])
    model.fails = False
    recorder = Recorder(*model.blocks, model.avgpool)
    model(batch(seed=3)[0])
    with pytest.warns(UserWarning, match="not the same layers ran"):
        loss = reg.loss()
    assert loss.item() == pytest.approx(recipe(recorder.features).item(), rel=1e-5)


def test_begin_forgets_what_no_loss_took():
    model = Net()
    reg = SESRegularizer(model)
    model(batch(seed=2)[0])
    reg.begin()
    recorder = Recorder(*model.blocks, model.avgpool)
    model(batch(seed=3)[0])
    assert reg.loss().item() == pytest.approx(recipe(recorder.features).item(), rel=1e-5)


def test_passes_that_measure_nothing_take_nothing_away():
    model = Net()
    reg = SESRegularizer(model)
    recorder = Recorder(*model.blocks, model.avgpool)
    model(batch(seed=2)[0])
    expected = recipe(recorder.features)
    with torch.no_grad():
        model(batch(seed=3)[0])
    model.eval()
    model(batch(seed=3)[0])
    model.train()
    with reg.disabled():
        model(batch(seed=3)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reg.loss().item() == pytest.approx(expected.item(), rel=1e-5)


# ---- when it measures ----


def test_no_loss_before_a_forward_pass():
    model = Net()
    reg = SESRegularizer(model)
    with pytest.raises(RuntimeError, match=r"no features of blocks.0.*once after each forward"):
        reg.loss()
    model(batch()[0])
    reg.loss()
    with pytest.raises(RuntimeError, match="once after each forward"):
        reg.loss()


def test_disabled():
    model = Net()
    reg = SESRegularizer(model, every_k=2)
    with reg.disabled():
        model(batch()[0])
        assert reg._features == []
        assert reg.loss().item() == 0
        assert reg.step == 0
        with reg.disabled():
            pass
        assert reg.loss().item() == 0
    model(batch()[0])
    assert reg.loss() > 0


def test_every_k_skips_whole_steps_and_resumes():
    model = Net()
    reg = SESRegularizer(model, every_k=3)
    measured = []
    for _ in range(7):
        model(batch()[0])
        held = len(reg._features)
        loss = reg.loss()
        assert (loss > 0) == (held == 4) == loss.requires_grad
        measured.append(held == 4)
    assert measured == [True, False, False] * 2 + [True]

    resumed = SESRegularizer(model, every_k=3)
    resumed.load_state_dict(reg.state_dict())
    for expected in (False, False, True):
        model(batch()[0])
        assert (resumed.loss() > 0) == expected


def test_skipped_steps_run_no_operation():
    model = Net()
    reg = SESRegularizer(model, every_k=2)
    model(batch()[0])
    reg.loss()
    with Operations() as with_hooks:
        model(batch()[0])
        reg.loss()
    reg.close()
    with Operations() as without:
        model(batch()[0])
    assert len(with_hooks.names) == len(without.names) + 1  # the zero


class Operations(TorchDispatchMode):
    """Names of all operations, and (name, dtype) of the tensors that they return."""

    def __init__(self):
        super().__init__()
        self.names, self.made = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function.name())
        for o in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(o, torch.Tensor):
                self.made.add((function.name(), o.dtype))
        return out


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_nothing_of_a_feature_map_s_size_is_allocated(half):
    """By the profiler: under a dispatch mode autograd could not add its gradients in place."""

    def large_allocations(regularized):
        model = Net()
        reg = SESRegularizer(model) if regularized else None
        x, y = batch(600)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            with torch.autocast("cpu", half, enabled=half is not None):
                loss = F.cross_entropy(model(x), y)
                if reg:
                    loss = loss + reg.loss()
            loss.backward()
        smallest_map = 600 * 8 * 8 * 8 * (4 if half is None else 2)
        return sorted(
            event.name for event in profile.events() if event.self_cpu_memory_usage >= smallest_map
        )

    assert large_allocations(regularized=True) == large_allocations(regularized=False)


def test_no_value_is_read_on_the_host():
    model = Net()
    reg = SESRegularizer(model)
    for _ in range(2):
        with Operations() as operations:
            model(batch()[0])
            reg.loss().backward()
    reads = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
    assert not [name for name in operations.names if name.split("::")[1].split(".")[0] in reads]


def test_all_layers_go_through_one_call(monkeypatch):
    import ses_kernels.regularizer as module

    calls = []
    inner = module.spectral_entropies
    monkeypatch.setattr(
        module,
        "spectral_entropies",
        lambda xs, **options: calls.append(len(xs)) or inner(xs, **options),
    )
    model = Net()
    reg = SESRegularizer(model)
    model(batch()[0])
    reg.loss()
    assert calls == [4]


# ---- training as people do it ----


def test_gradient_accumulation_is_a_loss_per_micro_batch():
    model = Net()
    reg = SESRegularizer(model)
    recorder = Recorder(*model.blocks, model.avgpool)
    expected = 0
    for seed in (1, 2):
        x, y = batch(seed=seed)
        (F.cross_entropy(model(x), y) / 2 + reg.loss() / 2).backward()
    ours = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    for seed in (1, 2):
        x, y = batch(seed=seed)
        expected = expected + gradients(F.cross_entropy(model(x), y), model) / 2
        model(x)
        padded = torch.autograd.grad(
            recipe(recorder.features), list(model.parameters()), materialize_grads=True
        )
        expected = expected + torch.cat([g.flatten().double() for g in padded]) / 2
    assert relative(ours, expected) < 1e-5


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_grad_scaler_and_autocast(half):
    """Unscaled, the gradient is that of the recipe on the same half-precision activations."""
    model = Net()
    reg = SESRegularizer(model, lambda_ses=1.0)
    recorder = Recorder(*model.blocks, model.avgpool)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def step(penalty):
        optimizer.zero_grad()
        with torch.autocast("cpu", half):
            model(batch()[0])
            loss = penalty()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
        scaler.step(optimizer)
        scaler.update()
        return loss, torch.cat(grads)

    loss, ours = step(reg.loss)
    expected, reference = step(lambda: recipe(recorder.features, lambda_ses=1.0))
    assert recorder.features[0].dtype == torch.float64
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # What is left is the rounding of the feature maps' gradients to half precision.
    assert relative(ours, reference) < (2e-2 if half == torch.bfloat16 else 3e-3)


class Checkpointed(Net):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        x = checkpoint(self.blocks, self.stem(x), use_reentrant=self.reentrant)
        return self.head(self.avgpool(x).flatten(1))


def test_checkpointing_counts_nothing_twice():
    plain, saved = Net(), Checkpointed(reentrant=False)
    results = []
    for model in (plain, saved):
        reg = SESRegularizer(model)
        for _ in range(2):  # what the first backward pass recomputed must not be in the second
            model.zero_grad()
            x, y = batch()
            loss = F.cross_entropy(model(x), y) + reg.loss()
            loss.backward()
            assert reg._features == []
        results.append((loss.item(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results)


def test_reentrant_checkpointing_is_an_error():
    model = Checkpointed(reentrant=True)
    reg = SESRegularizer(model, layers="blocks.?")
    model(batch()[0])
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        reg.loss()


@pytest.mark.parametrize("attach_first", [True, False])
def test_compiled(attach_first):
    torch.compiler.reset()
    model, eager = Net(), Net()
    if attach_first:
        reg = SESRegularizer(model, every_k=2)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        reg = SESRegularizer(compiled, every_k=2)
    eager_reg = SESRegularizer(eager, every_k=2)
    x, y = batch()
    for measured in (True, False, True):
        grads = []
        for net, regularizer in ((compiled, reg), (eager, eager_reg)):
            loss = F.cross_entropy(net(x), y) + regularizer.loss()
            grads.append(gradients(loss, net))
        assert relative(*grads) < 1e-5
        assert reg.state_dict() == eager_reg.state_dict()
        assert measured == reg.measured == (reg.step % 2 == 1)
    assert reg.entropies == pytest.approx(eager_reg.entropies, abs=1e-5)
    model.eval()
    compiled(x)
    assert reg._features == []
    model.train()
    reg.close()
    compiled(x)
    assert reg._features == []


def test_compiled_by_inductor():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
    reg = SESRegularizer(model, layers=nn.Linear, lambda_ses=1.0)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        task = forward(torch.ones(20, 1) * torch.arange(6.0) + torch.eye(20, 6)).square().mean()
        results.append(gradients(task + reg.loss(), model))
    assert relative(*results) < 1e-5


def test_compiled_step_breaks_the_graph_at_loss_alone():
    torch.compiler.reset()
    model, eager = Net(), Net()
    reg, eager_reg = SESRegularizer(model), SESRegularizer(eager)
    x, y = batch()

    @torch.compile(backend="aot_eager")
    def step():
        return F.cross_entropy(model(x), y) + reg.loss()

    expected = F.cross_entropy(eager(x), y) + eager_reg.loss()
    for _ in range(3):
        assert step().item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(gradients(step(), model), gradients(expected, eager)) < 1e-5


def test_compiled_and_run_before_it_was_hooked_says_so():
    torch.compiler.reset()
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batch()[0])
    reg = SESRegularizer(compiled)
    compiled(batch()[0])
    with pytest.raises(RuntimeError, match=r"torch.compiler.reset"):
        reg.loss()
    torch.compiler.reset()
    compiled(batch()[0])
    assert reg.loss() > 0


def test_compiled_blocks_keep_their_names():
    model = Net()
    model.blocks[1] = torch.compile(model.blocks[1], backend="aot_eager")
    assert SESRegularizer(model).layers == ("blocks.0", "blocks.1", "blocks.2", "avgpool")


def test_copies_of_the_model_have_no_hooks():
    model = Net()
    reg = SESRegularizer(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(batch(seed=5)[0])
        assert reg._features == []
    average = torch.optim.swa_utils.AveragedModel(model)
    average(batch(seed=5)[0])
    assert reg._features == []
    model(batch()[0])
    assert reg.loss() > 0


def test_a_thousand_steps_leak_nothing():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
    reg = SESRegularizer(model, layers=nn.Linear, every_k=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x = torch.randn(16, 6)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            (model(x).square().mean() + reg.loss()).backward()
            optimizer.step()
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        with open("/proc/self/statm") as statm:
            return tensors, int(statm.read().split()[1]) * 4096

    steps(200)
    tensors, resident = steps(100)
    tensors_after, resident_after = steps(1000)
    assert tensors_after <= tensors  # less, where what other tests left is freed meanwhile
    assert resident_after - resident < 4 << 20


# ---- the ten bugs of the first implementation, by name ----


def test_bug_hooks_active_in_evaluation():
    model = Net()
    reg = SESRegularizer(model)
    model.eval()
    model(batch()[0])  # with gradients enabled, which eval() does not change
    assert reg._features == []
    assert reg.loss().item() == 0
    model.train()
    with torch.no_grad():
        model(batch()[0])
        assert reg._features == []
        assert reg.loss().item() == 0
    assert reg.step == 0


def test_bug_models_not_freed_between_runs():
    for finish in (SESRegularizer.close, lambda reg: None):
        model = Net()
        reg = SESRegularizer(model)
        (F.cross_entropy(model(batch()[0]), batch()[1]) + reg.loss()).backward()
        finish(reg)
        alive = weakref.ref(model)
        gc.disable()  # a reference cycle would need the collector
        try:
            del model
            assert alive() is None
        finally:
            gc.enable()


def test_bug_models_not_freed_closed_leaves_no_hook():
    model = Net()
    with SESRegularizer(model) as reg:
        assert sum(len(m._forward_hooks) for m in model.modules()) == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(batch()[0])
    assert reg.loss().item() == 0
    reg.close()  # twice is harmless


def test_bug_pooling_outside_the_hook():
    """What a forward pass leaves for the loss is (N, C), not the (N, C, H, W) map."""
    model = Net()
    reg = SESRegularizer(model)
    model(batch()[0])
    assert [tuple(x.shape) for _, x in reg._features] == [(40, 8), (40, 12), (40, 16), (40, 16)]
    assert all(x.untyped_storage().nbytes() == x.nbytes for _, x in reg._features)


@pytest.mark.parametrize(("half", "mean"), [(torch.bfloat16, 30), (torch.float16, 300)])
def test_bug_half_precision_entropies(half, mean):
    """A model wholly in half precision: means, spectra and penalty are float32 all the same."""
    model = nn.Sequential(Tokens()).to(half)
    reg = SESRegularizer(model, layers="0")
    x = (torch.randn(64, 8, 9, 9, generator=torch.Generator().manual_seed(0)) + mean).to(half)
    model(x)
    expected = recipe([x.double().mean((2, 3))]).item()
    loss = reg.loss()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    in_half = recipe([x.mean((2, 3))]).item()
    assert abs(in_half / expected - 1) > 1e-2  # what a mean in half precision would give


def test_bug_spectral_norm_of_the_wrong_module():
    """Spectral norm beside SES: neither hooks nor globs reach into the parametrization."""
    model = Net()
    parametrize = nn.utils.parametrizations.spectral_norm
    parametrize(model.blocks[1].skip)
    reg = SESRegularizer(model, layers="blocks.1*")
    assert reg.layers == ("blocks.1", "blocks.1.branch", "blocks.1.branch.0", "blocks.1.branch.1",
                          "blocks.1.skip")  # fmt: skip
    for _ in range(20):
        model(batch()[0])
        assert reg.loss() > 0
    weight = model.blocks[1].skip.weight.detach().flatten(1)
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=1e-2)


def test_bug_wrong_names_of_device_memory():
    """CUDA device properties are read nowhere but where a test with a device covers it."""
    import pathlib
    import re

    root = pathlib.Path(__file__).parents[1]
    documented = {"name", "major", "minor", "total_memory", "multi_processor_count",
                  "L2_cache_size", "max_threads_per_multi_processor"}  # fmt: skip
    for path in [*root.glob("ses_kernels/**/*.py"), *root.glob("bench/*.py")]:
        text = path.read_text()
        for variable in re.findall(r"(\w+) = torch\.cuda\.get_device_properties\(", text):
            read = set(re.findall(rf"\b{variable}\.(\w+)", text))
            assert read <= documented, path
        assert set(re.findall(r"get_device_properties\([^)]*\)\.(\w+)", text)) <= documented, path


def test_bug_late_bound_closures_in_builders():
    """Each hook knows its own layer: widths differ, so a mix-up would show in d."""
    model = Net()
    reg = SESRegularizer(model, layers=["blocks.?", "stem"])
    model(batch()[0])
    reg.loss()
    widths = [int(row.split()[2]) for row in reg.summary().splitlines()[1:]]
    assert widths == [8, 8, 12, 16]
    assert list(reg.targets) == ["stem", "blocks.0", "blocks.1", "blocks.2"]


def test_bug_hard_coded_device():
    """Layers on two devices: one call each, and the penalty is where the last layer is."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 10, device="meta")

        def forward(self, x):
            return self.second(self.first(x).to("meta"))

    model = Split()
    reg = SESRegularizer(model, layers="*")
    model(torch.randn(20, 6))
    loss = reg.loss()
    assert loss.device.type == "meta"
    assert [h.device.type for _, h in reg._measured] == ["cpu", "meta"]
    assert [names for names, _ in reg._measured] == [["first"], ["second"]]


def test_bug_thread_parallel_runs():
    """Runs in threads share nothing: bit for bit what they are one after the other."""

    def train(model, seed):
        reg = SESRegularizer(model, every_k=1 + seed % 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for step in range(5):
            x, y = batch(seed=10 * seed + step)
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + reg.loss()).backward()
            optimizer.step()

    alone, together = ([Net(seed) for seed in range(4)] for _ in range(2))
    for seed, model in enumerate(alone):
        train(model, seed)
    threads = [threading.Thread(target=train, args=(m, seed)) for seed, m in enumerate(together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_bug_bfloat16_on_devices_that_lack_it():
    """The device needs no bfloat16 arithmetic for us: features are widened as they are read."""
    model = nn.Sequential(Tokens()).bfloat16()
    reg = SESRegularizer(model, layers="0", lambda_ses=1.0)
    for shape in ((40, 6), (40, 6, 4, 4)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        model(x)
        with Operations() as operations:
            loss = reg.loss()
        narrow = {name for name, dtype in operations.made if dtype == torch.bfloat16}
        assert narrow <= {"aten::slice.Tensor", "aten::view"}
        pooled = x.double().flatten(2).mean(2) if len(shape) > 2 else x
        assert loss.item() == pytest.approx(recipe([pooled], lambda_ses=1.0).item(), rel=1e-4)
