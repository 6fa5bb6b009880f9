"""The training step that is measured: networks as published, and penalties that agree."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import bench_training, report
from bench.bench_training import BY_ITSELF, OTHERS, PLAIN, SES, calls, counts
from bench.models import NETWORKS, Network
from bench.shapes import SHAPES
from ses_kernels import SESRegularizer
from ses_lab.models import build

pytestmark = pytest.mark.filterwarnings("ignore:SESRegularizer:UserWarning")  # batches of 8
CIFAR = {"channels": 3, "size": 32, "classes": 10}
SMALL = Network("small", partial(build, "resnet18", depths=(1, 1, 1, 1), **CIFAR), cpu_batch=8)
TOKENS = Network("tokens", partial(build, "vit_tiny", embed_dim=24, depth=2, **CIFAR), cpu_batch=8)


def _on_meta(network: Network) -> torch.nn.Module:
    with torch.device("meta"):
        return network.build()


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_network_has_the_hooks_of_the_shapes(network: Network) -> None:
    model = _on_meta(network)
    layers = SESRegularizer(model, hook_last_n=network.hook_last_n).layers
    shapes = []
    for name in layers:
        model.get_submodule(name).register_forward_hook(lambda m, i, out: shapes.append(out.shape))
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    if network.name == "ViT-tiny":
        assert layers == tuple(f"blocks.{i}" for i in range(12))
        assert shapes == [(2, 65, 192)] * 12
    else:
        (wanted,) = (s.layers for s in SHAPES if s.name == f"{network.name}-B256")
        assert [channels for _, channels, _, _ in shapes] == [d for _, d in wanted]
        assert layers[-1] == "avgpool"


@pytest.mark.parametrize("network", [SMALL, TOKENS], ids=lambda network: network.name)
def test_steps_differ_by_the_penalty_alone(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_training, "LAMBDA", 10.0)  # as large as the rest of the loss
    penalties, updates = {}, {}
    for name in (PLAIN, SES, *OTHERS, BY_ITSELF):
        found = calls(network, 8, torch.float32, "cpu")  # always the same weights
        model = found[PLAIN].args[0]
        before = [p.detach().clone() for p in model.parameters()]
        penalties[name] = found[name]()
        updates[name] = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    assert penalties.pop(PLAIN) is None
    value = penalties[SES].item()
    assert value > 1
    assert {name: p.item() for name, p in penalties.items()} == pytest.approx(
        dict.fromkeys(penalties, value), rel=1e-3
    )
    assert not any(u.any() for u in updates[BY_ITSELF])

    def distance(a: str, b: str) -> float:
        squares = [(u - v).square().sum() for u, v in zip(updates[a], updates[b], strict=True)]
        return sum(squares).sqrt().item()

    assert all(distance(name, SES) < 1e-2 * distance(PLAIN, SES) for name in OTHERS)


def test_steps_share_tensors_and_not_hooks() -> None:
    found = calls(SMALL, 4, torch.float32, "cpu")
    plain, hooked = (found[name].args[0] for name in (PLAIN, SES))
    assert plain.layer1[0].conv1 is not hooked.layer1[0].conv1
    for ours, theirs in zip(plain.state_dict().values(), hooked.state_dict().values(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    hooks = [sum(len(m._forward_hooks) for m in model.modules()) for model in (plain, hooked)]
    assert hooks == [0, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ses_adds_no_read_by_the_host_and_as_many_operations_as_by_itself(dtype) -> None:
    found = calls(TOKENS, 8, dtype, "cpu")
    for call in found.values():
        call()  # the first step prepares
    seen = {name: counts(found[name], "cpu") for name in (PLAIN, SES, BY_ITSELF)}
    # GradScaler asks whether a gradient overflowed.
    assert seen[PLAIN]["host_syncs"] == (dtype == torch.float16)
    assert seen[SES]["host_syncs"] == seen[PLAIN]["host_syncs"]
    assert seen[BY_ITSELF]["host_syncs"] == 0
    added = seen[SES]["operations"] - seen[PLAIN]["operations"]
    assert seen[BY_ITSELF]["operations"] == pytest.approx(added, rel=0.1)


def test_reads_by_the_host_are_counted_in_forward_and_backward() -> None:
    x = torch.ones(3, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda g: g * bool(g.any()))

    def call() -> None:
        y.sum().backward(retain_graph=True)
        assert x.detach().sum().item() == 3

    assert counts(call, "cpu")["host_syncs"] == 2


def test_rows_of_a_training_step_and_their_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda call, args, **_: call(*args))
    clock, device = bench_training.CLOCKS[0], bench_training.DEVICE
    bench_training.test_training(benchmark, 0.0, SMALL, 4, torch.float32, clock)
    rows = benchmark.extra_info["rows"]
    assert [row["provider"] for row in rows] == [PLAIN, SES, *OTHERS, BY_ITSELF]
    for row in rows:
        assert row["rounds"] == 3
        assert 0 < row[f"over {PLAIN}"][0] <= row[f"over {PLAIN}"][2]
        assert {"device", "threads", "versions", "peak_bytes", "operations", "host_syncs"} <= (
            row.keys()
        )
        assert ("launches" in row) == (device == "cuda")
    results = tmp_path / "rows.json"
    results.write_text(json.dumps({"rows": rows}))
    report.write(results)
    title, _, header, _, line, *_, origin = capsys.readouterr().out.splitlines()
    assert title.startswith("## A training step")
    assert line.startswith("| small-B4, float32, ")
    assert header.count("|") == line.count("|")
    assert origin.startswith(rows[0]["device"])


def test_table_of_training_steps_is_what_is_added() -> None:
    def row(provider: str, ratios: list[float], **facts) -> dict:
        common = {"shape": "net-B8", "dtype": "float32", "mode": "training", "clock": "wall"}
        common |= {"provider": provider, "seconds": [0.1, 0.1, 0.1], "rounds": 157**2}
        return common | {f"over {PLAIN}": ratios} | facts

    skipped = row("gone", [])
    del skipped["seconds"]
    rows = [
        row(PLAIN, [1, 1, 1], peak_bytes=8 << 20, operations=50, host_syncs=1),
        row(SES, [1, 1.02, 1.1], peak_bytes=9 << 20, operations=70, host_syncs=1),
        row(BY_ITSELF, [0.01, 0.015, 0.02], peak_bytes=1, operations=19, host_syncs=0),
        row("paper", [3, 3.5, 4], rounds=10**6, peak_bytes=20 << 20, operations=999),
        skipped,
    ]
    assert report.table(rows).splitlines()[-1] == (
        "| net-B8, float32, wall | 100 (100-100) | 8 | 24649"
        " | +2.00 ± 0.10 | +1.50 ± 0.01 | +250.00 ± 1.00 | 20 | 0 | 1.0 |"
    )
