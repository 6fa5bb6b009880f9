"""The shapes measured: activations hooked in real networks, and batches of small matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    name: str  # no spaces: pytest's -k picks by it
    layers: tuple[tuple[int, ...], ...]  # (B, d) a layer, or one (batch, B, d)

    @property
    def numel(self) -> int:
        return sum(math.prod(layer) for layer in self.layers)

    def tensors(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """ReLU features: the large common mean of real activations, and rows of one sign."""
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(layer, generator=generator).relu_().to(device, dtype)
            for layer in self.layers
        ]


def batch_of(batch: int, n: int) -> Shape:
    """Matrices twice as wide as high."""
    return Shape(f"{batch}x{n}x{2 * n}", ((batch, n, 2 * n),))


def affordable(batch: int, n: int) -> bool:
    """Whether it is one matrix, or two cores need less than a second for torch.linalg.eigh."""
    return batch == 1 or batch * n**3 <= 1 << 30


def _hooks(batch: int, widths: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple((batch, width) for width in widths)


_RESNET18 = [64, 64, 128, 128, 256, 256, 512, 512, 512]
_WRN28_10 = [160] * 4 + [320] * 4 + [640] * 5

SHAPES = [
    Shape("single-256x2048", ((256, 2048),)),
    Shape("ResNet-18-B256", _hooks(256, _RESNET18)),
    Shape("ResNet-18-B512", _hooks(512, _RESNET18)),
    Shape("ResNet-50-B256", _hooks(256, [2048] * 4)),
    Shape("WRN-28-10-B256", _hooks(256, _WRN28_10)),
    # 256 images x 12 heads, 197 tokens x 64
    Shape("ViT-B-heads-3072x197x64", ((3072, 197, 64),)),
    # n = 8..128: the solver's share of the cost grows with n. All sizes: bench_sweep.py.
    batch_of(4096, 8),
    batch_of(4096, 16),
    batch_of(1024, 32),
    batch_of(256, 64),
    batch_of(64, 128),
]
