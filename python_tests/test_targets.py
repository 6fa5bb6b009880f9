"""What a SESRegularizer is aimed at: blocks and their parts, heads, weights, several terms."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_regularizer import Net, Operations, batch, recipe
from torch import nn
from torch.utils.checkpoint import checkpoint

from ses_kernels import SESRegularizer, Term, pooling, reference, schedules
from ses_kernels.layout import Layout

transformers = pytest.importorskip("transformers")

N, T, D, HEADS = 24, 7, 16, 4


def entropy(x):
    return reference.spectral_entropy(x.detach()).item()


class Attention(nn.Module):
    """timm's: the weights through a dropout of their own, unless the attention is fused."""

    def __init__(self, fused=False):
        super().__init__()
        self.num_heads, self.fused_attn = HEADS, fused
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.seen = {}

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            heads = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = torch.softmax(q @ k.mT / math.sqrt(D / HEADS), -1)
            self.seen["weights"] = weights
            heads = self.attn_drop(weights) @ v
        self.seen["heads"] = heads  # (N, heads, T, D / heads)
        self.seen["out"] = self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))
        return self.seen["out"]


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


class Layer(nn.Module):
    def __init__(self, fused=False):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(D), Attention(fused)
        self.norm2, self.mlp = nn.LayerNorm(D), Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    def __init__(self, depth=3, fused=False):
        super().__init__()
        self.patch = nn.Conv2d(3, D, 2)
        self.blocks = nn.Sequential(*(Layer(fused) for _ in range(depth)))
        self.head = nn.Linear(D, 5)

    def forward(self, x):
        return self.head(self.blocks(self.patch(x).flatten(2).mT).mean(1))


def images():
    return torch.randn(N, 3, 4, 3)


def run(model, *inputs, **options):
    reg = SESRegularizer(model, **options)
    model(*inputs)
    return reg, reg.loss()


# ---- targets ----


def test_blocks_attention_and_mlp():
    model = Vit()
    assert SESRegularizer(model).layers == ("blocks.0", "blocks.1", "blocks.2")
    assert SESRegularizer(model, layers="blocks", hook_last_n=2).layers == ("blocks.1", "blocks.2")
    reg, _ = run(model, images(), layers=["attention", "mlp"], hook_last_n=1)
    assert reg.layers == ("blocks.2.attn", "blocks.2.mlp")
    out = model.blocks[2].attn.seen["out"]
    assert reg.entropies["blocks.2.attn"] == pytest.approx(entropy(out.mean(1)), abs=1e-5)


def test_heads():
    model = Vit()
    reg, loss = run(model, images(), layers="heads", beta=0.5, lambda_ses=1.0)
    assert reg.layers == tuple(f"blocks.{i}.attn:heads" for i in range(3))
    expected = 0
    for i, key in enumerate(reg.layers):
        heads = model.blocks[i].attn.seen["heads"].mean(2)  # (N, heads, D / heads)
        got = reg.entropies[key]
        assert isinstance(got, list)
        assert got == pytest.approx([entropy(heads[:, h]) for h in range(HEADS)], abs=1e-5)
        # A layer counts as the mean of its heads.
        each = [recipe([heads[:, h]], beta=0.5, lambda_ses=1.0) for h in range(HEADS)]
        expected = expected + sum(each) / HEADS
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    weight = model.blocks[0].attn.qkv.weight
    ours, theirs = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert reg.flat_entropies("H/")["H/blocks.1.attn:heads/2"] == reg.entropies[reg.layers[1]][2]


def cka(heads):  # (N, heads, D) -> (heads, heads), by its definition
    heads = (heads - heads.mean(0)).double().unbind(1)
    norms = [torch.linalg.matrix_norm(a.mT @ a) for a in heads]
    rows = [[torch.linalg.matrix_norm(a.mT @ b) ** 2 / (norms[i] * norms[j])
             for j, b in enumerate(heads)] for i, a in enumerate(heads)]  # fmt: skip
    return torch.stack([torch.stack(row) for row in rows])


def test_head_similarity_is_the_spectrum_of_cka():
    model = Vit()
    reg, loss = run(model, images(), layers="head_similarity", beta=0.9, lambda_ses=1.0)
    assert reg.layers == tuple(f"blocks.{i}.attn:similarity" for i in range(3))
    expected = 0
    for i, key in enumerate(reg.layers):
        p = torch.linalg.eigvalsh(cka(model.blocks[i].attn.seen["heads"].mean(2))) / HEADS
        h = -(p * p.log()).sum()
        assert reg.entropies[key] == pytest.approx(h.item(), abs=1e-5)
        expected = expected + (h - 0.9 * math.log(HEADS)) ** 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    weight = model.blocks[0].attn.qkv.weight
    ours, theirs = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e15])
def test_heads_that_say_the_same_and_heads_that_share_nothing(scale):
    """A rotation of a head makes it no other one."""
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    x = torch.randn(64, 4)
    apart = torch.zeros(64, 4, 2)
    for head in range(4):  # only its own samples differ
        apart[16 * head : 16 * head + 8, head, 0] = 1.0
        apart[16 * head + 8 : 16 * head + 16, head, 0] = -1.0
    for heads, expected in ((torch.stack([x, x @ rotation], 1), 0.0), (apart, math.log(4))):
        y = scale * heads.flatten(1)[:, None]  # (N, 1, heads D)
        found = Layout(tuple(y.shape), 0, 2, 1, "")
        matrix = pooling.head_similarities(y, heads.shape[1], found, None, "attn")
        assert entropy(matrix) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_head_similarity_in_checkpointed_blocks(autocast):
    """The gradient is that without checkpointing, in float32 under autocast too."""
    model, x, gradients = Vit(), images(), []
    for checkpointed in (False, True):
        reg = SESRegularizer(model, layers="head_similarity", lambda_ses=1.0)
        with torch.autocast("cpu", enabled=autocast):
            tokens = model.patch(x).flatten(2).mT
            for block in model.blocks:
                tokens = (
                    checkpoint(block, tokens, use_reentrant=False)
                    if checkpointed
                    else block(tokens)
                )
        loss = reg.loss()
        assert loss.dtype == torch.float32
        gradients.append(torch.autograd.grad(loss, model.blocks[0].attn.qkv.weight)[0])
        reg.close()
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_attention_weights_through_a_dropout():
    model = Vit()
    reg, _ = run(model, images(), layers="attention_weights")
    assert reg.layers == tuple(f"blocks.{i}.attn:weights" for i in range(3))
    for i, key in enumerate(reg.layers):
        weights = model.blocks[i].attn.seen["weights"].mean(2).flatten(1)  # (N, heads * T)
        assert reg.entropies[key] == pytest.approx(entropy(weights), abs=1e-5)


def test_fused_attention_has_no_weights():
    model = Vit(fused=True)
    reg = SESRegularizer(model, layers="attention_weights")
    model(images())
    with pytest.raises(RuntimeError, match=r"attn:weights.*use_reentrant.*set_fused_attn\(False\)"):
        reg.loss()


class SoftmaxAttention(nn.Module):
    """Nothing drops out the weights, and ``softmax`` makes them, a module or a function."""

    def __init__(self, softmax):
        super().__init__()
        self.qkv, self.proj, self.softmax = nn.Linear(D, 3 * D), nn.Linear(D, D), softmax

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        self.weights = self.softmax(q @ k.mT / math.sqrt(D / HEADS))
        return self.proj((self.weights @ v).transpose(1, 2).flatten(2))


def test_attention_weights_out_of_a_softmax():
    model = Vit()
    for block in model.blocks:
        block.attn = SoftmaxAttention(nn.Softmax(-1))
    reg, _ = run(model, images(), layers="attention_weights")
    assert reg.layers == tuple(f"blocks.{i}.attn:weights" for i in range(3))
    for block, h in zip(model.blocks, reg.entropies.values(), strict=True):
        assert h == pytest.approx(entropy(block.attn.weights.mean(2).flatten(1)), abs=1e-5)


def test_features_are_not_taken_for_attention_weights():
    model = Vit(depth=2)
    for block in model.blocks:
        block.attn = SoftmaxAttention(lambda x: x.softmax(-1))
    SESRegularizer(model, layers="attention_weights")
    with pytest.raises(ValueError, match=r"attn:weights: SoftmaxAttention puts out no.*nn.Softmax"):
        model(images())


class Attends(nn.Module):
    def __init__(self, **call):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": nn.MultiheadAttention(D, HEADS, batch_first=True)})
            for _ in range(2)
        )
        self.call, self.weights = call, []

    def forward(self, x):
        self.weights = []
        for layer in self.layers:
            y, w = layer["attn"](x, x, x, **self.call)
            self.weights.append(w)
            x = x + y
        return x


class AttentionBlock(nn.Module):
    def __init__(self, **call):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(D, HEADS, batch_first=True), nn.Linear(D, D)
        self.call = call

    def forward(self, x):
        y, self.weights = self.attn(x, x, x, **self.call)
        return self.fc(x + y)


def test_attention_weights_of_torch():
    x = torch.randn(N, T, D)
    for average in (False, True):
        call = {"need_weights": True, "average_attn_weights": average}
        model = nn.Sequential(AttentionBlock(**call), AttentionBlock(**call))
        reg, _ = run(model, x, layers="attention_weights")
        assert reg.layers == ("0.attn:weights", "1.attn:weights")
        for block, h in zip(model, reg.entropies.values(), strict=True):
            weights = block.weights.mean(-2).reshape(N, -1)
            assert h == pytest.approx(entropy(weights), abs=1e-5)
    model = nn.Sequential(AttentionBlock(need_weights=False), AttentionBlock(need_weights=False))
    SESRegularizer(model, layers="attention_weights")
    with pytest.raises(ValueError, match=r"0.attn:weights: .*no attention weights.*need_weights"):
        model(x)


def test_heads_of_torch_cannot_be_seen():
    model = nn.Sequential(AttentionBlock(), AttentionBlock())
    with pytest.raises(
        ValueError, match=r"heads.*0.attn is a torch.nn.MultiheadAttention, which ne"
    ):
        SESRegularizer(model, layers="heads")


def test_parts_that_a_model_lacks():
    for target in ("attention", "heads", "head_similarity", "attention_weights", "mlp"):
        with pytest.raises(ValueError, match=f"layers='{target}': the blocks, blocks.2 the last"):
            SESRegularizer(Net(), layers=target)


SIZES = {"hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": HEADS,
         "intermediate_size": 32, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip


def vit(attention):
    config = transformers.ViTConfig(image_size=8, patch_size=4, **SIZES)
    config._attn_implementation = attention
    return transformers.ViTModel(config).train(), {"pixel_values": torch.randn(N, 3, 8, 8)}


def bert(attention):
    config = transformers.BertConfig(vocab_size=50, **SIZES)
    config._attn_implementation = attention
    return transformers.BertModel(config).train(), {"input_ids": torch.randint(50, (N, T))}


@pytest.mark.parametrize("make", [vit, bert])
def test_targets_of_transformers(make):
    model, inputs = make("eager")
    reg = SESRegularizer(model, layers=["blocks", "attention", "mlp", "heads", "attention_weights"])
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    reg.loss()
    assert len(reg.layers) == 5 * 3
    blocks = [key for key in reg.layers if key.rpartition(".")[2].isdigit()]
    for key, hidden in zip(blocks[:-1], out.hidden_states[1:], strict=False):
        assert reg.entropies[key] == pytest.approx(entropy(hidden.mean(1)), abs=1e-4)
    weights = [key for key in reg.layers if key.endswith(":weights")]
    for key, w in zip(weights, out.attentions, strict=True):
        assert reg.entropies[key] == pytest.approx(entropy(w.mean(2).flatten(1)), abs=1e-4)
    heads = [reg.entropies[key] for key in reg.layers if key.endswith(":heads")]
    assert [len(h) for h in heads] == [HEADS] * 3
    projections = [m for n, m in model.named_modules()
                   if n.endswith(("attention.o_proj", "attention.output.dense"))]  # fmt: skip
    seen = []
    for module in projections:
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    reg.begin()
    model(**inputs)
    for x, got in zip(seen, heads, strict=True):
        x = x.unflatten(-1, (HEADS, -1)).mean(1)
        assert got == pytest.approx([entropy(x[:, h]) for h in range(HEADS)], abs=1e-4)


@pytest.mark.parametrize("make", [vit, bert])
def test_attention_weights_that_are_not_made(make):
    model, inputs = make("sdpa")
    SESRegularizer(model, layers="attention_weights")
    with pytest.raises(ValueError, match=r'no attention weights.*attn_implementation="eager"'):
        model(**inputs)


# ---- terms ----


def test_terms_with_options_of_their_own(monkeypatch):
    import ses_kernels.regularizer as module

    calls = []
    inner = module.spectral_entropies
    monkeypatch.setattr(
        module, "spectral_entropies", lambda xs, **o: calls.append(len(xs)) or inner(xs, **o)
    )
    model, x = Vit(), images()
    terms = [
        Term("blocks", last=2, beta=0.5, pool="cls"),
        Term("attention_weights", last=1, alpha=0.5),
        Term("heads", last=1, beta={"*": 0.3}),
        Term("patch"),
    ]
    reg = SESRegularizer(model, terms=terms, beta=0.6, lambda_ses=1.0)
    recorded = {}
    for name in ("blocks.1", "blocks.2", "patch"):
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: recorded.update({name: out})
        )
    model(x)
    loss = reg.loss()
    assert reg.layers == ("patch", "blocks.1", "blocks.2", "blocks.2.attn:weights",
                          "blocks.2.attn:heads")  # fmt: skip
    assert calls == [4 + HEADS]
    seen = model.blocks[2].attn.seen
    heads = seen["heads"].mean(2)
    expected = (
        recipe([recorded["patch"].mean((2, 3))], beta=0.6, lambda_ses=1.0)
        + recipe([recorded["blocks.1"][:, 0], recorded["blocks.2"][:, 0]], beta=0.5, lambda_ses=1.0)
        + recipe([seen["weights"].mean(2).flatten(1)], beta=0.6, alpha=0.5, lambda_ses=1.0)
        + recipe([heads[:, h] for h in range(HEADS)], beta=0.3, lambda_ses=1.0) / HEADS
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_wrong_terms():
    model = Vit()
    for options, message in (
        ({"terms": []}, "terms must be one or more Term"),
        ({"terms": [Term("blocks")], "layers": "mlp"}, "terms= has layers"),
        ({"terms": [Term("blocks"), Term("blocks.0")]}, r"different layers, got \['blocks.0'\]"),
        ({"terms": [Term("blocks", last=0)]}, "hook_last_n must be an int of 1 or more, got 0"),
        ({"terms": [Term("blocks", beta=2)]}, "beta must be between 0 and 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            SESRegularizer(model, **options)


# ---- beta ----


def test_beta_alpha_and_lambda_can_be_set():
    model = Net()
    reg = SESRegularizer(model, layers="blocks.?")
    features = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: features.append(out.double().mean((2, 3))))

    def expected(betas, alphas, weight):
        model(batch()[0])
        parts = [recipe([x], b, weight, a) for x, b, a in zip(features, betas, alphas, strict=True)]
        features.clear()
        assert reg.loss().item() == pytest.approx(sum(parts).item(), rel=1e-5)

    expected([0.7] * 3, [1] * 3, 0.01)
    reg.beta, reg.lambda_ses = 0.9, 0.1
    expected([0.9] * 3, [1] * 3, 0.1)
    reg.beta, reg.alpha = {"blocks.0": 0.2}, {"*.[12]": 3}
    assert reg.beta == {"blocks.0": 0.2, "blocks.1": 0.7, "blocks.2": 0.7}
    expected([0.2, 0.7, 0.7], [1, 3, 3], 0.1)
    with pytest.raises(ValueError, match="beta must be between 0 and 1, got 1"):
        reg.beta = 1
    with pytest.raises(ValueError, match="beta: nothing matches 'stem'"):
        reg.beta = {"stem": 0.5}
    with pytest.raises(ValueError, match="alpha must be finite"):
        reg.alpha = -1
    with pytest.raises(ValueError, match="lambda_ses must be finite"):
        reg.lambda_ses = math.inf


def test_schedules():
    linear = schedules.linear(0.9, 0.3, 10)
    assert [linear(s) for s in (0, 5, 10, 99)] == pytest.approx([0.9, 0.6, 0.3, 0.3])
    cosine = schedules.cosine(0.9, 0.3, 10)
    assert [cosine(s) for s in (0, 5, 10, 99)] == pytest.approx([0.9, 0.6, 0.3, 0.3])
    assert cosine(2) == pytest.approx(0.3 + 0.3 * (1 + math.cos(0.2 * math.pi)))
    step = schedules.step([0.3, 0.7, 0.9], [20, 35])
    assert [step(s) for s in (0, 19, 20, 34, 35, 99)] == [0.3, 0.3, 0.7, 0.7, 0.9, 0.9]
    for wrong in (lambda: schedules.linear(0.1, 0.2, 0), lambda: schedules.cosine(0.1, 0.2, 1.5)):
        with pytest.raises(ValueError, match="steps must be an int of at least 1"):
            wrong()
    for values, milestones in (([0.1], [3]), ([0.1, 0.2, 0.3], [5, 5])):
        with pytest.raises(ValueError, match="one value more than milestones"):
            schedules.step(values, milestones)


def test_beta_by_a_schedule():
    model = Net()
    beta = {"blocks.0": schedules.linear(0.9, 0.3, 4), "*": 0.5}
    reg = SESRegularizer(model, layers="blocks.?", beta=beta, lambda_ses=lambda step: 0.1 * step)
    features = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: features.append(out.double().mean((2, 3))))
    for step in range(6):
        model(batch()[0])
        first = recipe(features[:1], max(0.9 - 0.15 * step, 0.3), 0.1 * step)
        expected = first + recipe(features[1:], 0.5, 0.1 * step)
        features.clear()
        loss = reg.loss()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-9)
        assert loss.requires_grad == (step > 0)
    assert reg.targets["blocks.0"] == pytest.approx(0.3 * math.log(8))
    reg.beta = lambda step: 1.5 - step
    model(batch()[0])
    with pytest.raises(ValueError, match=r"beta must be between 0 and 1, got -4.5"):
        reg.loss()


def test_a_schedule_makes_no_tensor():
    """No more operations at each step than a number: a GPU is sent none and asked nothing."""
    counted = []
    for beta in (0.5, schedules.linear(0.9, 0.3, 50)):
        model = Net()
        reg = SESRegularizer(model, beta=beta)
        for _ in range(3):
            model(batch()[0])
            with Operations() as operations:
                reg.loss()
        counted.append(operations.names)
    assert counted[0] == counted[1]
    # Not scalar_tensor: torch.where makes one of a number in the rows that serve without kernels.
    made = ("lift_fresh", "_to_copy", "copy_", "_local_scalar_dense")
    assert not [name for name in counted[1] if name.split("::")[1].split(".")[0] in made]


def test_values_that_are_set_anew_leak_nothing():
    model = Net()
    reg = SESRegularizer(model)
    for i in range(200):
        reg.beta = {"blocks.0": 0.2 + i / 1000}
        model(batch(8)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reg.loss()
    assert len(reg._kept) <= 64


def test_beta_in_the_state():
    beta = {"blocks.0": schedules.step([0.3, 0.7], [2]), "blocks.1": 0.5,
            "blocks.2": schedules.cosine(0.9, 0.3, 9)}  # fmt: skip
    reg = SESRegularizer(Net(), layers="blocks.?", beta=beta)
    reg.step = 7
    state = json.loads(json.dumps(reg.state_dict()))
    other = SESRegularizer(Net(), layers="blocks.?")
    other.load_state_dict(state)
    assert other.step == 7
    assert other.beta == beta
    assert other.targets == reg.targets
    unknown = SESRegularizer(Net(), layers="blocks.?", beta=lambda step: 0.5)
    state = unknown.state_dict()
    assert state["beta"] == dict.fromkeys(unknown.layers)
    other.load_state_dict(state)  # of a function of someone's own nothing is known
    assert other.beta == beta
    other.load_state_dict({"step": 3})
    assert other.step == 3
    with pytest.raises(ValueError, match="step must be an int of 0 or more, got -1"):
        other.step = -1


def test_the_first_step_logs_the_summary(caplog):
    model = Net()
    reg = SESRegularizer(model)
    with caplog.at_level("DEBUG", logger="ses_kernels"):
        for _ in range(2):
            model(batch()[0])
            reg.loss()
    assert [r.message for r in caplog.records if r.name.startswith("ses_kernels")] == [
        reg.summary()
    ]


def test_measured():
    model = Net()
    reg = SESRegularizer(model, every_k=2)
    seen = [reg.measured]
    for _ in range(3):
        model(batch()[0])
        reg.loss()
        seen.append(reg.measured)
    with reg.disabled():
        reg.loss()
        seen.append(reg.measured)
    assert seen == [False, True, False, True, False]
