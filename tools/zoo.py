"""What SESRegularizer(model) measures on models of torchvision, timm and transformers.

    make zoo    # an environment of its own; writes docs/zoo.md

One forward pass of each model with random weights. A row is checked: every block runs, its samples
are those of the batch, its features as many as the library says that stage has. Exits with 1 where
a row fails.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
import torchvision
import transformers as hf
from torch import nn

import ses_kernels

SAMPLES = 3
SMALL = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4,
         "intermediate_size": 96}  # fmt: skip
TOKENS = {"input_ids": lambda: torch.randint(5, 90, (SAMPLES, 11))}
BOTH = {**TOKENS, "decoder_input_ids": lambda: torch.randint(5, 90, (SAMPLES, 7))}


def images(size: int) -> dict[str, Callable]:
    return {"pixel_values": lambda: torch.randn(SAMPLES, 3, size, size)}


# model class -> (configuration, inputs, the widths of its blocks as the configuration says)
TRANSFORMERS = {
    "BertModel": (SMALL, TOKENS, lambda c: [c.hidden_size]),
    "RobertaModel": (SMALL, TOKENS, lambda c: [c.hidden_size]),
    "DistilBertModel": (
        {"n_layers": 2, "dim": 48, "n_heads": 4, "hidden_dim": 96}, TOKENS, lambda c: [c.dim]),
    "AlbertModel": ({**SMALL, "embedding_size": 16}, TOKENS, lambda c: [c.hidden_size]),
    "ElectraModel": (SMALL, TOKENS, lambda c: [c.hidden_size]),
    "DebertaV2Model": (SMALL, TOKENS, lambda c: [c.hidden_size]),
    "GPT2Model": ({"n_layer": 2, "n_embd": 48, "n_head": 4}, TOKENS, lambda c: [c.n_embd]),
    "OPTModel": (
        {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "ffn_dim": 96,
         "word_embed_proj_dim": 48}, TOKENS, lambda c: [c.hidden_size]),
    "LlamaModel": ({**SMALL, "num_key_value_heads": 2}, TOKENS, lambda c: [c.hidden_size]),
    "T5Model": (
        {"num_layers": 2, "d_model": 48, "num_heads": 4, "d_ff": 96, "d_kv": 12}, BOTH,
        lambda c: [c.d_model]),
    "BartModel": (
        {"encoder_layers": 2, "decoder_layers": 2, "d_model": 48, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}, BOTH,
        lambda c: [c.d_model]),
    "WhisperModel": (
        {"encoder_layers": 2, "decoder_layers": 2, "d_model": 48, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "max_source_positions": 20},
        {"input_features": lambda: torch.randn(SAMPLES, 80, 40),
         "decoder_input_ids": BOTH["decoder_input_ids"]}, lambda c: [c.d_model]),
    "Wav2Vec2Model": (
        {**SMALL, "layerdrop": 0.0, "num_conv_pos_embedding_groups": 4},
        {"input_values": lambda: torch.randn(SAMPLES, 4000)}, lambda c: [c.hidden_size]),
    "ViTModel": ({**SMALL, "image_size": 32, "patch_size": 8}, images(32),
                 lambda c: [c.hidden_size]),
    "DeiTModel": ({**SMALL, "image_size": 32, "patch_size": 8}, images(32),
                  lambda c: [c.hidden_size]),
    "BeitModel": ({**SMALL, "image_size": 32, "patch_size": 8}, images(32),
                  lambda c: [c.hidden_size]),
    "SwinModel": (
        {"image_size": 64, "embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 4, 8],
         "window_size": 4}, images(64), lambda c: [24, 48, 96]),
    "SegformerModel": ({}, images(64), lambda c: c.hidden_sizes),
    "PvtV2Model": ({"image_size": 64}, images(64), lambda c: c.hidden_sizes),
    "CvtModel": ({}, images(64), lambda c: c.embed_dim),
    "PoolFormerModel": ({"depths": [1, 1, 2, 1]}, images(64), lambda c: c.hidden_sizes),
    "ConvNextModel": ({"depths": [1, 1, 2, 1]}, images(64), lambda c: c.hidden_sizes),
    "ConvNextV2Model": ({"depths": [1, 1, 2, 1]}, images(64), lambda c: c.hidden_sizes),
    "ResNetModel": ({"depths": [1, 1, 2, 1]}, images(64), lambda c: c.hidden_sizes),
    "RegNetModel": ({"depths": [1, 1, 2, 1]}, images(64), lambda c: c.hidden_sizes),
    "MobileNetV1Model": ({}, images(64), None),
    "MobileNetV2Model": ({}, images(64), None),
    "LevitModel": ({"depths": [1, 2, 1]}, images(224), lambda c: c.hidden_sizes),
    "MobileViTModel": ({}, images(64), None),
}  # fmt: skip

TORCHVISION = """
resnet18 resnet50 wide_resnet50_2 resnext50_32x4d vgg11_bn alexnet googlenet inception_v3
densenet121 squeezenet1_0 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5
efficientnet_b0 efficientnet_v2_s regnet_y_400mf convnext_tiny vit_b_16 swin_t swin_v2_t maxvit_t
"""

TIMM = """
resnet18 seresnet50 regnety_004 convnext_atto efficientnet_b0 mobilenetv3_small_100 densenet121
xception41 inception_v4 dla34 res2net50_26w_4s nfnet_l0 repvgg_a0 ghostnet_100 vovnet39a
cspresnet50 vit_tiny_patch16_224 deit_tiny_patch16_224 beit_base_patch16_224
swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 mixer_s16_224 resmlp_12_224 gmlp_s16_224
efficientformer_l1 caformer_s18 poolformer_s12 edgenext_xx_small davit_tiny mobilevit_xxs
maxvit_nano_rw_256 coatnet_nano_rw_224 volo_d1_224 nest_tiny mambaout_femto levit_128
cait_xxs24_224 xcit_nano_12_p16_224 tiny_vit_5m_224 pit_ti_224 pvt_v2_b0 twins_pcpvt_small
visformer_tiny convit_tiny fastvit_t8 repvit_m0_9 inception_next_atto focalnet_tiny_srf
sequencer2d_s starnet_s1 hiera_tiny_224
"""


# Parts of the blocks, where the library makes attention weights.
TARGETS = {
    "timm vit_tiny_patch16_224": ("attention", "mlp", "heads", "attention_weights"),
    "timm swin_tiny_patch4_window7_224": ("attention", "mlp", "heads", "attention_weights"),
    "torchvision vit_b_16": ("attention", "mlp"),
    "torchvision swin_t": ("attention", "mlp"),
    "transformers ViTModel": ("attention", "mlp", "heads", "attention_weights"),
    "transformers BertModel": ("attention", "mlp", "heads", "attention_weights"),
    "transformers T5Model": ("attention", "mlp", "heads"),
}


def models(only: str) -> Iterator[tuple[str, nn.Module, dict, list[int] | dict[str, int] | None]]:
    """Name, model, its inputs, and the widths of its stages, in order or by name, as it says."""
    for name in TORCHVISION.split():
        if re.search(only, f"torchvision {name}"):
            slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            model = torchvision.models.get_model(name, weights=None, **slow)
            size = 299 if "inception" in name else 224
            yield f"torchvision {name}", model, {"": torch.randn(SAMPLES, 3, size, size)}, None
    for name in TIMM.split():
        if re.search(only, f"timm {name}"):
            model = timm.create_model(name, num_classes=10)
            size = model.default_cfg["input_size"]
            info = getattr(model, "feature_info", [])
            widths = {stage["module"]: stage["num_chs"] for stage in info}
            yield f"timm {name}", model, {"": torch.randn(SAMPLES, *size)}, widths
    for name, (options, inputs, widths) in TRANSFORMERS.items():
        if re.search(only, f"transformers {name}"):
            kind = getattr(hf, name)
            config = kind.config_class(**options)
            config._attn_implementation = "eager"
            model = kind(config)
            known = None if widths is None else list(widths(config))
            yield f"transformers {name}", model, {k: f() for k, f in inputs.items()}, known


def measure(
    model: nn.Module, inputs: dict, layers: str | None
) -> tuple[ses_kernels.SESRegularizer, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reg = ses_kernels.SESRegularizer(model.train(), lambda_ses=0, layers=layers)
        model(*[v for k, v in inputs.items() if not k], **{k: v for k, v in inputs.items() if k})
        reg.loss()
    said = [str(w.message) for w in caught if "SESRegularizer" in str(w.message)]
    return reg, [text for text in said if "cannot reach its target" not in text]


def squash(values) -> str:
    """How often in a row, and what: 2 x 64; 128."""
    return "; ".join(
        f"{n} x {value}" if (n := len(list(group))) > 1 else str(value)
        for value, group in itertools.groupby(values)
    )


def failures(model: nn.Module, rows: list, widths) -> Iterator[str]:
    """Where the library says something else than was measured."""
    for row in rows:
        if row.samples != SAMPLES:
            yield f"{row.layer} has {row.samples} samples"
        layer = model.get_submodule(row.layer.partition(":")[0])
        known = getattr(layer, "out_channels", None)
        if isinstance(known, int) and known != row.d:
            yield f"{row.layer} has {row.d} features, its out_channels is {known}"
    blocks = [row for row in rows if "pool" not in row.layer]
    if isinstance(widths, list) and list(dict.fromkeys(b.d for b in blocks)) != widths:
        yield f"{squash(b.d for b in blocks)} features, the configuration says {widths}"
    if isinstance(widths, dict):
        for stage, width in widths.items():
            inside = [b for b in blocks if b.layer == stage or b.layer.startswith(f"{stage}.")]
            if inside and inside[-1].d != width:
                yield f"{inside[-1].layer} has {inside[-1].d} features, the library says {width}"


def line(
    name: str, model: nn.Module, inputs: dict, widths, layers: str | None = None
) -> tuple[str, str]:
    """A row of the table, and what is wrong with it."""
    reg, said = measure(model, inputs, layers)
    reg.close()
    rows = reg.rows()
    names = squash(re.sub(r"\d+", "*", row.layer) for row in rows)
    features, axes = squash(row.d for row in rows), squash(row.averaged for row in rows)
    if layers is not None:
        name, widths = f'{name}, "{layers}"', None
    cells = (name, f"`{names}`", str(len(rows)), features, axes)
    return f"| {' | '.join(cells)} |", "; ".join([*failures(model, rows, widths), *said])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression of names")
    parser.add_argument("--output", type=Path, help="a Markdown file")
    options = parser.parse_args()
    torch.manual_seed(0)
    timm.layers.set_fused_attn(False)  # which makes no attention weights
    rows, failed = [], 0
    for name, model, inputs, widths in models(options.only):
        for layers in (None, *TARGETS.get(name, ())):
            try:
                text, wrong = line(name, model, inputs, widths, layers)
            except Exception as error:
                text, wrong = f"| {name} | {type(error).__name__} | | | |", str(error)
            rows.append(text)
            failed += bool(wrong)
            print(text, f"WRONG: {wrong}" if wrong else "", flush=True)
    print(f"{len(rows) - failed} of {len(rows)} rows are right")
    if options.output:
        options.output.write_text("\n".join([HEADER, *rows, ""]))
    return min(failed, 1)


VERSIONS = ", ".join(
    f"{module.__name__} {module.__version__.partition('+')[0]}"
    for module in (torch, torchvision, timm, hf)
)
HEADER = f"""# Models and what is measured of them

`SESRegularizer(model)` on models with random weights, one forward pass of {SAMPLES} samples, by
`make zoo` with {VERSIONS}.
Every layer has {SAMPLES} samples, and as many features as its library says.

| model | layers | number | features | axes averaged |
|---|---|---|---|---|"""


if __name__ == "__main__":
    sys.exit(main())
