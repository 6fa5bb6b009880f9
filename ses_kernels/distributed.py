"""Samples sharded over the ranks of a process group: what crosses between them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ses_kernels import ops

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gather_if_wide(x: Tensor, group) -> tuple[Tensor, dist.ProcessGroup | None]:
    """The samples of all ranks (b, B, d) and None where B <= d, else the shard x and the group."""
    mine = torch.tensor([*x.shape, _DTYPES.index(x.dtype)], device=x.device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    shards = torch.stack(every).tolist()  # the one look on the host
    if any((b, d, kind) != tuple(shards[0][i] for i in (0, 2, 3)) for b, _, d, kind in shards):
        got = [f"{tuple(shape)} {_DTYPES[kind]}" for *shape, kind in shards]
        raise ValueError(
            f"group=: shards may differ in the number of samples alone, got (batch, B, d) {got}"
        )
    counts = [shard[1] for shard in shards]
    if sum(counts) > x.shape[2]:
        return x, group
    return _GatherSamples.apply(x, counts, group), None


class _GatherSamples(torch.autograd.Function):
    """Shards (b, B_r, d) -> all samples (b, B, d) on every rank.

    Every rank then computes the same H, once: the gradient of a shard is its own rows, unsummed.
    """

    @staticmethod
    def forward(ctx, x, counts, group):
        ctx.counts, ctx.rank = counts, dist.get_rank(group)
        padded = torch.nn.functional.pad(x, (0, 0, 0, max(counts) - x.shape[1])).contiguous()
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded, group=group)
        return torch.cat([p[:, :count] for p, count in zip(pieces, counts, strict=True)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        start = sum(ctx.counts[: ctx.rank])
        return grad[:, start : start + ctx.counts[ctx.rank]], None, None


def location_scale(x, anchor, dtype, backend, group) -> tuple[Tensor, Tensor]:
    """Location and scale of the global batch, from shards (b, B_r, d)."""
    anchor = anchor.clone(memory_format=torch.contiguous_format)  # it is received into
    if anchor.shape[1]:
        dist.broadcast(anchor, dist.get_global_rank(group, 0), group=group)
    location, scale = ops.location_scale(x, anchor, dtype, backend)
    dist.all_reduce(scale, dist.ReduceOp.MIN, group=group)
    if anchor.shape[1]:
        # mean offset = sum_r B_r offset_r / sum_r B_r; the count rides along
        count = location.new_full((x.shape[0], 1), x.shape[1])
        total = torch.cat([location[:, 1] * x.shape[1], count], 1)
        dist.all_reduce(total, group=group)
        location[:, 1] = total[:, :-1] / total[:, -1:]
    return location, scale
