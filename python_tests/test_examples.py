"""The examples run from start to end; a killed experiment goes on to the same result."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = ("--quick", "--images", "512", "--epochs", "2")
# One thread: what is equal bit for bit does not depend on the machine's cores or load.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"examples/{script}", *options]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_digits(tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    done = run("digits.py", "--epochs", "1", "--output", str(picture))
    for column in ("accuracy", "ms per step", "target H", "H without", "H with", "rank with"):
        assert column in done.stdout
    layers = [line.split() for line in done.stdout.splitlines() if line[:5].strip().isdigit()]
    assert [row[1] for row in layers] == ["16", "16", "32", "32", "64", "64"]
    assert "5/5" in done.stderr  # the progress bar
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("mnist")
    return folder, run("mnist.py", *TINY, "--seeds", "2", "--output", str(folder)).stdout


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["rows"]


def untimed(folder: Path) -> list[dict]:
    times = ("ms_per_step", "relative_time")
    return [{k: v for k, v in row.items() if k not in times} for row in rows(folder)]


def test_mnist_reports_every_condition(finished: tuple[Path, str]) -> None:
    folder, output = finished
    columns = ("accuracy", "noise", "blur", "contrast", "gap", "condition of J", "time per step")
    header = next(line for line in output.splitlines() if line.startswith("|"))
    assert all(column in header for column in columns)
    conditions = ["without", *(f"every {k}" for k in (1, 3, 5, 10))]
    conditions += [f"beta {beta}" for beta in (0.5, 0.6, 0.8, 0.9)]
    for seed in (0, 1):
        assert [r["condition"] for r in rows(folder) if r["seed"] == seed] == conditions
    for row in rows(folder):
        assert 0 <= row["accuracy"] <= 1
        assert row["condition_number"] >= 1
        assert all(1 <= r <= d for r, d in zip(row["ranks"], (16, 16, 32, 32, 64, 64), strict=True))
        assert len(row["entropies"]) == -(-4 // (row["every_k"] or 1))  # of four steps
    for name in ("dynamics", "beta_sweep", "pareto"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # Runs of a seed start from the same weights, and the penalty then changes them.
    entropies = {row["condition"]: row["entropies"] for row in rows(folder) if row["seed"] == 0}
    assert entropies["without"][0] == entropies["every 1"][0] == entropies["beta 0.9"][0]
    assert len({str(entropies[name][-1]) for name in ("without", "every 1", "beta 0.9")}) == 3


def test_mnist_killed_and_resumed_is_the_same_bit_for_bit(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    options = (*TINY, "--seeds", "1", "--output", str(tmp_path))
    command = [sys.executable, "examples/mnist.py", *options]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.1)  # into the next epoch
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = checkpoint.read_bytes()
    (tmp_path / "checkpoint.tmp").write_bytes(before[: len(before) // 2])  # killed while writing
    resumed = run("mnist.py", *options)
    first = int(re.search(r"(\d+)/36 \[", resumed.stderr).group(1))
    assert first >= 18  # the first epoch, of two, is not trained again
    assert untimed(tmp_path) == [row for row in untimed(finished[0]) if row["seed"] == 0]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.mark.usefixtures("examples")
def test_finished_experiment_is_not_run_again(finished: tuple[Path, str]) -> None:
    import mnist

    results = json.loads((finished[0] / "results.json").read_text())
    again = mnist.experiment(results["settings"], finished[0] / "checkpoint.pt")
    assert again == results["rows"]  # times too


@pytest.mark.usefixtures("examples")
def test_checkpoint_is_whole_or_not_at_all(tmp_path: Path) -> None:
    import mnist

    path = tmp_path / "checkpoint.pt"
    mnist.save({"settings": {"size": 14}, "x": torch.ones(1000)}, path)
    with pytest.raises(Exception, match="pickle"):
        mnist.save({"settings": {}, "x": torch.zeros(1000), "bad": lambda: None}, path)
    assert mnist.load(path, {"size": 14})["x"].sum() == 1000
    with pytest.raises(SystemExit, match="another --output"):
        mnist.load(path, {"size": 28})


@pytest.mark.usefixtures("examples")
def test_overhead_is_that_of_the_paired_steps() -> None:
    from network import Run

    plain, shaped = Run(0, lambda_ses=0), Run(0, lambda_ses=0.01, every_k=5)
    plain.seconds = [1.0, 2.0] * 5
    shaped.seconds = [3 * s if i % 5 == 0 else s for i, s in enumerate(plain.seconds)]
    shaped.seconds[7] = 1e3  # the machine was busy
    assert shaped.overhead(plain) == pytest.approx((2 * 3 + 8 * 1) / 10)


@pytest.mark.usefixtures("examples")
def test_report_claims_only_what_every_seed_shows(finished: tuple[Path, str]) -> None:
    import mnist_report

    plain = rows(finished[0])[:1] * 3
    changes = {"accuracy": (0.1, 0.2, 0.1), "noise": (0.1, 0.1, -0.1), "loss_gap": (0.1, 0.1, 0.1)}
    shaped = [
        row | {name: row[name] + change[i] for name, change in changes.items()}
        for i, row in enumerate(plain)
    ]
    expected = "better: accuracy %; worse: gap (nats)"
    assert mnist_report.verdict(shaped, plain) == expected
