"""The rows of the operation table against each other and against the float64 formula."""

import math

import pytest
import torch

from ses_kernels import ops, torch_rows

without_extension = pytest.mark.skipif(
    ops.EXTENSION_MISSING is not None, reason=str(ops.EXTENSION_MISSING)
)
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 64, 64), (2, 65, 129), (1, 130, 300), (1, 2000, 300)]


def inputs(shape, dtype):
    buffer = torch.randn(shape[0], shape[1] + 2, shape[2] + 3, dtype=torch.float64) + 50
    return buffer.to(dtype)[:, 1 : shape[1] + 1, 2 : shape[2] + 2]  # rows with gaps between them


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_rows_equal_the_formula(shape, dtype, compute, center):
    x = inputs(shape, dtype)
    anchor = x[:, :1] if center else x[:, :0]
    exact = x.double()
    if center:
        exact = exact - exact[:, :1]  # the common offset would round the mean
        exact = exact - exact.mean(1, keepdim=True)
    side = "samples" if shape[1] <= shape[2] else "features"
    eps = torch.finfo(compute).eps
    for backend in ("auto", "torch"):
        location, scale = ops.location_scale(x, anchor, compute, backend)
        shifted = exact if not center else x.double() - x[:, :1].double()
        largest = shifted.abs().amax((1, 2)) * scale
        assert ((largest >= 0.5) & (largest < 1) | (shifted == 0).all()).all()
        assert (scale.log2() == scale.log2().round()).all()
        xs = exact * scale[:, None, None]
        expected = xs @ xs.mT if side == "samples" else xs.mT @ xs
        gram = ops.gram(x, location, scale, side, compute, backend)
        size = expected.diagonal(dim1=1, dim2=2).amax(-1)[:, None, None] + 1e-300
        assert ((gram - expected).abs() <= 32 * eps * size).all()
        m = torch.randn(gram.shape, dtype=compute)
        m = m + m.mT
        g = torch.rand(shape[0], dtype=compute)
        got = ops.gram_backward(m, x, location, scale, g, side, backend)
        product = m.double() @ xs if side == "samples" else xs @ m.double()
        expected = product * (2 * g * scale)[:, None, None]
        assert got.dtype == x.dtype
        tolerance = 64 * max(eps, torch.finfo(dtype).eps) * expected.abs().amax((1, 2)).max()
        assert ((got - expected).abs() <= tolerance).all()


def backends(x):
    """Those that can run on x."""
    fused = ("fused",) if x.stride(2) == 1 and ops.EXTENSION_MISSING is None else ()
    return ("auto", "torch", *fused)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gram_in_float64_of_narrower_samples(shape, dtype, center):
    """Location and scale are float32; the products are as accurate as of float64 samples."""
    x = inputs(shape, dtype)
    side = "samples" if shape[1] <= shape[2] else "features"
    location, scale = ops.location_scale(x, x[:, :1] if center else x[:, :0], torch.float32, "auto")
    xs = torch_rows.standardize(x, location.double(), scale.double())
    expected = xs @ xs.mT if side == "samples" else xs.mT @ xs
    size = expected.diagonal(dim1=1, dim2=2).sqrt()
    size = size[:, :, None] * size[:, None, :]
    depth = shape[2] if side == "samples" else shape[1]
    for backend in backends(x):
        gram = ops.gram(x, location, scale, side, torch.float64, backend)
        assert gram.dtype == torch.float64
        if backend == "fused":  # BLAS rounds the two halves differently
            assert torch.equal(gram, gram.mT)
        assert ((gram - expected).abs() <= (8 + depth / 2) * 2**-52 * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("side", ["samples", "features"])
def test_samples_of_any_strides(side, dtype):
    """Rows with gaps between them are read where they lie, others go through torch operations."""
    compute = torch.promote_types(dtype, torch.float32)
    dense = torch.randn(3, 6, 70).to(dtype) + 3
    padded = torch.full((3, 9, 90), torch.nan, dtype=dtype)[:, 2:8, 11:81].copy_(dense)
    spread = torch.full((3, 6, 140), torch.nan, dtype=dtype)[:, :, ::2].copy_(dense)
    transposed = dense.mT.contiguous().mT
    swapped = dense.transpose(0, 1).contiguous().transpose(0, 1)
    one = dense[:1].expand(3, 6, 70)
    n = 6 if side == "samples" else 70
    m = torch.randn(3, n, n, dtype=compute)
    m = m + m.mT
    g = torch.rand(3, dtype=compute)

    def results(x, backend):
        location, scale = ops.location_scale(x, x[:, :1], compute, backend)
        gram = ops.gram(x, location, scale, side, compute, backend)
        gradient = ops.gram_backward(m, x, location, scale, g, side, backend)
        assert gradient.is_contiguous()
        return location, scale, gram, gradient

    for x in (padded, spread, transposed, swapped, one):
        assert not x.is_contiguous()
        for backend in backends(x):
            same_backend = "torch" if x.stride(2) != 1 else backend
            expected = results(x.contiguous(), same_backend)
            for got, other in zip(results(x, backend), expected, strict=True):
                torch.testing.assert_close(got, other)


def test_small_operands_of_any_strides():
    """vmap hands over expanded ones: a stride of 0 between the matrices of a batch."""
    x = torch.randn(4, 5, 9)
    location, scale = ops.location_scale(x[:1], x[:1, :1], torch.float32, "auto")
    m = torch.randn(1, 5, 5)
    m = m + m.mT
    g = torch.rand(1)

    def expanded(t):
        return t.expand(4, *t.shape[1:])

    def gapped(t):
        wide = torch.full([2 * size for size in (4, *t.shape[1:])], torch.nan)
        return wide[(slice(None, None, 2),) * t.dim()].copy_(expanded(t))

    dense = [expanded(t).contiguous() for t in (m, location, scale, g)]
    for backend in backends(x):
        gram = ops.gram(x, dense[1], dense[2], "samples", torch.float64, backend)
        gradient = ops.gram_backward(dense[0], x, *dense[1:], "samples", backend)
        for form in (expanded, gapped):
            m1, location1, scale1, g1 = map(form, (m, location, scale, g))
            got = ops.gram(x, location1, scale1, "samples", torch.float64, backend)
            assert torch.equal(got, gram)
            got = ops.gram_backward(m1, x, location1, scale1, g1, "samples", backend)
            assert torch.equal(got, gradient)


@without_extension
def test_fused_says_what_it_cannot_read():
    x, scale = torch.randn(2, 3, 8)[:, :, ::2], torch.ones(2)
    with pytest.raises(RuntimeError, match=r"cannot run.*rows without gaps"):
        ops.location_scale(x, x[:, :1], torch.float32, "fused")
    with pytest.raises(RuntimeError, match=r"cannot run.*rows without gaps"):
        ops.gram(x, scale.new_empty(2, 0, 4), scale, "samples", torch.float64, "fused")
    with pytest.raises(RuntimeError, match=r"float64 Gram matrices, not torch\.float32"):
        ops.rational([torch.eye(3)[None]], [True], torch.float32, True, "fused")


def test_a_kernel_takes_what_it_does_not_refuse():
    """Told by the arguments; the last of them is the backend."""
    kernel = ops.Kernel(lambda n, _: f"kernel {n}", lambda n, _: "n is odd" if n % 2 else None)
    row = ops._or_default(kernel, lambda n, _: f"default {n}")
    assert [row(n, "auto") for n in (1, 2)] == ["default 1", "kernel 2"]
    assert [row(n, "torch") for n in (1, 2)] == ["default 1", "default 2"]
    assert row(2, "fused") == "kernel 2"
    with pytest.raises(RuntimeError, match='"fused" cannot run: n is odd; use backend="auto"'):
        row(1, "fused")


# ---- the rational solver ------------------------------------------------------------------------


def grams(n):  # (b, n, n), float64: full rank, rank 1 and 3, repeated eigenvalues, nothing, NaN
    x = torch.randn(2, n, n, dtype=torch.float64)
    low = torch.randn(n, 3, dtype=torch.float64)
    q = torch.linalg.qr(x[0])[0]
    k = torch.stack([
        x[0] @ x[0].mT, low[:, :1] @ low[:, :1].mT, low @ low.mT, torch.eye(n, dtype=torch.float64),
        (q * (1.0 + torch.arange(n) % 3)) @ q.mT, torch.zeros(n, n, dtype=torch.float64),
        torch.full((n, n), torch.nan, dtype=torch.float64), x[1] @ x[1].mT * 1e-30,
    ])  # fmt: skip
    return (k + k.mT) / 2


def exact_rational(gram, center):
    """H and K M, which no round-off in a null space disturbs, from eigenvalues in float64."""
    trace = gram.diagonal(dim1=1, dim2=2).sum(-1)
    w, v = torch.linalg.eigh(gram / trace[:, None, None])
    w = w.clamp_min(1e-300)
    h = torch.special.entr(w).sum(-1)
    m = (v * -(w.log() + h[:, None])[:, None]) @ v.mT
    if center:
        m = m - m.mean(1, keepdim=True)
        m = m - m.mean(2, keepdim=True)
    return h, m / trace[:, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rational_rows_equal_the_eigendecomposition(dtype):
    """Layers of several sizes in one call, some centred."""
    sizes, center = (1, 5, 32, 33, 70), [True, False, True, False, True]
    layers = [grams(n) for n in sizes]
    rows = ("auto", "torch") if ops.EXTENSION_MISSING else ("auto", "torch", "fused")
    for backend in rows:
        found = ops.rational(layers, center, dtype, True, backend)
        alone = ops.rational(layers, center, dtype, False, backend)
        for i, (n, gram, centered) in enumerate(zip(sizes, layers, center, strict=True)):
            h, m = found[i], found[len(sizes) + i]
            assert (h.dtype, m.dtype, m.shape) == (dtype, dtype, gram.shape)
            assert torch.equal(alone[i].nan_to_num(7.0), h.nan_to_num(7.0))
            assert alone[len(sizes) + i].numel() == 0
            assert h[5] == 0
            assert (m[5] == 0).all()
            assert h[6].isnan()
            assert m[6].isnan().all()
            good = [0, 3, 4, 7]  # of full rank
            h64, m64 = exact_rational(gram[good], centered)
            rounding = torch.finfo(dtype).eps * math.log(n)
            stated = rounding + n * (1.5e-12 if dtype == torch.float32 else 5e-15)
            assert ((h[good] - h64).abs() <= stated).all()
            size = m64.abs().amax((1, 2)) + 1 / gram[good].diagonal(dim1=1, dim2=2).sum(-1)
            error = (m[good].double() - m64).abs().amax((1, 2)) / size
            assert error.max() <= (1e-6 if dtype == torch.float32 else 1e-8)
            # rank 1 and 3
            assert (
                (h[1:3] - exact_rational(gram[1:3], False)[0]).abs() <= stated + 1e-13 * n
            ).all()


def test_rational_rows_on_float32_grams():
    """The set of poles for CUDA, on the torch row."""
    gram = grams(40)[[0, 3, 4]]
    h, m = ops.rational([gram.float()], [False], torch.float32, True, "auto")
    h64, m64 = exact_rational(gram, False)
    assert h.dtype == m.dtype == torch.float32
    torch.testing.assert_close(h.double(), h64, rtol=0, atol=2e-5)
    # K M: sup |x e(x)| <= sup |x^(1/2) e(x)| = 4e-8 for eigenvalues x of P, and round-off
    torch.testing.assert_close(gram @ m.double(), gram @ m64, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [6, 40])
def test_rational_of_an_indefinite_matrix_is_nan(n):
    """Not the garbage of a factorisation that failed; and its neighbours do not notice."""
    gram = grams(n)[[0, 3, 4]]
    expected = ops.rational([gram], [False], torch.float64, True, "auto")
    spoiled = gram.clone()
    spoiled[1] = -torch.eye(n, dtype=torch.float64)
    spoiled[1, 0, 0] = 2 * n
    rows = ("torch",) if ops.EXTENSION_MISSING else ("torch", "fused")
    for backend in rows:
        h, m = ops.rational([spoiled], [False], torch.float64, True, backend)
        assert h[1].isnan()
        assert m[1].isnan().all()
        torch.testing.assert_close(h[::2], expected[0][::2], rtol=1e-13, atol=0)
        assert m[::2].isfinite().all()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_rational_from_samples_is_its_three_steps(dtype, center):
    """Of few and of many matrices, of rows with gaps between them: the same bits."""
    shapes = [(1, 1, 1), (3, 5, 7), (1, 300, 33), (21, 8, 16), (9, 40, 40), (1, 2, 2)]
    compute = torch.promote_types(dtype, torch.float32)
    xs = [inputs(shape, dtype) for shape in shapes]
    for backend in backends(xs[1]):
        for some in (xs, xs[:1], xs[2:3], xs[3:5]):
            sides = ["samples" if x.shape[1] <= x.shape[2] else "features" for x in some]
            located = [
                ops.location_scale(x, x[:, :1] if center else x[:, :0], compute, backend)
                for x in some
            ]
            grams = [
                ops.gram(x, *at, side, torch.float64, backend)
                for x, at, side in zip(some, located, sides, strict=True)
            ]
            centered = [center and side == "samples" for side in sides]
            for gradient in (True, False):
                solved = ops.rational(grams, centered, compute, gradient, backend)
                expected = [*solved, *(at[0] for at in located), *(at[1] for at in located)]
                found = ops.rational_from_samples(some, center, gradient, backend)
                assert len(found) == 4 * len(some)
                for got, step in zip(found, expected, strict=True):
                    assert got.dtype == step.dtype
                    assert torch.equal(got, step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_have_the_bits_of_float32(dtype):
    """Widened as they are read; the gradient is that of float32, rounded."""
    spread = torch.logspace(-40, 5, 66, base=2)  # float16 has subnormal numbers from 2^-14 down
    shapes = [(1, 1, 1), (3, 5, 7), (2, 64, 65), (21, 16, 33), (21, 33, 15), (1, 300, 9)]
    xs = [(torch.randn(shape) + spread[: shape[2]]).to(dtype) for shape in shapes]
    xs += [inputs((2, 12, 40), dtype), xs[1].clone(), xs[1] * 0]
    xs[-2][0, 2, 3], xs[-2][1, 0, 0] = torch.nan, torch.inf
    for x in xs:
        wide = x.float()
        side = "samples" if x.shape[1] <= x.shape[2] else "features"
        n = min(x.shape[1:])
        for compute in (torch.float32, torch.float64):
            m = torch.randn(x.shape[0], n, n, dtype=compute)
            g = torch.randn(x.shape[0], dtype=compute)
            for anchor in (1, 0):
                for backend in backends(x):
                    found = []
                    for y in (x, wide):
                        at = ops.location_scale(y, y[:, :anchor], compute, backend)
                        gram = ops.gram(y, *at, side, torch.float64, backend)
                        gradient = ops.gram_backward(m + m.mT, y, *at, g, side, backend)
                        assert gradient.dtype == y.dtype
                        found.append((*at, gram, gradient.to(dtype)))
                    for got, expected in zip(*found, strict=True):
                        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_power_of_two():
    values = torch.tensor([0.0, 0.3, 0.5, 1.0, 3.0, 1e-44, 3e38])
    scaled = values * torch_rows.power_of_two(values)
    assert torch_rows.power_of_two(values)[0] == 1
    assert ((scaled[1:5] >= 0.5) & (scaled[1:5] < 1)).all()
    assert scaled.isfinite().all()
