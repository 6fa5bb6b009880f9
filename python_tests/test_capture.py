"""The matrix of a layer: samples x features as the model means them, or an error that says why."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import random
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ses_kernels import SESRegularizer, reference

N, D = 24, 6


def entropy(x):
    return reference.spectral_entropy(x.detach()).item()


def measure(model, *inputs, **options):
    """Name -> entropy of one forward pass in training."""
    with SESRegularizer(model, lambda_ses=0, **options) as reg:
        model(*inputs)
        reg.loss()
        return reg.entropies


def outputs(model, *inputs):
    """Name -> what each module put out, by hooks of the test's own; copied, since it may change."""
    found = {}

    def keep(name):
        def hook(module, args, output):
            found[name] = output.detach().clone() if isinstance(output, torch.Tensor) else output

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules()]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return found


class Puts(nn.Module):
    """A model whose one layer, "layer", puts out what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.layer = Wrapped(function)

    def forward(self, x):
        self.layer(x)
        return x


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(D, D), function

    def forward(self, x):
        return self.function(self.linear(x))


def puts(function, x=None, **options):
    model = Puts(function)
    x = torch.randn(N, D) if x is None else x
    got = measure(model, x, layers="layer", **options)["layer"]
    return got, model.layer.linear(x)


# ---- layouts ----


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("length", [12, N])
def test_transformer_encoder(batch_first, length):
    """batch_first=False is what torch does by default; where T = N nothing else tells."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn((N, length, 16) if batch_first else (length, N, 16))
    expected = outputs(model, x)
    names = ["layers.1", "layers.0.linear2", "layers.0.norm1", "layers.0.dropout1"]
    for name, h in measure(model, x, layers=names).items():
        assert h == pytest.approx(entropy(expected[name].mean(1 if batch_first else 0)), abs=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda b: nn.LSTM(D, 5, batch_first=b),
        lambda b: nn.GRU(D, 5, bidirectional=True, batch_first=b),
        lambda b: nn.RNN(D, 5, 2, batch_first=b),
        lambda b: nn.LSTM(D, 5, proj_size=3, batch_first=b),
    ],
)
def test_recurrent(make, batch_first):
    model = nn.Sequential(make(batch_first))
    x = torch.randn((N, 9, D) if batch_first else (9, N, D))
    expected = model(x)[0].mean(1 if batch_first else 0)
    assert measure(model, x, layers="0")["0"] == pytest.approx(entropy(expected), abs=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_of_torch(batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(D, 2, batch_first=batch_first)

        def forward(self, x):
            return self.attend(x, x, x)[0]

    model = Net()
    x = torch.randn((N, 9, D) if batch_first else (9, N, D))
    expected = model(x).mean(1 if batch_first else 0)
    assert measure(model, x, layers="attend")["attend"] == pytest.approx(
        entropy(expected), abs=1e-5
    )


def test_sequence_first_attention_inside_a_batch_first_model():
    """The sizes overrule what a part declares: the block turns its axes round and back."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.fc = nn.MultiheadAttention(D, 2), nn.Linear(D, D)

        def forward(self, x):
            y = x.transpose(0, 1)
            return self.fc(x + self.attend(y, y, y)[0].transpose(0, 1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, D, 4, 4)
            self.block = Block()

        def forward(self, images):
            return self.block(self.patch(images).flatten(2).mT)

    model, x = Net(), torch.randn(N, 3, 12, 12)
    expected = model(x).mean(1)
    got = measure(model, x, layers=["block", "block.fc", "block.attend"])
    assert got["block"] == got["block.fc"] == pytest.approx(entropy(expected), abs=1e-5)
    attended = outputs(model, x)["block.attend"][0]  # (T, N, D)
    assert got["block.attend"] == pytest.approx(entropy(attended.mean(0)), abs=1e-5)


def test_batch_first_that_contradicts_the_input_is_an_error():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.attend = nn.Conv2d(3, D, 4, 4), nn.MultiheadAttention(D, 2)

        def forward(self, images):
            x = self.patch(images).flatten(2).mT  # (N, T, D): attends over the batch
            return self.attend(x, x, x)[0]

    model, x = Net(), torch.randn(N, 3, 12, 12)
    with pytest.raises(ValueError, match=r"attend: batch_first=False.*\(24, 9, 6\).*batch_axis=1"):
        measure(model, x, layers="attend")
    expected = model(x)
    for axis, mean in ((0, 1), (1, 0)):
        got = measure(model, x, layers="attend", batch_axis=axis)["attend"]
        assert got == pytest.approx(entropy(expected.mean(mean)), abs=1e-5)


CONVOLUTIONS = [
    (nn.Conv1d(D, 8, 3), (N, D, 15)),
    (nn.Conv1d(D, 8, 1), (N, D, 8)),  # L = C
    (nn.Conv2d(D, 8, 1), (N, D, 8, 8)),
    (nn.Conv3d(D, 8, 1), (N, D, 3, 4, 5)),
    (nn.ConvTranspose1d(D, 8, 3), (N, D, 15)),
    (nn.BatchNorm1d(D), (N, D, 15)),
    (nn.BatchNorm1d(D), (N, D)),
    (nn.InstanceNorm1d(D, affine=True), (N, D, 15)),
    (nn.GroupNorm(2, D), (N, D, 15)),
    (nn.AdaptiveAvgPool1d(4), (N, D, 15)),
    (nn.MaxPool1d(2), (N, D, 15)),
    (nn.Upsample(scale_factor=2), (N, D, 15)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS)
@pytest.mark.parametrize("then", [None, nn.ReLU(), nn.Dropout(0.0), nn.Identity()])
def test_convolutions_and_what_follows(layer, shape, then):
    """An activation has the layout of the layer before it."""
    model = nn.Sequential(nn.Sequential(layer, *([then] if then is not None else [])))
    x = torch.randn(shape)
    y = model(x)
    expected = y.flatten(2).mean(2) if y.dim() > 2 else y
    name = "0.0" if then is None else "0.1"
    assert measure(model, x, layers=name)[name] == pytest.approx(entropy(expected), abs=1e-5)


class ChannelsLast(nn.Module):
    """A block of (N, H, W, C) with a convolution inside, as ConvNeXt or MambaOut have."""

    def __init__(self, width, ends):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)
        self.ends = ends

    def forward(self, x):  # (N, C, H, W) or (N, H, W, C)
        y = x if self.ends == "first" else x.permute(0, 3, 1, 2)
        y = self.fc(self.norm(self.conv(y).permute(0, 2, 3, 1)))
        return x + (y.permute(0, 3, 1, 2) if self.ends == "first" else y)


@pytest.mark.parametrize("ends", ["first", "last"])
@pytest.mark.parametrize("space", [(4, 4), (5, 7), (8, 5), (5, 8), (8, 8)])
def test_blocks_of_both_kinds_of_layers(ends, space):
    width = 8
    model = nn.Sequential(ChannelsLast(width, ends))
    x = torch.randn((N, width, *space) if ends == "first" else (N, *space, width))
    expected = entropy(model(x).mean((2, 3) if ends == "first" else (1, 2)))
    assert measure(model, x, layers="0")["0"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("ends", ["first", "last"])
def test_as_wide_as_it_is_high(ends):
    """C = H = W, as in the first stage of ConvNeXt at 384: the graph tells what made it."""
    model, x = nn.Sequential(ChannelsLast(8, ends), nn.Dropout(0.1)), torch.randn(N, 8, 8, 8)
    y = model[0](x)
    expected = entropy(y.mean((2, 3) if ends == "first" else (1, 2)))
    assert measure(model, x, layers="0")["0"] == pytest.approx(expected, abs=1e-5)
    model[0].register_forward_hook(lambda m, args, out: out.detach().requires_grad_())
    with pytest.raises(ValueError, match=r"0: the features of .*\(24, 8, 8, 8\).*feature_axis="):
        measure(model, x, layers="0")
    got = measure(model, x, layers="0", feature_axis=1 if ends == "first" else 3)["0"]
    assert got == pytest.approx(expected, abs=1e-5)


def test_linear_layers_on_images():
    """By name, as transformers' ConvNeXt *.pwconv2: (N, H, W, C) whatever the block puts out."""
    model = nn.Sequential(ChannelsLast(8, "first"))
    x = torch.randn(N, 8, 5, 7)
    found = outputs(model, x)
    for name, h in measure(model, x, layers=["0.fc", "0.norm"]).items():
        assert h == pytest.approx(entropy(found[name].mean((1, 2))), abs=1e-5)


def test_patches_put_out_as_tokens():
    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, D, 4, 4)

        def forward(self, x):
            return self.conv(x).flatten(2).mT

    model, x = nn.Sequential(Embed()), torch.randn(N, 3, 16, 16)
    assert measure(model, x, layers="0")["0"] == pytest.approx(entropy(model(x).mean(1)), abs=1e-5)


def test_a_concatenation_of_convolutions():
    """As wide as none of its layers, and its space as wide as one of them."""

    class Inception(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return torch.cat([self.one(x), self.other(x)], 1)

    model = nn.Sequential(Inception())
    for space in ((8, 8), (7, 8)):
        x = torch.randn(N, 3, *space)
        expected = entropy(model(x).mean((2, 3)))
        assert measure(model, x, layers="0")["0"] == pytest.approx(expected, abs=1e-5)


class Windows(nn.Module):
    """Attention inside windows: (N, H, W, C) -> (N windows, T, C) -> (N, H, W, C)."""

    def __init__(self, width, side, frames=False):
        super().__init__()
        self.side, self.attend = side, nn.Linear(width, width)
        self.conv = nn.Conv2d(width, width, 1) if frames else None

    def forward(self, x):
        n, h, w, c = x.shape
        s = self.side
        x = x.reshape(n, h // s, s, w // s, s, c).transpose(2, 3)
        x = self.attend(x.reshape(-1, s * s, c))
        x = x.reshape(n, h // s, w // s, s, s, c).transpose(2, 3).reshape(n, h, w, c)
        if self.conv is not None:
            self.conv(x.reshape(n * h, 1, w, c).permute(0, 3, 1, 2))
        return x


def test_windows_on_the_axis_of_the_batch():
    model, x = nn.Sequential(Windows(D, 2, frames=True)), torch.randn(N, 4, 6, D)
    found = outputs(model, x)
    got = measure(model, x, layers=["0.attend", "0.conv"])
    attended, frames = found["0.attend"], found["0.conv"]
    assert attended.shape == (6 * N, 4, D)
    assert got["0.attend"] == pytest.approx(entropy(attended.unflatten(0, (N, 6)).mean((1, 2))),
                                            abs=1e-5)  # fmt: skip
    assert got["0.conv"] == pytest.approx(entropy(frames.unflatten(0, (N, 4)).mean((1, 3, 4))),
                                          abs=1e-5)  # fmt: skip
    with SESRegularizer(model, layers="0.attend") as reg:
        model(x)
        loss = reg.loss()
        (ours,) = torch.autograd.grad(loss, model[0].attend.weight, retain_graph=True)
        assert "6 windows" in reg.summary()
    attended = model[0].attend(x.double().float().reshape(N, 2, 2, 3, 2, D).transpose(2, 3)
                               .reshape(-1, 4, D))  # fmt: skip
    matrix = attended.double().unflatten(0, (N, 6)).mean((1, 2))
    expected = 0.01 * (reference.spectral_entropy(matrix) - 0.7 * math.log(D)) ** 2
    (theirs,) = torch.autograd.grad(expected, model[0].attend.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("samples", [4, 5, 8])
def test_windows_of_as_many_tokens_as_samples(samples):
    """Windows of 2 x 2 tokens and a batch of 4: what is around them has the batch first."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.windows = Windows(D, 2)

        def forward(self, x):
            return x + self.windows(x)

    model, x = nn.Sequential(Block()), torch.randn(samples, 4, 6, D)
    attended = outputs(model, x)["0.windows.attend"]
    got = measure(model, x, layers="0.windows.attend")["0.windows.attend"]
    assert got == pytest.approx(entropy(attended.unflatten(0, (samples, 6)).mean((1, 2))), abs=1e-5)


def test_sequences_of_a_multiple_of_the_batch():
    """(T, N, D) = (8, 4, D) in layers that declare nothing: so is what is around them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(D, D)

        def forward(self, x):
            return x + self.fc(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, images):
            return self.blocks(images.flatten(2).permute(2, 0, 1))

    model, x = Net(), torch.randn(4, D, 2, 4)
    expected = entropy(model.blocks[0](x.flatten(2).permute(2, 0, 1)).mean(0))
    for name in ("blocks.0", "blocks.0.fc"):
        y = outputs(model, x)[name]
        assert measure(model, x, layers=name)[name] == pytest.approx(entropy(y.mean(0)), abs=1e-5)
    assert measure(model, x, layers="blocks.0")["blocks.0"] == pytest.approx(expected, abs=1e-5)


def test_batch_axis_takes_windows_for_samples():
    model, x = nn.Sequential(Windows(D, 2)), torch.randn(N, 4, 6, D)
    attended = outputs(model, x)["0.attend"]
    got = measure(model, x, layers="0.attend", batch_axis=0)["0.attend"]
    assert got == pytest.approx(entropy(attended.mean(1)), abs=1e-5)


def test_no_axis_of_the_batch_is_an_error():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x):
            return self.linear(x.flatten(0, 1)[:-1])

    with pytest.raises(ValueError, match=r"linear: no axis of its output \(71, 6\).*batch_axis="):
        measure(Net(), torch.randn(N, 3, D), layers="linear")


def test_a_batch_as_long_as_the_sequence_is_said():
    model, x = nn.Sequential(nn.Linear(D, D)), torch.randn(N, N, D)
    with pytest.warns(UserWarning, match=r"0: axes 0 and 1 .*\(24, 24, 6\).*batch_axis=0"):
        got = measure(model, x, layers="0")["0"]
    assert got == pytest.approx(entropy(model(x).mean(1)), abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(model, x, layers="0", batch_axis=0)
        got = measure(model, x, layers="0", batch_axis=1)["0"]
    assert got == pytest.approx(entropy(model(x).mean(0)), abs=1e-5)


def test_what_nothing_tells_is_a_convention_and_a_warning():
    class Mystery(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.weight

    for shape, axis, mean in (((N, 5, D), 2, 1), ((N, D, 3, 4), 1, (2, 3))):
        model, x = nn.Sequential(Mystery()), torch.randn(shape)
        with pytest.warns(UserWarning, match=f"0: nothing tells.*feature_axis={axis}"):
            got = measure(model, x, layers="0")["0"]
        assert got == pytest.approx(entropy(x.mean(mean)), abs=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert measure(model, x, layers="0", feature_axis=axis)["0"] == got


def test_axes_and_pool_of_single_layers():
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    x = torch.randn(N, 7, D)
    first, second = model[0](x), model(x)
    got = measure(model, x, layers=nn.Linear, batch_axis={"1": 1}, pool={"0": "none"})
    assert got["0"] == pytest.approx(entropy(first.flatten(0, 1)), abs=1e-5)
    assert got["1"] == pytest.approx(entropy(second.mean(0)), abs=1e-5)
    with pytest.raises(ValueError, match="batch_axis: nothing matches '7'"):
        SESRegularizer(model, layers=nn.Linear, batch_axis={"7": 1})
    with pytest.raises(ValueError, match=r"0: feature_axis=3 is no axis of .*\(24, 7, 6\)"):
        measure(model, x, layers="0", feature_axis=3)
    with pytest.raises(ValueError, match=r"axis 0 of .* both samples and features"):
        measure(model, x, layers="0", feature_axis=0)


def test_class_token_and_tokens_of_sequences_first():
    model, x = nn.Sequential(nn.LSTM(D, 5)), torch.randn(9, N, D)
    y = model(x)[0]
    for pool, matrix in (("cls", y[0]), ("tokens", y.flatten(0, 1)), ("none", y.flatten(0, 1))):
        got = measure(model, x, layers="0", pool=pool)["0"]
        assert got == pytest.approx(entropy(matrix), abs=1e-5)


def test_lazy_layers():
    """Their weights have no shape before the first pass."""
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(2), nn.LazyLinear(5))
    x = torch.randn(N, 3, 6, 6)
    got = measure(model, x, layers=["0", "1", "3"])
    found = outputs(model, x)
    assert got["0"] == pytest.approx(entropy(found["0"].mean((2, 3))), abs=1e-5)
    assert got["1"] == pytest.approx(entropy(found["1"].mean((2, 3))), abs=1e-5)
    assert got["3"] == pytest.approx(entropy(found["3"].mean(1)), abs=1e-5)


# ---- outputs ----


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor
    count: int = 3
    other: torch.Tensor | None = None


STRUCTURES = {
    "tuple": lambda x: (x, x[:2]),
    "None first": lambda x: (None, x),
    "nested": lambda x: ((x, torch.arange(3)), None),
    "dict of one": lambda x: {"ids": torch.arange(3), "features": x},
    "dict": lambda x: {"other": x[:2], "last_hidden_state": x},
    "dataclass": lambda x: Result(x),
    "list of one": lambda x: [x],
}


@pytest.mark.parametrize("wrap", STRUCTURES)
def test_structures(wrap):
    got, x = puts(STRUCTURES[wrap])
    assert got == pytest.approx(entropy(x), abs=1e-5)


def test_select_by_index_key_field_and_function():
    wrap = lambda x: (x[:, :2], {"a": x[:, :3]}, Result(x))  # noqa: E731
    for select, columns in ((0, 2), (-3, 2), (lambda o: o[1]["a"], 3), (lambda o: o[2].hidden, 6)):
        got, x = puts(wrap, select=select)
        assert got == pytest.approx(entropy(x[:, :columns]), abs=1e-5)
    got, x = puts(lambda x: Result(x[:, :4], other=x), select="other")
    assert got == pytest.approx(entropy(x), abs=1e-5)


def test_an_index_leaves_a_tensor_as_it_is():
    """select=0 where some layers put out a tensor, and others a tuple."""
    got, x = puts(lambda x: x, select=0)
    assert got == pytest.approx(entropy(x), abs=1e-5)


BAD = {
    "select missing": (lambda x: {"a": x, "b": x}, {"select": "x"}, r"select='x'.*\['a', 'b'\]"),
    "index missing": (lambda x: (x, x), {"select": 2}, r"select=2.*\[0, 1\]"),
    "several": (lambda x: {"a": x, "b": x}, {}, r"2 tensors, \['a'\] \(24, 6\).*select="),
    "branches": (lambda x: [x, x], {}, r"2 tensors.*select="),
    "None": (lambda x: None, {}, "expected a tensor in its output, got NoneType"),
    "int": (lambda x: x.long(), {}, "torch.int64"),
    "bool": (lambda x: x > 0, {}, "torch.bool"),
    "complex": (lambda x: x + 1j, {}, "torch.complex64.*view_as_real"),
    "empty": (lambda x: x[:0], {}, r"empty tensor of shape \(0, 6\)"),
    "sparse": (lambda x: x.detach().to_sparse(), {}, "sparse.*to_dense"),
    "nested": (
        lambda x: torch.nested.as_nested_tensor([x[:3], x[3:]], layout=torch.jagged), {},
        "nested tensor.*to_padded_tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_outputs_without_a_spectrum(case):
    function, options, message = BAD[case]
    with pytest.raises(TypeError, match=f"layer: .*{message}"):
        puts(function, **options)


def test_packed_sequences():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(D, 5, batch_first=True)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
            return self.rnn(packed)[0]

    model, x = Net(), torch.randn(N, 9, D)
    lengths = torch.arange(N) % 9 + 1
    padded, _ = nn.utils.rnn.pad_packed_sequence(model(x, lengths), batch_first=True)
    expected = torch.stack([row[:n].mean(0) for row, n in zip(padded, lengths, strict=True)])
    got = measure(model, x, lengths, layers="rnn")["rnn"]
    assert got == pytest.approx(entropy(expected), abs=1e-5)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x, attention_mask=None):
        return self.linear(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_padding_is_not_pooled(dtype):
    model, x = Masked().to(dtype), torch.randn(N, 9, D, dtype=dtype, requires_grad=True)
    mask = torch.arange(9)[None] < torch.arange(N)[:, None] % 9 + 1
    y = model(x).double()
    matrix = (y * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    for pool in ("mean", "masked"):
        with SESRegularizer(model, layers="linear", pool=pool) as reg:
            model(x, attention_mask=mask.long())
            loss = reg.loss()
            assert "attention_mask" in reg.summary()
        assert reg.entropies["linear"] == pytest.approx(entropy(matrix), abs=1e-5)
        (ours,) = torch.autograd.grad(loss, x)
    expected = 0.01 * (reference.spectral_entropy(matrix) - 0.7 * math.log(D)) ** 2
    (theirs,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(ours, theirs, rtol=3e-2 if dtype == torch.bfloat16 else 1e-4,
                               atol=1e-7 if dtype != torch.bfloat16 else 1e-5)  # fmt: skip


def test_padding_under_autocast():
    """The mean is in float32, though the layer puts out bfloat16."""
    model, x = Masked(), torch.randn(N, 9, D) + 30
    mask = torch.arange(9)[None] < torch.arange(N)[:, None] % 9 + 1
    reg = SESRegularizer(model, layers="linear", lambda_ses=0)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, attention_mask=mask)
        reg.loss()
    assert y.dtype == torch.bfloat16
    matrix = (y.double() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    assert reg.entropies["linear"] == pytest.approx(entropy(matrix), abs=1e-5)
    narrow = entropy(matrix.bfloat16().double())  # what a mean in half precision would give
    assert abs(narrow - entropy(matrix)) > 1e-3


def test_an_encoder_and_a_decoder_have_masks_of_their_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x, attention_mask=None, decoder_attention_mask=None):
            return self.decoder(self.encoder(x))

    class DecoderOnly(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(D, D)

        def forward(self, x, attention_mask=None):
            return self.decoder(x)

    x = torch.randn(N, 9, D)
    masks = [torch.arange(9)[None] < torch.arange(N)[:, None] % 9 + 1, torch.rand(N, 9) < 0.5]
    masks[1][:, 0] = True
    names = ("attention_mask", "decoder_attention_mask")

    def mean(y, mask):
        return (y * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    for model, given, expected in (
        (Net(), 2, {"encoder": 0, "decoder": 1}),
        (Net(), 1, {"encoder": 0, "decoder": None}),  # T5 makes its decoder's inputs of labels
        (DecoderOnly(), 1, {"decoder": 0}),  # OPT
    ):
        found = outputs(model, x)
        with SESRegularizer(model, layers=list(expected), lambda_ses=0) as reg:
            model(x, **dict(zip(names[:given], masks, strict=False)))
            reg.loss()
        for name, which in expected.items():
            y = found[name]
            matrix = y.mean(1) if which is None else mean(y, masks[which])
            assert reg.entropies[name] == pytest.approx(entropy(matrix), abs=1e-5)


def test_a_mask_of_other_tokens_is_said():
    """One of spectrogram frames, say, of which a convolution makes half as many tokens."""
    model, x = Masked(), torch.randn(N, 9, D)
    with SESRegularizer(model, layers="linear") as reg:
        model(x, attention_mask=torch.ones(N, 18))
        with pytest.warns(UserWarning, match=r"attention_mask of shape \(\d+, 18\) is of no"):
            reg.loss()
    assert reg.entropies["linear"] == pytest.approx(entropy(model(x).mean(1)), abs=1e-5)
    with warnings.catch_warnings():  # once, and not where there are no tokens to average
        warnings.simplefilter("error")
        for pool in ("none", "cls"):
            with SESRegularizer(model, layers="linear", pool=pool) as reg:
                model(x, attention_mask=torch.ones(N, 18))
                reg.loss()


def test_a_mask_of_one_model_of_two_is_its_own():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.image = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x, y, attention_mask=None):
            return self.text(x).mean(1) + self.image(y).mean(1)

    model, mask = Both(), torch.arange(9)[None] < torch.arange(N)[:, None] % 9 + 1
    with warnings.catch_warnings(), SESRegularizer(model, layers=["text", "image"]) as reg:
        warnings.simplefilter("error")
        model(torch.randn(N, 9, D), torch.randn(N, 16, D), attention_mask=mask)
        reg.loss()


def test_masked_needs_a_mask():
    with pytest.raises(ValueError, match='linear: pool="masked" found no mask'):
        measure(Masked(), torch.randn(N, 9, D), layers="linear", pool="masked")


def test_padding_of_torch_s_encoder():
    """src_key_padding_mask is True where there is padding, and reaches the layers itself."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    x, padding = torch.randn(N, 9, 16), torch.arange(9)[None] > torch.arange(N)[:, None] % 9

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            return self.encoder(x, src_key_padding_mask=padding)

    keep = ~padding[:, :, None]
    expected = (Net()(x) * keep).sum(1) / keep.sum(1)
    got = measure(Net(), x, layers="encoder.layers.0")["encoder.layers.0"]
    assert got == pytest.approx(entropy(expected), abs=1e-5)


def test_in_place_consumers():
    """The entropy is that of what the layer put out, not of what became of it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(D, D), nn.ReLU(inplace=True)

        def forward(self, x):
            h = self.relu(self.linear(x))
            h += 3 * x
            return h

    model = Net()
    for shape, pool, matrix in (
        ((N, D), "mean", lambda y: y),
        ((N, 5, D), "cls", lambda y: y[:, 0]),
        ((N, 5, D), "tokens", lambda y: y.flatten(0, 1)),
        ((N, 5, D), "none", lambda y: y.flatten(0, 1)),
        ((N, 5, D), lambda y: y[:, 2], lambda y: y[:, 2]),
        ((N, 5, D), lambda y: y.flatten(0, 1), lambda y: y.flatten(0, 1)),
        ((N, D), lambda y: y, lambda y: y),
    ):
        x = torch.randn(shape)
        y = matrix(model.linear(x))
        with SESRegularizer(model, layers="linear", pool=pool, lambda_ses=1.0) as reg:
            model(x)
            loss = reg.loss()
            ours = torch.autograd.grad(loss, model.linear.weight)[0]
        assert reg.entropies["linear"] == pytest.approx(entropy(y), abs=1e-5)
        h = reference.spectral_entropy(y.double())
        theirs = torch.autograd.grad((h - 0.7 * math.log(D)) ** 2, model.linear.weight)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_no_variance_is_said():
    """Attention weights sum to one: their mean over queries and keys is that of rounding."""

    class Weights(nn.Module):
        def forward(self, x):  # (N, heads, T, T)
            return torch.softmax(x, -1)

    model = nn.Sequential(Weights())
    x = torch.randn(N, 4, 7, 7, requires_grad=True)
    with pytest.warns(UserWarning, match=r"0 has no variance.*attention_weights"):
        measure(model, x, layers="0")


def test_vmap_is_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    SESRegularizer(model, layers="0")
    with pytest.raises(ValueError, match=r"0: it runs under torch.vmap.*disabled\(\)"):
        torch.vmap(model)(torch.randn(5, 3, 8, 8))


def test_parts_that_are_called_on_their_own():
    """The batch is that of the part: here two views of 12 images are joined."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))

    model, x = Module(), torch.randn(N, D)
    with SESRegularizer(model, layers="backbone.1", lambda_ses=0) as reg:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.backbone(x)
            reg.loss()
        assert reg.entropies["backbone.1"] == pytest.approx(entropy(model.backbone(x)), abs=1e-5)
        reg.begin()
        model.backbone[1](model.backbone[0](x))
        with pytest.warns(UserWarning, match=r"backbone.1: it ran outside of a call.*batch_axis=0"):
            reg.loss()


def test_a_call_without_a_tensor_is_said():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, count):
            return self.linear(torch.ones(count, 1) * torch.randn(count, D))

    with pytest.warns(UserWarning, match="linear: the model was called with no tensor"):
        measure(Net(), N, layers="linear")


# ---- layers that do not run ----


class Calls(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.many, self.run = nn.ModuleList([nn.Linear(D, D)]), forward

    def forward(self, x):
        return self.run(self, x)


ABSENT = {
    "never called": (lambda m, x: m.a(x), ["a", "b"], "b did not run"),
    ".forward()": (lambda m, x: m.b.forward(m.a(x)), ["a", "b"], r"b did not run.*\.forward\(\)"),
    "a list": (lambda m, x: m.many[0](m.a(x)), ["a", "many"], "many did not run.*ModuleList"),
    "reentrant": (
        lambda m, x: m.a(checkpoint(m.b, x.requires_grad_(), use_reentrant=True)), ["a", "b"],
        "b did not run.*use_reentrant=False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ABSENT)
def test_layers_that_never_run_are_named(case):
    forward, layers, message = ABSENT[case]
    model = Calls(forward)
    with SESRegularizer(model, layers=layers) as reg:
        model(torch.randn(N, D))
        with pytest.raises(RuntimeError, match=f"SESRegularizer: {message}.*strict=False"):
            reg.loss()
    with SESRegularizer(model, layers=layers, strict=False) as reg:
        model(torch.randn(N, D))
        reg.loss()
        assert list(reg.entropies) == ["a"]


def test_out_proj_of_attention_is_never_called():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    reg = SESRegularizer(model, layers=["*.out_proj", "*.linear2"])
    model(torch.randn(N, 5, 16))
    with pytest.raises(RuntimeError, match=r"layers.0.self_attn.out_proj did not run"):
        reg.loss()


def test_layers_that_are_skipped_later():
    """Layer drop: once it has run, a layer may be missing from a step."""
    model = Calls(lambda m, x: m.b(m.a(x)))
    reg = SESRegularizer(model, layers=["a", "b"])
    model(torch.randn(N, D))
    reg.loss()
    model.run = lambda m, x: m.a(x)
    model(torch.randn(N, D))
    reg.loss()
    assert list(reg.entropies) == ["a"]


class BatchNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, D, 3), nn.BatchNorm2d(D)

    def forward(self, x):
        return self.bn(self.conv(x))


REPLACE = {
    "SyncBatchNorm": (nn.SyncBatchNorm.convert_sync_batchnorm, ["bn"]),
    "assignment": (lambda m: setattr(m, "bn", nn.BatchNorm2d(D)), ["bn"]),
    "beside others": (lambda m: setattr(m, "bn", nn.BatchNorm2d(D)), ["conv", "bn"]),
    "deletion": (lambda m: setattr(m, "bn", nn.Identity()), ["conv", "bn"]),
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("after_a_step", [True, False])
@pytest.mark.parametrize("case", REPLACE)
def test_replaced_layers_are_named(case, after_a_step, keep):
    replace, layers = REPLACE[case]
    model, x = BatchNorms(), torch.randn(N, 3, 8, 8)
    reg = SESRegularizer(model, layers=layers, strict=False)
    kept = model.bn if keep else None
    if after_a_step:
        model(x)
        reg.loss()
    replace(model)
    if case != "SyncBatchNorm":  # which runs on a GPU alone
        model(x)
    with pytest.raises(RuntimeError, match=r"bn were replaced in the model.*make a new"):
        reg.loss()
    del kept


def test_the_same_features_are_hooked_once():
    """timm's SelectAdaptivePool2d holds the pool that it calls."""

    class SelectAdaptivePool2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            return self.pool(x).flatten(1)

    class BasicBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.b(self.a(x))

    model = nn.Sequential()
    model.add_module("blocks", nn.Sequential(BasicBlock(), BasicBlock()))
    model.add_module("global_pool", SelectAdaptivePool2d())
    assert SESRegularizer(model).layers == ("blocks.0", "blocks.1", "global_pool")


# ---- checkpointing ----


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


BETWEEN = {
    "every_k": lambda reg, model: None,
    "eval": lambda reg, model: model.eval(),
    "close": lambda reg, model: reg.close(),
    "disabled": lambda reg, model: reg.disabled().__enter__(),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("pool", [lambda x: x.exp() * x, lambda x: x, "mean"])
def test_checkpointing_recomputes_the_same_graph(between, pool):
    """Whatever changes between forward and backward, and whatever pool= saves for its gradient."""
    gradients = []
    for wrap in (Checkpointed, lambda: Checkpointed().body):
        torch.manual_seed(0)
        model = wrap()
        reg = SESRegularizer(model, layers=nn.Linear, every_k=2, pool=pool, lambda_ses=1.0)
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
        task = model(x).square().mean()
        loss = task + reg.loss()
        BETWEEN[between](reg, model)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_what_pool_saves_may_not_change():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x):
            return self.linear(x).mul_(2)

    model = Net()
    reg = SESRegularizer(model, layers="linear", pool=lambda x: x * x)
    model(torch.randn(N, D))
    with pytest.raises(RuntimeError, match="changed in place"):
        reg.loss().backward()


# ---- copies ----


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
        self.reg = SESRegularizer(self, layers="body.*", beta={"body.0": 0.4, "body.1": 0.6})

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_module_that_holds_a_regulariser_can_be_copied(how):
    model, x = Holds(), torch.randn(N, D)
    model(x)
    model.reg.loss()
    copied = how(model)
    assert copied.reg.step == 1
    assert not copied.body[0]._forward_hooks or copied.body[0](x) is not None
    copied(x)
    with pytest.raises(RuntimeError, match="this SESRegularizer is a copy and has no hooks"):
        copied.reg.loss()
    model(x)
    assert model.reg.loss() > 0
    assert model.reg.step == 2


def test_a_saved_model_loads_without_the_package(tmp_path):
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
    SESRegularizer(model, layers=nn.Linear)
    torch.save(model, tmp_path / "model.pt")
    x = torch.randn(N, D)
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "ses_kernels":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
model = torch.load(r"{tmp_path}/model.pt", weights_only=False)
torch.save(model(torch.load(r"{tmp_path}/x.pt")), r"{tmp_path}/y.pt")
assert "ses_kernels" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(x))


def _in_a_process(rank, model, queue):
    queue.put(model(torch.ones(4, D)).sum().item())


def test_spawned_processes():
    model = nn.Sequential(nn.Linear(D, D))
    SESRegularizer(model, layers="0", pool=lambda x: x)  # a function cannot be pickled
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    torch.multiprocessing.spawn(_in_a_process, (model, queue), nprocs=1)
    assert queue.get() == pytest.approx(model(torch.ones(4, D)).sum().item(), rel=1e-5)


def test_a_buffer_of_a_copy():
    """torch.save into memory, as a checkpoint callback does."""
    model = Holds()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).reg.layers == ()


# ---- compiled ----


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layouts(dynamic):
    """Sequence-first, channels-last, windows and masks inside of one graph."""
    torch.compiler.reset()
    layer = nn.TransformerEncoderLayer(D, 2, 12, dropout=0.0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.windows = nn.TransformerEncoder(layer, 1), Windows(D, 2)
            self.conv = nn.Conv1d(D, D, 1)

        def forward(self, x):  # (T, N, D)
            x = self.encoder(x)
            y = self.windows(x.transpose(0, 1).unflatten(1, (4, 2)))
            return self.conv(y.flatten(1, 2).mT)

    model = Net()
    names = ["encoder.layers.0", "windows.attend", "conv"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for samples in (N + 1, N + 3):
        x = torch.randn(8, samples, D)
        expected = measure(model, x, layers=names)
        torch.compiler.reset()
        assert measure_compiled(model, compiled, x, names) == pytest.approx(expected, abs=1e-5)


def measure_compiled(model, compiled, x, names):
    with SESRegularizer(model, lambda_ses=0, layers=names) as reg:
        for _ in range(2):
            compiled(x)
            reg.loss()
        assert "windows" in reg.summary()
        return reg.entropies


def test_windows_of_a_length_that_may_be_the_batch_s_is_an_error():
    """(T, N, D) = (8, 24, D): 48 windows are two of each sample, or six of each of 8."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.windows = nn.GRU(D, D), Windows(D, 2)

        def forward(self, x):
            return self.windows(self.rnn(x)[0].transpose(0, 1).unflatten(1, (4, 2)))

    model = Net()
    with pytest.raises(ValueError, match=r"attend: no axis .*\(48, 4, 6\).*8 or 24.*batch_axis="):
        measure(model, torch.randn(8, N, D), layers="windows.attend")
    x = torch.randn(8, N, D)
    expected = outputs(model, x)["windows.attend"]
    got = measure(model, x, layers="windows.attend", batch_axis=0)["windows.attend"]
    assert got == pytest.approx(entropy(expected.mean(1)), abs=1e-5)


# ---- random networks ----


class Random(nn.Module):
    """A network drawn at random, and the matrix of each of its layers, computed by itself."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.n = draw.choice([5, 8, 13, 24])
        self.matrices = {}
        kind = draw.choice(["conv1d", "conv2d", "conv3d", "last", "tokens", "sequences", "rnn",
                            "windows"])  # fmt: skip
        self.kind, self.layers = kind, nn.ModuleList()
        width = draw.choice([4, 6, 10])
        space = [draw.choice([3, 4, 5, 8]) for _ in range(3)]
        if kind.startswith("conv"):
            dims = int(kind[4])
            conv = getattr(nn, f"Conv{kind[4:]}")
            norm = getattr(nn, f"BatchNorm{kind[4:]}")
            self.shape = (self.n, width, *space[:dims])
            for _ in range(draw.randint(1, 3)):
                new = draw.choice([4, 6, 8])
                part = draw.choice([
                    lambda w, v: conv(w, v, 1),
                    lambda w, v: nn.Sequential(conv(w, v, 3, padding=1), norm(v), nn.ReLU()),
                    lambda w, v: nn.Sequential(conv(w, v, 1), nn.GroupNorm(2, v), nn.GELU()),
                ])  # fmt: skip
                self.layers.append(part(width, new))
                width = new
        elif kind == "last":
            self.shape = (self.n, *space[:2], width)
            for _ in range(draw.randint(1, 3)):
                self.layers.append(draw.choice([
                    lambda w: nn.Sequential(nn.LayerNorm(w), nn.Linear(w, w), nn.GELU()),
                    lambda w: Windows(w, 1),
                    lambda w: nn.Linear(w, w),
                ])(width))  # fmt: skip
        elif kind == "windows":
            self.shape = (self.n, 4, 6, width)
            self.layers.extend(Windows(width, 2) for _ in range(draw.randint(1, 2)))
        else:
            first = kind == "tokens" or (kind == "rnn" and draw.random() < 0.5)
            self.first, length = first, draw.choice([3, 7, 8, 13])
            self.shape = (self.n, length, width) if first else (length, self.n, width)
            for _ in range(draw.randint(1, 2)):
                if kind == "rnn":
                    rnn = draw.choice([nn.LSTM, nn.GRU, nn.RNN])
                    self.layers.append(rnn(width, width, batch_first=first))
                else:
                    layer = nn.TransformerEncoderLayer(
                        width, 2, 2 * width, dropout=0.0, batch_first=first,
                        norm_first=draw.random() < 0.5,
                    )  # fmt: skip
                    self.layers.append(layer)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
            if self.kind.startswith("conv"):
                matrix = x.flatten(2).mean(2)
            elif self.kind in ("last", "windows"):
                matrix = x.mean((1, 2))
            else:
                matrix = x.mean(1 if self.first else 0)
            self.matrices[f"layers.{i}"] = matrix
            if isinstance(layer, Windows):
                # A linear layer commutes with the mean over positions.
                self.matrices[f"layers.{i}.attend"] = matrix
        return x


@pytest.mark.parametrize("seeds", [range(i, 200, 10) for i in range(10)], ids=str)
def test_random_networks(seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        model = Random(seed)
        x = torch.randn(model.shape)
        names = ["layers.?"]
        if any(isinstance(layer, Windows) for layer in model.layers):
            names.append("*.attend")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # too few samples for the target, N = T
            got = measure(model, x, layers=names)
        assert set(got) == set(model.matrices), (seed, model)
        for name, matrix in model.matrices.items():
            assert got[name] == pytest.approx(entropy(matrix), abs=2e-5), (seed, name, model)


def test_the_reference_of_the_random_networks_is_sharp():
    """Another axis gives another entropy: the test above could fail."""
    x = F.relu(torch.randn(13, 8, 13))
    assert abs(entropy(x.mean(1)) - entropy(x.mean(2))) > 1e-2
    assert abs(entropy(x.mean(1)) - entropy(x.mean(0))) > 1e-2
