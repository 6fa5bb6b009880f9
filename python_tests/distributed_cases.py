"""Run by torchrun from test_distributed.py: shards against one process on the joined batch.

Once over all three ranks, and once over a group of the first two.
"""

import os

import distributed_regularizer_cases
import torch
import torch.distributed as dist

import ses_kernels


def require(condition, message):
    if not condition:
        raise AssertionError(message)


def value_and_gradient(x, **options):
    x = x.detach().requires_grad_()
    h = ses_kernels.spectral_entropy(x, **options)
    h.sum().backward()
    return h.detach(), x.grad


def shard(x, counts, rank):
    start = sum(counts[:rank])
    return x[..., start : start + counts[rank], :], slice(start, start + counts[rank])


def main(group):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)

    def check(x, counts, tolerance, **options):
        mine, rows = shard(x, counts, rank)
        h, g = value_and_gradient(mine, group=group, **options)
        h1, g1 = value_and_gradient(x, **options)
        torch.testing.assert_close(h, h1, rtol=tolerance, atol=tolerance, equal_nan=True)
        expected = g1[..., rows, :]
        scale = g1.nan_to_num().abs().max().item()
        torch.testing.assert_close(
            g, expected, rtol=0, atol=tolerance * scale + 1e-15, equal_nan=True
        )

    even, uneven = [6] * world, [5 + 4 * r for r in range(world)]
    for counts in (even, uneven):
        total = sum(counts)
        for d in (total - 5, total, total + 9):  # features side, and both wide cases
            x = torch.randn(total, d, dtype=torch.float64)
            for options in ({}, {"center": False}, {"order": 2}, {"solver": "rational"}):
                check(x, counts, 1e-11, **options)
            check(x + 100 * torch.randn(d).double(), counts, 1e-11)
            check(x.float(), counts, 1e-4, power=1)
            check(x.float() * 1e18, counts, 1e-4)
            check(torch.randn(2, 3, total, d, dtype=torch.float64), counts, 1e-11)
            bad = x.clone()
            bad[0, 0] = float("nan")  # on rank 0 alone
            check(bad, counts, 1e-11)
            check(torch.ones(total, d), counts, 1e-6)
    # float64 at power 1 on the features side has a Gram matrix for want of a distributed SVD
    check(torch.randn(sum(even), 4, dtype=torch.float64), even, 1e-6, power=1)
    check(torch.randn(sum(uneven), 40).bfloat16(), uneven, 1e-2)

    layers = [torch.randn(sum(uneven), d, dtype=torch.float64) for d in (3, 50)]
    mine = [shard(x, uneven, rank)[0] for x in layers]
    torch.testing.assert_close(
        ses_kernels.spectral_entropies(mine, group=group), ses_kernels.spectral_entropies(layers)
    )

    # DDP averages over ranks: W times the global entropy has the one-process gradient.
    x = torch.randn(sum(even), 7, dtype=torch.float64)
    single = torch.nn.Linear(7, 5, dtype=torch.float64)
    parallel = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Linear(7, 5, dtype=torch.float64), process_group=group
    )
    parallel.module.load_state_dict(single.state_dict())
    ses_kernels.spectral_entropy(single(x)).backward()
    entropy = ses_kernels.spectral_entropy(parallel(shard(x, even, rank)[0]), group=group)
    (world * entropy).backward()
    torch.testing.assert_close(
        parallel.module.weight.grad, single.weight.grad, rtol=1e-9, atol=1e-12
    )

    for x, error, message in (
        (torch.randn(4, 5 + rank), ValueError, "differ in the number of samples alone"),
        (torch.randn(4, 5, dtype=[torch.float32, torch.float64][rank > 0]), ValueError, "float64"),
    ):
        try:
            ses_kernels.spectral_entropy(x, group=group)
        except error as e:
            require(message in str(e), e)
        else:
            raise AssertionError(f"no {error.__name__}")
    for d in (3, 50):  # both routes refuse a second derivative that would need the other ranks
        y = torch.randn(6, d, dtype=torch.float64, requires_grad=True)
        h = ses_kernels.spectral_entropy(y, group=group)
        (g,) = torch.autograd.grad(h, y, create_graph=True)
        try:
            g.pow(2).sum().backward()
        except RuntimeError as e:
            require("once" in str(e), e)
        else:
            raise AssertionError("a second derivative across ranks was given")


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for group in (dist.group.WORLD, dist.new_group([0, 1])):
        for name, cases in (
            ("tensors", main),
            ("SESRegularizer", distributed_regularizer_cases.main),
        ):
            if dist.get_rank(group) >= 0:  # a member
                cases(group)
            dist.barrier()
            if dist.get_rank() == 0:
                print(f"{name}: {dist.get_world_size(group)} ranks equal one process", flush=True)
    dist.destroy_process_group()
    # Not by the interpreter: one exit in forty, a thread of gloo aborts it (pytorch issue 190489).
    os._exit(0)
