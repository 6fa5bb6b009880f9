"""Called by distributed_cases.py on every rank: SESRegularizer under DDP and FSDP2."""

import copy
import importlib.util

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ses_kernels import SESRegularizer

LAYERS = ["0", "2", "4"]  # 12 and 20 features, and more features than samples


def network():
    torch.manual_seed(0)
    sizes = [(5, 12), (12, 20), (20, 70)]
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(70, 3)).double()


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in grads]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11)


def test_models():
    import test_regularizer_models

    return test_regularizer_models


class Puts(nn.Module):
    """Puts out what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def library_model(build, group):
    """The three lines on a shard of the batch, against one process on all of it."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    single, inputs = test_models().make(build)
    for module in single.modules():  # whose statistics would be those of a shard
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model = DistributedDataParallel(copy.deepcopy(single), process_group=group)
    mine = {name: x.chunk(world)[rank] for name, x in inputs.items()}
    reg = SESRegularizer(model, beta=0.7, lambda_ses=0.01, hook_last_n=3, process_group=group)
    joined = SESRegularizer(single, beta=0.7, lambda_ses=0.01, hook_last_n=3)
    expected = gradients(single(**inputs).loss + joined.loss(), single)
    ours = gradients(model(**mine).loss + reg.loss(), model)
    scale = max(g.abs().max().item() for g in expected)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * scale)


def main(group):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mesh = DeviceMesh.from_group(group, "cpu")
    counts = [8 + 5 * r for r in range(world)]
    start = sum(counts[:rank])
    torch.manual_seed(1)
    x, y = torch.randn(sum(counts), 5).double(), torch.randint(3, (sum(counts),))
    even = slice(8 * rank, 8 * rank + 8)
    uneven = slice(start, start + counts[rank])

    def sharded(model):
        for layer in [*model[::2], model]:
            fully_shard(layer, mesh=mesh)
        return model

    def replicated(model):
        return DistributedDataParallel(model, process_group=group)

    for wrap in (replicated, sharded):
        for attach_first in (True, False):
            single = network()
            model = copy.deepcopy(single)
            options = {"layers": LAYERS, "lambda_ses": 1.0, "beta": 0.5, "every_k": 2}
            joined = SESRegularizer(single, **options)
            if attach_first:
                reg = SESRegularizer(model, process_group=group, **options)
            model = wrap(model)
            if not attach_first:
                reg = SESRegularizer(model, process_group=group, **options)

            # Task and penalty of even shards: DDP's mean of the ranks' means is the joined mean.
            everything = slice(0, 8 * world)
            task = F.cross_entropy(single(x[everything]), y[everything])
            penalty = joined.loss()
            expected = gradients(task + penalty, single)
            task = F.cross_entropy(model(x[even]), y[even])
            ours = reg.loss()
            close(ours.detach(), penalty.detach())
            close(gradients(task + ours, model), expected)
            assert reg.entropies.keys() == joined.entropies.keys()
            for name, h in joined.entropies.items():
                assert abs(reg.entropies[name] - h) < 1e-10, name

            model(x[even])  # a skipped step, on every rank
            assert reg.loss().item() == 0

            # Uneven shards: the penalty alone, whose weight does not depend on the shard.
            joined.load_state_dict({"step": 0})
            unused = 0 * single(x).sum()  # DDP waits for the gradient of every parameter
            expected = gradients(joined.loss() + unused, single)
            unused = 0 * model(x[uneven]).sum()
            close(gradients(reg.loss() + unused, model), expected)

    if importlib.util.find_spec("transformers"):
        for build in (test_models().resnet, test_models().vit, test_models().bert):
            library_model(build, group)

    # A sharded output, as tensor parallelism may leave one, is refused by name.
    parallel = nn.Sequential(Puts(lambda x: distribute_tensor(x, mesh, [Shard(0)])))
    SESRegularizer(parallel, layers="0")
    refusal = ""
    try:
        parallel(torch.randn(8, 5, requires_grad=True))
    except TypeError as error:
        refusal = str(error)
    assert "0: its output is a DTensor" in refusal, refusal
    assert "full_tensor()" in refusal, refusal

    # Without a group each rank has its own entropies.
    model = replicated(network())
    own = SESRegularizer(model, layers=LAYERS, beta=0.3)
    alone = network()
    mine = SESRegularizer(alone, layers=LAYERS, beta=0.3)
    model(x[even])
    alone(x[even])
    close(own.loss().detach(), mine.loss().detach())
