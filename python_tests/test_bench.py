"""The benchmarks measure what they say: each provider is right, and rounds are paired."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import report
from bench.providers import Provider, io_bytes, io_floor, providers
from bench.shapes import SHAPES
from bench.timing import paired, paired_ratios, peak_bytes
from ses_kernels import reference

ROOT = Path(__file__).parents[1]
# B < d, B > d, two layers of one n, and a batch.
LAYERS = [(6, 10), (6, 4), (6, 9)]
BATCH = [(3, 5, 7)]


@pytest.mark.parametrize("layers", [LAYERS, BATCH], ids=["layers", "batch"])
@pytest.mark.parametrize("provider", providers("cpu"), ids=lambda p: p.name)
def test_provider_equals_reference(provider: Provider, layers: list[tuple[int, ...]]) -> None:
    if provider.entropies is io_floor:
        pytest.skip("moves the bytes only")
    torch.manual_seed(0)
    xs = [torch.randn(layer).relu() for layer in layers]
    exact = [x.double().requires_grad_() for x in xs]
    expected = torch.cat([reference.spectral_entropy(x).flatten() for x in exact])
    try:
        entropies = provider.entropies(xs)
    except RuntimeError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(entropies.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    if provider.differentiable:
        gradients = provider.step([x.requires_grad_() for x in xs])
        for actual, wanted in zip(
            gradients, torch.autograd.grad(expected.sum(), exact), strict=True
        ):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5)


def test_floor_reads_and_writes_what_it_counts() -> None:
    xs = [torch.randn(256, 1024, requires_grad=True)]
    (dx,) = Provider("floor", io_floor).step(xs)
    assert dx.shape == xs[0].shape
    assert io_bytes(xs, backward=False) == 256 * 1024 * 4
    assert io_bytes(xs, backward=True) == 3 * 256 * 1024 * 4


def test_paired_rounds_cancel_drift() -> None:
    """On a clock that slows down all the time, the ratio of two costs is still theirs."""
    now, calls = 1.0, []

    def clock(name: str, cost: float):
        def seconds() -> float:
            nonlocal now
            calls.append(name)
            now *= 1.01
            return cost * now

        return seconds

    seconds = paired({"ours": clock("ours", 1), "other": clock("other", 5)}, budget=1e9)
    rounds = [set(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert all(names == {"ours", "other"} for names in rounds)  # one of each, in every round
    low, median, high = paired_ratios(seconds, "ours")["other"]
    assert 4.9 < low <= median <= high < 5.1
    assert paired_ratios(seconds, "ours")["ours"] == [1, 1, 1]


def test_a_slow_provider_leaves_when_its_budget_is_spent() -> None:
    seconds = paired({"ours": lambda: 0.1, "slow": lambda: 10.0}, budget=1, min_rounds=3)
    assert len(seconds["slow"]) == 3
    assert 10 <= len(seconds["ours"]) <= 11
    assert paired_ratios(seconds, "ours")["slow"] == pytest.approx([100, 100, 100])


def test_peak_memory_is_the_most_held_at_once() -> None:
    def call() -> torch.Tensor:
        for _ in range(3):
            x = torch.empty(1 << 20, dtype=torch.uint8)
            del x
        return torch.empty(1 << 18, dtype=torch.uint8)

    assert peak_bytes(call, "cpu") == 1 << 20


def test_shapes_are_those_of_the_networks() -> None:
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    layers = {shape.name: len(shape.layers) for shape in SHAPES}
    assert (layers["ResNet-18-B256"], layers["WRN-28-10-B256"]) == (9, 13)


def test_report_from_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {
        "shape": "2x8x16",
        "layers": [[2, 8, 16]],
        "dtype": "float32",
        "mode": "forward+backward",
        "clock": "wall",
        "device": "a device",
        "threads": 2,
        "versions": {"torch": "2.13.0", "cuda": None},
    }
    rows = [
        common | {"provider": "ours", "seconds": [0.001, 0.002, 0.003], "over ours": [1, 1, 1]},
        common | {"provider": "paper", "seconds": [0.1, 0.12, 0.3], "over ours": [50, 60, 75]},
        common | {"provider": "absent", "skipped": "not here"},
    ]
    results = tmp_path / "device.json"
    results.write_text(json.dumps({"rows": rows}))
    report.write(results)
    table = results.with_suffix(".md").read_text()
    assert table == capsys.readouterr().out
    assert "| 2x8x16 | forward+backward | 2 (1-3) | 60x (50-75) |" in table
    assert "absent" not in table
    assert results.with_suffix(".png").stat().st_size > 1000


def test_bench_command_writes_complete_rows(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    # A pytest of its own, that must not take itself for a worker of this one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    options = ["--output", str(results), "--budget", "0", "-k", "64x128x256 and not backward"]
    command = [sys.executable, "-m", "bench", *options]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    rows = {row["provider"]: row for row in json.loads(results.read_text())["rows"]}
    assert {"ours", "paper", "gram, closed form", "svdvals", "I/O floor"} <= rows.keys()
    assert rows["ours"]["rounds"] == 3
    assert rows["ours"]["peak_bytes"] > 0
    assert {"device", "threads", "versions", "commit", "dtype", "io_bytes"} <= rows["ours"].keys()


def test_gpu_script_says_that_there_is_no_gpu() -> None:
    script = ROOT / "bench" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run([str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 64
    assert "needs a CUDA GPU" in done.stderr
    assert done.stdout == ""
