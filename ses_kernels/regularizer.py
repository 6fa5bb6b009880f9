"""SESRegularizer: Spectral Entropy Shaping as a term of a training loss."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ses_kernels import capture, context, evidence, options, pooling
from ses_kernels import layers as _layers
from ses_kernels.functional import spectral_entropies
from ses_kernels.options import Number, require

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """What was decided for one layer; None for what is not known before it has run."""

    layer: str
    module: str
    d: int | None
    beta: float
    target: float | None  # beta log d in nats
    alpha: float
    samples: int | None
    shape: tuple[int, ...] | None  # of its last output
    averaged: str | None  # axes and windows
    rule: str | None


@dataclass(frozen=True)
class Term:
    """One target of a :class:`SESRegularizer`; what is None is the regulariser's own option.

    Examples:
        >>> encoder = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(encoder, 4)
        >>> terms = [ses_kernels.Term("blocks", last=1), ses_kernels.Term("attention", alpha=0.5)]
        >>> ses_kernels.SESRegularizer(model, terms=terms).layers[-2:]
        ('layers.3', 'layers.3.self_attn')

    Args:
        layers: what it measures, as for :class:`SESRegularizer`.
        last: only the last n of each target.

    The others are those of :class:`SESRegularizer`.
    """

    layers: _layers.Layers = None
    last: int | None = None
    beta: Number | Mapping[str, Number] | None = None
    alpha: Number | Mapping[str, Number] | None = None
    pool: pooling.Pool | Mapping[str, pooling.Pool] | None = None
    select: pooling.Selector | Mapping[str, pooling.Selector] = None
    batch_axis: int | Mapping[str, int] | None = None
    feature_axis: int | Mapping[str, int] | None = None


class SESRegularizer:
    """The penalty λ Σ_l α_l (H_l - β_l log d_l)² of a model's layers.

    H_l is the spectral entropy (:func:`spectral_entropy`, nats) of the N x d_l features that layer
    l puts out, one row a sample of the batch, taken by forward hooks.

    Examples:
        >>> encoder = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(encoder, 4)
        >>> reg = ses_kernels.SESRegularizer(model, hook_last_n=2)
        >>> loss = model(torch.randn(64, 5, 16)).square().mean() + reg.loss()  # once per step
        >>> loss.backward()
        >>> list(reg.entropies)  # reg.summary() has more: what was measured, layer by layer
        ['layers.2', 'layers.3']

    Args:
        model: hooked in place, compiled or not, inside or outside DDP or FSDP2. The regulariser
            holds no reference to it, and a copy of the model has no hooks.
        beta: target of H_l as a share of log d_l, in (0, 1); a schedule, a function of the step
            (:mod:`ses_kernels.schedules`); or a mapping from names and globs of layers to these,
            0.7 for the others. An attribute that may be set between steps.
        lambda_ses: weight of the penalty, >= 0, or a schedule; an attribute that may be set. 0
            measures the entropies without a gradient.
        alpha: weight of a layer, >= 0, a schedule, or a mapping as for beta, 1 for the others; an
            attribute that may be set.
        layers: ``"blocks"``: the repeated blocks of the model, found by its structure.
            ``"attention"``, ``"mlp"``: these parts of the blocks. ``"heads"``: every attention
            head before the output projection, each a matrix of its own; a layer counts as the mean
            of its heads. ``"head_similarity"``: how alike the heads are, heads features (see
            docs/shaping.md). ``"attention_weights"``: the weights of all heads, averaged over the
            queries, heads x keys features. Or a name, a glob (``"layer4.*"``, by :mod:`fnmatch`,
            where ``*`` crosses dots), a module type, a predicate ``(name, module) -> bool``, or a
            sequence of these. None: the blocks, and behind blocks without attention the pooled
            features.
        hook_last_n: only the last n of each target, or of what the names match.
        every_k: measure at every k-th step, the first among them; others cost nothing.
        pool: samples and features of an output. ``"mean"``: over space, tokens and windows, in
            float32; padding that a mask in the call tells (``attention_mask``,
            ``key_padding_mask``, packed sequences) is left out. ``"masked"``: the same, an error
            where there is no mask. ``"none"``: every position is a sample. ``"tokens"``: every
            token of (N, T, D) is one. ``"cls"``: the first token. Or a function of the tensor that
            returns (samples, features). Or a mapping from names and globs, "mean" for the others.
        select: the tensor of an output that is a tuple, mapping or dataclass: an index, a key, or a
            function of the output; or a mapping from names and globs. None: ``last_hidden_state``,
            the first of a tuple, or the only floating-point tensor.
        batch_axis: the axis of the samples, where it is not the one it is taken for; or a mapping
            from names and globs. See :meth:`summary`.
        feature_axis: the same for the features.
        terms: several :class:`Term`, each with its own layers and options, in place of ``layers``
            and ``hook_last_n``; one solver call for all of them.
        strict: every hooked layer has to run in the first step. False: those that do not (dropped
            layers, routing) are left out of the sum.
        process_group: entropies of the global batch over the ranks of this group; the gradient is
            multiplied by their number, because DDP and FSDP2 average: it equals that of one process
            on the joined batch. None: each rank shapes the entropy of its own batch, which
            averages to another objective, since H of a part is not H of the whole.

    Raises:
        TypeError: nn.DataParallel; an output that has no one floating-point tensor, or a sparse,
            nested, sharded, complex or empty one.
        ValueError: an option outside its range; a pattern that matches nothing, with the nearest
            names; a model in which no blocks are found; an output whose axes cannot be told, with
            its shape and the option that decides; a forward pass under vmap.
        RuntimeError: from :meth:`loss`, when hooked layers did not run in the first step, were
            replaced, or when the regulariser is a copy.

    The matrix of a layer: which axis has the samples and which the features is known from the
    layer's type, from ``batch_first``, from the widths of its parameters and from the batch that
    the model was called with. All other axes are averaged, and so are the windows of an image that
    lie on the axis of the batch. Where that is contradictory it is an error; where only convention
    decides, a warning.

    Hooks act in training mode with gradients enabled, so that evaluation costs nothing. A layer
    that runs several times in a pass (shared weights) counts as the mean of its calls, and so do
    several forward passes before one ``loss()`` (two views of a batch), with one warning; a pass
    that can no longer be differentiated, since a backward pass or an optimiser's step came after
    it, is left out. ``loss()`` counts the steps: with gradient accumulation call it once per
    micro-batch, whose own entropy it then shapes.

    Precision: float32 (float64) under autocast too. With a GradScaler the penalty is part of the
    scaled loss. Activation checkpointing needs ``use_reentrant=False``: the reentrant variant runs
    the layers without gradients. ``torch.compile``: hooks are traced into the graph without a
    break. ``loss()`` runs outside of it, since it counts steps in Python; attach before the first
    call of a compiled model, or call ``torch.compiler.reset()`` after, since Dynamo does not look
    for new hooks. In a CUDA graph of a whole step a schedule stays at the value it was captured at.

    Cost: one :func:`spectral_entropies` call per device, for all layers. Kept from a forward pass:
    the pooled features (N x d_l), or with ``"none"`` and ``"tokens"`` a copy of the output. No
    synchronisation with the host on CUDA, apart from the first step, which copies the targets there
    and asks whether the features vary at all, and from ``process_group``, which reads shard sizes.

    Source: D. Le Bone, Spectral Entropy Shaping (2026). Entropy: Roy & Vetterli, EUSIPCO 2007.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: Number | Mapping[str, Number] = 0.7,
        lambda_ses: Number = 0.01,
        alpha: Number | Mapping[str, Number] = 1.0,
        layers: _layers.Layers = None,
        hook_last_n: int | None = None,
        every_k: int = 1,
        pool: pooling.Pool | Mapping[str, pooling.Pool] = "mean",
        select: pooling.Selector | Mapping[str, pooling.Selector] = None,
        batch_axis: int | Mapping[str, int] | None = None,
        feature_axis: int | Mapping[str, int] | None = None,
        terms: Sequence[Term] | None = None,
        strict: bool = True,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        require(options.is_count(every_k), "every_k", "an int of 1 or more", every_k)
        if terms is None:
            terms = [Term(layers, hook_last_n)]
        elif layers is not None or hook_last_n is not None:
            raise ValueError("terms= has layers and last of its own: leave out layers, hook_last_n")
        require(len(terms) > 0, "terms", "one or more Term", terms)
        root = _layers.unwrap(model)
        modules = _layers.named(root)
        common = Term(None, None, beta, alpha, pool, select, batch_axis, feature_axis)
        self._layers = {layer.key: layer for layer in _make_layers(terms, common, modules)}

        self.lambda_ses = lambda_ses
        self._every_k, self._strict, self._group = every_k, strict, process_group
        self._step = 0  # calls of loss() in training
        self._disabled = False
        self._measuring = True  # this step is one of every k, and not disabled: what hooks ask
        self._is_copy = False
        self._once = capture.Once()
        self._passes = capture.Passes(root, self._once)
        self._measured: list[tuple[list[str], Tensor]] = []  # keys and entropies, per device
        self._took = False  # whether the last loss() measured
        self._kept: dict[tuple, Tensor] = {}  # targets and weights on their devices
        self._root = weakref.ref(root)
        self._attach(root, modules)

    def _attach(self, root: nn.Module, modules: dict[str, nn.Module]) -> None:
        self._handles = [root.register_forward_pre_hook(capture.Begin(self, ""), with_kwargs=True)]
        names = {layer.name for layer in self._layers.values()}
        for name, module in modules.items():  # parts of the model may be called on their own
            if name and any(other.startswith(f"{name}.") for other in names):
                begin = capture.Begin(self, name)
                self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        for layer in self._layers.values():
            self._handles.append(layer.hook(self))

    # ---- in the forward pass ----

    def begin(self) -> None:
        """Starts a step: forgets what no loss() has taken. For training loops that skip steps."""
        self._passes.clear()

    @property
    def _features(self) -> list[capture.Entry]:
        return self._passes.entries

    def _enter(self, name: str, args, kwargs) -> None:
        """The model is called, or a part of it on its own."""
        if self._measuring and torch.is_grad_enabled() and not context.in_backward():
            self._passes.enter(name, args, kwargs)

    def _capture(self, key: str, module: nn.Module, args, kwargs, output) -> None:
        if not (self._measuring and module.training and torch.is_grad_enabled()):
            return
        # In the backward pass a checkpointed block runs again, but not for us.
        if not context.in_backward():
            layer = self._layers[key]
            around = self._passes.around(layer.name)
            self._passes.add(key, layer.matrix(args, kwargs, output, self._passes.call, around))

    # ---- in the step ----

    def loss(self) -> Tensor:
        """() tensor: the penalty of the forward passes since the last one, 0 if not measured.

        0 without a gradient in eval mode, under no_grad, when disabled or closed, and on the steps
        that every_k skips. Counts a step in training mode.
        """
        if self._is_copy:
            raise RuntimeError(
                "this SESRegularizer is a copy and has no hooks: make a new one for the copied "
                "model, and give it this one's state_dict()"
            )
        features = self._passes.take()
        self._took = False
        if not (self._in_training() and torch.is_grad_enabled()) or self._disabled:
            return torch.zeros(())
        wanted = self._measuring
        if wanted:
            self._check_that_all_ran(features)
        step = self._step
        self._count(step + 1)
        if not wanted:
            return torch.zeros(())
        self._took = True
        return self._penalty(features, step)

    # Dynamo would specialise the graph on the step number.
    loss._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _check_that_all_ran(self, features: list[capture.Entry]) -> None:
        ran = {key for key, _ in features}
        absent = [layer for layer in self._layers.values() if layer.key not in ran]
        if not absent:
            return self._see(ran)
        lost = self._lost(absent)
        if lost:
            raise RuntimeError(
                f"SESRegularizer: {', '.join(lost)} were replaced in the model after they were "
                "hooked (convert_sync_batchnorm, quantization, an assignment); close() this one, "
                "and make a new SESRegularizer when the model is complete"
            )
        weights = (
            f". {capture.HOW_TO_GET_WEIGHTS}" if any(a.kind == "weights" for a in absent) else ""
        )
        never = [layer for layer in absent if layer.is_training() and not layer.seen]
        first = not any(layer.seen for layer in self._layers.values())
        if not features:
            raise RuntimeError(
                f"loss() found no features of {', '.join(self.layers)}: it is called once after "
                "each forward pass in training mode. If one ran, either the model was compiled and "
                "run before it was hooked (call torch.compiler.reset()), or its layers run in "
                f"reentrant activation checkpointing (use_reentrant=False){weights}"
            )
        if never and first and self._strict:
            raise RuntimeError(
                f"SESRegularizer: {', '.join(layer.key for layer in never)} did not run in the "
                "first measured step. A hook sees modules that are called: not a ModuleList, the "
                "out_proj of nn.MultiheadAttention, a layer whose .forward() is called directly, "
                "or one in reentrant activation checkpointing (use_reentrant=False); a model "
                f"that was compiled and run before needs torch.compiler.reset(){weights}. Leave "
                "such layers out of layers=, or pass strict=False where some are skipped by design"
            )
        self._see(ran)

    def _see(self, ran: set[str]) -> None:
        for key in ran:
            self._layers[key].seen = True

    def _lost(self, absent: list[capture.Layer]) -> list[str]:
        """The names at which the model has another module, or none, by now."""
        root = self._root()
        present = set() if root is None else {id(module) for module in root.modules()}
        return [layer.key for layer in absent if id(layer.module()) not in present]

    def _say_what_masks_are_unused(self) -> None:
        """A mask may be of some layers' tokens and not of others'; one of none's is a doubt."""
        used = {layer.mask for layer in self._layers.values()}
        for layer in self._layers.values():
            for name, shape in layer.misfits.items():
                if name not in used:
                    self._once.say(
                        name,
                        f"{name} of shape {shape} is of no measured layer's tokens, "
                        f"{layer.key} put out {layer.shape}: padding counts as the rest. "
                        "pool= may be a function that leaves it out; of layers whose tokens the "
                        "mask does not describe, this is as it should be",
                    )

    def _penalty(self, features: list[capture.Entry], step: int) -> Tensor:
        weight = options.at(self.lambda_ses, step, "lambda_ses")
        if not weight:
            features = [entry._replace(matrix=entry.matrix.detach()) for entry in features]
        doubts = [layer for layer in self._layers.values() if layer.doubt]
        if doubts:
            more = ", ".join(layer.key for layer in doubts[1:])
            more = f". The same holds for {more}" if more else ""
            self._once.say("doubt", f"{doubts[0].doubt}{more}")
        self._say_what_masks_are_unused()
        self._look_at(features, step)
        matrices = [(key, m) for key, x in features for m in (x.unbind() if x.dim() == 3 else (x,))]
        calls = Counter(key for key, _ in matrices)
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for key, x in matrices:
            by_device.setdefault(x.device, []).append((key, x))
        self._measured = []
        device = matrices[-1][1].device  # where the model's output is
        parts = []
        for chosen in by_device.values():
            keys, xs = zip(*chosen, strict=True)
            entropies = spectral_entropies(xs, group=self._group)  # (matrices,)
            self._measured.append((list(keys), entropies.detach()))
            layers = [self._layers[key] for key in keys]
            distance = entropies
            units = [math.log(layer.width or 1) for layer in layers]
            for scale, unit in self._sum("beta", layers, units, entropies, step):
                distance = torch.sub(distance, unit, alpha=scale)  # H - beta log d
            units = [1 / calls[key] for key in keys]
            for scale, unit in self._sum("alpha", layers, units, entropies, step):
                parts.append(weight * scale * (unit * distance.square()).sum().to(device))
        penalty = functools.reduce(torch.add, parts)
        if self._group is not None:  # the value as it is, the gradient times the number of ranks
            ranks = torch.distributed.get_world_size(self._group)
            penalty = penalty + (ranks - 1) * (penalty - penalty.detach())
        return penalty

    def _look_at(self, features: list[capture.Entry], step: int) -> None:
        """Widths of the layers; warnings, once each, where a layer cannot be what is wanted."""
        ranks = 1 if self._group is None else torch.distributed.get_world_size(self._group)
        fresh = []
        for entry in features:
            key, x = entry
            layer = self._layers[key]
            samples, width = ranks * x.shape[-2], x.shape[-1]
            if layer.width is None:
                fresh.append(entry)
            new, layer.width, layer.samples = layer.width is None, width, samples
            needed = width ** options.at(layer.beta, step, "beta")
            if new and min(samples - 1, width) < needed:
                warnings.warn(
                    f"SESRegularizer: {key} cannot reach its target: {samples} samples bound the "
                    f"effective rank by {samples - 1}, and exp(beta log d) = {needed:.1f} at d = "
                    f"{width}, beta = {options.at(layer.beta, step, 'beta'):g}. "
                    f"{math.ceil(needed) + 1} samples would do",
                    stacklevel=4,
                )
        self._look_for_variance([entry for entry in fresh if entry.matrix.shape[-2] > 1])
        if fresh and _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s", self.summary())

    @torch.no_grad()
    def _look_for_variance(self, features: list[capture.Entry]) -> None:
        """Where rows differ by round-off alone, as attention weights do that sum to one."""
        facts = []
        for key, x in features:
            if x.device.type != "meta":
                x = x.float() if x.dtype != torch.float64 else x
                facts.append((key, (x - x[..., :1, :]).abs().amax(), x.abs().amax()))
        for key, *numbers in facts:
            spread, size = map(float, torch.stack(numbers).tolist())
            if spread <= 8 * torch.finfo(torch.float32).eps * size:
                self._once.say(
                    f"variance {key}",
                    f"{key} has no variance: its samples differ by {spread:.1e} at "
                    f"values of {size:.1e}, and the entropy is that of rounding. Weights that sum "
                    'to one have none when they are averaged: layers="attention_weights" takes '
                    "them as features",
                )

    def _sum(
        self, option: str, layers: list[capture.Layer], units: list[float], like: Tensor, step: int
    ) -> list[tuple[float, Tensor]]:
        """sum_l option_l units_l e_l as numbers times vectors that stay on the device.

        A schedule is such a number, and so is a value that all layers share: neither is copied.
        """
        values = [getattr(layer, option) for layer in layers]
        numbers = {value for value in values if not callable(value)}
        vectors: dict[Number | None, list[float]] = {}
        for i, (value, unit) in enumerate(zip(values, units, strict=True)):
            one = callable(value) or len(numbers) == 1
            vector = vectors.setdefault(value if one else None, [0.0] * len(values))
            vector[i] = unit if one else unit * value
        return [
            (1.0 if value is None else options.at(value, step, option), self._keep(like, vector))
            for value, vector in vectors.items()
        ]

    def _keep(self, like: Tensor, vector: list[float]) -> Tensor:
        """On the device for good, because a copy to a GPU would wait for it at every step."""
        key = like.device, like.dtype, tuple(vector)
        if key not in self._kept:
            if len(self._kept) >= 64:  # values that are set anew all the time
                self._kept.clear()
            self._kept[key] = torch.tensor(vector, device=like.device, dtype=like.dtype)
        return self._kept[key]

    def _in_training(self) -> bool:
        """Also where layers were lost, so that loss() says so."""
        root = self._root()
        if root is None or not self._handles:
            return False
        layers = self._layers.values()
        lost = any(layer.module() is None for layer in layers)
        return any(layer.is_training() for layer in layers) or (root.training and lost)

    def _count(self, step: int) -> None:
        self._step = step
        self._measuring = not self._disabled and step % self._every_k == 0

    # ---- for the user ----

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of what is measured, in the model's order; ":heads", ":similarity" and ":weights"
        behind those of the targets that are named so.
        """
        return tuple(self._layers)

    @property
    def step(self) -> int:
        """Steps that loss() has counted; set it to go on from another."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        require(isinstance(step, int) and step >= 0, "step", "an int of 0 or more", step)
        self._count(step)

    @property
    def measured(self) -> bool:
        """Whether the last loss() measured, rather than being 0."""
        return self._took

    @property
    def beta(self) -> dict[str, Number]:
        """Of each layer; set it to a number, a schedule, or a mapping, 0.7 for the others."""
        return {key: layer.beta for key, layer in self._layers.items()}

    @beta.setter
    def beta(self, beta: Number | Mapping[str, Number]) -> None:
        self._set("beta", beta, 0.7)

    @property
    def alpha(self) -> dict[str, Number]:
        """Of each layer; set it to a number, a schedule, or a mapping, 1 for the others."""
        return {key: layer.alpha for key, layer in self._layers.items()}

    @alpha.setter
    def alpha(self, alpha: Number | Mapping[str, Number]) -> None:
        self._set("alpha", alpha, 1.0)

    @property
    def lambda_ses(self) -> Number:
        """Weight of the penalty; set it to a number or a schedule."""
        return self._lambda_ses

    @lambda_ses.setter
    def lambda_ses(self, lambda_ses: Number) -> None:
        self._lambda_ses = options.number("lambda_ses", lambda_ses)

    def _set(self, option: str, value, default: float) -> None:
        values = options.per_layer(option, value, self._layers, default)
        for key, layer in self._layers.items():
            setattr(layer, option, options.number(option, values[key]))

    @property
    def entropies(self) -> dict[str, float | list[float]]:
        """H_l in nats of the last measured step, {} before it. Reading waits for the device.

        A list, one of each head, for layers of ``"heads"``.
        """
        calls: dict[str, list[float]] = {}
        for keys, entropies in self._measured:
            for key, entropy in zip(keys, entropies.tolist(), strict=True):
                calls.setdefault(key, []).append(entropy)
        means: dict[str, float | list[float]] = {}
        for key, h in calls.items():
            layer = self._layers[key]
            if layer.kind == "heads":
                means[key] = [sum(h[i :: layer.heads]) * layer.heads / len(h)
                              for i in range(layer.heads)]  # fmt: skip
            else:
                means[key] = sum(h) / len(h)
        return means

    def flat_entropies(self, prefix: str = "") -> dict[str, float]:
        """:attr:`entropies` for a logger: each head of a layer has a name, ``layer/0``."""
        flat: dict[str, float] = {}
        for key, h in self.entropies.items():
            if isinstance(h, list):
                flat.update({f"{prefix}{key}/{i}": value for i, value in enumerate(h)})
            else:
                flat[f"{prefix}{key}"] = h
        return flat

    @property
    def targets(self) -> dict[str, float]:
        """beta_l log d_l in nats at this step, of the layers that have run."""
        return {
            key: options.at(layer.beta, self._step, "beta") * math.log(layer.width)
            for key, layer in self._layers.items()
            if layer.width is not None
        }

    def rows(self) -> list[Row]:
        """What was decided for each layer; None where it has not run."""
        targets = self.targets
        return [
            Row(
                key,
                layer.type,
                layer.width,
                options.at(layer.beta, self._step, "beta"),
                targets.get(key),
                options.at(layer.alpha, self._step, "alpha"),
                layer.samples,
                *layer.decision(),
            )
            for key, layer in self._layers.items()
        ]

    def summary(self) -> str:
        """A table of :meth:`rows`: d features of N samples, from an output of that shape, averaged
        over these axes, and the rule by which that was decided.
        """
        table: list[tuple[str, ...]] = [Row._fields]
        for row in self.rows():
            written = row._asdict()
            written |= {option: f"{written[option]:g}" for option in ("beta", "alpha")}
            if row.target is not None:
                written["target"] = f"{row.target:.3f}"
            table.append(tuple("?" if cell is None else str(cell) for cell in written.values()))
        sizes = [max(map(len, column)) for column in zip(*table, strict=True)]
        numbers = range(2, 7)
        return "\n".join(
            "  ".join(
                cell.rjust(size) if i in numbers else cell.ljust(size)
                for i, (cell, size) in enumerate(zip(cells, sizes, strict=True))
            ).rstrip()
            for cells in table
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

    def state_dict(self) -> dict:
        """The step, and beta of every layer: a number, a schedule by name, or None for others."""
        return {"step": self._step, "beta": {k: options.written(b) for k, b in self.beta.items()}}

    def load_state_dict(self, state: Mapping) -> None:
        """Goes on from there, with its beta, but for layers and functions that it does not know."""
        for key, beta in state.get("beta", {}).items():
            if key in self._layers and beta is not None:
                self._layers[key].beta = options.number("beta", options.read(beta))
        self._count(int(state["step"]))

    def close(self) -> None:
        """Removes every hook; loss() is 0 from then on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.begin()
        self._measuring = False  # a graph that was compiled with the hooks asks

    def __enter__(self) -> SESRegularizer:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __reduce__(self):
        """Of a module that holds one: a copy, which has no hooks and says so."""
        return _copy, (self.state_dict(),)


_DEFAULTS = {"beta": 0.7, "alpha": 1.0, "pool": "mean", "select": None, "batch_axis": None,
             "feature_axis": None}  # fmt: skip


def _make_layers(
    terms: Sequence[Term], common: Term, modules: dict[str, nn.Module]
) -> list[capture.Layer]:
    """Of all terms, in the model's order."""
    hooks = []
    for term in terms:
        last = term.last
        require(last is None or options.is_count(last), "hook_last_n", "an int of 1 or more", last)
        hooks.append(_layers.find(modules, term.layers, last))
    every = [hook.key for found in hooks for hook in found]
    twice = [key for key, count in Counter(every).items() if count > 1]
    require(not twice, "terms", "about different layers", twice)
    plain = {name: _layers.unwrap(module) for name, module in modules.items()}
    names = {id(module): name for name, module in modules.items()}
    made = []
    for term, found in zip(terms, hooks, strict=True):
        values = {}
        for option, default in _DEFAULTS.items():
            own = getattr(term, option)
            value = getattr(common, option) if own is None else own
            keys = every if own is None else [hook.key for hook in found]
            values[option] = options.per_layer(option, value, keys, default)
        for hook in found:
            chosen = {option: each[hook.key] for option, each in values.items()}
            pool = chosen["pool"]
            known = callable(pool) or pool in pooling.NAMES
            require(known, "pool", f"one of {pooling.NAMES} or a function", pool)
            of_heads = hook.kind in ("heads", "similarity")
            where = names[id(hook.module)] if of_heads else hook.name
            chosen["is_decoder"] = _is_decoder(hook.name, modules)
            made.append(capture.Layer(hook, evidence.evidence(where, plain), chosen))
    order = {name: place for place, name in enumerate(modules)}
    return sorted(made, key=lambda layer: order[layer.name])


def _is_decoder(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether it is in a decoder beside an encoder: each has a mask of its own."""
    before, found, _ = f".{name}.".partition(".decoder.")
    return bool(found) and f"{before}.encoder".lstrip(".") in modules


def _copy(state: dict) -> SESRegularizer:
    """What is left of a regulariser in a copy of the module that holds it."""
    copied = SESRegularizer(nn.Sequential(nn.Identity()), layers="0")
    copied.close()
    copied._is_copy, copied._layers = True, {}
    copied.load_state_dict(state)
    return copied
