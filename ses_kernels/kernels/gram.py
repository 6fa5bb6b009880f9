"""Triton kernels of the Gram stage: location and scale, Gram matrix, backward product.

Xs = ((x - anchor) - mean) * scale is never stored: every kernel forms it while it reads x.
The product kernels see x as Y (b, n, m), whatever the side: n is the side of the Gram matrix
and m the contracted axis, so that K = Y Y^T and dY = 2 g scale dK Y serve samples and features.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Programs that keep an SM busy while others wait on memory.
PROGRAMS_PER_SM = 2
# Stands for the SM count off the GPU (interpreter): small, yet enough to split.
SMS_WITHOUT_GPU = 16
# Partial Gram matrices may take this much (it stays in L2), or this part of x's own bytes.
WORKSPACE_BYTES = 4 << 20
WORKSPACE_PART_OF_X = 8


def _device_guard(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def precision(major):
    """input_precision of every tl.dot, by compute capability: before 8.0 there is no tf32."""
    # Triton adds each tf32x3 block to the accumulator by a rounded float32 addition, so a long
    # contraction does not collect the tensor core's truncation. Plain tf32 would keep 10 bits.
    return "tf32x3" if major >= 8 else "ieee"


@functools.cache
def _device(device):  # -> programs that fill it, input_precision
    if device.type != "cuda":
        return PROGRAMS_PER_SM * SMS_WITHOUT_GPU, precision(0)
    properties = torch.cuda.get_device_properties(device)
    return PROGRAMS_PER_SM * properties.multi_processor_count, precision(properties.major)


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def _as_side(x, side):  # (b, B, d) -> n, m, stride_n, stride_m
    if side == "samples":
        return x.shape[1], x.shape[2], x.stride(1), x.stride(2)
    if side == "features":
        return x.shape[2], x.shape[1], x.stride(2), x.stride(1)
    raise ValueError(f"side must be 'samples' or 'features', got {side!r}")


# --- location and scale ---------------------------------------------------------------------

# Square enough to be coalesced whichever axis of x is contiguous, 16 elements a thread.
LOCATION_ROWS, LOCATION_COLS, LOCATION_WARPS = 32, 64, 4
# Rows below which a program is not worth its partial sum: the workspace is at most x / 32.
LOCATION_MIN_ROWS = 64
FINISH_COLS, FINISH_PARTS = 256, 256


@triton.jit
def _power_of_two(top):
    """Helper: the scale 2**-e, e the frexp exponent of the largest magnitude (its bits, int32)."""
    exponent = tl.minimum(tl.maximum((top >> 23) - 126, -126), 126)
    scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(top == 0, 1.0, scale)
    return tl.where(top >= 0x7F800000, float("nan"), scale)


@triton.jit
def location_partial_kernel(
    # pointers; anchor is None without centring
    x_ptr, anchor_ptr, sums_ptr, tops_ptr, location_ptr, scale_ptr,
    # sizes
    b, B, d, splits, rows_per_split,
    # strides of x
    stride_b, stride_r, stride_c,
    # tile; WHOLE because one program per matrix then needs no second launch
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Layer 1 of location_scale: sum and largest magnitude of x - anchor over a block of rows."""
    blocks = tl.cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    block = pid % blocks
    split = pid // blocks % splits
    batch = (pid // blocks // splits).to(tl.int64)
    cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
    if anchor_ptr is not None:
        anchor = tl.load(anchor_ptr + batch * d + cols, mask=cols < d, other=0.0)
        total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    # Magnitudes compare as integers: exact, order-free, and NaN ranks above everything.
    top = tl.zeros((BLOCK_R, BLOCK_D), tl.int32)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, B)
    for row in range(begin, end, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        mask = (rows < end)[:, None] & (cols < d)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_r + cols.to(tl.int64)[None, :] * stride_c
        # Upcast before any arithmetic: the interpreter's bfloat16 arithmetic is wrong.
        v = tl.load(x_ptr + batch * stride_b + offsets, mask=mask, other=0.0).to(tl.float32)
        if anchor_ptr is not None:
            v = tl.where(mask, v - anchor[None, :], 0.0)
            total += v
        top = tl.maximum(top, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    top = tl.max(tl.max(top, axis=1), axis=0)
    if WHOLE:
        tl.store(scale_ptr + batch, _power_of_two(top))
        if anchor_ptr is not None:
            out = location_ptr + batch * 2 * d + cols
            tl.store(out, anchor, mask=cols < d)
            tl.store(out + d, tl.sum(total, axis=0) / B, mask=cols < d)
    else:
        tl.store(tops_ptr + (batch * splits + split) * blocks + block, top)
        if anchor_ptr is not None:
            out = sums_ptr + (split * b + batch) * d + cols
            tl.store(out, tl.sum(total, axis=0), mask=cols < d)


@triton.jit
def location_finish_kernel(
    # pointers
    anchor_ptr, sums_ptr, tops_ptr, location_ptr, scale_ptr,
    # sizes; parts = largest magnitudes per matrix
    b, B, d, splits, parts,
    # tile
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Layer 2 of location_scale: the mean from the partial sums, the scale from the maxima."""
    blocks = tl.cdiv(d, BLOCK_D) if anchor_ptr is not None else 1
    pid = tl.program_id(0)
    block = pid % blocks
    batch = (pid // blocks).to(tl.int64)
    if anchor_ptr is not None:
        cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), tl.float32)
        for split in range(splits):
            total += tl.load(sums_ptr + (split * b + batch) * d + cols, mask=cols < d, other=0.0)
        anchor = tl.load(anchor_ptr + batch * d + cols, mask=cols < d, other=0.0)
        out = location_ptr + batch * 2 * d + cols
        tl.store(out, anchor, mask=cols < d)
        tl.store(out + d, total / B, mask=cols < d)
    if block == 0:
        top = tl.zeros((BLOCK_P,), tl.int32)
        for part in range(0, parts, BLOCK_P):
            index = part + tl.arange(0, BLOCK_P)
            seen = tl.load(tops_ptr + batch * parts + index, mask=index < parts, other=0)
            top = tl.maximum(top, seen)
        tl.store(scale_ptr + batch, _power_of_two(tl.max(top, axis=0)))


def location_scale(x, anchor):  # (b, B, d), (b, d) or None -> (b, 2, d) or None, (b,)
    """Launcher: location = (anchor, mean of x - anchor); scale = a power of two per matrix."""
    b, B, d = x.shape
    blocks = triton.cdiv(d, LOCATION_COLS)
    splits = min(triton.cdiv(_device(x.device)[0], b * blocks), B // LOCATION_MIN_ROWS)
    per_split = triton.cdiv(triton.cdiv(B, max(splits, 1)), LOCATION_ROWS) * LOCATION_ROWS
    splits = triton.cdiv(B, per_split)
    whole = splits * blocks == 1
    scale = torch.empty(b, dtype=torch.float32, device=x.device)
    location = sums = tops = None
    if anchor is not None:
        anchor = anchor.contiguous()
        location = scale.new_empty((b, 2, d))
        sums = None if whole else scale.new_empty((splits, b, d))
    if not whole:
        tops = scale.new_empty((b, splits * blocks), dtype=torch.int32)
    with _device_guard(x):
        location_partial_kernel[(b * splits * blocks,)](
            x, anchor, sums, tops, location, scale,
            b, B, d, splits, per_split, *x.stride(),
            BLOCK_R=LOCATION_ROWS, BLOCK_D=LOCATION_COLS, WHOLE=whole, num_warps=LOCATION_WARPS,
        )  # fmt: skip
        if not whole:
            finish_blocks = 1 if anchor is None else triton.cdiv(d, FINISH_COLS)
            location_finish_kernel[(b * finish_blocks,)](
                anchor, sums, tops, location, scale,
                b, B, d, splits, splits * blocks,
                BLOCK_D=FINISH_COLS, BLOCK_P=FINISH_PARTS, num_warps=LOCATION_WARPS,
            )  # fmt: skip
    return location, scale


# --- Gram matrix ----------------------------------------------------------------------------


class Tile(NamedTuple):
    n: int  # edge along the side of the Gram matrix
    m: int  # edge along the contracted axis of the Gram matrix
    warps: int
    stages: int


# By n alone: the smallest tile that holds the matrix, so that thousands of small ones fill the
# GPU with little waste; beyond 64, many 64 x 64 tiles. dtype and side do not change the row,
# as all arithmetic is float32. A 64 x 64 tile twice as deep spills registers on sm_80.
GRAM_TILES = (Tile(16, 32, 1, 2), Tile(32, 32, 2, 2), Tile(64, 16, 4, 3))
# A program with a shorter part of m than this spends more on its partial than it saves.
GRAM_MIN_DEPTH = 128
REDUCE_BLOCK = 1024


def _tile(table, n):
    return next((tile for tile in table if tile.n >= n), table[-1])


@triton.jit
def _shifted_tile(
    x_ptr, location_ptr, scale, offs_n, offs_m, n, m, stride_n, stride_m, SAMPLES: tl.constexpr
):
    """Helper: a tile of Y = ((x - anchor) - mean) * scale, exactly zero outside the matrix."""
    mask = (offs_n < n)[:, None] & (offs_m < m)[None, :]
    offsets = offs_n.to(tl.int64)[:, None] * stride_n + offs_m.to(tl.int64)[None, :] * stride_m
    # Upcast before any arithmetic: the interpreter's bfloat16 arithmetic is wrong.
    v = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if location_ptr is not None:
        if SAMPLES:
            anchor = tl.load(location_ptr + offs_m, mask=offs_m < m, other=0.0)
            mean = tl.load(location_ptr + m + offs_m, mask=offs_m < m, other=0.0)
            v = (v - anchor[None, :]) - mean[None, :]
        else:
            anchor = tl.load(location_ptr + offs_n, mask=offs_n < n, other=0.0)
            mean = tl.load(location_ptr + n + offs_n, mask=offs_n < n, other=0.0)
            v = (v - anchor[:, None]) - mean[:, None]
    return tl.where(mask, v * scale, 0.0)


@triton.jit
def gram_kernel(
    # pointers; location is None without centring
    x_ptr, location_ptr, scale_ptr, out_ptr,
    # sizes; m_per_split = contracted length of one program
    b, n, m, splits, m_per_split,
    # strides of x, seen as Y
    stride_b, stride_n, stride_m,
    # layout of Y, and whether one tile covers K (its two factors are then one load)
    SAMPLES: tl.constexpr, ONE_TILE: tl.constexpr,
    # tile
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Layer 1 of gram: one tile on or below the diagonal of Y Y^T over one part of m, mirrored."""
    edge = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    row = pid % edge
    col = pid // edge % edge
    if col > row:
        return
    split = pid // edge // edge % splits
    batch = (pid // edge // edge // splits).to(tl.int64)
    x_ptr += batch * stride_b
    if location_ptr is not None:
        location_ptr += batch * 2 * (m if SAMPLES else n)
    scale = tl.load(scale_ptr + batch)

    rows = row * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = col * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    begin = split * m_per_split
    end = tl.minimum(begin + m_per_split, m)
    for start in range(begin, end, BLOCK_M):
        depth = start + tl.arange(0, BLOCK_M)
        left = _shifted_tile(
            x_ptr, location_ptr, scale, rows, depth, n, m, stride_n, stride_m, SAMPLES
        )
        if ONE_TILE:
            right = left
        else:
            right = _shifted_tile(
                x_ptr, location_ptr, scale, cols, depth, n, m, stride_n, stride_m, SAMPLES
            )
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)

    # The lower triangle is stored twice, so K is symmetric to the bit: tf32x3 is not by itself.
    out_ptr += (split * b + batch) * n * n
    i = rows.to(tl.int64)[:, None]
    j = cols.to(tl.int64)[None, :]
    lower = (i < n) & (j <= i)
    tl.store(out_ptr + i * n + j, acc, mask=lower)
    tl.store(out_ptr + j * n + i, acc, mask=lower & (j < i))


@triton.jit
def gram_reduce_kernel(
    # pointers
    parts_ptr, out_ptr,
    # sizes; size = b * n * n
    size, splits,
    # tile
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Layer 2 of gram: add the partial Gram matrices, always in the same order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(parts_ptr + index, mask=index < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + index, total, mask=index < size)


def _gram_splits(x, n, m, tile):  # -> splits, m_per_split
    edge = triton.cdiv(n, tile.n)
    tiles = x.shape[0] * edge * (edge + 1) // 2
    workspace = max(WORKSPACE_BYTES, x.numel() * x.element_size() // WORKSPACE_PART_OF_X)
    splits = min(
        triton.cdiv(_device(x.device)[0], tiles),
        m // GRAM_MIN_DEPTH,
        workspace // (4 * x.shape[0] * n * n),
    )
    per_split = triton.cdiv(triton.cdiv(m, max(splits, 1)), tile.m) * tile.m
    return triton.cdiv(m, per_split), per_split


def gram(x, location, scale, side):  # (b, B, d), (b, 2, d) or None, (b,) -> (b, n, n)
    """Launcher: K = Xs Xs^T ("samples", n = B) or Xs^T Xs ("features", n = d), float32."""
    b = x.shape[0]
    n, m, stride_n, stride_m = _as_side(x, side)
    tile = _tile(GRAM_TILES, n)
    splits, per_split = _gram_splits(x, n, m, tile)
    edge = triton.cdiv(n, tile.n)
    location, scale = _contiguous(location, scale)
    out = torch.empty((b, n, n), dtype=torch.float32, device=x.device)
    parts = out if splits == 1 else out.new_empty((splits, b, n, n))
    with _device_guard(x):
        gram_kernel[(b * splits * edge * edge,)](
            x, location, scale, parts,
            b, n, m, splits, per_split, x.stride(0), stride_n, stride_m,
            SAMPLES=side == "samples", ONE_TILE=edge == 1,
            BLOCK_N=tile.n, BLOCK_M=tile.m, PRECISION=_device(x.device)[1],
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            gram_reduce_kernel[(triton.cdiv(out.numel(), REDUCE_BLOCK),)](
                parts, out, out.numel(), splits, BLOCK=REDUCE_BLOCK
            )
    return out


# --- backward product -----------------------------------------------------------------------

# Again by n alone; long in m, as Y is streamed along it, n / tile.n times.
BACKWARD_TILES = (Tile(16, 64, 2, 3), Tile(32, 64, 4, 3), Tile(64, 64, 4, 3))
BACKWARD_DEPTH = 16  # contracted step: the least tl.dot takes, for at most 128 registers


@triton.jit
def gram_backward_kernel(
    # pointers; location is None without centring
    dk_ptr, x_ptr, location_ptr, scale_ptr, g_ptr, dx_ptr,
    # sizes
    n, m,
    # strides of g, of x and dx, seen as Y
    stride_g, stride_b, stride_n, stride_m, stride_dn, stride_dm,
    # layout of Y
    SAMPLES: tl.constexpr,
    # tile
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Only layer of gram_backward: a tile of dY = 2 g scale dK Y, dK symmetric and contiguous."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles_m = tl.cdiv(m, BLOCK_M)
    pid = tl.program_id(0)
    # Tiles that read the same columns of Y are neighbours, so that Y comes from memory once.
    tile_n = pid % tiles_n
    tile_m = pid // tiles_n % tiles_m
    batch = (pid // tiles_n // tiles_m).to(tl.int64)
    x_ptr += batch * stride_b
    dk_ptr += batch * n * n
    dx_ptr += batch * n * m
    if location_ptr is not None:
        location_ptr += batch * 2 * (m if SAMPLES else n)
    scale = tl.load(scale_ptr + batch)
    factor = 2 * scale * tl.load(g_ptr + batch * stride_g)

    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, n, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        mask = (rows < n)[:, None] & (inner < n)[None, :]
        dk = tl.load(dk_ptr + rows.to(tl.int64)[:, None] * n + inner[None, :], mask=mask, other=0.0)
        y = _shifted_tile(
            x_ptr, location_ptr, scale, inner, cols, n, m, stride_n, stride_m, SAMPLES
        )
        acc = tl.dot(dk, y, acc, input_precision=PRECISION)

    mask = (rows < n)[:, None] & (cols < m)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_dn + cols.to(tl.int64)[None, :] * stride_dm
    tl.store(dx_ptr + offsets, (acc * factor).to(dx_ptr.dtype.element_ty), mask=mask)


def gram_backward(dk, x, location, scale, g, side):  # (b, n, n), (b, B, d) -> (b, B, d)
    """Launcher: dx = 2 g scale dk Xs ("samples") or 2 g scale Xs dk ("features"), in x's dtype."""
    n, m, stride_n, stride_m = _as_side(x, side)
    tile = _tile(BACKWARD_TILES, n)
    dk, location, scale = _contiguous(dk, location, scale)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _, _, stride_dn, stride_dm = _as_side(dx, side)
    grid = (x.shape[0] * triton.cdiv(n, tile.n) * triton.cdiv(m, tile.m),)
    with _device_guard(x):
        gram_backward_kernel[grid](
            dk, x, location, scale, g, dx,
            n, m, g.stride(0), x.stride(0), stride_n, stride_m, stride_dn, stride_dm,
            SAMPLES=side == "samples",
            BLOCK_N=tile.n, BLOCK_M=tile.m, BLOCK_K=BACKWARD_DEPTH,
            PRECISION=_device(x.device)[1], num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dx
