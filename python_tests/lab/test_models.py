"""Models against published sizes, other implementations, and what the rest of the lab asks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ses_kernels import SESRegularizer
from ses_kernels.reference import spectral_entropy
from ses_lab import networks
from ses_lab.models import MODELS, build, outputs

# Small variants, each with the same parts as the published model
SMALL = {
    "resnet18": {"width": 8},
    "resnet50": {"width": 4},
    "wrn28_10": {"depth": 10, "widen": 1},
    "resnet20": {},
    "resnet56": {"width": 4},
    "resnet112": {"width": 4},
    "vit_tiny": {"embed_dim": 32, "depth": 2, "patch": 4},
    "vit_small": {"embed_dim": 32, "depth": 2, "patch": 4},
    "mlp": {},
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def on_meta(name, **given):
    with torch.device("meta"):
        return build(name, **{"channels": 3, "size": 32, "classes": 10, **given})


@pytest.mark.parametrize(
    ("name", "millions", "digits"),
    [
        ("resnet20", 0.27, 2),  # He et al., table 6
        ("resnet56", 0.85, 2),
        ("resnet112", 1.7, 1),  # their ResNet-110
        ("resnet18", 11.17, 2),  # with CIFAR's stem, as in the usual training scripts
        ("resnet50", 23.52, 2),
        ("wrn28_10", 36.5, 1),  # Zagoruyko & Komodakis, table 4
    ],
)
def test_published_sizes(name, millions, digits):
    assert round(parameters(on_meta(name)) / 1e6, digits) == millions


def test_size_of_deit_tiny():
    model = on_meta("vit_tiny", size=224, classes=1000, patch=16)
    assert round(parameters(model) / 1e6, 1) == 5.7  # Touvron et al., table 1


@pytest.mark.parametrize(
    ("name", "hooks"),
    [
        ("resnet18", 9), ("resnet50", 17), ("wrn28_10", 13), ("resnet20", 10), ("resnet56", 28),
        ("resnet112", 55), ("vit_tiny", 12), ("mlp", 3),
    ],
)  # fmt: skip
def test_layers_of_the_regularizer(name, hooks):
    model = on_meta(name)
    assert (model.ses_layers is None) == (name != "mlp")
    assert len(SESRegularizer(model, layers=model.ses_layers).layers) == hooks


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet18", [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]),
        ("resnet50", [(256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)]),
        ("wrn28_10", [(160, 32, 32), (320, 16, 16), (640, 8, 8)]),
        ("resnet20", [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        ("vit_tiny", [(65, 192)] * 12),
        ("mlp", [(64,)] * 3),
    ],
)
def test_stages(name, shapes):
    out = outputs(on_meta(name), torch.empty(2, 3, 32, 32, device="meta"))
    assert [tuple(stage.shape[1:]) for stage in out.stages] == shapes
    assert out.logits.shape == (2, 10)


@pytest.mark.filterwarnings("ignore:SESRegularizer")  # of too few samples
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_on_every_kind_of_image(name, channels, size):
    model = build(name, channels=channels, size=size, classes=5, **SMALL[name])
    out = outputs(model, torch.rand(3, channels, size, size))
    assert out.logits.shape == (3, 5)
    assert isinstance(model.get_submodule(model.classifier), nn.Linear)
    reg = SESRegularizer(model, layers=model.ses_layers, lambda_ses=0)
    model(torch.rand(3, channels, size, size))
    reg.loss()
    assert len(reg.entropies) == len(reg.layers)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_used(name):
    model = build(name, channels=1, size=8, classes=5, **SMALL[name])
    for p in model.parameters():  # the last normalisation and biases, which start at 0
        p.data += 0.01 * torch.randn_like(p)
    model(torch.rand(8, 1, 8, 8)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if not (p.grad != 0).any()] == []


@pytest.mark.parametrize("name", MODELS)
def test_stages_are_of_this_pass_and_leave_no_hooks(name):
    model = build(name, channels=1, size=8, classes=5, **SMALL[name]).eval()
    first, x = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    outputs(model, first)
    out = outputs(model, x)
    last = out.stages[-1]
    if last.dim() == 4:  # the head on the last stage gives the logits
        last = last if name != "wrn28_10" else model.bn(last).relu()
        last = last.mean((2, 3))
    elif last.dim() == 3:
        last = model.norm(last)[:, 0]
    torch.testing.assert_close(model.get_submodule(model.classifier)(last), out.logits)
    torch.testing.assert_close(model(x), out.logits)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_stage_that_does_not_run_is_an_error():
    model = build("mlp", channels=2, size=None, classes=2)
    model.stages = (*model.stages, "normalize.unused")
    model.normalize.unused = nn.Identity()
    with pytest.raises(RuntimeError, match=r"normalize\.unused.*did not run"):
        outputs(model, torch.rand(4, 2))
    assert not any(m._forward_hooks for m in model.modules())


# ---- inputs -------------------------------------------------------------------------------------


def test_normalisation_is_inside():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    torch.manual_seed(1)
    inside = build("resnet20", channels=3, size=8, classes=5, mean=mean, std=std, width=4)
    torch.manual_seed(1)
    outside = build("resnet20", channels=3, size=8, classes=5, width=4)
    x = torch.rand(4, 3, 8, 8)
    scaled = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(inside(x), outside(scaled))
    assert not torch.equal(inside(x), outside(x))
    other = build("resnet20", channels=3, size=8, classes=5, width=4)
    other.load_state_dict(inside.state_dict())  # a checkpoint carries the statistics
    torch.testing.assert_close(other(x), inside(x))


def test_points():
    model = build("mlp", channels=2, size=None, classes=3, mean=0.5, std=(1.0, 2.0), depth=2)
    x = torch.randn(5, 2)
    h = (x - 0.5) / torch.tensor([1.0, 2.0])
    for i in range(2):
        h = model.hidden[i][0](h).clamp_min(0)
    torch.testing.assert_close(model(x), model.head(h))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "divide uint8 images by 255"),
        (torch.zeros(2, 1, 8, 8), ValueError, r"\(N, 3, 8, 8\), got \(2, 1, 8, 8\)"),
        (torch.zeros(2, 3, 9, 9), ValueError, r"\(N, 3, 8, 8\), got \(2, 3, 9, 9\)"),
    ],
)
def test_other_inputs_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        build("resnet20", channels=3, size=8, classes=5, width=4)(x)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("resnet19", {}, "unknown model 'resnet19', nearest 'resnet18'"),
        ("resnet18", {"mean": (0.5, 0.5)}, "mean has 2 values for 3 channels"),
        ("vit_tiny", {"patch": 5}, "patches of 5 must tile images of size 8"),
        ("vit_tiny", {"heads": 5}, "5 heads divide embed_dim 192"),
        ("wrn28_10", {"depth": 27}, r"6 n \+ 4"),
    ],
)
def test_options_that_do_not_fit(name, params, message):
    with pytest.raises(ValueError, match=message):
        build(name, channels=3, size=8, classes=5, **params)
    with pytest.raises(TypeError, match="colour"):
        build("resnet20", channels=3, size=8, classes=5, colour=True)


# ---- against other implementations --------------------------------------------------------------


def test_padding_shortcut():
    x = torch.randn(2, 3, 7, 6)
    y = networks.Padding(3, 8, 2)(x)
    assert y.shape == (2, 8, 4, 3)
    for c, i, j in itertools.product(range(8), range(4), range(3)):
        expected = x[:, c, 2 * i, 2 * j] if c < 3 else torch.zeros(2)
        assert torch.equal(y[:, c, i, j], expected)


def pairs_of(block):
    """Convolutions and norms of a block of ours, then of its shortcut."""
    order = ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample.0", "downsample.1"]
    found = dict(block.named_modules())
    return [found[name] for name in order if name in found]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_residual_blocks_equal_those_of_transformers(kind, stride):
    resnet = pytest.importorskip("transformers.models.resnet.modeling_resnet")
    inputs, outs = 8, 16
    if kind == "basic":
        ours = networks.BasicBlock(inputs, outs, stride, networks.Projection)
        theirs = resnet.ResNetBasicLayer(inputs, outs, stride)
    else:
        ours = networks.Bottleneck(inputs, outs // 4, stride, networks.Projection)
        theirs = resnet.ResNetBottleNeckLayer(inputs, outs, stride)
    leaves = (nn.Conv2d, nn.BatchNorm2d)
    shortcut = [m for m in theirs.shortcut.modules() if isinstance(m, leaves)]
    main = [m for m in theirs.layer.modules() if isinstance(m, leaves)]
    for mine, its in zip(pairs_of(ours), main + shortcut, strict=True):
        its.load_state_dict(mine.state_dict())
    x = torch.randn(4, inputs, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_wide_block_is_normalised_first():
    block = networks.WideBasicBlock(4, 8, 2).train()
    x = torch.randn(6, 4, 8, 8)

    def norm_relu(v):  # gain 1 and bias 0 at the start
        variance, mean = torch.var_mean(v, (0, 2, 3), correction=0, keepdim=True)
        return ((v - mean) / (variance + 1e-5).sqrt()).relu()

    h = norm_relu(x)
    out = nn.functional.conv2d(h, block.conv1.weight, stride=2, padding=1)
    out = nn.functional.conv2d(norm_relu(out), block.conv2.weight, padding=1)
    expected = out + nn.functional.conv2d(h, block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_vit_equals_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    ours = build("vit_tiny", channels=3, size=16, classes=5, embed_dim=32, depth=2, heads=4).eval()
    for p in ours.parameters():  # so that no bias is 0, no gain 1
        p.data += 0.1 * torch.randn_like(p)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        image_size=16, patch_size=4, num_labels=5, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    names = dict(theirs.named_parameters())
    state = {}
    for name, p in ours.named_parameters():
        if "qkv" in name:
            for part, letter in zip(p.chunk(3), "qkv", strict=True):
                state[translate(name.replace("qkv", f"{letter}_proj"))] = part
        else:
            state[translate(name)] = p
    assert set(state) == set(names)
    with torch.no_grad():
        for name, p in names.items():
            p.copy_(state[name])
        x = torch.rand(3, 3, 16, 16)
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-5)


def translate(name):
    """From our names to those of transformers."""
    for ours, theirs in {
        "patch_embed": "vit.embeddings.patch_embeddings.projection",
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "blocks.": "vit.layers.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "attn.": "attention.",
        "head.": "classifier.",
    }.items():
        name = name.replace(ours, theirs)
    return f"vit.layernorm.{name[5:]}" if name.startswith("norm.") else name


# ---- imported -----------------------------------------------------------------------------------


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), "attention"


class Logits(nn.Module):
    """A model of someone else's, whose outputs are tuples."""

    def __init__(self, num_classes, width=6):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), Pair(48, width))
        self.last = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.last(self.body(x)[0]), "other"


def test_dropout_is_that_of_the_paper(monkeypatch):
    """Of the embeddings and behind each dense layer but Q, K and V; nothing in eval mode."""
    rates = []
    real = F.dropout
    monkeypatch.setattr(
        F, "dropout", lambda x, p, training: rates.append((p, training)) or real(x, p, training)
    )
    torch.manual_seed(0)
    model = build("vit_tiny", channels=1, size=8, classes=3, embed_dim=16, depth=2, dropout=0.3)
    x = torch.rand(4, 1, 8, 8)
    assert not torch.equal(model(x), model(x))
    assert rates == 14 * [(0.3, True)]  # two passes of 1 + 2 * 3
    assert torch.equal(model.eval()(x), model(x))


def test_drop_path_leaves_out_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    model = build("vit_tiny", channels=1, size=8, classes=3, embed_dim=16, depth=3, drop_path=0.4)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.2, 0.4])
    x = torch.randn(1, 5, 16).expand(4000, -1, -1)
    block = model.blocks[2]
    with torch.no_grad():
        whole = block.attn(block.norm1(x[:1]))
        kept = block._kept(whole.expand(4000, -1, -1))
        share = (kept != 0).flatten(1).any(1).double().mean()
        assert share.item() == pytest.approx(0.6, abs=4 * (0.24 / 4000) ** 0.5)
        torch.testing.assert_close(kept.mean(0), whole[0] * share / 0.6, rtol=1e-4, atol=1e-6)
        block.eval()
        assert torch.equal(block._kept(whole), whole)
    with pytest.raises(ValueError, match=r"drop_path and dropout are in \[0, 1\), got 1"):
        build("vit_tiny", channels=1, size=8, classes=3, drop_path=1.0)


def test_attention_weights_on_request():
    options = {"channels": 1, "size": 8, "classes": 3, "embed_dim": 16, "depth": 2, "heads": 2}
    torch.manual_seed(0)
    fused = build("vit_tiny", **options).eval()
    explicit = build("vit_tiny", attention_weights=True, **options).eval()
    explicit.load_state_dict(fused.state_dict())
    seen = []
    explicit.blocks[1].attn.softmax.register_forward_hook(lambda m, i, out: seen.append(out))
    x = torch.rand(32, 1, 8, 8)
    torch.testing.assert_close(explicit(x), fused(x))
    (weights,) = seen
    assert weights.shape == (32, 2, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(32, 2, 5))
    # and what SES takes for them are these
    regularizer = SESRegularizer(explicit.train(), layers="attention_weights", hook_last_n=1)
    explicit(x)
    regularizer.loss()
    expected = spectral_entropy(weights.mean(2).flatten(1)).item()
    assert regularizer.entropies == {"blocks.1.attn:weights": pytest.approx(expected, abs=1e-4)}
    SESRegularizer(fused.train(), layers="attention_weights")
    with pytest.raises(ValueError, match=r"blocks.0.attn:weights: Attention puts out no"):
        fused(x)


def test_importable_model():
    shape = {"channels": 3, "size": 4, "classes": 5, "mean": 0.5}
    model = build(f"{__name__}:Logits", **shape, width=7, stages=["body"])
    assert (model.stages, model.classifier) == (("model.body",), "model.last")
    x = torch.rand(2, 3, 4, 4)
    out = outputs(model, x)
    torch.testing.assert_close(out.logits, model.model(x - 0.5)[0])
    assert [s.shape for s in out.stages] == [(2, 7)]
    with pytest.raises(ValueError, match="layers="):  # no known blocks: stages have to be named
        build(f"{__name__}:Logits", **shape)


def test_models_of_transformers():
    pytest.importorskip("transformers")
    model = build(
        "transformers:ResNetForImageClassification", channels=1, size=16, classes=4,
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic",
    )  # fmt: skip
    out = outputs(model, torch.rand(2, 1, 16, 16))
    assert out.logits.shape == (2, 4)
    assert [s.shape[1] for s in out.stages] == [8, 12, 12]
    assert model.get_submodule(model.classifier).out_features == 4
