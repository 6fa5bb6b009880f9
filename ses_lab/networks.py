"""Networks for small images and 2-D points: float inputs in [0, 1] in, logits (N, classes) out.

ResNet: He et al. (CVPR 2016), with the 3 x 3 stem without max-pooling that is usual on CIFAR, or in
their three-stage form of 16, 32 and 64 channels. Wide ResNet: Zagoruyko & Komodakis (BMVC 2016).
ViT: Dosovitskiy et al. (ICLR 2021), at the width of DeiT-tiny, Touvron et al. (ICML 2021).

Each has ``stages`` and ``classifier``, dotted names of its modules, and ``ses_layers``: the
``layers`` of SESRegularizer, None where its defaults know the blocks by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Statistic = float | Sequence[float] | None


class Normalize(nn.Module):
    """(x - mean) / std per channel, as part of the model: attacks and probes see raw inputs.

    ``size`` is the side of the square images, None for points (N, channels). TypeError for inputs
    that are not floats, ValueError for ones of other shape.
    """

    def __init__(
        self, channels: int, size: int | None, mean: Statistic = None, std: Statistic = None
    ) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        shape = (channels,) if size is None else (channels, 1, 1)
        for name, value, default in ("mean", mean, 0.0), ("std", std, 1.0):
            value = default if value is None else value
            value = torch.as_tensor(value, dtype=torch.float32).flatten()
            if len(value) not in (1, channels):
                raise ValueError(f"{name} has {len(value)} values for {channels} channels")
            self.register_buffer(name, value.expand(channels).reshape(shape).clone())

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"expected floats in [0, 1], got {x.dtype}; divide uint8 images by 255")
        shape = (self.channels,) if self.size is None else (self.channels, self.size, self.size)
        if x.shape[1:] != shape:
            expected = f"(N, {', '.join(map(str, shape))})"
            raise ValueError(f"expected inputs of shape {expected}, got {tuple(x.shape)}")
        return (x - self.mean) / self.std


# ---- residual networks --------------------------------------------------------------------------


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class Projection(nn.Sequential):
    """The shortcut of a block that changes shape: option B of He et al."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class Padding(nn.Module):
    """Option A of He et al.: every stride-th pixel, zeros in the new channels; no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))


def _shortcut(kind: type[nn.Module], inputs: int, outputs: int, stride: int) -> nn.Module:
    same = stride == 1 and inputs == outputs
    return nn.Identity() if same else kind(inputs, outputs, stride)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _shortcut(shortcut, inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: type[nn.Module]) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(shortcut, inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet(nn.Module):
    """Stages of residual blocks; each but the first halves the side and doubles the width."""

    classifier, ses_layers = "fc", None

    def __init__(
        self,
        normalize: Normalize,
        classes: int,
        *,
        depths: Sequence[int],
        block: type[nn.Module] = BasicBlock,
        width: int = 64,
        shortcut: type[nn.Module] = Projection,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1, self.bn1 = _conv(normalize.channels, width, 3), nn.BatchNorm2d(width)
        self.stages = tuple(f"layer{i + 1}" for i in range(len(depths)))
        inputs = width
        for i, (stage, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(block(inputs, width << i, 2 if i and not j else 1, shortcut))
                inputs = block.expansion * width << i
            self.add_module(stage, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, classes)
        x = F.relu(self.bn1(self.conv1(self.normalize(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(self.avgpool(x).flatten(1))


class WideBasicBlock(nn.Module):
    """Normalised before each convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width, 3)
        same = stride == 1 and inputs == width
        self.shortcut = None if same else _conv(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class WideResNet(nn.Module):
    """Three stages of (depth - 4) / 6 blocks, ``widen`` times as wide as those of a ResNet."""

    stages, classifier, ses_layers = ("layer1", "layer2", "layer3"), "fc", None

    def __init__(
        self, normalize: Normalize, classes: int, *, depth: int = 28, widen: int = 10
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"the depth of a Wide ResNet is 6 n + 4, n >= 1; got {depth}")
        self.normalize = normalize
        self.conv1 = _conv(normalize.channels, 16, 3)
        inputs = 16
        for i, stage in enumerate(self.stages):
            width, blocks = 16 * widen << i, []
            for j in range((depth - 4) // 6):
                blocks.append(WideBasicBlock(inputs, width, 2 if i and not j else 1))
                inputs = width
            self.add_module(stage, nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(inputs)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, classes)
        x = self.layer3(self.layer2(self.layer1(self.conv1(self.normalize(x)))))
        return self.fc(self.avgpool(F.relu(self.bn(x))).flatten(1))


# ---- transformers and points --------------------------------------------------------------------


class Attention(nn.Module):
    """With ``weights`` its ``softmax`` is a module, whose output a hook sees: (N, heads, T, T)."""

    def __init__(self, width: int, heads: int, dropout: float, weights: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.softmax = nn.Softmax(-1) if weights else None

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.softmax is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = self.softmax(q @ k.mT / q.shape[-1] ** 0.5) @ v
        return F.dropout(self.proj(out.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(
        self, width: int, heads: int, drop_path: float, dropout: float, weights: bool
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout, weights)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, 4 * width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._kept(self.attn(self.norm1(x)))
        return x + self._kept(self.mlp(self.norm2(x)))

    def _kept(self, branch: Tensor) -> Tensor:
        """Stochastic depth: whole samples left out, the others scaled up for the mean to stay."""
        if not self.drop_path or not self.training:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


class VisionTransformer(nn.Module):
    """Stages are its blocks, (N, 1 + patches, D) with the class token first.

    ``drop_path`` is the share of samples that the last block leaves out in training; it rises
    linearly from 0 at the first (Huang et al., ECCV 2016). ``dropout``: of the embeddings and
    behind every dense layer but those of Q, K and V. ``attention_weights``: attention by a softmax
    that hooks can reach, ``blocks.*.attn.softmax``, which is slower than the fused kernel.
    """

    classifier, ses_layers = "head", None

    def __init__(
        self,
        normalize: Normalize,
        classes: int,
        *,
        embed_dim: int = 192,
        depth: int = 12,
        heads: int | None = None,
        patch: int = 4,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        attention_weights: bool = False,
    ) -> None:
        super().__init__()
        heads = heads or max(1, embed_dim // 64)  # DeiT's 64 channels a head
        size = normalize.size
        if size is None or size % patch or embed_dim % heads:
            raise ValueError(
                f"patches of {patch} must tile images of size {size}, and {heads} heads divide "
                f"embed_dim {embed_dim}; pass patch= or heads="
            )
        if not 0 <= drop_path < 1 or not 0 <= dropout < 1:
            raise ValueError(f"drop_path and dropout are in [0, 1), got {drop_path}, {dropout}")
        self.normalize, self.dropout = normalize, dropout
        self.patch_embed = nn.Conv2d(normalize.channels, embed_dim, patch, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (size // patch) ** 2, embed_dim))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(Block(embed_dim, heads, rate, dropout, attention_weights) for rate in rates)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, classes)
        self.stages = tuple(f"blocks.{i}" for i in range(depth))
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for weight in (self.cls_token, self.pos_embed, *(module.weight for module in linear)):
            nn.init.trunc_normal_(weight, std=0.02)
        for module in linear:
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, classes)
        x = self.patch_embed(self.normalize(x)).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = F.dropout(x, self.dropout, self.training)
        return self.head(self.norm(self.blocks(x))[:, 0])


class MLP(nn.Module):
    """``depth`` hidden layers with ReLU, for points or flattened images."""

    classifier = "head"

    def __init__(
        self, normalize: Normalize, classes: int, *, width: int = 64, depth: int = 3
    ) -> None:
        super().__init__()
        self.normalize = normalize
        inputs = normalize.channels * (normalize.size or 1) ** 2
        widths = [inputs] + [width] * depth
        self.hidden = nn.Sequential(
            *(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths))
        )
        self.head = nn.Linear(width, classes)
        self.stages = tuple(f"hidden.{i}" for i in range(depth))
        self.ses_layers = self.stages  # no block that SESRegularizer would know by name

    def forward(self, x: Tensor) -> Tensor:  # (N, channels[, H, W]) -> (N, classes)
        return self.head(self.hidden(self.normalize(x).flatten(1)))
