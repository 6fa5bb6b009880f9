"""Spectral entropy at every block of a small residual network, on handwritten digits.

Two equal networks learn the 8 x 8 digits bundled with scikit-learn: one from the cross-entropy
alone, one with a penalty that pulls the entropy H_l of each block's features towards beta log d_l:

    loss = cross_entropy + lambda * sum_l (H_l - beta log d_l)^2

Each step trains both, one after the other, so their times are compared under the same conditions.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import ses_kernels

WIDTHS = (16, 16, 32, 32, 64, 64)
BATCH = 256


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


class Network:
    """The model, its optimiser, and the features that forward hooks collect."""

    def __init__(self, penalty: float, beta: float) -> None:
        torch.manual_seed(0)  # both networks start from the same weights
        blocks = [Block(a, b) for a, b in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)]
        self.model = nn.Sequential(
            nn.Conv2d(1, WIDTHS[0], 3, padding=1),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(WIDTHS[-1], 10),
        )
        self.optimiser = torch.optim.SGD(self.model.parameters(), 0.05, 0.9, weight_decay=5e-4)
        self.penalty = penalty
        self.target = beta * torch.tensor([math.log(d) for d in WIDTHS])
        self.features: list[Tensor] = []
        for block in blocks:
            block.register_forward_hook(self._collect)
        self.entropies: list[list[float]] = []  # a row per step, a column per block
        self.seconds: list[float] = []

    def _collect(self, block: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.features.append(output.mean((-2, -1)))  # (B, d): the mean over the image

    def step(self, images: Tensor, labels: Tensor) -> float:
        start = time.perf_counter()
        self.features.clear()
        loss = F.cross_entropy(self.model(images), labels)
        if self.penalty:
            entropies = ses_kernels.spectral_entropies(self.features)  # (blocks,) in one call
            loss = loss + self.penalty * (entropies - self.target).square().sum()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.seconds.append(time.perf_counter() - start)
        if not self.penalty:  # watched all the same, outside the time of the step
            with torch.no_grad():
                entropies = ses_kernels.spectral_entropies(self.features)
        self.entropies.append(entropies.tolist())
        return loss.item()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Leaves the entropies' features behind: those of all these images."""
        self.model.eval()
        self.features.clear()
        return (self.model(images).argmax(-1) == labels).float().mean().item()


def train(plain: Network, shaped: Network, images: Tensor, labels: Tensor, epochs: int) -> None:
    order = torch.Generator().manual_seed(0)
    batches = len(images) // BATCH
    progress = tqdm(range(epochs * batches), desc="training", mininterval=0.5)
    for i in progress:
        if i % batches == 0:
            shuffled = torch.randperm(len(images), generator=order)
        batch = shuffled[i % batches * BATCH :][:BATCH]
        # Each goes first every other time: the second finds the batch in cache.
        losses = {}
        for network in (plain, shaped) if i % 2 else (shaped, plain):
            losses[network] = network.step(images[batch], labels[batch])
        pairs = zip(shaped.entropies[-1], shaped.target.tolist(), strict=True)
        progress.set_postfix_str(
            f"loss {losses[shaped]:.3f} H/target " + " ".join(f"{h:.1f}/{t:.1f}" for h, t in pairs),
            refresh=False,
        )


def report(plain: Network, shaped: Network, images: Tensor, labels: Tensor) -> str:
    accuracies = [network.accuracy(images, labels) for network in (plain, shaped)]
    seconds = [torch.tensor(network.seconds) for network in (plain, shaped)]
    times = [1e3 * s.median().item() for s in seconds]
    overhead = (seconds[1] / seconds[0]).median().item()
    lines = [
        f"{'on the test set':24}{'without':>16}{'with':>16}",
        f"{'accuracy':24}{accuracies[0]:16.2%}{accuracies[1]:16.2%}",
        f"{'ms per step, median':24}{times[0]:16.1f}{times[1]:16.1f}  ({overhead:.2f}x, paired)",
        "",
        f"{'layer':>5}{'d':>5}{'target H':>10}{'H without':>12}{'H with':>9}"
        f"{'rank without':>15}{'rank with':>12}",
    ]
    entropies = [ses_kernels.spectral_entropies(n.features).tolist() for n in (plain, shaped)]
    ranks = [[ses_kernels.effective_rank(x).item() for x in n.features] for n in (plain, shaped)]
    for i, d in enumerate(WIDTHS):
        lines.append(
            f"{i:5}{d:5}{shaped.target[i]:10.2f}{entropies[0][i]:12.2f}{entropies[1][i]:9.2f}"
            f"{ranks[0][i]:15.1f}{ranks[1][i]:12.1f}"
        )
    return "\n".join(lines)


def plot(plain: Network, shaped: Network, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, network, title in zip(axes, (plain, shaped), ("without", "with"), strict=True):
        for i, history in enumerate(zip(*network.entropies, strict=True)):
            axis.plot(history, color=f"C{i}", label=f"block {i}, d = {WIDTHS[i]}")
        for i, target in enumerate(network.target.tolist()):
            axis.axhline(target, color=f"C{i}", linestyle="--", linewidth=1)
        axis.set_title(f"{title} the penalty (dashed: targets)")
        axis.set_xlabel("step")
    axes[0].set_ylabel("spectral entropy H, nats")
    axes[1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--beta", type=float, default=0.7, help="target as a share of log d")
    parser.add_argument("--lambda-ses", type=float, default=0.1, help="weight of the penalty")
    parser.add_argument("--output", type=Path, default=Path("digits.png"), help="the plot")
    options = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=0.25, random_state=0, stratify=labels
    )
    plain = Network(penalty=0, beta=options.beta)
    shaped = Network(penalty=options.lambda_ses, beta=options.beta)
    train(plain, shaped, images, labels, options.epochs)
    print(report(plain, shaped, test_images, test_labels))
    plot(plain, shaped, options.output)
    print(f"entropies over training: {options.output}")


if __name__ == "__main__":
    main()
