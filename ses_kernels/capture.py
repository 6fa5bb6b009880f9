"""What the hooks of a regulariser see: the matrix of each layer, and the forward passes."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ses_kernels import context, evidence, layout, options, pooling
from ses_kernels import layers as _layers

# ---- one layer ----

HOW_TO_GET_WEIGHTS = (
    "Attention weights are put out by nn.MultiheadAttention called with need_weights=True, "
    "average_attn_weights=False (torch's encoder layers call it without); in transformers with "
    'attn_implementation="eager"; in timm with fused_attn off, timm.layers.set_fused_attn(False) '
    "before the model is made; in attention of one's own by an nn.Softmax"
)


class Layer:
    """What is measured at one module, and what its output has turned out to be."""

    def __init__(self, hook: _layers.Hook, known: evidence.Evidence, chosen: dict) -> None:
        self.key, self.name, self.kind, self.takes = hook.key, hook.name, hook.kind, hook.takes
        self.heads = hook.heads
        self.module = weakref.ref(hook.module)
        self.type = type(_layers.unwrap(hook.module)).__name__
        self.known = known
        self.beta = options.number("beta", chosen["beta"])
        self.alpha = options.number("alpha", chosen["alpha"])
        self.pool, self.select = chosen["pool"], chosen["select"]
        self.batch_axis, self.feature_axis = chosen["batch_axis"], chosen["feature_axis"]
        self.is_decoder = chosen["is_decoder"]
        self.seen = False
        self.width: int | None = None
        self.samples: int | None = None
        self.shape: tuple[int, ...] = ()  # of its last output, () before it
        self.layout: layout.Layout | None = None
        self.mask = ""  # the name of the mask that was used
        self.misfits: dict[str, tuple[int, ...]] = {}  # shapes of the masks that did not fit
        self.doubt = ""
        self._decided: tuple = (), None  # what the layout was decided from, and the layout

    def hook(self, regularizer) -> torch.utils.hooks.RemovableHandle:
        """Puts the hook of a regulariser on the module."""
        module = self.module()
        assert module is not None  # it is being hooked
        if self.takes == "input":
            return module.register_forward_pre_hook(Input(regularizer, self.key), with_kwargs=True)
        return module.register_forward_hook(Output(regularizer, self.key), with_kwargs=True)

    def is_training(self) -> bool:
        module = self.module()
        return module is not None and module.training

    def matrix(
        self, args, kwargs, output, called: layout.Call | None, around: tuple[int, ...]
    ) -> Tensor:
        """(samples, features) of a call of the module; (heads, samples, features) of its heads."""
        packed = None
        if self.kind == "weights":
            x = self._weights(output)
        else:
            if self.select is None:
                output, packed = pooling.unpack(output)
            x = pooling.select(output, self.select, self.key)
        self.shape = tuple(x.shape)
        if callable(self.pool) and self.kind == "features":
            return pooling.pool(x, self.pool, None, None, self.key)
        if x.dim() < 2:
            raise ValueError(
                f"{self.key}: expected 2 or more axes, (samples, features), got shape "
                f"{tuple(x.shape)}"
            )
        if packed is not None:
            found = layout.Layout(self.shape, 0, x.dim() - 1, 1, "a packed sequence")
            self.mask, mask = "lengths", packed
        else:
            found = self._layout(args, called, around, x)
            self.mask, mask = self._mask(found, kwargs, called)
        self.layout, self.doubt = found, found.doubt
        if self.kind == "weights":
            return pooling.weight_matrix(x, found, self.key)
        if self.kind == "heads":
            return pooling.head_matrices(x, self.heads, found, mask, self.key)
        if self.kind == "similarity":
            return pooling.head_similarities(x, self.heads, found, mask, self.key)
        return pooling.pool(x, self.pool, found, mask, self.key)

    def _layout(self, args, called, around, x: Tensor) -> layout.Layout:
        first = args[0] if len(args) and isinstance(args[0], Tensor) else None
        facts = (
            self.shape,
            tuple(first.shape) if first is not None else None,
            around,
            called and called[:2],
        )
        compiling = torch.compiler.is_compiling()  # sizes may be symbols then
        if not compiling and facts == self._decided[0]:
            return self._decided[1]
        weights = self.kind == "weights"
        found = layout.decide(
            self.shape,
            self.known,
            called,
            self.key,
            input_shape=facts[1],
            around=around,
            batch_axis=self.batch_axis,
            feature_axis=len(self.shape) - 1 if weights else self.feature_axis,
            batch_first=weights,
            graph=None if compiling else x.grad_fn,
        )
        if not compiling:
            self._decided = facts, found
        return found

    def _weights(self, output) -> Tensor:
        """The attention weights (N, heads, T, T) or (N, T, T).

        Beside the features they are the last such tensor behind the first, which is the features.
        """
        x: Tensor | None
        if self.select is not None or self.takes != "beside":
            x = pooling.select(output, self.select, self.key)
        else:
            behind = output[1:] if isinstance(output, (tuple, list)) else ()
            x = next((y for y in reversed(behind) if _may_be_weights(y)), None)
        if x is None or x.dim() not in (3, 4):
            raise ValueError(
                f"{self.key}: {self.type} puts out no attention weights (N, heads, T, T). "
                f"{HOW_TO_GET_WEIGHTS}. Or pass select="
            )
        return x

    def _mask(self, found: layout.Layout, kwargs, called) -> tuple[str, Tensor | None]:
        """The name of the mask of padding that fits the tokens, and the mask (N, T)."""
        self.misfits = {}
        averages = self.kind in ("heads", "similarity") or self.pool in ("mean", "masked")
        if self.kind == "weights" or not averages or len(self.shape) != 3 or found.windows > 1:
            return "", None
        (tokens,) = found.averaged
        wanted = (self.shape[found.batch], self.shape[tokens])
        masks = layout.masks(kwargs) + (called.masks if called is not None else ())
        others = "attention_mask" if self.is_decoder else "decoder_attention_mask"
        for name, mask in masks:
            if name == others:
                continue
            if tuple(mask.shape) == wanted:
                return name, mask
            self.misfits[name] = tuple(mask.shape)
        return "", None

    def decision(self) -> tuple[tuple[int, ...] | None, str | None, str | None]:
        """Shape of the last output, averaged axes and rule."""
        if self.layout is None:
            return (self.shape, None, "pool= is a function") if self.shape else (None, None, None)
        averaged = self.layout.averaged if self.pool in ("mean", "masked") else ()
        if self.kind == "weights":
            averaged = (len(self.shape) - 2,)
        words = [str(axis) for axis in averaged]
        if self.layout.windows > 1:
            words.append(f"{self.layout.windows} windows")
        rule = self.layout.rule
        if self.pool != "mean":
            rule = f'pool="{self.pool}"; {rule}'
        if self.mask:
            rule += f"; without padding, by {self.mask}"
        return tuple(self.shape), ", ".join(words) or "-", rule


def _may_be_weights(x) -> bool:
    return isinstance(x, Tensor) and x.dim() in (3, 4) and x.dtype.is_floating_point


# ---- all layers, pass by pass ----


class Once:
    """Warnings, each said once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, about: str, text: str) -> None:
        if about not in self._said:
            self._said.add(about)
            warnings.warn(f"SESRegularizer: {text}", stacklevel=4)


class Entry(NamedTuple):
    """What one call of a layer left."""

    key: str
    matrix: Tensor  # (samples, features), or of heads (heads, samples, features)


class _Pass(NamedTuple):
    """A forward pass that was seen."""

    start: int  # of its entries among those that no loss() has taken
    stamp: tuple | None  # of the weights then; None where that cannot be known
    whole: bool  # of the model, rather than of a part


class Passes:
    """What forward passes have left that no loss() has taken."""

    def __init__(self, root: nn.Module, once: Once) -> None:
        self._root, self._once = weakref.ref(root), once
        self._parameter: weakref.ref | None = None
        self.clear()

    def clear(self) -> None:
        self.entries: list[Entry] = []
        self._passes: list[_Pass] = []
        self.call: layout.Call | None = None  # with which the model was called
        self._caller = ""  # the name of the part of it that was, "" for the whole
        self._inputs: dict[str, tuple[int, ...]] = {}  # shapes, of the parts that hold layers

    def enter(self, name: str, args, kwargs) -> None:
        """The model is called, or a part of it."""
        first = args[0] if len(args) else None
        self._inputs[name] = tuple(first.shape) if isinstance(first, Tensor) else ()
        if name and self.call is not None and _holds(self._caller, name):
            return  # inside of a call that was seen
        self.call, self._caller = layout.call(args, kwargs), name
        stamp = None if torch.compiler.is_compiling() else self._stamp()
        if self.entries and stamp is not None:
            self._drop_stale(stamp)
        if self._passes and self._passes[-1].start == len(self.entries):
            self._passes.pop()  # it left nothing
        self._passes.append(_Pass(len(self.entries), stamp, not name))

    def around(self, name: str) -> tuple[int, ...]:
        """The shape that the part around a layer was called with, () where none is known."""
        while name:
            name = name.rpartition(".")[0]
            if self._inputs.get(name):
                return self._inputs[name]
        return ()

    def add(self, key: str, matrix: Tensor) -> None:
        self.entries.append(Entry(key, matrix))

    def take(self) -> list[Entry]:
        """The entries of whole passes: not of one in which other layers ran than in the last."""
        parts: list[list[Entry]] = []
        for p, part in self._split():
            if p.whole or not parts:
                parts.append(list(part))
            else:  # of a model whose parts are called one after the other
                parts[-1] += part
        self.clear()
        parts = [part for part in parts if part]
        ran = [{entry.key for entry in part} for part in parts]
        whole = [part for part, keys in zip(parts, ran, strict=True) if keys == ran[-1]]
        if len(whole) < len(parts):
            self._once.say(
                "failed",
                "a forward pass in which not the same layers ran as in the last is left out of "
                "loss()",
            )
        if len(whole) > 1:
            self._once.say(
                "views",
                f"loss() takes the features of {len(whole)} forward passes; a layer counts as the "
                "mean of them. If one of the passes is a probe, run it within disabled(), under "
                "no_grad or in eval mode",
            )
        return [entry for part in whole for entry in part]

    def _split(self) -> list[tuple[_Pass, list[Entry]]]:
        """The passes, each with its entries; what ran before any was seen is one too."""
        passes = self._passes
        if not passes or passes[0].start:
            passes = [_Pass(0, None, False), *passes]
        ends = [*(p.start for p in passes[1:]), len(self.entries)]
        return [(p, self.entries[p.start : end]) for p, end in zip(passes, ends, strict=True)]

    def _stamp(self) -> tuple | None:
        """Of the weights and their gradients: another one after a step or a backward pass."""
        p = None if self._parameter is None else self._parameter()
        if p is None:
            root = self._root()
            found = () if root is None else root.parameters()
            p = next((p for p in found if p.requires_grad), None)
            if p is None:
                return None
            self._parameter = weakref.ref(p)
        gradient = None if p.grad is None else (id(p.grad), context.version(p.grad))
        return context.version(p), gradient

    def _drop_stale(self, stamp: tuple) -> None:
        """Leaves out the passes whose graph a backward pass or a step has made useless."""
        split = self._split()
        kept = [(p, part) for p, part in split if p.stamp in (None, stamp)]
        if len(kept) == len(split):
            return
        self._once.say(
            "stale",
            "features of a forward pass that no loss() took are left out, since a backward pass or "
            "an optimiser's step came after it. Call loss() in every step, every_k= skips some; "
            "run other forward passes in training mode within disabled()",
        )
        self.entries, self._passes = [], []
        for p, part in kept:
            self._passes.append(p._replace(start=len(self.entries)))
            self.entries += part


def _holds(outer: str, inner: str) -> bool:
    return not outer or inner.startswith(f"{outer}.")


# ---- hooks ----


class _Hook:
    """Bound to a regulariser in the model itself; inert in its copies and pickles."""

    def __init__(self, regularizer, name: str) -> None:
        self.regularizer, self.name = regularizer, name

    def __reduce__(self):
        # An average of weights is such a copy, and so is a saved model, which has to load where
        # this package is not: a method of the standard library takes anything and returns None.
        return getattr, (contextlib.nullcontext(), "__exit__")


class Begin(_Hook):
    """The forward pre-hook of the model and of what holds the layers."""

    def __call__(self, module: nn.Module, args, kwargs) -> None:
        self.regularizer._enter(self.name, args, kwargs)


class Output(_Hook):
    """The forward hook of a layer."""

    def __call__(self, module: nn.Module, args, kwargs, output) -> None:
        self.regularizer._capture(self.name, module, args, kwargs, output)


class Input(_Hook):
    """The forward pre-hook of a part whose input is measured."""

    def __call__(self, module: nn.Module, args, kwargs) -> None:
        (x, *_) = args or kwargs.values()
        self.regularizer._capture(self.name, module, (x,), {}, x)
