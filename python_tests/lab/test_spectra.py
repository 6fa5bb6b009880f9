"""ses_lab.spectra against powerlaw, WeightWatcher, scipy and the definitions in numpy."""

import io

import numpy as np
import powerlaw
import pytest
import scipy.stats
import torch
from torch import nn

from ses_lab import models, spectra, weights
from ses_lab.names import ConfigError


def _values(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "pareto":
        return rng.pareto(1.5, 300) + 1
    if kind == "steep":  # beyond the range to which powerlaw keeps by default
        return rng.pareto(4.0, 300) + 1
    draw = rng.standard_normal if kind == "gaussian" else lambda size: rng.standard_t(2, size)
    return np.linalg.svd(draw((160, 80)), compute_uv=False) ** 2


@pytest.mark.filterwarnings("ignore")  # powerlaw warns about the ends of its range
@pytest.mark.parametrize("kind", ["pareto", "steep", "gaussian", "student"])
def test_power_law_agrees_with_powerlaw(kind):
    x = _values(kind)
    fit = spectra.power_law(x)
    other = powerlaw.Fit(x, parameter_ranges={"alpha": [1.001, 1000]}, verbose=0)
    assert fit.alpha == pytest.approx(other.power_law.alpha, rel=1e-9)
    assert fit.xmin == pytest.approx(other.xmin, rel=1e-12)
    assert fit.ks == pytest.approx(other.power_law.D, rel=1e-9)
    assert fit.tail == other.n_tail
    if kind == "steep":
        assert powerlaw.Fit(x, verbose=0).power_law.alpha <= 3 < fit.alpha


def test_power_law_finds_the_tail_above_another_body():
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(0.1, 1, 2000), rng.pareto(1.2, 2000) + 1])
    fit = spectra.power_law(x)
    assert 0.9 < fit.xmin < 1.3
    assert fit.alpha == pytest.approx(
        2.2, abs=4 * 1.2 / fit.tail**0.5
    )  # sigma = (alpha - 1) / sqrt n


def test_power_law_and_hill_of_too_few_values_are_nan():
    for x in ([], [1.0], [1.0, 2.0], [3.0, 3.0, 3.0], [1.0, np.nan, 2.0, 3.0]):
        fit = spectra.power_law(np.array(x))
        assert np.isnan(fit.alpha)
        assert fit.tail == 0
    assert np.isnan(spectra.hill(np.ones(8)))
    assert np.isnan(spectra.hill(np.array([1.0])))


@pytest.mark.parametrize("k", [None, 20])
def test_hill_is_the_fit_of_a_pareto_distribution_above_the_next_value(k):
    x = np.sort(_values("student"))[::-1]
    kept = k or len(x) // 2
    shape, _, _ = scipy.stats.pareto.fit(x[:kept], floc=0, fscale=x[kept])
    assert spectra.hill(x, k) == pytest.approx(1 + shape, rel=1e-9)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_decay_of_an_exact_power_law(exponent):
    sigma = np.arange(1, 101.0) ** -exponent
    assert spectra.decay(sigma) == pytest.approx(exponent, abs=1e-9)
    sigma[:10], sigma[60:] = 1e3, 1e-9  # what lies outside of 10 to 60 % of the ranks is left out
    assert spectra.decay(sigma) == pytest.approx(exponent, abs=1e-9)
    assert np.isnan(spectra.decay(sigma[:2]))


def test_hill_of_the_largest_tenth():
    x = np.sort(_values("student"))[::-1]
    assert len(x) == 80
    assert spectra.hill_top(x) == pytest.approx(1 + 8 / np.log(x[:8] / x[7]).sum(), rel=1e-12)
    # Its threshold is one of the k values: against ours of k - 1 it is nearer to 1.
    shrunk = 1 + (spectra.hill(x, 7) - 1) * 8 / 7
    assert spectra.hill_top(x) == pytest.approx(shrunk, rel=1e-12)
    assert np.isnan(spectra.hill_top(x[:7]))
    assert np.isnan(spectra.hill_top(np.ones(20)))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(5, 12, 3), nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(48, 30))


def test_table_follows_the_definitions():
    net = _net()
    conv, linear = spectra.table(net)
    for row, module in ((conv, net[0]), (linear, net[3])):
        w = module.weight.detach().double().flatten(1).numpy()
        s = np.linalg.svd(w, compute_uv=False)
        p = s / s.sum()
        assert (row["rows"], row["columns"]) == w.shape
        assert row["entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-5)
        assert row["frobenius"] == pytest.approx(np.linalg.norm(w), rel=1e-9)
        assert row["spectral"] == pytest.approx(np.linalg.norm(w, 2), rel=1e-9)
        assert row["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-9)
        assert row["alpha"] == pytest.approx(spectra.power_law(s**2).alpha, rel=1e-9)
        assert row["hill"] == pytest.approx(spectra.hill(s**2), rel=1e-9)
    assert (conv["layer"], linear["layer"]) == ("0", "3")
    assert conv["columns"] == 45


@pytest.mark.filterwarnings("ignore")  # of pandas, for what WeightWatcher calls
def test_table_agrees_with_weightwatcher_on_linear_layers():
    weightwatcher = pytest.importorskip("weightwatcher")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 60))
    with torch.no_grad():
        net[0].weight.copy_(torch.distributions.StudentT(2.0).sample((100, 200)))
    theirs = weightwatcher.WeightWatcher(model=net).analyze()
    for row, (_, other) in zip(spectra.table(net), theirs.iterrows(), strict=True):
        assert row["alpha"] == pytest.approx(other["alpha"], rel=1e-5)
        assert row["ks"] == pytest.approx(other["D"], rel=1e-4)
        assert row["stable_rank"] == pytest.approx(other["stable_rank"], rel=1e-5)
        assert row["frobenius"] ** 2 == pytest.approx(other["norm"], rel=1e-5)
        assert row["spectral"] ** 2 == pytest.approx(other["spectral_norm"], rel=1e-5)


def test_round_off_eigenvalues_are_left_out():
    torch.manual_seed(0)
    full = torch.randn(60, 30)
    low = torch.cat([full, full], 1)  # rank 30 of 60, singular values times sqrt 2
    one, two = spectra.table({"a.weight": full, "b.weight": low})
    assert two["alpha"] == pytest.approx(one["alpha"], rel=1e-5)
    assert two["xmin"] == pytest.approx(2 * one["xmin"], rel=1e-5)
    assert two["hill"] == pytest.approx(one["hill"], rel=1e-5)


def test_zero_and_broken_layers_do_not_stop_the_others():
    bad = torch.full((8, 9), torch.nan)
    rows = spectra.table(
        {"zero.weight": torch.zeros(8, 9), "bad.weight": bad, "good.weight": torch.eye(8, 9)}
    )
    zero, broken, good = rows
    assert zero["frobenius"] == 0
    assert np.isnan(zero["stable_rank"])
    assert all(np.isnan(broken[key]) for key in ("entropy", "alpha", "hill", "spectral"))
    assert good["stable_rank"] == pytest.approx(8)
    assert good["entropy"] == pytest.approx(np.log(8), rel=1e-5)


def test_the_fused_projection_of_gpt2_is_split_by_columns():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=24, n_head=2, vocab_size=40, n_positions=8)
    model, x = transformers.GPT2Model(config), torch.randn(4, 24)
    found = weights.matrices(model)
    q, k, v = model.h[0].attn.c_attn(x).split(24, dim=-1)  # kept as (in, out)
    for part, expected in zip("qkv", (q, k, v), strict=True):
        torch.testing.assert_close(x @ found[f"h.0.attn.c_attn.{part}"], expected)
    assert found["h.0.attn.c_proj"].shape == (24, 24)


def test_fused_projections_are_split():
    attention = nn.MultiheadAttention(24, 2)
    vit = models.build("vit_tiny", channels=1, size=8, classes=3, embed_dim=24, depth=1, heads=2)
    for module, layer, fused in (
        (attention, "in_proj", attention.in_proj_weight),
        (vit, "blocks.0.attn.qkv", vit.get_parameter("blocks.0.attn.qkv.weight")),
    ):
        found = weights.matrices(module)
        parts = [found[f"{layer}.{part}"] for part in "qkv"]
        assert torch.equal(torch.cat(parts), fused)
        assert {part.shape for part in parts} == {(24, 24)}


def test_parametrized_weights_have_the_name_of_the_layer():
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(9, 7)))
    assert list(weights.matrices(net)) == ["0"]


def test_a_checkpoint_gives_the_table_of_its_model(tmp_path):
    net = _net()
    expected = spectra.table(net)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(4, 5, 4, 4)).sum().backward()
    optimizer.step()
    after = spectra.table(net)
    assert after != expected
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(state, tmp_path / "checkpoint.pt")
    assert spectra.table(weights.load(tmp_path / "checkpoint.pt")) == after

    from safetensors.torch import save_file

    save_file(net.state_dict(), tmp_path / "model.safetensors")
    assert spectra.table(weights.load(tmp_path / "model.safetensors")) == after


class _Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_loading_runs_no_code(tmp_path, capsys):
    torch.save({"model": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ConfigError, match=r"evil\.pt is no checkpoint .*UnpicklingError"):
        weights.load(tmp_path / "evil.pt")
    assert "executed" not in capsys.readouterr().out


def _same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_checkpoints_by_their_usual_names(key):
    net = _net()
    checkpoint = {"epoch": 3, key: net.state_dict(), "optimizer_state_dict": {}}
    _same(weights.matrices(checkpoint), weights.matrices(net))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the older weight norm is deprecated
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_multiplied_out(norm, dim):
    torch.manual_seed(0)
    plain, net = nn.Linear(6, 4), nn.Linear(6, 4)
    net.load_state_dict(plain.state_dict())
    net = norm(nn.Sequential(net)[0], dim=dim)
    for parameter in net.parameters():
        parameter.data *= 1.5
    _same(weights.matrices(nn.Sequential(net)), {"0": net(torch.eye(6)).sub(net.bias).T})
    net(torch.ones(2, 6)).sum().backward()
    with pytest.raises(ValueError, match="no weight matrix"):  # none is the gradient of W
        spectra.gradient_alignment(net)


def test_recurrent_weights_are_a_matrix_a_gate():
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 4, num_layers=2, bidirectional=True)
    found = weights.matrices(nn.ModuleDict({"lstm": lstm}))
    assert len(found) == 2 * 2 * 2 * 4  # layers, directions, input and hidden, gates
    torch.testing.assert_close(found["lstm.ih_l0.g"], lstm.weight_ih_l0[8:12].detach())
    torch.testing.assert_close(
        found["lstm.hh_l1_reverse.o"], lstm.weight_hh_l1_reverse[12:].detach()
    )
    assert set(weights.matrices(nn.GRU(5, 4))) == {
        f"{kind}_l0.{gate}" for kind in ("ih", "hh") for gate in "rzn"
    }
    assert set(weights.matrices(nn.RNN(5, 4))) == {"ih_l0", "hh_l0"}


def test_experts_that_are_stacked_are_a_matrix_each():
    stacked = torch.randn(3, 8, 6)
    state = {"layers.0.mlp.experts.gate_up_proj": stacked, "conv.weight": torch.randn(4, 3, 5)}
    found = weights.matrices(state)
    assert {name: tuple(w.shape) for name, w in found.items()} == {
        **{f"layers.0.mlp.experts.gate_up_proj.{i}": (8, 6) for i in range(3)}, "conv": (4, 15),
    }  # fmt: skip
    assert torch.equal(found["layers.0.mlp.experts.gate_up_proj.1"], stacked[1])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(dtype):
    weight = torch.randn(8, 6).to(dtype)
    (row,) = spectra.table({"a.weight": weight})
    (expected,) = spectra.table({"a.weight": weight.float()})
    assert row == pytest.approx(expected, nan_ok=True)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match=r"no weight matrix among \['bias'"):
        spectra.table({"bias": torch.zeros(3), "norm.weight": torch.zeros(3)})


def test_gradient_alignment():
    torch.manual_seed(0)
    net = nn.Linear(40, 30, bias=False)
    with pytest.raises(ValueError, match="no weight"):
        spectra.gradient_alignment(net)
    u, _, vh = torch.linalg.svd(net.weight.detach())

    def share(gradient, k=3):
        net.weight.grad = gradient
        return spectra.gradient_alignment(net, k)["weight"]

    assert share(torch.outer(u[:, 0], vh[2])) == pytest.approx(1, abs=1e-5)
    assert share(torch.outer(u[:, 0], vh[3])) == pytest.approx(0, abs=1e-5)
    assert share(net.weight.detach(), k=30) == pytest.approx(1, abs=1e-5)
    s = torch.linalg.svdvals(net.weight.detach()) ** 2
    assert share(net.weight.detach()) == pytest.approx((s[:3].sum() / s.sum()).item(), rel=1e-4)
    random = np.mean([share(torch.randn(30, 40), k=10) for _ in range(30)])
    assert random == pytest.approx(100 / 1200, rel=0.1)


def test_gradient_alignment_splits_fused_projections():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2)
    x = torch.randn(5, 3, 16)
    attention(x, x, x)[0].square().sum().backward()
    shares = spectra.gradient_alignment(attention, k=16)
    assert set(shares) == {"in_proj.q", "in_proj.k", "in_proj.v", "out_proj"}
    assert shares["in_proj.v"] == pytest.approx(1, abs=1e-5)  # k = 16: all of it


def test_singular_values_are_saved_as_an_npz(tmp_path):
    net = _net()
    spectra.save(tmp_path / "epoch-0001.npz", net)
    with np.load(tmp_path / "epoch-0001.npz") as saved:
        assert set(saved) == {"0", "3"}
        w = net[3].weight.detach().double().numpy()
        np.testing.assert_allclose(saved["3"], np.linalg.svd(w, compute_uv=False), rtol=1e-10)


def test_plots_show_all_eigenvalues_and_the_fit():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 50), nn.Linear(2, 2))  # the second has no fit
    figure = spectra.plot(net)
    histogram, ccdf, _, empty = figure.axes
    assert histogram.patches[0].get_data().values.sum() == 50
    points, line = ccdf.lines
    x, y = points.get_data()
    fit = spectra.power_law(10**x)
    np.testing.assert_allclose(10**y, np.arange(50, 0, -1) / 50)
    start, end = np.column_stack(line.get_data())
    assert start == pytest.approx([x[-fit.tail], y[-fit.tail]])
    assert end[0] == x[-1]
    assert (end[1] - start[1]) / (end[0] - start[0]) == pytest.approx(1 - fit.alpha)
    assert not empty.lines
    file = io.BytesIO()
    figure.savefig(file)
    assert file.getvalue().startswith(b"\x89PNG")
