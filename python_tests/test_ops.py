"""The rows of the operation table against each other and against the float64 formula."""

import pytest
import torch

from ses_kernels import ops

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
        gram = ops.gram(x, location, scale, side, backend)
        size = expected.diagonal(dim1=1, dim2=2).amax(-1)[:, None, None] + 1e-300
        assert ((gram - expected).abs() <= 32 * eps * size).all()
        m = torch.randn(gram.shape, dtype=compute)
        m = m + m.mT
        coefficient = torch.rand(shape[0], dtype=compute)
        got = ops.gram_backward(m, x, location, scale, coefficient, side, backend)
        product = m.double() @ xs if side == "samples" else xs @ m.double()
        expected = product * coefficient[:, None, None]
        assert got.dtype == x.dtype
        tolerance = 64 * max(eps, torch.finfo(dtype).eps) * expected.abs().amax((1, 2)).max()
        assert ((got - expected).abs() <= tolerance).all()


def test_columns_with_gaps_and_negative_space():
    """Rows that are not dense go through torch operations, to the same result."""
    x = torch.randn(2, 6, 20)[:, :, ::2]
    location, scale = ops.location_scale(x, x[:, :1], torch.float32, "auto")
    dense = x.contiguous()
    got = ops.gram(x, location, scale, "samples", "auto")
    torch.testing.assert_close(got, ops.gram(dense, location, scale, "samples", "auto"))


def test_power_of_two():
    values = torch.tensor([0.0, 0.3, 0.5, 1.0, 3.0, 1e-44, 3e38])
    scaled = values * ops.power_of_two(values)
    assert ops.power_of_two(values)[0] == 1
    assert ((scaled[1:5] >= 0.5) & (scaled[1:5] < 1)).all()
    assert scaled.isfinite().all()
