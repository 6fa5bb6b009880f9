"""The benchmarks measure what they say: each provider is right, and rounds are paired."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mpmath
import pytest
import torch

from bench import (
    accuracy,
    bench_solvers,
    bench_sweep,
    crossover,
    host,
    large,
    provenance,
    report,
    slq,
)
from bench.providers import Provider, io_bytes, io_floor, providers
from bench.shapes import SHAPES
from bench.timing import paired, paired_ratios, peak_bytes
from ses_kernels import __main__ as capabilities
from ses_kernels import crossover as table
from ses_kernels import ops, reference

measures_the_extension = pytest.mark.skipif(
    ops.EXTENSION_MISSING is not None, reason=str(ops.EXTENSION_MISSING)
)
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
    solver = rows[0] | {"shape": "solver-2x8", "mode": "solver", "clock": "eager"}
    rows.append(solver | {"roofline_seconds": 0.0005})
    rows += [
        row | {"shape": f"{batch}x{n}x{2 * n}", "layers": [[batch, n, 2 * n]], "mode": "sweep"}
        for row in rows[:2]
        for batch, n in [(1, 4), (1, 8), (1, 32), (64, 8), (2, 8)]
    ]
    results = tmp_path / "device.json"
    results.write_text(json.dumps({"rows": rows}))
    report.write(results)
    table = results.with_suffix(".md").read_text()
    assert table == capsys.readouterr().out
    assert "| 2x8x16 | forward+backward | 2 (1-3) | 60x (50-75) |" in table
    assert "| solver-2x8 | solver, float32, eager | 2 (1-3) | 0.5 |" in table
    assert "| 64x8x16 | sweep | 2 (1-3) | 60x (50-75) |" in table
    assert "absent" not in table
    assert results.with_suffix(".png").stat().st_size > 1000


def test_report_over_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "device.json"
    common = {"shape": "2x8x16", "dtype": "float32", "mode": "forward+backward", "clock": "wall"}
    common |= {"device": "a device", "threads": 2, "commit": "0123456789abc", "versions": {}}
    for isa, run, seconds, ratio, loop in [
        ("avx2", 1, 0.002, 1.5, 1e-4),
        ("avx2", 2, 0.004, 2.5, 3e-4),
        ("avx2", 3, 0.003, 1.75, 2e-4),
        ("avx512", 4, 0.001, 3.0, 5e-4),
    ]:
        around = {"isa": isa, "date": f"2026-01-0{run}", "dirty": run == 4}
        around |= {"clock_ghz": [1, run, 9], "loop_least": loop, "loop_mean": loop}
        rows = [
            {"provider": "ours", "seconds": [0, seconds, 9], "over ours": [1, 1, 1]},
            {"provider": "paper", "seconds": [0, 1, 9], "over ours": [0, ratio, 99]},
            {"provider": "absent", "skipped": "not here"},
        ]
        report.append(results, [common | around | row for row in rows])
    assert len(json.loads(results.read_text())["rows"]) == 4 * 3
    report.write(results)
    lines = capsys.readouterr().out.splitlines()
    assert "| 2x8x16 | 3 (0-99) | 1.75 (1.5-2.5) |" in lines  # the widest registers first
    label = "| 2x8x16 | forward+backward"
    assert f"{label}, avx2, 3 runs | 3 (2-4) | 1.75x (1.5-2.5) |" in lines
    assert f"{label}, avx512 | 1 (0-9e+03) | 3x (0-99) |" in lines  # quartiles of its one run
    assert "| 2026-01-02 | 012345678 | avx2 | 2 | 2 (2-2) | 3 (3-3) |" in lines
    assert "| 2026-01-04 | 012345678 and changes | avx512 | 2 | 4 (4-4) | 1 (1-1) |" in lines


def test_loops_by_which_a_busy_host_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"ours": [1.0]} | {name: [clock()] for name, clock in host.clocks().items()}
    if len(seconds) == 1:
        pytest.skip("no compiler")
    for _ in range(20):
        for name, clock in host.clocks().items():
            seconds[name].append(clock())
    facts = host.take(seconds)
    assert seconds == {"ours": [1.0]}
    assert 0.1 < facts["clock_ghz"][2] < 10
    # twelve a turn, of which no core does more than four a cycle
    assert facts["loop_least"] > 12 * host.MULTIPLY_ADDS / 4 / 10e9
    assert facts["loop_least"] <= facts["loop_mean"]
    host._library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert host.clocks() == {}
    assert host.take({"ours": [1.0]}) == {}
    host._library.cache_clear()


def test_bench_command_writes_complete_rows(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    earlier = {"mode": "training", "skipped": "an earlier run", "device": "a CPU", "threads": 2}
    results.write_text(json.dumps({"rows": [earlier]}))
    # A pytest of its own, that must not take itself for a worker of this one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    chosen = "64x128x256 and not backward or solver and 144-64 or sweep and 32-8"
    options = ["--output", str(results), "--budget", "0", "-k", chosen]
    options += [] if ops.EXTENSION_MISSING else ["--isa", "portable"]
    command = [sys.executable, "-m", "bench", *options]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    rows: dict[str, dict[str, dict]] = {}
    first, *measured = json.loads(results.read_text())["rows"]
    assert first == earlier
    for row in measured:
        rows.setdefault(row["mode"], {})[row["provider"]] = row
    networks = {"ours", "paper", "gram, closed form", "svdvals", "I/O floor"}
    assert networks <= rows["forward"].keys()
    assert {"ours", "ours, eigh", "torch eigh"} <= rows["solver"].keys()
    assert {"ours", "gram, autograd", "gram, closed form"} == rows["sweep"].keys()
    for ours in (by_provider["ours"] for by_provider in rows.values()):
        assert ours["rounds"] == 3
        assert ours["peak_bytes"] > 0
        assert {"device", "threads", "versions", "commit", "dtype", "io_bytes"} <= ours.keys()
        assert ours["isa"] == (None if ops.EXTENSION_MISSING else "portable")
        assert ("loop_mean" in ours) == bool(host.clocks())


@measures_the_extension
def test_instruction_set_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    provenance.add_isa(parser)
    before = provenance.isa()
    assert parser.parse_args([]).isa is None
    assert provenance.isa() == before
    with pytest.raises(SystemExit):
        parser.parse_args(["--isa", "avx1024"])
    assert f"of {', '.join(ops._C.info()['isas'])}, got avx1024" in capsys.readouterr().err


def test_gpu_script_takes_less_than_nine_minutes_and_fills_the_table() -> None:
    script = ROOT / "bench" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    stages = re.findall(r'stage "([^"]+)" (\d+)', script.read_text())
    limits = {name: int(seconds) for name, seconds in stages}
    assert {"digits", "suite", "benchmarks", "training", "crossover"} <= limits.keys()
    assert sum(limits.values()) + 3 * limits["$tool"] <= 9 * 60  # four tools


def test_gpu_script_says_that_there_is_no_gpu() -> None:
    script = ROOT / "bench" / "gpu.sh"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run([str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 64
    assert "needs a CUDA GPU" in done.stderr
    assert done.stdout == ""


def test_accuracy_reference_is_the_derivative() -> None:
    """Against 60 digits of H, differenced, on exact rank 3 of 4 x 6: two singular values are 0."""
    x = torch.randint(-9, 10, (4, 6), generator=torch.Generator().manual_seed(0)).float()
    x[3] = x[0]
    with mpmath.workdps(60):

        def entropy(rows: list[list[mpmath.mpf]]) -> mpmath.mpf:
            centred = mpmath.matrix(4, 6)
            for j in range(6):
                mean = sum(row[j] for row in rows) / 4
                for i in range(4):
                    centred[i, j] = rows[i][j] - mean
            eigenvalues = mpmath.eigsy(centred * centred.T, eigvals_only=True)
            p = [w / sum(eigenvalues) for w in eigenvalues if w > 1e-40]
            return -sum(q * mpmath.log(q) for q in p)

        rows = [[mpmath.mpf(v) for v in row] for row in x.tolist()]
        h, g = accuracy.reference(x)
        assert abs(h.item() - entropy(rows)) < 1e-14
        # Rows 0 and 3 move together, for apart they open a direction where H has no derivative.
        for moved, j in [((0, 3), 0), ((1,), 2), ((2,), 5)]:
            values = []
            for step in (-1e-15, 1e-15):
                for i in moved:
                    rows[i][j] = x[i, j].item() + mpmath.mpf(step)
                values.append(entropy(rows))
            for i in moved:
                rows[i][j] = mpmath.mpf(x[i, j].item())
            slope = (values[1] - values[0]) / mpmath.mpf(2e-15)
            assert abs(sum(g[i, j].item() for i in moved) - slope) < 1e-14


def test_accuracy_command_writes_complete_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "rows.json"
    command = ["accuracy", "--shapes", "8x12", "12x7", "--seeds", "1", "--output", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    accuracy.main()
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == len(accuracy.FAMILIES) * len(accuracy.ROUTES)
    assert {"device", "threads", "versions", "commit", "dtype", "shapes", "seeds"} <= rows[0].keys()
    for row in rows:
        assert 0 <= row["value"] < 1e-4
        assert 0 < row["gradient"] < (1e-4 if row["family"] == "Gaussian" else torch.inf)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(accuracy.FAMILIES)
    assert all(line.count("|") == 2 + len(accuracy.ROUTES) for line in table)


@pytest.mark.parametrize("family", large.FAMILIES)
def test_reference_of_large_matrices(family: str) -> None:
    x = large.FAMILIES[family](48, 48, torch.Generator().manual_seed(0)).float()
    for actual, wanted in zip(large.reference(x), accuracy.reference(x), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9 * wanted.norm().item())


@pytest.mark.parametrize("deflated", [0, 4])
def test_stochastic_estimate_is_unbiased(deflated: int) -> None:
    """With all Lanczos steps that there are, only the probes are left to converge."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 20, generator=generator, dtype=torch.float64) ** 3
    x[3] = x[0]  # the Krylov spaces are exhausted a step earlier
    h, g = accuracy.reference(x)
    many = slq.estimate(x, 20_000, 11, generator, deflated)
    assert many.standard_error < 0.01
    assert abs(many.entropy - h) < 4 * many.standard_error
    assert (many.gradient - g).norm() < 1.5 * (20 / 20_000) ** 0.5 * g.norm()
    few = [slq.estimate(x, 4, 11, generator, deflated) for _ in range(200)]
    values = torch.stack([each.entropy for each in few])
    claimed = torch.stack([each.standard_error for each in few]).square().mean().sqrt()
    assert claimed == pytest.approx(values.std().item(), rel=0.3)
    assert abs(values.mean() - h) < 4 * claimed / 200**0.5
    mean = torch.stack([each.gradient for each in few]).mean(0)
    assert (mean - g).norm() < 1.5 * (20 / 800) ** 0.5 * g.norm()


def test_large_command_writes_complete_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(large, "RANKS", (30,))
    monkeypatch.setattr(large, "PROBES", (4, 16))
    results = tmp_path / "rows.json"
    command = ["large", "--sizes", "60", "--budget", "0", "--output", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    large.main()
    table = capsys.readouterr().out.splitlines()
    rows = json.loads(results.read_text())["rows"]
    methods = {(row["curve"], row["point"]) for row in rows}
    assert len(methods) == 4 + 1 + 3 * 2
    assert len(rows) == len(methods) * len(large.FAMILIES)
    assert {"device", "threads", "versions", "commit", "dirty", "date", "entropy"} <= rows[0].keys()
    assert all(row["rounds"] == 1 and row["seconds"][1] > 0 for row in rows)
    errors = {(row["curve"], row["point"], row["family"]): row for row in rows}
    for family in large.FAMILIES:
        exact = errors[large.BASE, "", family]
        assert exact["gradient"] < (1e-4 if family == "Gaussian" else 0.05)
        assert exact["standard_error"] is None
        value_alone = errors["rational, H alone", "", family]
        assert value_alone["gradient"] is None
        assert value_alone["value"] == pytest.approx(exact["value"], abs=1e-5)
        stochastic = errors["SLQ, 30 steps", "16 probes", family]
        assert stochastic["gradient"] > 0.5  # unbiased, but of rank 16
        assert stochastic["value"] < 5 * stochastic["standard_error"]
    assert 1e-6 < errors["lowrank", "rank 30", "i^-2"]["gradient"] < 1e-2
    assert len(table) == 2 + len(methods)
    assert all(line.count("|") == 4 + len(large.FAMILIES) for line in table)
    report.write(results)
    assert "\n".join(table) in capsys.readouterr().out
    assert results.with_suffix(".png").stat().st_size > 1000


@measures_the_extension
def test_solvers_measured_agree() -> None:
    x = torch.randn(3, 12, 40)
    x -= x.mean(-2, keepdim=True)
    calls = bench_solvers.calls(x @ x.mT)
    assert {"ours", "ours, eigh", "torch eigh"} <= calls.keys()
    h, m = (part.double() for part in calls["torch eigh"]())
    exact = torch.stack([reference.spectral_entropy(part) for part in x.double()])
    torch.testing.assert_close(h, exact, rtol=1e-5, atol=1e-5)
    # Rounding has its way with log P along 1, the null space of a centred Gram matrix.
    centre = torch.eye(12).double() - 1 / 12
    for name, call in calls.items():
        h_of, m_of = (part.double() for part in call())
        torch.testing.assert_close(h_of, h, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(
            centre @ m_of @ centre, centre @ m @ centre, rtol=1e-3, atol=1e-6, msg=name
        )


@pytest.mark.parametrize(
    ("properties", "teraflops", "gigabytes"),
    [  # kHz, bits; beside them the data sheets of T4, A100 with 40 GB, L40S and H100 SXM
        ((7, 5, 40, 1_590_000, 5_001_000, 256), 8.1, 320),
        ((8, 0, 108, 1_410_000, 1_215_000, 5120), 19.5, 1555),
        ((8, 9, 142, 2_520_000, 9_001_000, 384), 91.6, 864),
        ((9, 0, 132, 1_980_000, 2_619_000, 5120), 67, 3350),
    ],
    ids=["T4", "A100", "L40S", "H100"],
)
def test_roofline_is_that_of_the_data_sheet(properties, teraflops, gigabytes) -> None:
    names = ("major", "minor", "multi_processor_count", "clock_rate", "memory_clock_rate",
             "memory_bus_width")  # fmt: skip
    device = SimpleNamespace(**dict(zip(names, properties, strict=True)))
    arithmetic, memory = bench_solvers.peaks(device)
    assert arithmetic == pytest.approx(1e12 * teraflops, rel=0.02)
    assert memory == pytest.approx(1e9 * gigabytes, rel=0.02)
    assert bench_solvers.roofline(7 * arithmetic, 5 * memory, device) == pytest.approx(7)
    assert bench_solvers.roofline(5 * arithmetic, 7 * memory, device) == pytest.approx(7)


def test_sweep_covers_the_sizes() -> None:
    batches, sizes = zip(*bench_sweep.POINTS, strict=True)
    assert (min(batches), max(batches)) == (1, 8192)
    assert (min(sizes), max(sizes)) == (4, 512)


def test_winning_sizes_from_disturbed_ratios() -> None:
    sizes, batches = (8, 16, 32, 64), (1, 8, 64)
    stairs = {16: 1, 32: 8}
    ratios = {
        (n, batch): 2.0 if any(n <= top and batch >= low for top, low in stairs.items()) else 0.5
        for n in sizes
        for batch in batches
    }
    assert crossover.winning(ratios) == stairs
    assert crossover.winning(ratios | {(16, 8): 0.6, (64, 1): 1.5}) == stairs
    within_noise = dict.fromkeys(ratios, 0.96)
    assert crossover.winning(within_noise) == {64: 1}
    slower = dict.fromkeys(ratios, 0.94)
    assert crossover.winning(slower) == crossover.winning({}) == {}
    assert crossover.winning(slower | {(n, 64): 1.0 for n in sizes}) == {64: 64}


def test_table_is_as_the_command_writes_it() -> None:
    text = crossover.TABLE_FILE.read_text()
    assert crossover.source(text) == text
    for facts in table.MEASURED.values():
        measured = {"device", "threads", "torch", "commit", "dirty", "date"} == facts.keys()
        assert measured or facts.keys() == {"not measured"}
    for rows in (*table.RATIONAL.values(), *table.EIGH.values()):
        assert list(rows) == sorted(rows)
        assert list(rows.values()) == sorted(set(rows.values()))


@measures_the_extension
def test_crossover_command_rewrites_the_rows_of_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, results = tmp_path / "crossover.py", tmp_path / "rows.json"
    file.write_text(crossover.TABLE_FILE.read_text())
    monkeypatch.setattr(crossover, "TABLE_FILE", file)
    small = {
        name: dataclasses.replace(decision, sizes=(4, 6, 1 << 20), batches=(1, 3))
        for name, decision in crossover.DECISIONS.items()
    }
    small["RATIONAL"] = dataclasses.replace(small["RATIONAL"], sizes=(4, 6))
    monkeypatch.setattr(crossover, "DECISIONS", small)
    for name in ("MEASURED", "RATIONAL", "EIGH"):
        monkeypatch.setattr(table, name, copy.deepcopy(getattr(table, name)))
    before = runpy.run_path(str(file))
    command = ["crossover", "--budget", "0", "--output", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    crossover.main()

    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == (2 + 3) * 4  # dtypes x sizes; n = 2^20 is beyond the eigh kernel
    assert {"device", "threads", "versions", "commit", "dirty", "date"} <= rows[0].keys()
    assert all(0 < row["ratio"][0] <= row["ratio"][2] for row in rows)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    after = runpy.run_path(str(file))
    assert after["MEASURED"][here]["threads"] == torch.get_num_threads()
    for name, decision in small.items():
        assert after[name].keys() == before[name].keys()
        for (device, dtype), stairs in after[name].items():
            if device != here:
                assert stairs == before[name][device, dtype]
                assert after["MEASURED"][device] == before["MEASURED"][device]
                continue
            ratios = {
                (row["n"], row["batch"]): row["ratio"][1]
                for row in rows
                if (row["table"], row["dtype"]) == (name, str(dtype).removeprefix("torch."))
            }
            assert stairs == crossover.winning(ratios)
            assert stairs.keys() <= set(decision.sizes)
    assert (
        f"| 6 | {rows[2]['ratio'][1]:.2f} | {rows[3]['ratio'][1]:.2f} |" in capsys.readouterr().out
    )


def test_table_is_read_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {("cpu", torch.float32): {32: 1, 48: 4}, ("cpu", torch.bfloat16): {16: 1}}
    for name, wins in (("RATIONAL", table.rational_wins), ("EIGH", table.eigh_wins)):
        monkeypatch.setattr(table, name, rows)
        assert [wins("cpu", torch.float32, n, 1) for n in (1, 32, 33, 48)] == [1, 1, 0, 0]
        assert [wins("cpu", torch.float32, n, 4) for n in (32, 33, 48, 49)] == [1, 1, 1, 0]
        assert not wins("cpu", torch.float32, 48, 3)
        assert wins("cpu", torch.float16, 16, 1)  # by the rows of the other half type
        assert not wins("cpu", torch.float64, 4, 1)
        assert not wins("xpu", torch.float32, 4, 1)


def test_table_without_batches_compiles_once_for_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "RATIONAL", {("cpu", torch.float32): {8: 1, 32: 1}})
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def f(x):
        wins = table.rational_wins(x.device.type, x.dtype, x.shape[-1], x.shape[0])
        return x + 1 if wins else x - 1

    torch._dynamo.reset()
    for batch in (2, 3, 64, 4096):
        assert f(torch.zeros(batch, 5)).sum() == 5 * batch
    assert len(graphs) == 1


def test_capabilities_print_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    capabilities.main()
    out = capsys.readouterr().out
    for device, facts in table.MEASURED.items():
        for key, value in facts.items():
            assert f"{key}: {value}" in out, device
    for rows in (*table.RATIONAL.values(), *table.EIGH.values()):
        for n, batch in rows.items():
            assert f"n <= {n}" + (f" from batch {batch} on" if batch > 1 else "") in out
