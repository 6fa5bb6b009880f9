"""Blocks by structure: every block of every stage once, on models of transformers and on toys."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from ses_kernels import SESRegularizer, blocks

N = 3


def find(model):
    return blocks.find(dict(model.named_modules()))


# ---- models of transformers ----

IMAGES = {"pixel_values": (N, 3, 32, 32)}
TOKENS = {"input_ids": (N, 7)}
BOTH = {"input_ids": (N, 7), "decoder_input_ids": (N, 5)}
LAYERS = {"encoder_layers": 2, "decoder_layers": 3, "d_model": 16, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
         "intermediate_size": 32}  # fmt: skip
STAGES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1]}

# model -> its configuration, inputs, the pattern and number of its layers, their widths
MODELS = {
    "T5Model": (
        {"num_layers": 2, "num_decoder_layers": 3, "d_model": 16, "num_heads": 2, "d_ff": 32,
         "d_kv": 8, "vocab_size": 50}, BOTH, {"(en|de)coder.block.": 5}, {16}),
    "BartModel": ({**LAYERS, "vocab_size": 50}, BOTH, {"(en|de)coder.layers.": 5}, {16}),
    "OPTModel": (
        {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 32,
         "word_embed_proj_dim": 16, "vocab_size": 50}, TOKENS, {"decoder.layers.": 2}, {16}),
    "WhisperModel": (
        {**LAYERS, "max_source_positions": 20, "vocab_size": 50, "pad_token_id": 0},
        {"input_features": (N, 80, 40), "decoder_input_ids": (N, 5)},
        {"(en|de)coder.layers.": 5}, {16}),
    "ConvNextModel": (STAGES, IMAGES, {"encoder.stages...layers.": 5}, {8, 12, 16, 20}),
    "ConvNextV2Model": (STAGES, IMAGES, {"encoder.stages...layers.": 5}, {8, 12, 16, 20}),
    "RegNetModel": (
        {**STAGES, "groups_width": 4, "embedding_size": 8}, IMAGES,
        {"encoder.stages...layers.": 5, "pooler": 1}, {8, 12, 16, 20}),
    "MobileNetV1Model": ({"depth_multiplier": 0.25}, IMAGES, {"layer.": 26, "pooler": 1}, None),
    "PoolFormerModel": (STAGES, IMAGES, {r"encoder.block..\.": 5}, {8, 12, 16, 20}),
    "ViTModel": ({**SMALL, "image_size": 32, "patch_size": 8}, IMAGES, {"layers.": 2}, {16}),
    "BertModel": ({**SMALL, "vocab_size": 50}, TOKENS, {"encoder.layer.": 2}, {16}),
    "AlbertModel": (
        {**SMALL, "vocab_size": 50, "embedding_size": 8}, TOKENS, {"albert_layers.": 1}, {16}),
    "GPT2Model": (
        {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50}, TOKENS, {"h.": 2}, {16}),
    "LlamaModel": ({**SMALL, "vocab_size": 50, "num_key_value_heads": 1}, TOKENS, {"layers.": 2},
                   {16}),
    "ResNetModel": (
        {**STAGES, "layer_type": "basic", "embedding_size": 8}, IMAGES,
        {"encoder.stages...layers.": 5, "pooler": 1}, {8, 12, 16, 20}),
    "SwinModel": (
        {"image_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2},
        IMAGES, {"encoder.layers...blocks.": 4}, {8, 16}),
    "MobileNetV2Model": ({"depth_multiplier": 0.25}, IMAGES, {"layer.": 16, "pooler": 1}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name):
    """Every block runs, with the samples of the batch and the features of the configuration."""
    transformers = pytest.importorskip("transformers")
    options, inputs, patterns, widths = MODELS[name]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**options)).train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reg = SESRegularizer(model, lambda_ses=0)
        model(**{
            key: torch.randint(1, 50, shape) if key.endswith("ids") else torch.randn(shape)
            for key, shape in inputs.items()
        })  # fmt: skip
        reg.loss()
    said = [str(w.message) for w in caught if "SESRegularizer" in str(w.message)]
    assert all("cannot reach its target" in text for text in said), said
    for pattern, count in patterns.items():
        matching = [layer for layer in reg.layers if re.search(pattern, layer)]
        assert len(matching) == count, (pattern, reg.layers)
    assert len(reg.layers) == sum(patterns.values()), reg.layers
    assert {row.samples for row in reg.rows()} == {N}
    if widths is not None:
        assert {row.d for row in reg.rows()} == widths


# ---- toys with the structure of models of torchvision, timm and others ----


def conv(inputs, outputs, groups=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class ConvNormAct(nn.Module):
    def __init__(self, inputs, outputs, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, groups=groups)
        self.bn = nn.BatchNorm2d(outputs)


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)


class MBConv(nn.Module):
    """EfficientNet's: a gate among layers of one convolution is no block in a stage."""

    def __init__(self, width):
        super().__init__()
        self.block = nn.Sequential(
            ConvNormAct(width, width), ConvNormAct(width, width, width), Gate(width),
            ConvNormAct(width, width),
        )  # fmt: skip


class Fused(nn.Module):
    """EfficientNetV2's: the first of them have one convolution."""

    def __init__(self, width, expand):
        super().__init__()
        layers = [ConvNormAct(width, width) for _ in range(1 + expand)]
        self.block = nn.Sequential(*layers)


class Mlp(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)


class Attn(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


class Encoder(nn.Module):
    """A transformer's layer, of a class whose name says nothing."""

    def __init__(self, cross=False):
        super().__init__()
        self.attn, self.fc1, self.fc2 = Attn(), nn.Linear(8, 8), nn.Linear(8, 8)
        if cross:
            self.cross_attn = Attn()


class Mixture(nn.Module):
    """With experts, a list of equal parts that is no sequence of blocks."""

    def __init__(self):
        super().__init__()
        self.attn, self.gate = Attn(), nn.Linear(8, 4)
        self.experts = nn.ModuleList(Mlp() for _ in range(4))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(8, 2, bias=False) for _ in range(3))


class ManyHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.sa = nn.Module()
        self.sa.heads = nn.ModuleList(Head() for _ in range(4))
        self.sa.proj = nn.Linear(8, 8)
        self.ffwd = Mlp()


class Pair(nn.Module):
    """T5's: the parts of a block in a list of its own."""

    def __init__(self, cross=False):
        super().__init__()
        parts = [type("SelfAttention", (Attn,), {})(), type("Feed", (Mlp,), {})()]
        if cross:
            parts.insert(1, type("Cross", (Attn,), {})())
        self.layer = nn.ModuleList(parts)


class Stage(nn.Module):
    def __init__(self, make, depth, downsample=True):
        super().__init__()
        self.downsample = conv(8, 8) if downsample else nn.Identity()
        self.blocks = nn.Sequential(*(make() for _ in range(depth)))


class Backbone(nn.Module):
    """Something that others wrap, with a stem of several convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), conv(8, 8))
        self.layers = nn.ModuleList(Encoder() for _ in range(6))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch1, self.branch2 = ConvNormAct(8, 8), conv(8, 8)


class GoogLeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = conv(3, 8)
        self.inception3a, self.inception3b, self.inception4a = (Inception() for _ in range(3))
        self.aux1, self.aux2 = Inception(), Inception()
        self.fc = nn.Linear(8, 5)


class Vgg(nn.Module):
    def __init__(self):
        super().__init__()
        layers = []
        for _ in range(3):
            layers += [nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))


class DenseBlock(nn.ModuleDict):
    def __init__(self):
        super().__init__(
            {f"denselayer{i}": nn.Sequential(conv(8, 8), conv(8, 8)) for i in range(4)}
        )


def seq(*modules):
    return nn.Sequential(*modules)


TOYS = {
    "EfficientNet": (
        lambda: seq(conv(3, 8), seq(MBConv(8)), seq(MBConv(8), MBConv(8)), conv(8, 8)),
        ["1.0", "2.0", "2.1"]),
    "EfficientNetV2": (
        lambda: seq(seq(Fused(8, 0), Fused(8, 0)), seq(Fused(8, 1), Fused(8, 1))),
        ["0.0", "0.1", "1.0", "1.1"]),
    "Mixer": (lambda: seq(nn.Conv2d(3, 8, 4), seq(*(Mixer() for _ in range(3)))),
              ["1.0", "1.1", "1.2"]),
    "stages": (lambda: seq(Stage(Encoder, 2, False), Stage(Encoder, 3)),
               [f"{i}.blocks.{j}" for i, n in ((0, 2), (1, 3)) for j in range(n)]),
    "stages of one block": (lambda: seq(Stage(Encoder, 1), Stage(Encoder, 1)),
                            ["0.blocks.0", "1.blocks.0"]),
    "stages of two kinds": (
        lambda: seq(Stage(lambda: MBConv(8), 2), Stage(Encoder, 1)),
        ["0.blocks.0", "0.blocks.1", "1.blocks.0"]),
    "decoder": (lambda: seq(*(Encoder(cross=True) for _ in range(3))), ["0", "1", "2"]),
    "one layer": (lambda: nn.ModuleList([Encoder()]), ["0"]),
    "experts": (lambda: nn.ModuleList(Mixture() for _ in range(3)), ["0", "1", "2"]),
    "lists of heads": (lambda: nn.ModuleList(ManyHeads() for _ in range(3)), ["0", "1", "2"]),
    "parts in a list": (lambda: nn.ModuleList(Pair(i > 0) for i in range(3)), ["0", "1", "2"]),
    "lists in a list": (lambda: nn.ModuleList([nn.ModuleList([Encoder(), Encoder()]),
                                               nn.ModuleList([Encoder()])]),
                        ["0.0", "0.1", "1.0"]),
    "a wrapped backbone": (lambda: seq(Backbone(), nn.Linear(8, 5)),
                           [f"0.layers.{i}" for i in range(6)]),
    "GoogLeNet": (GoogLeNet, ["inception3a", "inception3b", "inception4a"]),
    "VGG": (Vgg, ["features.2", "features.5", "features.8"]),
    "DenseNet": (lambda: seq(conv(3, 8), DenseBlock(), conv(8, 8), DenseBlock()), ["1", "3"]),
    "one convolution each": (lambda: seq(*(conv(8, 8) for _ in range(4))), ["0", "1", "2", "3"]),
    "one map each": (lambda: nn.ModuleList(ConvNormAct(8, 8) for _ in range(3)), ["0", "1", "2"]),
    "a head of several layers": (
        lambda: seq(Stage(Encoder, 3), nn.Sequential(nn.LayerNorm(8), Mlp())),
        [f"0.blocks.{i}" for i in range(3)]),
    "one layer and a head": (lambda: seq(nn.Linear(8, 8), Encoder(), nn.Linear(8, 5)), ["1"]),
    "transformer": (lambda: nn.Transformer(8, 2, 2, 3, 8),
                    ["encoder.layers.0", "encoder.layers.1",
                     *(f"decoder.layers.{i}" for i in range(3))]),
    "none": (lambda: seq(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), []),
}  # fmt: skip


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp_tokens, self.mlp_channels = Mlp(4), Mlp()


@pytest.mark.parametrize("toy", TOYS)
def test_toys(toy):
    make, expected = TOYS[toy]
    assert find(make()) == expected


def test_lazy_layers_have_blocks_too():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.LazyConv2d(8, 3), nn.LazyLinear(8)

    assert find(nn.Sequential(Lazy(), Lazy())) == ["0", "1"]


def test_a_model_without_blocks_is_told_what_to_pass():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    for layers in (None, "blocks", "attention"):
        with pytest.raises(
            ValueError, match=r"Sequential has no .*pass layers=.*\['0', '1', '2'\]"
        ):
            SESRegularizer(model, layers=layers)


def test_scores_that_a_classifier_pools_are_no_features():
    """SqueezeNet ends in a convolution and a pool."""

    class Fire(nn.Module):
        def __init__(self):
            super().__init__()
            self.squeeze, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    model = nn.Sequential(Fire(), Fire(), nn.Conv2d(8, 5, 1))
    model.add_module("classifier", nn.Sequential(nn.AdaptiveAvgPool2d(1)))
    assert SESRegularizer(model).layers == ("0", "1")
