"""A small residual network, and its training step with and without Spectral Entropy Shaping."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ses_kernels

WIDTHS = (16, 16, 32, 32, 64, 64)  # d_l of every block


class Block(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        stride = d_out // d_in  # a wider block halves the image
        self.branch = nn.Sequential(
            nn.Conv2d(d_in, d_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(d_out),
            nn.ReLU(),
            nn.Conv2d(d_out, d_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(d_out),
        )
        self.skip = nn.Identity() if d_in == d_out else nn.Conv2d(d_in, d_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.skip(x))


class ResNet(nn.Module):
    def __init__(self, stem_stride: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTHS[0], 3, stem_stride, padding=1)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairwise((WIDTHS[0], *WIDTHS)))
        self.head = nn.Linear(WIDTHS[-1], 10)

    def features(self, x: Tensor) -> list[Tensor]:  # (B, 1, H, W) -> (B, d, h, w) of every block
        x, features = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return features

    def classify(self, features: list[Tensor]) -> Tensor:  # -> (B, 10)
        return self.head(features[-1].mean((-2, -1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class Run:
    """A network in training: model, optimiser, penalty, and what was seen on the way."""

    def __init__(
        self,
        seed: int,
        lambda_ses: float,
        beta: float = 0.7,
        every_k: int = 1,
        stem_stride: int = 1,
    ) -> None:
        torch.manual_seed(seed)  # runs of one seed start from the same weights
        self.model = ResNet(stem_stride)
        self.optimiser = torch.optim.SGD(self.model.parameters(), 0.05, 0.9, weight_decay=5e-4)
        self.ses = None
        if lambda_ses:
            self.ses = ses_kernels.SESRegularizer(
                self.model, layers=Block, beta=beta, lambda_ses=lambda_ses, every_k=every_k
            )
        self.targets = [beta * math.log(d) for d in WIDTHS]
        self.every_k = every_k
        self.entropies: list[list[float]] = []  # (steps with the penalty, blocks)
        self.seconds: list[float] = []  # of every step

    def step(self, images: Tensor, labels: Tensor) -> float:
        start = time.perf_counter()
        if self.ses:
            loss = F.cross_entropy(self.model(images), labels) + self.ses.loss()
        else:
            features = self.model.features(images)
            loss = F.cross_entropy(self.model.classify(features), labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.seconds.append(time.perf_counter() - start)
        # Outside the time of the step; without the penalty the entropies are only watched.
        if not self.ses:
            self.entropies.append(entropies(features))
        elif (len(self.seconds) - 1) % self.every_k == 0:
            self.entropies.append(list(self.ses.entropies.values()))
        return loss.item()

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "ses": self.ses and self.ses.state_dict(),
            "entropies": self.entropies,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.ses:
            self.ses.load_state_dict(state["ses"])
        self.entropies, self.seconds = state["entropies"], state["seconds"]

    def overhead(self, plain: Run) -> float:
        """Mean time of a step over that of ``plain``, which took each step just before or after.

        The median of the paired ratios, over the steps with the penalty and over those that skip
        it, weighted by how many there are: a mean would be at the mercy of the slowest steps.
        """
        ratios = torch.tensor(self.seconds) / torch.tensor(plain.seconds)
        computed = torch.arange(len(ratios)) % self.every_k == 0
        kinds = [r for r in (ratios[computed], ratios[~computed]) if len(r)]
        return sum(len(r) * r.median().item() for r in kinds) / len(ratios)


@torch.no_grad()
def entropies(features: list[Tensor]) -> list[float]:  # (B, d, h, w) of every block, in nats
    return ses_kernels.spectral_entropies([x.mean((-2, -1)) for x in features]).tolist()
