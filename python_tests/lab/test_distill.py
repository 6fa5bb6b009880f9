"""Distillation losses against the papers' formulas written as sums, and on a real student."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from ses_lab.distill import DISTILLERS, as_map, pairs
from ses_lab.models import Outputs, build, outputs

N, K = 5, 4
DOUBLE = torch.float64


def example(*shapes, seed, dtype=DOUBLE, **options):
    g = torch.Generator().manual_seed(seed)
    stages = [torch.randn(N, *shape, generator=g, dtype=dtype, **options) for shape in shapes]
    return Outputs(torch.randn(N, K, generator=g, dtype=dtype, **options), stages)


STUDENT = example((3, 6, 6), (4, 3, 3), (6, 2, 2), seed=1)
TEACHER = example((5, 6, 6), (8, 3, 3), (7, 2, 2), seed=2)


def distiller(name, student=STUDENT, teacher=TEACHER, **params):
    made = DISTILLERS[name](student, teacher, **params).to(student.logits.dtype)
    made.prepare([teacher] * 2)
    return made


# ---- formulas -----------------------------------------------------------------------------------


def kd(student, teacher, temperature):
    """T^2 sum_k p_k log(p_k / q_k): Hinton et al. (2015), less the entropy of the teacher."""
    total = 0.0
    for s, t in zip(student.logits.tolist(), teacher.logits.tolist(), strict=True):
        q, p = ([math.exp(v / temperature) for v in row] for row in (s, t))
        q, p = ([v / sum(row) for v in row] for row in (q, p))
        total += sum(p[k] * math.log(p[k] / q[k]) for k in range(K))
    return temperature**2 * total / N


def attention(s, t):
    """|Q_s / |Q_s| - Q_t / |Q_t||^2 / positions, Q = sum_c A_c^2. Zagoruyko & Komodakis (2017)."""
    total = 0.0
    for n in range(N):
        maps = [sum(channel.flatten() ** 2 for channel in x[n]) for x in (s, t)]
        maps = [q / math.sqrt(sum(v * v for v in q.tolist())) for q in maps]
        total += sum((a - b) ** 2 for a, b in zip(*map(torch.Tensor.tolist, maps), strict=True))
    return total / N / s[0, 0].numel()


def mmd(s, t):
    """Squared MMD of the normalised maps under (x . y)^2. Huang & Wang (2017), equations 6-8."""

    def mean_kernel(x, y):
        total = 0.0
        for a in x.flatten(1):
            for b in y.flatten(1):
                total += (a @ b / a.norm() / b.norm()).item() ** 2
        return total / len(x) / len(y)

    return (
        sum(
            mean_kernel(s[n], s[n]) + mean_kernel(t[n], t[n]) - 2 * mean_kernel(s[n], t[n])
            for n in range(N)
        )
        / N
    )


def huber(a, b):
    return 0.5 * (a - b) ** 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def rkd(s, t):
    """Distance and angle potentials over pairs and triples. Park et al. (2019), equations 5-9."""
    potentials = []
    for e in (s, t):
        d = [[(a - b).norm().item() for b in e] for a in e]
        mean = sum(map(sum, d)) / (N * (N - 1))
        angle = {}
        for i in range(N):
            for j in range(N):
                for k in range(N):
                    if i != j and j != k:
                        u, v = e[i] - e[j], e[k] - e[j]
                        angle[i, j, k] = (u @ v / u.norm() / v.norm()).item()
        potentials.append(({(i, j): d[i][j] / mean for i in range(N) for j in range(N)}, angle))
    return [
        sum(huber(a[key], b[key]) for key in a) / N**power
        for power, a, b in zip((2, 3), *potentials, strict=True)
    ]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd(temperature):
    loss = distiller("kd", temperature=temperature)(STUDENT, TEACHER)
    assert loss.item() == pytest.approx(kd(STUDENT, TEACHER, temperature))
    # The gradient of T^2 times the cross-entropy with soft targets, equation (2)
    logits = STUDENT.logits.clone().requires_grad_()
    distiller("kd", temperature=temperature)(STUDENT._replace(logits=logits), TEACHER).backward()
    q, p = ((x / temperature).softmax(1) for x in (STUDENT.logits, TEACHER.logits))
    torch.testing.assert_close(logits.grad, temperature * (q - p) / N)


def test_attention():
    expected = sum(attention(s, t) for s, t in zip(STUDENT.stages, TEACHER.stages, strict=True))
    found = distiller("attention")(STUDENT, TEACHER).item()
    assert found == pytest.approx(1000 * expected)


def test_nst():
    expected = sum(mmd(s, t) for s, t in zip(STUDENT.stages, TEACHER.stages, strict=True))
    assert distiller("nst")(STUDENT, TEACHER).item() == pytest.approx(50 * expected)


def test_rkd():
    # Far apart, so that some distances are on the linear side of Huber's loss
    stage = STUDENT.stages[-1].clone()
    stage[0] *= 30
    student = STUDENT._replace(stages=[stage])
    distance, angle = rkd(stage.mean((2, 3)), TEACHER.stages[-1].mean((2, 3)))
    found = [
        distiller("rkd", student, distance=d, angle=a)(student, TEACHER).item()
        for d, a in ((1, 0), (0, 1), (25, 50))
    ]
    assert found == pytest.approx([distance, angle, 25 * distance + 50 * angle])


def test_fitnets():
    made = distiller("fitnets")
    s, t = STUDENT.stages[1], TEACHER.stages[1]  # the middle ones
    W, b = made.regressor.weight[:, :, 0, 0], made.regressor.bias
    error = 0.0
    for n in range(N):
        for i in range(3):
            for j in range(3):
                error += (W @ s[n, :, i, j] + b - t[n, :, i, j]).square().sum().item()
    assert made(STUDENT, TEACHER).item() == pytest.approx(error / t.numel())


def test_factor_transfer():
    """|F_t / |F_t| - F_s / |F_s||_1, averaged. Kim et al. (2018), equation 3."""
    made = distiller("factor").eval()
    s = made.translator(STUDENT.stages[-1])
    t = made.encoder(TEACHER.stages[-1])
    assert s.shape == t.shape == (N, 4, 2, 2)  # round(7 / 2) channels
    expected = sum(
        (a / a.norm() - b / b.norm()).abs().sum().item() for a, b in zip(s, t, strict=True)
    ) / s.numel()  # fmt: skip
    assert made(STUDENT, TEACHER).item() == pytest.approx(200 * expected)


def test_paraphraser_is_trained_once_and_then_frozen():
    fresh = DISTILLERS["factor"](STUDENT, TEACHER, lr=1e-2).double()
    with pytest.raises(RuntimeError, match="prepare"):
        fresh(STUDENT, TEACHER)

    def error():
        x = TEACHER.stages[-1]
        return F.mse_loss(fresh.decoder(fresh.encoder(x)), x).item()

    before = error()
    fresh.prepare([TEACHER] * 100)
    assert error() < 0.5 * before

    frozen = {k: v.clone() for k, v in fresh.encoder.state_dict().items()}
    trained = [p for p in fresh.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in fresh.translator.parameters()}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        fresh.train()
        optimizer.zero_grad()
        fresh(STUDENT, TEACHER).backward()
        optimizer.step()
    torch.testing.assert_close(fresh.encoder.state_dict(), frozen, rtol=0, atol=0)

    resumed = DISTILLERS["factor"](STUDENT, TEACHER).double()
    resumed.load_state_dict(fresh.state_dict())
    assert resumed(STUDENT, TEACHER).item() == fresh(STUDENT, TEACHER).item()


# ---- invariances --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kd", "attention", "rkd", "nst"])
def test_no_loss_and_no_gradient_where_student_equals_teacher(name):
    stages = [x.clone().requires_grad_() for x in TEACHER.stages]
    student = Outputs(TEACHER.logits.clone().requires_grad_(), stages)
    loss = distiller(name, student)(student, TEACHER)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    loss.backward()
    for x in (student.logits, *stages):
        assert x.grad is None or x.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["attention", "rkd", "nst"])
def test_scale_does_not_matter(name):
    expected = distiller(name)(STUDENT, TEACHER).item()
    for a, b in ((1e3, 1), (1, 1e-3), (1e-4, 1e4)):
        student = STUDENT._replace(stages=[a * x for x in STUDENT.stages])
        teacher = TEACHER._replace(stages=[b * x for x in TEACHER.stages])
        assert distiller(name)(student, teacher).item() == pytest.approx(expected)


def test_rkd_sees_only_relations():
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE))[0]
    moved = torch.einsum("dc,nchw->ndhw", rotation, STUDENT.stages[-1]) + 3
    expected = distiller("rkd")(STUDENT, TEACHER).item()
    student = STUDENT._replace(stages=[moved])
    assert distiller("rkd", student)(student, TEACHER).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["attention", "rkd", "nst"])
def test_dead_student_has_finite_gradients(name):
    """All samples alike, some channels and samples 0: as after too large a step."""
    for alive in (0, 1):
        stages = [alive * x[:1].expand_as(x) * (x > 0.5) for x in STUDENT.stages]
        if alive:
            stages = [torch.cat([x[:1], x[:1], 0 * x[:1], x[3:]]) for x in stages]
        stages = [x.requires_grad_() for x in stages]
        loss = distiller(name)(STUDENT._replace(stages=stages), TEACHER)
        loss.backward()
        assert loss.isfinite()
        for x in stages:
            assert x.grad is None or x.grad.abs().max() < 1e6


# ---- stages that differ -------------------------------------------------------------------------


def test_as_map():
    tokens = torch.randn(2, 10, 3)
    whole = as_map(tokens)  # a class token and 3 x 3 patches
    for i in range(3):
        for j in range(3):
            assert torch.equal(whole[:, :, i, j], tokens[:, 1 + 3 * i + j])
    assert torch.equal(as_map(tokens[:, 1:]), whole)
    assert as_map(torch.zeros(2, 5)).shape == (2, 5, 1, 1)
    for shape in ((2, 8, 3), (2, 3, 4, 4, 4), (2, 0, 3)):
        with pytest.raises(ValueError, match="a stage is"):
            as_map(torch.zeros(shape))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [(3, 3, [(0, 0), (1, 1), (2, 2)]), (3, 12, [(0, 3), (1, 7), (2, 11)]), (4, 1, [(3, 0)]),
     (4, 3, [(0, 0), (1, 1), (3, 2)])],
)  # fmt: skip
def test_pairs_are_evenly_spaced_up_to_the_last(ours, theirs, expected):
    student, teacher = (
        Outputs(torch.zeros(1, K), [torch.full((1, 2, 2, 2), float(i)) for i in range(n)])
        for n in (ours, theirs)
    )
    found = [(int(s[0, 0, 0, 0]), int(t[0, 0, 0, 0])) for s, t in pairs(student, teacher)]
    assert found == expected


def test_the_larger_map_is_averaged_to_the_smaller():
    student, teacher = example((2, 6, 4), seed=0), example((3, 3, 8), seed=1)
    ((s, t),) = pairs(student, teacher)
    assert (s.shape, t.shape) == ((N, 2, 3, 4), (N, 3, 3, 4))
    torch.testing.assert_close(s[:, :, 1, 2], student.stages[0][:, :, 2:4, 2].mean(2))
    torch.testing.assert_close(t[:, :, 1, 2], teacher.stages[0][:, :, 1, 4:6].mean(2))


KINDS = {
    "maps": [(3, 8, 8), (4, 4, 4), (6, 2, 2)],
    "more maps": [(8, 6, 6), (8, 6, 6), (16, 3, 3), (32, 1, 1)],
    "tokens": [(17, 10)] * 6,
    "patches": [(4, 7)] * 2,
}


@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("name", DISTILLERS)
def test_every_kind_of_stage(name, student, teacher):
    student = example(*KINDS[student], seed=1, dtype=torch.float32, requires_grad=True)
    teacher = example(*KINDS[teacher], seed=2, dtype=torch.float32, requires_grad=True)
    made = DISTILLERS[name](student, teacher)
    made.prepare([teacher])
    loss = made(student, teacher)
    loss.backward()
    assert loss.shape == ()
    assert loss > 0
    assert any(x.grad is not None and x.grad.any() for x in (student.logits, *student.stages))
    assert all(x.grad is None for x in (teacher.logits, *teacher.stages))
    for p in made.parameters():
        assert not p.requires_grad or p.grad is not None


def test_what_cannot_be_compared_is_refused():
    flat = example((4,), (6,), seed=0)
    for name in ("attention", "nst"):
        with pytest.raises(ValueError, match="no pair of stages has two positions"):
            DISTILLERS[name](flat, TEACHER)
    with pytest.raises(ValueError, match=r"classes, got shapes \(\(5, 4\), \(5, 3\)\)"):
        DISTILLERS["kd"](STUDENT, TEACHER._replace(logits=torch.zeros(N, 3)))
    for name in ("fitnets", "attention", "rkd", "nst", "factor"):
        with pytest.raises(ValueError, match="need stages"):
            DISTILLERS[name](STUDENT._replace(stages=[]), TEACHER)


# ---- on digits ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images[:1400], torch.tensor(data.target)[:1400], images[1400:], data.target[1400:]


def network(width):
    return build("resnet20", channels=1, size=8, classes=10, width=width, depths=(1, 1, 1))


def fit(model, digits, steps, extra=None, teacher=None, a=0.0):
    """Accuracy after ``steps`` of (1 - a) cross-entropy + a extra, and the extra's course."""
    images, labels, test_images, test_labels = digits
    modules = nn.ModuleList([model] if extra is None else [model, extra])
    optimizer = torch.optim.SGD(
        [p for p in modules.parameters() if p.requires_grad], lr=0.05, momentum=0.9
    )
    course = []
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        out = outputs(model, images[batch])
        loss = (1 - a) * F.cross_entropy(out.logits, labels[batch])
        if extra is not None:
            with torch.no_grad():
                taught = outputs(teacher, images[batch])
            distilled = extra(out, taught)
            loss = loss + a * distilled
            course.append(distilled.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = model.eval()(test_images).argmax(1).numpy() == test_labels
    return right.mean(), course


@pytest.fixture(scope="module")
def teacher(digits):
    torch.manual_seed(0)
    model = network(16)
    accuracy, _ = fit(model, digits, 120)
    assert accuracy > 0.85
    return model.eval()


@pytest.mark.parametrize("name", DISTILLERS)
def test_student_learns_labels_and_relations(name, digits, teacher):
    """At a = 0.5, where RKD on raw distances is known to leave a student at chance."""
    images = digits[0]
    student = network(8)
    with torch.no_grad():
        example = outputs(student, images[:64]), outputs(teacher, images[:64])
        batches = [outputs(teacher, batch) for batch in images.split(64)]
    # Maps of 16 times fewer positions than CIFAR's, over which attention takes the mean
    extra = DISTILLERS[name](*example, **({"weight": 1000 / 16} if name == "attention" else {}))
    extra.prepare(batches)
    accuracy, course = fit(student, digits, 120, extra, teacher, a=0.5)
    assert accuracy > 0.8
    assert sum(course[-5:]) < 0.7 * sum(course[:5])
