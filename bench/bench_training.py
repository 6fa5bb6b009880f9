"""What the penalty of Spectral Entropy Shaping adds to a training step: time, memory, launches.

A step is forward, cross-entropy, penalty, backward and SGD. The overhead of SES is small beside the
noise of a shared machine, so it is measured twice: in whole steps, with and without, in paired
rounds; and by itself, on the outputs that its hooks would see, as a share of the plain step.
"""

from __future__ import annotations

import copy
import ctypes
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.bench_entropy import CLOCKS, DEVICE
from bench.measure import measure
from bench.models import NETWORKS, Network
from bench.providers import gram_closed, paper
from bench.timing import Call
from ses_kernels import SESRegularizer

PLAIN, SES, BY_ITSELF = "plain step", "SES", "SES by itself"
OTHERS = {"gram, closed form": gram_closed, "paper": paper}
BETA, LAMBDA = 0.7, 0.01

CASES = [
    (network, batch)
    for network in NETWORKS
    for batch in ((256, 512) if DEVICE == "cuda" else (network.cpu_batch,))
]
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float16]}[DEVICE]
if DEVICE == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
    DTYPES.append(torch.bfloat16)


class PooledPenalty:
    """lambda sum_l (H_l - beta log d_l)^2 of modules' outputs, with the entropies of a provider."""

    def __init__(self, modules: list[nn.Module], entropies) -> None:
        self.entropies, self.features, self.targets = entropies, [], None
        for module in modules:
            module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs, output: Tensor) -> None:
        # (N, C, H, W) -> (N, C), or (N, T, D) -> (N, D)
        self.features.append(output.mean((2, 3) if output.dim() == 4 else 1))

    def loss(self) -> Tensor:
        features, self.features = self.features, []
        if self.targets is None:  # once: a copy to the device makes the host wait
            widths = torch.tensor([x.shape[1] for x in features])
            self.targets = (BETA * widths.log()).to(features[0].device)
        return LAMBDA * (self.entropies(features) - self.targets).square().sum()


class _Taps(nn.Module):
    """Modules whose outputs are given tensors: for hooks without a network."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.taps = nn.ModuleList(nn.Identity() for _ in range(count))

    def forward(self, outputs: list[Tensor]) -> None:
        for tap, output in zip(self.taps, outputs, strict=True):
            tap(output)


class _NextLayers(torch.autograd.Function):
    """The rest of the network, to autograd: a gradient that the penalty's is to be added to."""

    @staticmethod
    def forward(ctx, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx, _: Tensor):
        return None, *ctx.gradients


def _twin(model: nn.Module) -> nn.Module:
    """Modules, and so hooks, of its own on the same tensors: where they lie decides no ratio."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _by_itself(model: nn.Module, layers: tuple[str, ...], x: Tensor) -> Call:
    """Hooks, loss() and its backward on outputs of ``layers`` that were computed before."""
    outputs = []
    for name in layers:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(x)
    gradients = [torch.randn_like(output.requires_grad_()) for output in outputs]
    taps = _Taps(len(layers))
    regularizer = SESRegularizer(taps, layers=nn.Identity, beta=BETA, lambda_ses=LAMBDA)

    def call() -> Tensor:
        taps(outputs)
        loss = regularizer.loss()
        torch.autograd.grad([loss, _NextLayers.apply(gradients, *outputs)], outputs)
        return loss

    return call


def calls(network: Network, batch: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """A step without penalty, and with it by each provider; and SES by itself.

    Each returns its penalty.
    """
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 32, 32).to(device)
    y = torch.randint(10, (batch,)).to(device)
    model = network.build().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    autocast = partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)

    def step(model: nn.Module, penalty: Call | None = None) -> Tensor | None:
        with autocast():
            loss = F.cross_entropy(model(x), y)
        added = None
        if penalty is not None:
            added = penalty()
            loss = loss + added
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return added

    twin = _twin(model)
    ses = SESRegularizer(twin, hook_last_n=network.hook_last_n, beta=BETA, lambda_ses=LAMBDA)
    found = {PLAIN: partial(step, model), SES: partial(step, twin, ses.loss)}
    for name, provider in OTHERS.items():
        twin = _twin(model)
        modules = [twin.get_submodule(name) for name in ses.layers]
        found[name] = partial(step, twin, PooledPenalty(modules, provider).loss)
    with autocast():
        found[BY_ITSELF] = _by_itself(_twin(model), ses.layers, x)
    return found


class _Dispatched(TorchDispatchMode):
    # What .item(), bool(), nonzero() and equal() come down to.
    READ_BY_THE_HOST = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.equal,
    )

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.syncs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        self.syncs += func.overloadpacket in self.READ_BY_THE_HOST
        return func(*args, **(kwargs or {}))


def counts(call: Call, device: str) -> dict[str, int]:
    """Operations that torch dispatches in a call, backward included, and values the host reads.

    On CUDA instead of the latter every wait of the host for the device, those inside of libraries
    too, and kernel launches, as the profiler records them.
    """
    with _Dispatched() as dispatched:
        call()
    found = {"operations": dispatched.operations, "host_syncs": dispatched.syncs}
    if device == "cuda":
        torch.cuda.synchronize()
        activities = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
            call()
        events = profile.key_averages()
        found["launches"] = sum(e.count for e in events if "LaunchKernel" in e.key)
        found["host_syncs"] = sum(e.count for e in events if "Synchronize" in e.key)
    return found


@pytest.fixture(autouse=True, scope="module")
def freed_memory_is_kept() -> None:
    """glibc's malloc gives pages back and takes them again, in one step more than in the next: 4 %
    of a ResNet-18 step on the CPU either way, by chance, which would hide the overhead.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if DEVICE == "cpu" and mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


@pytest.mark.filterwarnings("ignore:SESRegularizer:UserWarning")  # small batches on the CPU
@pytest.mark.parametrize("clock", CLOCKS[:1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("network", "batch"), CASES, ids=[f"{network.name}-B{batch}" for network, batch in CASES]
)
def test_training(benchmark, budget, network: Network, batch: int, dtype, clock: str) -> None:
    found = calls(network, batch, dtype, DEVICE)
    facts = {
        "shape": f"{network.name}-B{batch}",
        "dtype": str(dtype).removeprefix("torch."),
        "mode": "training",
        "clock": clock,
    }
    # More than for a kernel: a step is long, and what is added to it small.
    measure(benchmark, 5 * budget, found, facts, DEVICE, base=PLAIN)
    for row in benchmark.extra_info["rows"]:
        if "seconds" in row:
            row |= counts(found[row["provider"]], DEVICE)
