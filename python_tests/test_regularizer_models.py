"""SESRegularizer on models of transformers: eager and compiled, float32 and autocast."""

from __future__ import annotations

import pytest
import torch
from test_regularizer import gradients, recipe, relative

import ses_kernels

transformers = pytest.importorskip("transformers")

SAMPLES = 24
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16], depths=[1, 1, 1], layer_type="basic",
        num_labels=5,
    )  # fmt: skip
    return transformers.ResNetForImageClassification(config), "pixel_values", (3, 32, 32)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=4, num_labels=5, **PLAIN,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), "pixel_values", (3, 16, 16)


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=5, **PLAIN,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), "input_ids", (9,)


DEFAULT = {
    resnet: [*(f"resnet.encoder.stages.{i}.layers.0" for i in range(3)), "resnet.pooler"],
    vit: ["vit.layers.0", "vit.layers.1"],
    bert: ["bert.encoder.layer.0", "bert.encoder.layer.1"],
}


def make(build):
    torch.manual_seed(0)
    model, name, shape = build()
    labels = torch.randint(5, (SAMPLES,))
    if name == "input_ids":
        return model.train(), {name: torch.randint(50, (SAMPLES, *shape)), "labels": labels}
    return model.train(), {name: torch.randn(SAMPLES, *shape), "labels": labels}


def record(model, names):
    """Pooled features of the named modules, in float64, by hooks of the test's own."""
    features = {}

    def hook(name):
        def inner(module, inputs, output):
            x = (output[0] if isinstance(output, tuple) else output).double()
            features[name] = x.mean((2, 3)) if x.dim() == 4 else x.mean(1)

        return inner

    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    return features


def run(forward, inputs, half, penalty):
    with torch.autocast("cpu", half, enabled=half is not None):
        task = forward(**inputs).loss
        return task, penalty()


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("build", DEFAULT)
def test_penalty_and_gradient_equal_the_recipe(build, compiled, half):
    model, inputs = make(build)
    names = DEFAULT[build][-3:]
    features = record(model, names)
    expected = run(model, inputs, half, lambda: recipe(features.values(), lambda_ses=1.0))
    reference = gradients(sum(expected), model)

    model, inputs = make(build)  # without the hooks of the test
    torch.compiler.reset()
    reg = ses_kernels.SESRegularizer(model, beta=0.7, lambda_ses=1.0, hook_last_n=3, every_k=1)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    task, penalty = run(forward, inputs, half, reg.loss)

    assert list(reg.layers) == names
    # Compiled, half-precision activations may be fused, and rounded otherwise.
    tolerance = 1e-5 if half is None or not compiled else 1e-2
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(expected[1].item(), rel=tolerance)
    # Half precision rounds the gradients of the activations, in the recipe and here.
    tolerance = {None: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[half]
    assert relative(gradients(task + penalty, model), reference) < tolerance


@pytest.mark.parametrize("build", DEFAULT)
def test_default_layers(build):
    model, _ = make(build)
    assert list(ses_kernels.SESRegularizer(model).layers) == DEFAULT[build]


@pytest.mark.parametrize("build", [vit, bert])
def test_gradient_checkpointing_of_the_library(build):
    results = []
    for checkpointing in (False, True):
        model, inputs = make(build)
        if checkpointing:
            model.gradient_checkpointing_enable()
        reg = ses_kernels.SESRegularizer(model, lambda_ses=1.0)
        task, penalty = run(model, inputs, None, reg.loss)
        (task + penalty).backward()
        assert reg._features == []
        results.append([penalty.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)


def test_class_token_and_all_tokens():
    model, inputs = make(vit)
    matrices = {}
    model.vit.layers[1].mlp.register_forward_hook(
        lambda m, i, o: matrices.update(cls=o[:, 0], tokens=o.flatten(0, 1))
    )
    for pool in ("cls", "tokens"):
        with ses_kernels.SESRegularizer(model, layers="vit.layers.1.mlp", pool=pool) as reg:
            model(**inputs)
            assert reg.loss().item() == pytest.approx(recipe([matrices[pool]]).item(), rel=1e-5)
