"""ses_lab.probes against foolbox, scipy, Pillow, torch.func and closed forms."""

import colorsys
import io
import math

import foolbox
import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from torch import nn

from ses_lab import models
from ses_lab.probes import PROBES, attacks, common, geometry, representation
from ses_lab.probes import corruption as corruptions


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    return x, torch.from_numpy(data.target).long()


@pytest.fixture(scope="module")
def trained(digits):
    """A small convolutional network at some 95 % on digits."""
    x, y = digits
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.zero_grad()
    net.stages, net.classifier = ("0", "2"), "4"
    return net.eval()


# ---- what all probes keep to ----

_QUICK = {
    "corruption": {"names": ("gaussian_noise", "jpeg"), "severities": (1, 5)},
    "pgd": {"steps": 3},
    "hessian": {"iterations": 3},
}


def _nets():
    common = {"channels": 1, "size": 8, "classes": 10}
    yield models.build("resnet20", **common)
    yield models.build("vit_tiny", embed_dim=24, depth=2, heads=2, patch=2, **common)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_measures_and_changes_nothing(name, digits):
    x, y = digits
    for net in _nets():
        torch.manual_seed(0)
        net.train()
        net.get_submodule(net.stages[0]).eval()  # a frozen part
        modes = [module.training for module in net.modules()]
        before = {key: value.clone() for key, value in net.state_dict().items()}
        options = {"samples": 24, "batch_size": 10, **_QUICK.get(name, {})}
        first = PROBES[name](net, x, y, _seeded(), **options)
        again = PROBES[name](net, x, y, _seeded(), **options)
        assert first
        assert all(isinstance(value, float | int) for value in first.values())
        assert all(math.isfinite(value) for value in first.values())
        assert first == again
        assert [module.training for module in net.modules()] == modes
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert all(parameter.grad is None for parameter in net.parameters())
        assert not any(module._forward_hooks for module in net.modules())


def test_points_have_probes_too():
    torch.manual_seed(0)
    net = models.build("mlp", channels=2, size=None, classes=2)
    x = 3 * torch.randn(40, 2)
    y = (x[:, 0] > 0).long()
    for name in PROBES.keys() - {"corruption"}:
        assert PROBES[name](net, x, y, _seeded())
    with pytest.raises(ValueError, match=r"are for images .*got \(40, 2\)"):
        PROBES["corruption"](net, x, y)


def test_the_generator_chooses_the_samples(trained, digits):
    x, y = digits
    few = PROBES["fgsm"](trained, x, y, _seeded(), samples=300)["clean"]
    chosen = torch.randperm(len(x), generator=_seeded())[:300]
    with torch.no_grad():
        assert few == (trained(x[chosen]).argmax(1) == y[chosen]).sum().item() / 300


def test_wrong_inputs_are_refused(trained, digits):
    x, y = digits
    with pytest.raises(TypeError, match=r"uint8.*divide by 255"):
        PROBES["ranks"](trained, (255 * x).byte(), y)
    with pytest.raises(ValueError, match="got 1797, 5"):
        PROBES["ranks"](trained, x, y[:5])


# ---- corruptions ----


@pytest.fixture(scope="module")
def photographs():
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1) / 255
    tiles = F.interpolate(image[None], (64, 96), mode="area").unfold(2, 32, 32).unfold(3, 32, 32)
    return tiles.permute(0, 2, 3, 1, 4, 5).reshape(6, 3, 32, 32).contiguous()


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_a_corruption_grows_with_its_severity(name, photographs, digits):
    for x in (photographs, digits[0][:16]):
        distances = []
        for severity in range(1, 6):
            out = corruptions.corrupt(x, name, severity, _seeded())
            assert out.shape == x.shape
            assert out.dtype == x.dtype
            assert out.min() >= 0
            assert out.max() <= 1
            assert torch.equal(out, corruptions.corrupt(x, name, severity, _seeded()))
            distances.append((out - x).square().mean().item())
        if x is photographs:
            assert distances[0] > 0
            assert distances == sorted(distances)


@pytest.mark.parametrize("name", ["shot_noise", "gaussian_noise", "speckle_noise"])
def test_noise_has_its_variance(name):
    x = torch.full((8, 1, 64, 64), 0.5)
    out = corruptions.corrupt(x, name, 3, _seeded())
    c = corruptions.CORRUPTIONS[name][1][2]
    expected = {"shot_noise": 0.5 / c, "gaussian_noise": c**2, "speckle_noise": (0.5 * c) ** 2}
    assert out.mean().item() == pytest.approx(0.5, abs=0.003)
    assert out.var().item() == pytest.approx(expected[name], rel=0.05)


def test_impulse_noise_is_salt_and_pepper():
    x = torch.full((8, 3, 64, 64), 0.5)
    out = corruptions.corrupt(x, "impulse_noise", 5, _seeded())
    for value in (0, 1):
        assert (out == value).float().mean().item() == pytest.approx(0.035, rel=0.1)
    assert (out == 0.5).float().mean().item() == pytest.approx(0.93, rel=0.01)


@pytest.mark.parametrize("severity", range(1, 6))
def test_gaussian_blur_is_that_of_scipy(severity, photographs):
    sigma = corruptions.CORRUPTIONS["gaussian_blur"][1][severity - 1]
    expected = scipy.ndimage.gaussian_filter(
        photographs.numpy(), (0, 0, sigma, sigma), mode="nearest", radius=math.ceil(4 * sigma)
    )
    out = corruptions.corrupt(photographs, "gaussian_blur", severity)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", ["jpeg", "pixelate"])
def test_jpeg_and_pixelate_are_those_of_pillow(name, severity, photographs):
    c = corruptions.CORRUPTIONS[name][1][severity - 1]

    def theirs(pixels):
        image = Image.fromarray(pixels)
        if name == "pixelate":
            small = image.resize((int(28 * c), int(32 * c)), Image.BOX)
            return np.asarray(small.resize((28, 32), Image.BOX), dtype=float)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=c, subsampling=0)
        return np.asarray(Image.open(file), dtype=float)

    x = photographs[..., :28]  # no multiple of 8
    differences, distortions = [], []
    for images in (x, x[:, :1]):
        pixels = (255 * images).round().permute(0, 2, 3, 1).squeeze(-1).byte().numpy()
        expected = np.stack([theirs(image) for image in pixels])
        out = corruptions.corrupt(images, name, severity).permute(0, 2, 3, 1).squeeze(-1)
        differences.append(np.abs(255 * out.numpy() - expected).ravel())
        distortions.append(np.abs(pixels - expected).ravel())
    differences, distortions = np.concatenate(differences), np.concatenate(distortions)
    # Their integer arithmetic may round a coefficient the other way, and with it its whole block.
    assert np.median(differences) < 1
    assert differences.mean() < 0.15 * distortions.mean() + 0.5 * (name == "pixelate")


def test_the_tables_of_jpeg_are_those_of_pillow():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=50)
    luminance, chrominance = Image.open(file).quantization.values()
    assert [int(q) for q in corruptions._LUMINANCE.split()] == list(luminance)
    assert [int(q) for q in corruptions._CHROMINANCE.split()] == list(chrominance)


def test_a_displacement_is_in_pixels_along_x_and_y():
    x = torch.rand(2, 3, 10, 14)
    out = corruptions._displace(x, torch.tensor([3.0, 2.0]).expand(2, 1, 1, 2))
    torch.testing.assert_close(out[:, :, :-2, :-3], x[:, :, 2:, 3:])


def test_brightness_adds_to_the_value_of_hsv(photographs):
    out = corruptions.corrupt(photographs, "brightness", 3)
    for before, after in zip(
        photographs.permute(0, 2, 3, 1).reshape(-1, 3)[::50].tolist(),
        out.permute(0, 2, 3, 1).reshape(-1, 3)[::50].tolist(),
        strict=True,
    ):
        h, s, v = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(h, s, min(v + 0.15, 1)), abs=1e-5)
    assert corruptions.corrupt(torch.zeros(1, 1, 8, 8), "brightness", 1).unique().item() == (
        pytest.approx(0.05)
    )


def test_contrast_shrinks_about_the_mean(photographs):
    x = 0.25 + 0.5 * photographs
    out = corruptions.corrupt(x, "contrast", 2)
    torch.testing.assert_close(out.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(out.std((2, 3)), 0.5 * x.std((2, 3)))


def test_zoom_blur_is_the_mean_of_scipys_zooms(photographs):
    x = photographs[0].double().numpy()
    centre = np.array([0, 15.5, 15.5])
    zooms = []
    for i in range(11):
        inverse = np.array([1, 1 / (1 + 0.01 * i), 1 / (1 + 0.01 * i)])
        zooms.append(
            scipy.ndimage.affine_transform(
                x, inverse, centre - inverse * centre, order=1, mode="nearest"
            )
        )
    expected = (x + sum(zooms)) / 12
    out = corruptions.corrupt(photographs[:1].double(), "zoom_blur", 2)
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-6)


def test_motion_smears_a_point_along_one_line():
    x = torch.zeros(200, 1, 31, 31)
    x[:, :, 15, 15] = 1
    out = corruptions.corrupt(x, "motion_blur", 5, _seeded())[:, 0]
    torch.testing.assert_close(out.sum((1, 2)), torch.ones(200), atol=1e-4, rtol=0)
    row, column = torch.meshgrid(torch.arange(31.0) - 15, torch.arange(31.0) - 15, indexing="ij")
    moments = [
        torch.stack([(out * a * b).sum((1, 2)) for a in (row, column)], -1) for b in (row, column)
    ]
    spread = torch.linalg.eigvalsh(torch.stack(moments, -2))  # across and along
    assert (spread[:, 0] < 0.4).all()  # bilinear taps
    assert (spread[:, 1] > 2.5).all()
    angle = torch.atan2((out * row).sum((1, 2)), (out * column).sum((1, 2)))
    tilt = torch.remainder(angle + math.pi / 2, math.pi) - math.pi / 2
    assert tilt.abs().max() < math.pi / 4 + 0.05
    assert tilt.std().item() == pytest.approx(math.pi / 2 / 12**0.5, rel=0.2)


@pytest.mark.parametrize(
    "name", ["gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "elastic", "pixelate"]
)
def test_what_moves_pixels_leaves_a_flat_image_flat(name):
    x = torch.rand(3, 3, 1, 1).expand(-1, -1, 20, 28)
    torch.testing.assert_close(corruptions.corrupt(x, name, 5, _seeded()), x)


def test_fog_is_scaled_to_the_brightness_of_the_image():
    x = torch.full((4, 3, 32, 24), 0.5)
    for severity, (amount, _) in enumerate(corruptions.CORRUPTIONS["fog"][1], 1):
        out = corruptions.corrupt(x, "fog", severity, _seeded())
        torch.testing.assert_close(out.amax((1, 2, 3)), torch.full((4,), 0.5))
        lowest = torch.full((4,), 0.25 / (0.5 + amount))
        torch.testing.assert_close(out.amin((1, 2, 3)), lowest)
        # Smooth, unlike noise: a step to the next pixel is small beside the range.
        assert (out.diff(dim=3).abs().mean() / (0.5 - lowest[0])).item() < 0.12
        assert torch.equal(out[:, 0], out[:, 2])


def test_accuracy_under_corruption(trained, digits):
    x, y = digits
    options = {"names": ("contrast", "jpeg"), "severities": (1, 5)}
    result = corruptions.corruption(trained, x, y, _seeded(), **options)
    with torch.no_grad():
        clean = (trained(x).argmax(1) == y).float().mean().item()
        expected = trained(((x - x.mean((2, 3), True)) * 0.15 + x.mean((2, 3), True)).clamp(0, 1))
    assert result["clean"] == pytest.approx(clean)
    assert result["contrast/5"] == pytest.approx((expected.argmax(1) == y).float().mean().item())
    assert result["contrast/5"] < result["contrast/1"] <= clean + 0.02
    assert result["contrast"] == pytest.approx((result["contrast/1"] + result["contrast/5"]) / 2)
    assert result["mean"] == pytest.approx((result["contrast"] + result["jpeg"]) / 2)


def test_the_set_of_the_source_acts_on_normalised_images(photographs):
    """Against its definitions, written out; the network sees what they give, nothing clamped."""
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    x = photographs[:2]
    side = x.shape[-1]
    net = models.build("mlp", channels=3, size=side, classes=2, mean=mean, std=std)
    z = net.normalize(x)
    padded = F.pad(z, (2, 2, 2, 2))
    box = sum(padded[..., i : i + side, j : j + side] for i in range(5) for j in range(5)) / 25
    average = z.mean((2, 3), keepdim=True)
    noise = torch.randn(z.shape, generator=_seeded())
    expected = {
        "gaussian_noise": z + 0.08 * noise,
        "gaussian_blur": box,
        "contrast": average + 0.4 * (z - average),
        "brightness": z + 0.3,
        "shot_noise": torch.poisson(z.clamp_min(0) * 100, generator=_seeded()) / 100,
    }
    assert expected.keys() == corruptions.SOURCE.keys()
    for name, value in expected.items():
        out = corruptions.corrupt(x, name, 3, _seeded(), "source", net)
        torch.testing.assert_close(net.normalize(out), value, rtol=1e-5, atol=1e-5)
    bright = corruptions.corrupt(torch.ones(1, 3, side, side), "brightness", 5, None, "source", net)
    assert bright.min() > 1


def test_the_set_of_the_source_has_its_severities(digits):
    x, y = digits
    net = models.build("mlp", channels=1, size=8, classes=10)
    result = corruptions.corruption(net, x, y, _seeded(), set="source", samples=50)
    names = {f"{name}/{s}" for name in corruptions.SOURCE for s in (1, 3, 5)}
    assert result.keys() == {"clean", "mean", *corruptions.SOURCE, *names}
    with pytest.raises(ValueError, match="unknown corruption set 'sorce'; did you mean 'source'"):
        corruptions.corruption(net, x, y, set="sorce")


def test_unknown_corruptions_are_named():
    for name, severity in (("frost", 1), ("fog", 0), ("fog", 6)):
        with pytest.raises(ValueError, match=f"{name}.*{severity}.*1 to 5.*elastic"):
            corruptions.corrupt(torch.zeros(1, 1, 8, 8), name, severity)


# ---- attacks ----

_FOOLBOX = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l2", 0.6)])
def test_pgd_is_that_of_foolbox(norm, epsilon, trained, digits):
    x, y = digits[0][:200], digits[1][:200]
    options = {"steps": 7, "random_start": False}
    ours = attacks.attack(
        trained, x, y, norm=norm, epsilon=epsilon, step_size=0.3 * epsilon, **options
    )
    assert all(parameter.grad is None for parameter in trained.parameters())
    reference = _FOOLBOX[norm](abs_stepsize=0.3 * epsilon, **options)
    theirs = foolbox.PyTorchModel(trained, bounds=(0, 1), device="cpu")
    _, expected, fooled = reference(theirs, x, y, epsilons=epsilon)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert 0.05 < fooled.float().mean() < 1
    with torch.no_grad():
        assert torch.equal(trained(ours).argmax(1) != y, fooled)
    trained.zero_grad()  # foolbox leaves gradients


def test_fgsm_is_that_of_foolbox(trained, digits):
    x, y = digits
    theirs = foolbox.PyTorchModel(trained, bounds=(0, 1), device="cpu")
    _, _, fooled = foolbox.attacks.LinfFastGradientAttack(random_start=False)(
        theirs, x, y, epsilons=0.05
    )
    trained.zero_grad()
    result = PROBES["fgsm"](trained, x, y, epsilon=0.05)
    assert result["robust"] == pytest.approx(1 - fooled.float().mean().item(), abs=1e-6)
    assert result["robust"] < result["clean"] - 0.05


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l2", 0.6)])
def test_pgd_stays_in_the_ball_and_beats_one_step(norm, epsilon, trained, digits):
    x, y = digits[0][:300], digits[1][:300]
    out = attacks.attack(
        trained, x, y, norm=norm, epsilon=epsilon, steps=10, step_size=epsilon / 4,
        random_start=True, generator=_seeded(),
    )  # fmt: skip
    delta = (out - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert size.max().item() <= epsilon * (1 + 1e-5)
    assert out.min() >= 0
    assert out.max() <= 1
    result = PROBES["pgd"](trained, x, y, _seeded(), norm=norm, epsilon=epsilon)
    if norm == "linf":
        assert result["robust"] <= PROBES["fgsm"](trained, x, y, epsilon=epsilon)["robust"]
    assert PROBES["pgd"](trained, x, y, norm=norm, epsilon=1e-6)["robust"] == result["clean"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_random_start_is_uniform_in_the_ball(norm):
    x = torch.zeros(4000, 3)  # points: no box to be clipped to
    start = attacks.attack(
        nn.Linear(3, 2), x, torch.zeros(4000).long(), norm=norm, epsilon=2.0, steps=0,
        step_size=0.0, random_start=True, generator=_seeded(),
    )  # fmt: skip
    radius = (start.abs().amax(1) if norm == "linf" else start.norm(dim=1)) / 2
    quantiles = (radius**3).quantile(torch.tensor([0.1, 0.5, 0.9]))  # volume inside
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=0.03, rtol=0)
    assert start.mean(0).abs().max() < 0.06


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="'linf' or 'l2', got 'l1'"):
        PROBES["pgd"](nn.Linear(2, 2), torch.rand(3, 2), torch.zeros(3).long(), norm="l1")


# ---- Jacobian ----


def test_jacobian_of_a_linear_network_is_its_matrix():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Linear(7, 5))
    matrix = (net[2].weight @ net[1].weight).detach().double().numpy()
    result = PROBES["jacobian"](net, torch.rand(9, 3, 2, 2), torch.zeros(9).long())
    condition = np.linalg.cond(matrix)
    assert result["condition"] == pytest.approx(condition, rel=1e-4)
    assert result["log_condition"] == pytest.approx(math.log(condition), rel=1e-4)
    assert result["spectral"] == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-4)
    assert result["frobenius"] == pytest.approx(np.linalg.norm(matrix), rel=1e-4)
    assert result["singular"] == 0


def test_jacobians_are_those_of_jacrev(trained, digits):
    x = digits[0][:12]
    expected = torch.func.vmap(torch.func.jacrev(lambda one: trained(one[None])[0]))(x).detach()
    torch.testing.assert_close(geometry.jacobians(trained, x), expected.flatten(2))
    conditions = np.linalg.cond(expected.flatten(2).double().numpy())
    result = PROBES["jacobian"](trained, x, torch.zeros(12).long(), batch_size=5)
    assert result["condition"] == pytest.approx(np.sort(conditions)[5], rel=1e-4)
    assert result["mean_condition"] == pytest.approx(conditions.mean(), rel=1e-4)
    assert result["std_condition"] == pytest.approx(conditions.std(ddof=1), rel=1e-4)
    assert result["log_condition"] == pytest.approx(np.log(conditions).mean(), rel=1e-4)
    norms = np.linalg.norm(expected.flatten(2).double().numpy(), axis=(1, 2))
    assert result["frobenius"] == pytest.approx(norms.mean(), rel=1e-5)
    vit = list(_nets())[1].eval()
    expected = torch.stack([torch.autograd.functional.jacobian(vit, one[None])[0] for one in x])
    torch.testing.assert_close(
        geometry.jacobians(vit, x), expected.flatten(2), atol=1e-6, rtol=1e-4
    )


def test_a_singular_jacobian_is_counted_apart():
    net = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [1.0, -1.0]])
    result = PROBES["jacobian"](net, x, torch.zeros(5).long())
    expected = np.linalg.cond(net[1].weight.detach().double().numpy())
    assert result["singular"] == pytest.approx(0.4)
    assert result["condition"] == pytest.approx(expected, rel=1e-4)  # the median
    assert result["mean_condition"] == pytest.approx(expected, rel=1e-4)  # of the others
    assert result["log_condition"] == pytest.approx(math.log(expected), rel=1e-4)


# ---- local complexity ----


def test_crossings_of_one_layer_are_exact_in_one_dimension():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 300), nn.ReLU(), nn.Linear(300, 2))
    kinks = (-net[0].bias / net[0].weight[:, 0]).detach()
    x = torch.linspace(-1, 1, 21)[:, None]
    near = (kinks - x).abs() < 0.1
    result = PROBES["complexity"](net, x, torch.zeros(21).long(), radius=0.1)
    assert near.sum() > 100
    assert result["crossings"] == pytest.approx(near.sum().item() / 21)
    assert result["share"] == pytest.approx(near.float().mean().item())


def test_the_neighbourhood_lies_between_two_balls():
    """Its hull holds the ball of radius r / sqrt P and lies in that of r."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4000), nn.ReLU(), nn.Linear(4000, 2))
    x = torch.randn(10, 6)
    distance = (net[0](x).abs() / net[0].weight.norm(dim=1)).detach()
    inner, outer = ((distance < r).sum().item() / 10 for r in (0.5 / 6**0.5, 0.5))
    result = PROBES["complexity"](net, x, torch.zeros(10).long(), _seeded(), radius=0.5)
    assert inner < result["crossings"] < outer
    assert inner > 100


def test_crossings_behind_the_first_layer():
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.LeakyReLU())
    with torch.no_grad():  # relu(x) and leaky(relu(x) - 1): kinks at 0 and 1
        for parameter, value in zip(net.parameters(), (1.0, 0.0, 1.0, -1.0), strict=True):
            parameter.fill_(value)
    for x, count in ((-3.0, 0), (0.1, 1), (0.5, 2), (1.2, 1), (3.0, 0)):
        probe = PROBES["complexity"](net, torch.tensor([[x]]), torch.zeros(1).long(), radius=0.7)
        assert probe["crossings"] == count


@pytest.mark.parametrize(
    "activation", [F.relu, nn.ReLU(inplace=True), F.gelu, F.silu, F.leaky_relu, torch.relu]
)
def test_activations_are_seen_as_modules_and_as_functions(activation):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(3, 500), nn.Linear(500, 2)

        def forward(self, x):
            return self.second(activation(self.first(x)))

    x, net = torch.randn(5, 3), Net()
    result = PROBES["complexity"](net, x, torch.zeros(5).long(), _seeded(), radius=0.2)
    frame = torch.linalg.qr(torch.randn((3, 3), generator=_seeded()))[0].mT
    reach = 0.2 * (net.first.weight @ frame.mT).abs().amax(1)  # of x on either side, along v
    expected = (net.first(x).abs() < reach).sum().item() / 5
    assert expected > 10
    assert result["crossings"] == pytest.approx(expected)


def test_a_network_without_units_is_refused():
    with pytest.raises(ValueError, match="ran no ReLU"):
        PROBES["complexity"](nn.Sequential(nn.Tanh()), torch.rand(3, 2), torch.zeros(3).long())


# ---- loss landscape ----


def _tiny():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    shapes = {name: p.shape for name, p in net.named_parameters()}

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        named = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, named, (x,)), y)

    return net, x, y, loss


def _flat(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def test_sharpness_is_the_rise_of_the_loss_along_the_gradient():
    net, x, y, loss = _tiny()
    w = _flat(net)
    g = torch.func.grad(loss)(w)
    for batch_size in (30, 7):
        result = PROBES["sharpness"](net, x, y, rho=0.3, batch_size=batch_size)
        assert result["loss"] == pytest.approx(loss(w).item())
        assert result["gradient_norm"] == pytest.approx(g.norm().item())
        rise = loss(w + 0.3 * g / g.norm()) - loss(w)
        assert result["sharpness"] == pytest.approx(rise.item())
    rho = 1e-3
    second = g @ torch.func.hessian(loss)(w) @ g / g.norm() ** 2
    taylor = rho * g.norm() + rho**2 / 2 * second
    assert PROBES["sharpness"](net, x, y, rho=rho)["sharpness"] == pytest.approx(
        taylor.item(), rel=1e-5
    )


@pytest.mark.parametrize("dominant", ["positive", "negative"])
def test_the_largest_eigenvalue_is_that_of_the_full_hessian(dominant):
    net, x, y, loss = _tiny()
    torch.manual_seed(0)
    if dominant == "negative":  # far from any minimum
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(3 * torch.randn_like(parameter))
    eigenvalues = torch.linalg.eigvalsh(torch.func.hessian(loss)(_flat(net)))
    assert (eigenvalues[-1] > -eigenvalues[0]) == (dominant == "positive")
    options = {"iterations": 3000, "tolerance": 1e-6}
    for batch_size in (30, 7):
        result = PROBES["hessian"](net, x, y, _seeded(), batch_size=batch_size, **options)
        assert result["eigenvalue"] == pytest.approx(eigenvalues[-1].item(), rel=1e-4)
        assert result["residual"] < 1e-6
        assert result["iterations"] < 6000


def test_the_residual_says_how_far_the_eigenvalue_may_be():
    net, x, y, loss = _tiny()
    eigenvalues = torch.linalg.eigvalsh(torch.func.hessian(loss)(_flat(net)))
    result = PROBES["hessian"](net, x, y, _seeded(), iterations=4, tolerance=0.0)
    assert result["iterations"] == 4
    nearest = (eigenvalues - result["eigenvalue"]).abs().min()
    assert nearest <= result["residual"] * abs(result["eigenvalue"])
    assert result["residual"] > 1e-4


def test_frozen_parameters_are_left_out():
    net, x, y, loss = _tiny()
    net[0].requires_grad_(False)
    block = torch.func.hessian(loss)(_flat(net))[30:, 30:]
    result = PROBES["hessian"](net, x, y, _seeded(), iterations=3000, tolerance=1e-6)
    assert result["eigenvalue"] == pytest.approx(torch.linalg.eigvalsh(block)[-1].item(), rel=1e-4)


def test_alignment_is_the_cosine_with_the_gradient_of_the_nuclear_norm():
    net, x, y, _ = _tiny()
    net[2].requires_grad_(False)
    weight = net[0].weight
    F.cross_entropy(net(x), y).backward()
    gradient, weight.grad = weight.grad, None
    torch.linalg.matrix_norm(weight, "nuc").backward()
    expected = F.cosine_similarity(gradient.flatten(), weight.grad.flatten(), dim=0).item()
    result = PROBES["gradient_alignment"](net, x, y, _seeded(), batch_size=7)
    assert result["cosine"] == pytest.approx(expected)
    assert result["aligned"] == float(expected > 0)


def test_a_weight_without_a_gradient_has_no_alignment():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].bias.fill_(-100)
        net[2].bias.copy_(torch.tensor([1.0, 0.0]))
    x, y = torch.rand(5, 3), torch.zeros(5).long()
    assert math.isnan(PROBES["gradient_alignment"](net, x, y)["cosine"])


# ---- representation ----


def test_units_are_dead_that_no_sample_makes_active():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(1, 2), nn.Linear(4, 5), nn.GELU())
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.copy_(torch.tensor([0.0, -0.9, -2.0]))  # active at any, at bright, at no pixel
        net[3].weight.fill_(0.0)
        net[3].bias.copy_(torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]))
    x = torch.full((4, 1, 4, 4), 0.5)
    dim = PROBES["dead_units"](net, x, torch.zeros(4).long(), batch_size=3)
    assert dim == {"share": pytest.approx((2 + 3) / 8), "units": 8}
    x[3, 0, 2, 1] = 1.0  # one pixel of the last batch
    assert PROBES["dead_units"](net, x, torch.zeros(4).long(), batch_size=3)["share"] == 4 / 8
    with pytest.raises(ValueError, match="ran no ReLU"):
        PROBES["dead_units"](nn.Sequential(nn.Tanh()), torch.rand(3, 2), torch.zeros(3).long())


def test_ranks_are_those_of_the_features(trained, digits):
    x, y = digits
    result = PROBES["ranks"](trained, x, y, batch_size=100)
    with torch.no_grad():
        features = trained[:3](x).mean((2, 3)).double().numpy()
    p = np.linalg.eigvalsh(np.cov(features.T))
    p = p / p.sum()
    assert set(result) == {"0", "2"}
    assert result["2"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_collapse_of_known_features():
    """Class means at orthogonal points, scatter s^2 in one direction between them."""
    k, s = 4, 0.1
    means = 2 * torch.eye(k, dtype=torch.float64)
    along = (means[0] - means[1]) / (8**0.5)
    y = torch.arange(k).repeat(10)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(4).repeat(5)
    result = representation._collapse(means[y] + s * sign[:, None] * along, y)
    # S_B = (4 / k) (I - 11^T / k): eigenvalue 1, three times.
    assert result["nc1"] == pytest.approx(s**2 / k)
    for key in ("equinorm", "equiangular", "max_angle"):
        assert result[key] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_collapse_does_not_see_round_off(offset):
    """A mean far from 0 changes nothing: the K-th singular value of the means is no direction."""
    generator = _seeded()
    y = torch.arange(10).repeat(30)
    h = torch.randn(10, 64, generator=generator)[y] + 0.1 * torch.randn(
        300, 64, generator=generator
    )
    expected = representation._collapse(h.double(), y)["nc1"]
    moved = representation._collapse((h + offset).double(), y)["nc1"]
    assert 1e-4 < expected < 1e-2
    assert moved == pytest.approx(expected, rel=1e-2)


def test_collapse_is_that_of_the_definition(trained, digits):
    x, y = digits
    keep = y < 7  # classes need not be all there
    result = PROBES["collapse"](trained, x[keep], y[keep], samples=None)
    with torch.no_grad():
        h = trained[:4](x[keep]).double().numpy()
    labels = y[keep].numpy()
    means = np.stack([h[labels == c].mean(0) for c in range(7)])
    centred = means - means.mean(0)
    residual = h - means[labels]
    within, between = residual.T @ residual / len(h), centred.T @ centred / 7
    assert result["nc1"] == pytest.approx(
        np.trace(within @ np.linalg.pinv(between, rcond=1e-10, hermitian=True)) / 7, rel=1e-6
    )
    norms = np.linalg.norm(centred, axis=1)
    cosines = np.corrcoef(norms, norms)[0, 0] * (centred @ centred.T) / np.outer(norms, norms)
    off = cosines[~np.eye(7, dtype=bool)]
    assert result["equinorm"] == pytest.approx(norms.std() / norms.mean(), rel=1e-6)
    assert result["equiangular"] == pytest.approx(off.std(), rel=1e-6)
    assert result["max_angle"] == pytest.approx(np.abs(off + 1 / 6).mean(), rel=1e-6)


def test_collapse_of_all_to_one_point_is_infinite():
    y = torch.arange(3).repeat(4)
    assert representation._collapse(torch.ones(12, 5).double(), y)["nc1"] == math.inf


def test_collapse_needs_two_classes(trained, digits):
    with pytest.raises(ValueError, match="two or more classes, got 1"):
        PROBES["collapse"](trained, digits[0][:20], torch.zeros(20).long())
    assert not trained[4]._forward_pre_hooks


def test_random_numbers_are_drawn_where_the_generator_is():
    like = torch.zeros(2, dtype=torch.float64)
    drawn = common.randn((3,), _seeded(), like)
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn, torch.randn(3, generator=_seeded()).double())
