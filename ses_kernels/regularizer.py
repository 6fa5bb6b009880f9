"""SESRegularizer: Spectral Entropy Shaping as a term of a training loss."""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ses_kernels import layers as _layers
from ses_kernels import pooling
from ses_kernels.functional import spectral_entropies


class SESRegularizer:
    r"""The penalty :math:`\lambda \sum_l \alpha_l (H_l - \beta_l \log d_l)^2` of a model's layers.

    H_l is the spectral entropy (:func:`spectral_entropy`, nats) of the B x d_l features that layer
    l puts out, taken by forward hooks. ::

        reg = ses_kernels.SESRegularizer(model, hook_last_n=3)
        loss = criterion(model(x), y) + reg.loss()  # once per forward pass
        reg.entropies  # {"layer4.1": 4.21, ...}

    Args:
        model: hooked in place, compiled or not, inside or outside DDP or FSDP2. The regulariser
            holds no reference to it, and a copy of the model has no hooks.
        beta: target of H_l as a share of log d_l, in (0, 1); or a mapping from names and globs of
            layers to shares, 0.7 for the others.
        lambda_ses: weight of the penalty, >= 0; an attribute that may be changed between steps. 0
            measures the entropies without a gradient.
        alpha: weight of a layer, >= 0; or a mapping as for beta, 1 for the others.
        layers: a name, a glob (``"layer4.*"``, by :mod:`fnmatch`, where ``*`` crosses dots), a
            module type, a predicate ``(name, module) -> bool``, or a sequence of these. None:
            attention and MLP outputs of transformers, else residual blocks and the pooled features
            after them.
        hook_last_n: only the last n of the matching layers.
        every_k: measure at every k-th step, the first among them; others cost nothing.
        pool: samples and features of an output. ``"mean"``: over space (N, C, ...) or tokens
            (N, T, D), in float32. ``"none"``: every position is a sample. ``"tokens"``: every token
            of (N, T, D) is one. ``"cls"``: the first token. Or a function of the tensor that
            returns (samples, features). Three axes are tokens, features last.
        select: the tensor of an output that is a tuple or mapping: an index, a key, or a function
            of the output. None: ``last_hidden_state``, else the first.
        process_group: entropies of the global batch over the ranks of this group; the gradient is
            multiplied by their number, because DDP and FSDP2 average: it equals that of one process
            on the joined batch. None: each rank shapes the entropy of its own batch, which
            averages to another objective, since H of a part is not H of the whole.

    Raises:
        TypeError: nn.DataParallel; an output without a tensor.
        ValueError: an option outside its range; a pattern that matches nothing, with the nearest
            names; a model in which no default layers are known.
        RuntimeError: from :meth:`loss`, when no hooked layer ran in training mode before it.

    Hooks act in training mode with gradients enabled, so that evaluation costs nothing. The
    features are those of the last forward pass of the model; a layer that runs several times in
    one (shared weights) counts as the mean of its calls. ``loss()`` counts the steps: with gradient
    accumulation call it once per micro-batch, whose own entropy it then shapes.

    Precision: float32 (float64) under autocast too. With a GradScaler the penalty is part of the
    scaled loss. Activation checkpointing needs ``use_reentrant=False``: the reentrant variant runs
    the layers without gradients. ``torch.compile``: hooks are traced into the graph without a
    break. ``loss()`` runs outside of it, since it counts steps in Python; attach before the first
    call of a compiled model, or call ``torch.compiler.reset()`` after, since Dynamo does not look
    for new hooks.

    Cost: one :func:`spectral_entropies` call per device, for all layers. Kept from a forward pass:
    the pooled features (B x d_l). No synchronisation with the host on CUDA, apart from the first
    step, which copies the targets there, and from ``process_group``, which reads shard sizes.

    Source: D. Le Bone, Spectral Entropy Shaping (2026). Entropy: Roy & Vetterli, EUSIPCO 2007.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float | Mapping[str, float] = 0.7,
        lambda_ses: float = 0.01,
        alpha: float | Mapping[str, float] = 1.0,
        layers: _layers.Layers = None,
        hook_last_n: int | None = None,
        every_k: int = 1,
        pool: pooling.Pool = "mean",
        select: pooling.Selector = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        last = 1 if hook_last_n is None else hook_last_n
        for option, count in (("every_k", every_k), ("hook_last_n", last)):
            whole = isinstance(count, int) and count >= 1
            _require(whole, option, "an int of 1 or more", count)
        _require(0 <= lambda_ses < math.inf, "lambda_ses", "finite and at least 0", lambda_ses)
        pools = ("mean", "none", "tokens", "cls")
        _require(callable(pool) or pool in pools, "pool", f"one of {pools} or a function", pool)
        root = _layers.unwrap(model)
        found = _layers.find(root, layers, hook_last_n)
        betas = _per_layer("beta", beta, found, 0.7)
        alphas = _per_layer("alpha", alpha, found, 1.0)
        for name in found:
            _require(0 < betas[name] < 1, "beta", "between 0 and 1", betas[name])
            _require(0 <= alphas[name] < math.inf, "alpha", "finite, at least 0", alphas[name])

        self.lambda_ses = lambda_ses
        self._beta, self._alpha = betas, alphas
        self._every_k, self._pool, self._select = every_k, pool, select
        self._group = process_group
        self._step = 0  # calls of loss() in training
        self._disabled = False
        self._measuring = True  # this step is one of every k, and not disabled: what hooks ask
        self._features: list[tuple[str, Tensor]] = []  # of the forward pass under way, in its order
        self._measured: list[tuple[list[str], Tensor]] = []  # names and entropies, per device
        self._widths: dict[str, int] = {}  # d_l, known after the first step
        self._constants: dict[tuple, list[Tensor]] = {}  # targets and weights on their devices
        self._modules = {name: weakref.ref(module) for name, module in found.items()}
        self._kinds = {name: type(_layers.unwrap(m)).__name__ for name, m in found.items()}
        self._handles = [root.register_forward_pre_hook(_Begin(self))]
        self._handles += [m.register_forward_hook(_Capture(self, n)) for n, m in found.items()]

    # ---- in the forward pass ----

    def _begin(self) -> None:
        """What an earlier pass left, without a loss() or recomputed, is not this one's."""
        self._features = []

    def _capture(self, name: str, module: nn.Module, output) -> None:
        if not (self._measuring and module.training and torch.is_grad_enabled()):
            return
        x = pooling.pool(pooling.select(output, self._select, name), self._pool, name)
        # In the backward pass a checkpointed block runs again, with the same operations but not
        # for us. Dynamo traces no backward pass.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._features.append((name, x))

    # ---- in the step ----

    def loss(self) -> Tensor:
        """() tensor: the penalty of the last forward pass, 0 where nothing is to be measured.

        0 without a gradient in eval mode, under no_grad, when disabled or closed, and on the steps
        that every_k skips. Counts a step in training mode.
        """
        features, self._features = self._features, []
        if not (self._in_training() and torch.is_grad_enabled()) or self._disabled:
            return torch.zeros(())
        wanted = self._measuring
        self._count(self._step + 1)
        if not wanted:
            return torch.zeros(())
        if not features:
            raise RuntimeError(
                f"loss() found no features of {', '.join(self.layers)}: it is called once after "
                "each forward pass in training mode. If one ran, either the model was compiled and "
                "run before it was hooked (call torch.compiler.reset()), or its layers run in "
                "reentrant activation checkpointing (use_reentrant=False)"
            )
        return self._penalty(features)

    # Dynamo would specialise the graph on the step number.
    loss._torchdynamo_disable = True

    def _penalty(self, features: list[tuple[str, Tensor]]) -> Tensor:
        if not self.lambda_ses:
            features = [(name, x.detach()) for name, x in features]
        self._look_at(features)
        calls = [name for name, _ in features]
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for name, x in features:
            by_device.setdefault(x.device, []).append((name, x))
        self._measured = []
        total = torch.zeros((), device=features[-1][1].device)  # where the model's output is
        for chosen in by_device.values():
            names, xs = zip(*chosen, strict=True)
            entropies = spectral_entropies(xs, group=self._group)  # (calls,)
            self._measured.append((list(names), entropies.detach()))
            weights = [self._alpha[name] / calls.count(name) for name in names]
            targets, weights = self._like(entropies, self._targets(names), weights)
            total = total + (weights * (entropies - targets).square()).sum().to(total.device)
        penalty = self.lambda_ses * total
        if self._group is not None:  # the value as it is, the gradient times the number of ranks
            ranks = torch.distributed.get_world_size(self._group)
            penalty = penalty + (ranks - 1) * (penalty - penalty.detach())
        return penalty

    def _look_at(self, features: list[tuple[str, Tensor]]) -> None:
        """Widths of the layers; a warning, once each, where so few samples cannot have the rank."""
        ranks = 1 if self._group is None else torch.distributed.get_world_size(self._group)
        for name, x in features:
            samples, width = ranks * x.shape[0], x.shape[1]
            needed, first = width ** self._beta[name], name not in self._widths
            self._widths[name] = width
            if first and min(samples - 1, width) < needed:
                warnings.warn(
                    f"SESRegularizer: {name} cannot reach its target: {samples} samples bound the "
                    f"effective rank by {samples - 1}, and exp(beta log d) = {needed:.1f} at d = "
                    f"{width}, beta = {self._beta[name]}. {math.ceil(needed) + 1} samples would do",
                    stacklevel=4,
                )

    def _like(self, x: Tensor, *values: list[float]) -> list[Tensor]:
        """Kept, because a copy to a GPU would wait for it at every step."""
        key = x.device, x.dtype, *map(tuple, values)
        if key not in self._constants:
            self._constants[key] = [torch.tensor(v, device=x.device, dtype=x.dtype) for v in values]
        return self._constants[key]

    def _targets(self, names) -> list[float]:
        return [self._beta[name] * math.log(self._widths[name]) for name in names]

    def _in_training(self) -> bool:
        return any(m is not None and m.training for m in (ref() for ref in self._modules.values()))

    def _count(self, step: int) -> None:
        self._step = step
        self._measuring = not self._disabled and step % self._every_k == 0

    # ---- for the user ----

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the hooked layers, in the model's order."""
        return tuple(self._kinds)

    @property
    def entropies(self) -> dict[str, float]:
        """H_l in nats of the last measured step, {} before it. Reading waits for the device."""
        calls: dict[str, list[float]] = {}
        for names, entropies in self._measured:
            for name, entropy in zip(names, entropies.tolist(), strict=True):
                calls.setdefault(name, []).append(entropy)
        return {name: sum(h) / len(h) for name, h in calls.items()}

    @property
    def targets(self) -> dict[str, float]:
        """beta_l log d_l in nats of the layers that have run."""
        return dict(zip(self._widths, self._targets(self._widths), strict=True))

    def summary(self) -> str:
        """A table of the hooked layers; d and the target are known after the first step."""
        rows = [("layer", "module", "d", "beta", "target", "alpha")]
        for name, kind in self._kinds.items():
            width, target = "?", "?"
            if name in self._widths:
                width, target = str(self._widths[name]), f"{self.targets[name]:.3f}"
            rows.append((name, kind, width, f"{self._beta[name]:g}", target,
                         f"{self._alpha[name]:g}"))  # fmt: skip
        sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(size) if i < 2 else cell.rjust(size)
                for i, (cell, size) in enumerate(zip(row, sizes, strict=True))
            )
            for row in rows
        )

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it nothing is measured, loss() is 0, and no step is counted."""
        before, self._disabled = self._disabled, True
        self._count(self._step)
        try:
            yield
        finally:
            self._disabled = before
            self._count(self._step)

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._count(int(state["step"]))

    def close(self) -> None:
        """Removes every hook; loss() is 0 from then on."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._modules, self._features = [], {}, []
        self._measuring = False  # a graph that was compiled with the hooks asks

    def __enter__(self) -> SESRegularizer:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class _Hook:
    """Bound to a regulariser in the model itself; inert in its copies and pickles."""

    def __init__(self, regularizer: SESRegularizer, name: str = "") -> None:
        self.regularizer, self.name = regularizer, name

    def __reduce__(self):  # an average of weights is such a copy
        return _Inert, ()


class _Begin(_Hook):
    """The forward pre-hook of the model."""

    def __call__(self, module: nn.Module, inputs) -> None:
        self.regularizer._begin()


class _Capture(_Hook):
    """The forward hook of a layer."""

    def __call__(self, module: nn.Module, inputs, output) -> None:
        self.regularizer._capture(self.name, module, output)


class _Inert:
    def __call__(self, *arguments) -> None:
        return None


def _require(condition: bool, option: str, range_: str, got) -> None:
    if not condition:
        raise ValueError(f"{option} must be {range_}, got {got!r}")


def _per_layer(option: str, value, names, default: float) -> dict[str, float]:
    """The value of each layer; from a mapping, that of the first pattern that matches."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, float(value))
    for pattern in value:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise _layers.no_match(option, pattern, names)
    return {
        name: float(next((v for p, v in value.items() if fnmatchcase(name, p)), default))
        for name in names
    }
