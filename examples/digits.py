"""Spectral entropy at every block of a small residual network, on handwritten digits.

Two equal networks learn the 8 x 8 digits bundled with scikit-learn: one from the cross-entropy
alone, one with a penalty that pulls the entropy H_l of each block's features towards beta log d_l:

    loss = cross_entropy + lambda * sum_l (H_l - beta log d_l)^2

Each step trains both, one after the other, so their times are compared under the same conditions.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from network import WIDTHS, Run, entropies
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

BATCH = 256


def train(plain: Run, shaped: Run, images: Tensor, labels: Tensor, epochs: int) -> None:
    order = torch.Generator().manual_seed(0)
    batches = len(images) // BATCH
    progress = tqdm(range(epochs * batches), desc="training", mininterval=0.5)
    for i in progress:
        if i % batches == 0:
            shuffled = torch.randperm(len(images), generator=order)
        batch = shuffled[i % batches * BATCH :][:BATCH]
        # Each goes first every other time: the second finds the batch in cache.
        losses = {}
        for run in (plain, shaped) if i % 2 else (shaped, plain):
            losses[run] = run.step(images[batch], labels[batch])
        pairs = zip(shaped.entropies[-1], shaped.targets, strict=True)
        progress.set_postfix_str(
            f"loss {losses[shaped]:.3f} H/target " + " ".join(f"{h:.1f}/{t:.1f}" for h, t in pairs),
            refresh=False,
        )


@torch.no_grad()
def report(plain: Run, shaped: Run, images: Tensor, labels: Tensor) -> str:
    accuracies, H = [], []
    for run in (plain, shaped):
        features = run.model.eval().features(images)
        right = run.model.classify(features).argmax(-1) == labels
        accuracies.append(right.float().mean().item())
        H.append(entropies(features))
    times = [1e3 * torch.tensor(run.seconds).median().item() for run in (plain, shaped)]
    lines = [
        f"{'on the test set':24}{'without':>16}{'with':>16}",
        f"{'accuracy':24}{accuracies[0]:16.2%}{accuracies[1]:16.2%}",
        f"{'ms per step, median':24}{times[0]:16.1f}{times[1]:16.1f}"
        f"  ({shaped.overhead(plain):.2f}x, paired)",
        "",
        f"{'layer':>5}{'d':>5}{'target H':>10}{'H without':>12}{'H with':>9}"
        f"{'rank without':>15}{'rank with':>12}",
    ]
    rows = zip(WIDTHS, shaped.targets, *H, strict=True)
    for i, (d, target, without, with_) in enumerate(rows):
        lines.append(
            f"{i:5}{d:5}{target:10.2f}{without:12.2f}{with_:9.2f}"
            f"{math.exp(without):15.1f}{math.exp(with_):12.1f}"
        )
    return "\n".join(lines)


def plot(plain: Run, shaped: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
    from PIL import Image

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
    for axis, run, title in zip(axes, (plain, shaped), ("without", "with"), strict=True):
        for i, history in enumerate(zip(*run.entropies, strict=True)):
            axis.plot(history, color=f"C{i}", label=f"block {i}, d = {WIDTHS[i]}")
        for i, target in enumerate(run.targets):
            axis.axhline(target, color=f"C{i}", linestyle="--", linewidth=1)
        axis.set_title(f"{title} the penalty", fontsize="medium")
        axis.set_xlabel("step")
    axes[0].set_ylabel("spectral entropy H, nats")
    axes[0].legend(fontsize="x-small")
    target = axes[1].plot([], color="black", linestyle="--", linewidth=1, label="beta log d")
    axes[1].legend(handles=target, loc="lower right", fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    if path.suffix == ".png":  # 64 colours: a quarter of the bytes
        Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


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
    plain = Run(0, lambda_ses=0, beta=options.beta)
    shaped = Run(0, lambda_ses=options.lambda_ses, beta=options.beta)
    train(plain, shaped, images, labels, options.epochs)
    print(report(plain, shaped, test_images, test_labels))
    plot(plain, shaped, options.output)
    print(f"entropies over training: {options.output}")


if __name__ == "__main__":
    main()
