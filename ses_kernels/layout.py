"""Which axis of a layer's output has the samples, which the features, and which are averaged.

Known, in this order: the user's options; the type of the module and ``batch_first``; the sizes of
what the model was called with; the widths of the module's parameters. What they say together is a
:class:`Layout`. Where they contradict each other it is a ValueError that names the option which
decides; where nothing is known it is the convention of PyTorch, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ses_kernels.evidence import Evidence

_MASKS = ("attention_mask", "decoder_attention_mask")  # 1 or True for what counts
_PADDING = ("key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask")  # True: padding


# ---- what the model was called with ----


class Call(NamedTuple):
    """What a call tells of the batch, and its masks of padding."""

    first: tuple[int, ...] = ()  # sizes of the first axis of its tensors
    second: tuple[int, ...] = ()  # of the second, where they may be sequences (T, N[, D])
    masks: tuple[tuple[str, Tensor], ...] = ()  # bool (N, T), True for what counts


def call(args, kwargs) -> Call:
    """What the arguments of a forward pass tell, nested or not."""
    tensors: list[Tensor] = []
    lists: list[int] = []
    _collect((args, kwargs), tensors, lists)
    first = [x.shape[0] for x in tensors if x.dim()]
    second = [x.shape[1] for x in tensors if x.dim() in (2, 3)]
    return Call(tuple(first + lists), tuple(second), masks(kwargs))


def _collect(value, tensors: list[Tensor], lists: list[int]) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, tensors, lists)
    elif isinstance(value, (list, tuple)):
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            lists.append(len(value))
        for item in value:
            _collect(item, tensors, lists)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            _collect(getattr(value, field.name), tensors, lists)


def masks(kwargs: Mapping) -> tuple[tuple[str, Tensor], ...]:
    """The masks of padding among the arguments of a call, True for what counts."""
    found = []
    for name in (*_MASKS, *_PADDING):
        mask = kwargs.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # Padding is True, or minus infinity to be added to the scores.
            keep = mask == 0 if name in _PADDING else mask != 0
            found.append((name, keep))
    return tuple(found)


# ---- the decision ----


class Layout(NamedTuple):
    """How an output becomes samples x features."""

    shape: tuple[int, ...]
    batch: int  # axis of the samples
    features: int  # axis of the features
    windows: int  # of one sample on the axis of the samples: averaged
    rule: str  # why, in words
    doubt: str = ""  # a warning, where only convention decided

    @property
    def averaged(self) -> tuple[int, ...]:
        axes = range(len(self.shape))
        return tuple(axis for axis in axes if axis not in (self.batch, self.features))


def decide(
    shape: tuple[int, ...],
    known: Evidence,
    called: Call | None,
    name: str,
    *,
    input_shape: tuple[int, ...] | None = None,
    around: tuple[int, ...] = (),
    batch_axis: int | None = None,
    feature_axis: int | None = None,
    batch_first: bool = False,
    graph: torch.autograd.graph.Node | None = None,
) -> Layout:
    """The layout of an output of 2 or more axes; ``called`` is None where the call was not seen.

    ``around``: the shape that the part of the model around the layer was called with, () if not
    known. ``batch_first``: no other axis than the first can have the samples. ``graph``: what made
    the output, asked where all else leaves it open. ValueError where the facts contradict each
    other, or an option is no axis of the output.
    """
    features, why, doubt = _features(shape, known, name, input_shape, feature_axis, graph)
    if batch_first:
        known = known._replace(batch_first=None, near=None, far=None)
    sequences = len(shape) == 3 and features == 2 and not batch_first  # (T, N, D) is possible
    batch, windows, because, second = _batch(
        shape, sequences, known, called, around, name, batch_axis
    )
    if batch == features:
        raise ValueError(
            f"{name}: axis {batch} of {_text(shape)} would be both samples and features; pass "
            "batch_axis= and feature_axis="
        )
    return Layout(shape, batch, features, windows, f"{why}; {because}", doubt or second)


def _text(shape) -> str:
    return f"({', '.join(str(size) for size in shape)})"


def _axis(option: str, axis: int, shape, name: str) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{name}: {option}={axis} is no axis of an output of shape {_text(shape)}")
    return axis % len(shape)


def _features(shape, known: Evidence, name, input_shape, option, graph) -> tuple[int, str, str]:
    dims = len(shape)
    if option is not None:
        return _axis("feature_axis", option, shape, name), "feature_axis=", ""
    if dims == 2:
        return 1, "two axes", ""
    axes = {"first": 1, "last": dims - 1}
    side = known.side
    if known.dims and dims not in known.dims:  # what was a map has become something else
        side = "last" if known.is_mixed else None
    fits = [which for which in ("first", "last") if shape[axes[which]] in known.widths]
    if side is not None and (side in fits or not fits or not known.widths):
        return axes[side], f"features of {known.why}", ""
    # The axis of its type is not as wide as its layers, the other is: a permuted output, or a
    # concatenation beside a space that happens to be as wide.
    square = _square(shape)
    came = _square(input_shape) if input_shape is not None and len(input_shape) == dims else None
    if side is not None and not known.is_leaf:
        if square == side:
            return axes[side], f"features of {known.why}, square space", ""
        if square in fits:
            return axes[fits[0]], f"the axis as wide as {known.why}", ""
    elif len(fits) == 1:
        return axes[fits[0]], f"the axis as wide as {known.why}", ""
    elif square is not None and known.widths:
        return axes[square], "square space", ""
    elif came is not None:
        return axes[came], "the layout of its input, square space", ""
    if side is None and not known.widths:
        which = "last" if dims == 3 else "first"
        words = "tokens (N, T, D)" if dims == 3 else "maps (N, C, *space)"
        doubt = (
            f"{name}: nothing tells which axis of its output {_text(shape)} has the features; "
            f"taken as {words}. feature_axis={axes[which]} says so, another value otherwise"
        )
        return axes[which], f"{words} by convention", doubt
    made = None if graph is None else _by_graph(graph, dims)
    if made is not None:
        return made, "what made it, in the autograd graph", ""
    raise ValueError(
        f"{name}: the features of its output {_text(shape)} may be on axis 1 or on axis {dims - 1}:"
        f" {known.why} have {sorted(known.widths)} features. Pass feature_axis="
    )


def _by_graph(graph, dims: int) -> int | None:
    """The axis of the features, from the last layer in the graph, through what moves axes."""
    waiting: list[tuple[torch.autograd.graph.Node, list[int]]] = [(graph, list(range(dims)))]
    seen: set[torch.autograd.graph.Node] = set()
    for node, axes in waiting:  # axes of what the node puts out, as axes of the output
        kind = type(node).__name__.removesuffix("0").removesuffix("Backward")
        if node in seen or len(seen) > 100:
            continue
        seen.add(node)
        inputs = [n for n, _ in node.next_functions if n is not None]
        if kind in ("Convolution", "NativeBatchNorm", "CudnnBatchNorm", "NativeGroupNorm"):
            return axes[1]
        flat = {type(n).__name__.partition("Backward")[0] for n in inputs} & {"Addmm", "Mm"}
        if kind in ("NativeLayerNorm", "Linear") or (kind in ("View", "UnsafeView") and flat):
            return axes[-1]
        if kind == "Permute":
            # Axis i of what a permutation puts out was axis dims[i].
            moved = [_signed(d) % dims for d in _saved(node, "dims")]
            axes = [axes[moved.index(i)] for i in range(dims)]
        elif kind == "Transpose":
            a, b = (_signed(_saved(node, f"dim{i}")) % dims for i in (0, 1))
            axes = list(axes)
            axes[a], axes[b] = axes[b], axes[a]
        elif kind not in _KEEP_AXES:
            continue
        waiting += [(n, axes) for n in inputs]
    return None


_KEEP_AXES = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Neg",
        "Relu",
        "Gelu",
        "Silu",
        "Tanh",
        "Sigmoid",
        "Elu",
        "LeakyRelu",
        "Hardtanh",
        "Hardswish",
        "Clamp",
        "Clone",
        "ToCopy",
        "NativeDropout",
        "Cat",
        "MaxPool2DWithIndices",
        "AvgPool2D",
    ]
)


def _saved(node: torch.autograd.graph.Node, name: str):
    return getattr(node, f"_saved_{name}")


def _signed(axis: int) -> int:
    """Autograd keeps a negative axis as an unsigned number."""
    return axis - 2**64 if axis >= 2**63 else axis


def _square(shape) -> str | None:
    """The side of the features, where the other axes are those of a square or a cube."""
    if len(shape) < 4:
        return None
    first = all(size == shape[2] for size in shape[2:])
    last = all(size == shape[1] for size in shape[1:-1])
    return None if first == last else "first" if first else "last"


def _batch(
    shape, sequences, known: Evidence, called, around, name, option
) -> tuple[int, int, str, str]:
    if option is not None:
        return _axis("batch_axis", option, shape, name), 1, "batch_axis=", ""
    declared = known.batch_first if sequences else None
    near = known.near if sequences else None
    if called is None or not called.first:
        axis = 1 if declared is False or (declared is None and near is False) else 0
        unknown = "it ran outside of a call of the model, as where .forward() is called"
        unknown = unknown if called is None else "the model was called with no tensor"
        doubt = (
            f"{name}: {unknown}, so that the size of the batch is not known; axis {axis} of its "
            f"output {_text(shape)} is taken for the samples. batch_axis={axis} says so"
        )
        return axis, 1, "batch size not known", doubt
    # Where something in the model wants the batch second, so may the model's own input be.
    turned = called.second if False in (known.far, known.near, known.batch_first) else ()
    inputs = called.first + turned
    plausible = [axis for axis in ((0, 1) if sequences else (0,)) if shape[axis] in inputs]
    if declared is not None:
        axis = 0 if declared else 1
        other = 1 - axis
        clash = shape[axis] not in inputs and shape[other] in called.first
        if not clash:
            windows = 1 if shape[axis] in inputs else _windows(shape[axis], called.first, turned)
            if windows:
                return axis, windows, f"batch_first={declared}", ""
        raise ValueError(
            f"{name}: batch_first={declared} puts the samples of its output {_text(shape)} on axis "
            f"{axis}, but the model was called with {_sizes(called)} samples. If that is meant, "
            f"pass batch_axis={axis}"
        )
    if plausible == [0]:
        return 0, 1, "the batch of the input", ""
    windows = _windows(shape[0], called.first, turned)
    if plausible == [1] and windows and near is not False:
        # Sequences (T, N, D), or windows that have as many tokens as the batch has samples.
        outer = around[:2] if len(around) == 3 else around[:1]
        inside = [0] if near else [axis for axis, size in enumerate(outer) if size in inputs]
        if inside == [0]:
            return 0, windows, f"{windows} windows of each sample, as around it", ""
        if inside != [1]:
            raise ValueError(
                f"{name}: the samples of its output {_text(shape)} may be on axis 1, or have "
                f"{windows} windows each on axis 0. Pass batch_axis=1, or a function as pool="
            )
    if plausible == [1]:
        return 1, 1, "the batch of the input", ""
    if plausible:
        if near is not None:
            return 0 if near else 1, 1, f"batch_first={near} nearby", ""
        if known.far is False:
            raise ValueError(
                f"{name}: the samples of its output {_text(shape)} may be on axis 0 or on axis 1: "
                "other layers have batch_first=False. Pass batch_axis="
            )
        doubt = (
            f"{name}: axes 0 and 1 of its output {_text(shape)} are both as long as the batch; "
            "axis 0 is taken for the samples. batch_axis=0 says so, batch_axis=1 otherwise"
        )
        return 0, 1, "batch first by convention", doubt if known.far is None else ""
    if windows:
        return 0, windows, f"{windows} windows of each sample", ""
    raise ValueError(
        f"{name}: no axis of its output {_text(shape)} has the samples: the model was called with "
        f"{_sizes(called)}. Pass batch_axis="
    )


def _windows(size: int, *inputs) -> int:
    """How many of each sample's lie in a row on an axis, 0 where that is not known."""
    found = set()
    for sizes in inputs:
        distinct = {n for n in sizes if n != 1} or set(sizes)
        if len(distinct) == 1:
            (samples,) = distinct
            if samples and size % samples == 0:
                found.add(size // samples)
    return found.pop() if len(found) == 1 else 0


def _sizes(called: Call) -> str:
    return " or ".join(str(n) for n in dict.fromkeys(called.first + called.second))
