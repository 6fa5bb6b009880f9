"""Every Triton kernel in the interpreter, against float64 by another route, on the CPU.

Not collected by name: test_triton.py runs this file in a process of its own, because triton
reads TRITON_INTERPRET once, when it is imported.
"""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from ses_kernels.kernels import gram as kernels

assert isinstance(kernels.gram_kernel, InterpretedFunction), "run through test_triton.py"

SIDES = ["samples", "features"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps
# What float32 may lose whatever the route: a few roundings of the largest element.
FLOOR = 4 * EPS
GUARD = 64  # elements on each side of an output, which nobody may write

# One, two, three, odd, prime, powers of two and their neighbours; B < d, B = d, B > d; the
# last four cross the 64 tile, the row splits and the 256 columns of the finishing kernel.
SIZES = [
    (1, 1), (1, 5), (2, 1), (2, 3), (3, 2), (5, 5), (7, 31), (15, 17), (16, 16), (17, 15),
    (33, 31), (31, 33), (63, 65), (64, 64), (65, 63), (3, 531), (531, 3), (40, 129), (131, 70),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs and workspaces start as NaN, inside guards that must survive the test."""
    buffers = []
    empty = torch.empty

    def guarded(*size, dtype=None, device=None):
        size = torch.Size(size[0] if isinstance(size[0], (tuple, list, torch.Size)) else size)
        dtype = dtype or torch.get_default_dtype()
        value = float("nan") if dtype.is_floating_point else 0x7FC00000
        buffer = empty(size.numel() + 2 * GUARD, dtype=dtype, device=device).fill_(value)
        buffers.append((buffer, buffer.clone(), size.numel()))
        return buffer[GUARD : GUARD + size.numel()].view(size)

    def new_empty(self, *size, dtype=None, device=None):
        return guarded(*size, dtype=dtype or self.dtype, device=device or self.device)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for buffer, before, numel in buffers:
        for part in (slice(0, GUARD), slice(GUARD + numel, None)):
            torch.testing.assert_close(buffer[part], before[part], rtol=0, atol=0, equal_nan=True)


def run(x, side, center=True, seed=0):
    """The three launchers in a row; dk and g are random, dk symmetric, g with gaps."""
    location, scale = kernels.location_scale(x, x[:, 0].float() if center else None)
    gram = kernels.gram(x, location, scale, side)
    generator = torch.Generator().manual_seed(seed)
    dk = torch.randn(gram.shape, generator=generator)
    dk = dk + dk.mT
    g = torch.rand(2 * len(x), generator=generator)[::2] + 0.5
    dx = kernels.gram_backward(dk, x, location, scale, g, side)
    assert gram.dtype == torch.float32
    assert dx.dtype == x.dtype
    assert dx.shape == x.shape
    assert dx.is_contiguous()
    assert torch.equal(gram, gram.mT) or gram.isnan().any()
    return location, scale, gram, dk, g, dx


def exact(x, scale, dk, g, side, center):
    """Float64, centred by the projector J = I - 11^T / B and not by subtracting a mean."""
    B = x.shape[1]
    y = x.double() * scale.double()[:, None, None]
    j = torch.eye(B, dtype=torch.float64) - (1 / B if center else 0)
    factor = 2 * g.double() * scale.double()
    if side == "samples":
        gram = torch.einsum("ij,bjk,blk,lm->bim", j, y, y, j)
        dx = torch.einsum("b,bij,jk,bkd->bid", factor, dk.double(), j, y)
    else:
        gram = torch.einsum("bij,ik,bkl->bjl", y, j, y)
        dx = torch.einsum("b,ij,bjd,bde->bie", factor, j, y, dk.double())
    return gram, dx


def plain(x, scale, dk, g, side, center):
    """What plain PyTorch does in float32."""
    y = x.float() * scale[:, None, None]
    if center:
        y = y - y.mean(1, keepdim=True)
    gram, dx = (y @ y.mT, dk @ y) if side == "samples" else (y.mT @ y, y @ dk)
    return gram, ((2 * g * scale)[:, None, None] * dx).to(x.dtype)


def errors(outs, refs):
    """Largest error of each matrix, relative to the largest element of its reference."""
    return [
        (out.double() - ref).abs().amax((1, 2)) / ref.abs().amax((1, 2)).clamp_min(1e-300)
        for out, ref in zip(outs, refs, strict=True)
    ]


def check(x, side, center=True, bar=None):
    _, scale, gram, dk, g, dx = run(x, side, center)
    refs = exact(x, scale, dk, g, side, center)
    got = errors((gram, dx), refs)
    base = errors(plain(x, scale, dk, g, side, center), refs)
    floors = FLOOR, max(FLOOR, torch.finfo(x.dtype).eps)
    for name, e, p, floor in zip(("gram", "dx"), got, base, floors, strict=True):
        limit = 2 * p + floor if bar is None else torch.full_like(p, max(bar, floor))
        print(f"{name} {side} {tuple(x.shape)} {x.dtype}: {e.max():.1e}, plain {p.max():.1e}")
        assert (e <= limit).all(), (name, e, p)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def n_of(size, side):
    """Of K, n x n."""
    return size[0] if side == "samples" else size[1]


# The sum over 531 is what they are for; K of 531 x 531 is tiles of 64 as those of 131 are.
@pytest.mark.parametrize(
    ("size", "side"),
    [(size, side) for size in SIZES for side in SIDES if n_of(size, side) < 500],
    ids=str,
)
def test_sizes(size, side):
    # A single sample centres to zero, which test_equal_rows_give_zero owns.
    check(randn(2, *size) + 1, side, center=size[0] > 1)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", [(7, 31), (65, 63)], ids=str)
def test_half(size, dtype, side, center):
    check(randn(2, *size, dtype=dtype) - 2, side, center)


def cut(x):
    b, B, d = x.shape
    buffer = torch.full((b + 1, B + 3, 3 * d + 5), float("nan"), dtype=x.dtype)
    view = buffer[1:, 2:-1, 3 : 3 + 3 * d : 3]
    view.copy_(x)
    return view


LAYOUTS = {
    "cut from a buffer of NaN": cut,
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch innermost": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "one matrix expanded": lambda x: x[:1].expand_as(x),
    "one column expanded": lambda x: x[:, :, :1].expand_as(x),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype, side):
    # The contiguous copy is right by the tests above; 70 crosses the tiles, 130 splits the rows.
    x = LAYOUTS[layout](randn(2, *((130, 9) if side == "features" else (17, 70)), dtype=dtype))
    copy = x.contiguous()
    assert x.stride() != copy.stride()
    for got, want in zip(run(x, side), run(copy, side), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_int32(axis, side):
    # Untouched pages of the buffer take no memory; the last element lies beyond 2**31.
    strides = [5, 5, 1]
    strides[axis] = 1 << 30
    shape = (3, 1, 5) if axis == 0 else (1, 3, 5)
    try:
        buffer = torch.zeros(0, dtype=torch.float16).resize_((2 << 30) + 64)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    x = buffer.as_strided(shape, strides)
    x.copy_(randn(*shape))
    check(x, side, center=axis == 1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("size", [(40, 70), (130, 9)], ids=str)
def test_hard_data(size, side):
    x = randn(2, *size)
    outlier = x.clone()
    outlier[:, 0] += 1000
    # A mean of 1000 sigma costs the plain route three digits, and costs us none.
    check(x + 1000, side, bar=2 * FLOOR)
    # The anchor is the outlier: every x - anchor and their mean are rounded at its size.
    check(outlier, side, bar=32 * EPS)
    check(torch.relu(x) + 5, side)
    x[:, size[0] // 2 :] = x[:, : size[0] - size[0] // 2]
    x[:, :, 1] = 3
    check(x, side)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("exponent", [-18, -9, 9, 18])
@pytest.mark.parametrize("center", [True, False])
def test_scale_of_x(exponent, center, side):
    x = randn(2, 33, 40) * 10.0**exponent
    # Two scales in one batch: each matrix has a factor of its own.
    x[1] *= 10.0**-exponent
    _, scale, gram, *_ = run(x, side, center)
    shifted = x - x[:, :1] if center else x
    top = (shifted.abs().amax((1, 2)) * scale).double()
    assert ((top >= 0.5) & (top < 1)).all()
    assert (torch.frexp(scale)[0] == 0.5).all()
    assert torch.isfinite(gram).all()
    assert (gram.diagonal(0, 1, 2) > 0).all()
    check(x, side, center)


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (64, 64), (131, 261)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_location_scale(size, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "FINISH_PARTS", 4)  # 10 maxima per matrix: more than one step
    x = randn(2, *size, dtype=dtype) + 3
    x[0, 0, -1] = x[1, size[0] // 2, 0] = 100  # in different parts of the two matrices
    anchor = x[:, -1].float()
    location, scale = kernels.location_scale(x, anchor)
    shifted = x.double() - anchor.double()[:, None]
    assert torch.equal(location[:, 0], anchor)
    wrong = (location[:, 1] - shifted.mean(1)).abs().max()
    assert wrong <= FLOOR * shifted.abs().max()
    top = shifted.float().abs().amax((1, 2))
    want = torch.where(top > 0, torch.ldexp(torch.ones(2), -torch.frexp(top)[1]), 1.0)
    assert torch.equal(scale, want)
    location, scale = kernels.location_scale(x, None)
    top = x.float().abs().amax((1, 2))
    assert location is None
    assert torch.equal(scale, torch.ldexp(torch.ones(2), -torch.frexp(top)[1]))


def test_scale_is_clamped():
    # The smallest subnormal, zero, the largest finite number.
    x = torch.tensor([2.0**-149, 0.0, 3.4e38]).view(3, 1, 1)
    assert kernels.location_scale(x, None)[1].tolist() == [2.0**126, 1.0, 2.0**-126]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 7), (9, 1), (33, 65)], ids=str)
def test_equal_rows_give_zero(size, dtype, side):
    x = (randn(2, 1, size[1]) * 100 + 7).to(dtype).expand(2, *size)
    location, scale, gram, _, _, dx = run(x, side)
    assert (location[:, 1] == 0).all()
    assert (scale == 1).all()
    assert (gram == 0).all()
    assert (dx == 0).all()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(
    ("value", "row", "size"),
    [(float("nan"), 0, (5, 300)), (float("inf"), 0, (17, 20)), (-float("inf"), 65, (66, 70))],
    ids=str,
)
def test_nan_stays_in_its_matrix(value, row, size, center, side):
    x = randn(3, size[0], min(size[1], 70) if side == "features" else size[1])
    clean = run(x, side, center)
    x[1, row, -1] = value
    bad = run(x, side, center)
    for index in (1, 2, 5):  # scale, gram, dx
        assert bad[index][1].isnan().all()
        assert torch.equal(bad[index][::2], clean[index][::2])


def test_the_batch_does_not_change_the_result():
    # A split depends on the batch, so only matrices too short to split agree to the bit.
    x = randn(5, 30, 100)
    whole = run(x, "samples")[2]
    assert torch.equal(whole[2:4], run(x[2:4], "samples")[2])


def test_runs_repeat_to_the_bit():
    x = randn(1, 40, 900)
    for first, second in zip(run(x, "samples"), run(x, "samples"), strict=True):
        assert torch.equal(first, second)


def test_unknown_side():
    with pytest.raises(ValueError, match="rows"):
        kernels.gram(randn(1, 2, 2), None, torch.ones(1), "rows")
