"""What is known of the axes of a module's output before it runs: its types, widths, neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from ses_kernels.blocks import is_map

_CHANNELS_FIRST = {  # type -> axes of its output, None for any number
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), 3),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), 4),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), 5),
    **dict.fromkeys((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Upsample, nn.PixelShuffle)),
}


class Evidence(NamedTuple):
    """What the type, the parameters and the neighbours of a module tell about its output."""

    side: str | None = None  # features on axis 1: "first"; on the last: "last"
    dims: frozenset[int] = frozenset()  # axes for which side "first" holds; empty: any
    widths: frozenset[int] = frozenset()  # numbers of features that its parameters know
    is_mixed: bool = False  # layers of both sides
    is_leaf: bool = False  # one layer: its width is the width of the output
    why: str = ""
    batch_first: bool | None = None  # declared by itself
    near: bool | None = None  # declared by its parts or by the block that it is part of
    far: bool | None = None  # declared elsewhere in the model


def evidence(name: str, modules: Mapping[str, nn.Module]) -> Evidence:
    """Of the module of that name among those of the model, the root under ""."""
    module = modules[name]
    known = _leaf(module)
    if known is None:
        leaves = [leaf for leaf in map(_leaf, _parts(module)) if leaf is not None]
        known = _composite(leaves) if leaves else _neighbour(name, modules)
    own, near, far = _batch_first(name, modules)
    return known._replace(batch_first=own, near=near, far=far)


def _parts(module: nn.Module) -> Iterable[nn.Module]:
    parts = module.modules()
    next(parts)
    return parts


def _leaf(module: nn.Module) -> Evidence | None:
    """A layer whose type tells where its features are, or one with parameters that do not tell."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvNd):
        dims, width = frozenset({len(module.kernel_size) + 2}), module.out_channels
        return Evidence("first", dims, frozenset({width}), is_leaf=True, why=kind)
    if isinstance(module, nn.modules.batchnorm._NormBase):  # batch and instance norm
        return Evidence("first", widths=frozenset({module.num_features}), is_leaf=True, why=kind)
    if type(module).forward is nn.GroupNorm.forward:
        return Evidence("first", widths=frozenset({module.num_channels}), is_leaf=True, why=kind)
    for channels_first, dims in _CHANNELS_FIRST.items():
        if isinstance(module, channels_first):
            return Evidence("first", frozenset({dims} if dims else ()), is_leaf=True, why=kind)
    if isinstance(module, nn.MultiheadAttention):
        return Evidence("last", widths=frozenset({module.embed_dim}), is_leaf=True, why=kind)
    if isinstance(module, nn.RNNBase):
        width = (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
        return Evidence("last", widths=frozenset({width}), is_leaf=True, why=kind)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return Evidence("last", widths=frozenset({module.embedding_dim}), is_leaf=True, why=kind)
    if is_map(module):
        width = getattr(module, "out_features", getattr(module, "nf", None))
        widths = frozenset({width} if width else ())
        return Evidence("last", widths=widths, is_leaf=True, why=kind)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        width = frozenset({module.normalized_shape[-1]})
        same = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        return Evidence("last" if same else None, widths=width, is_leaf=True, why=kind)
    vectors = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 1]
    if vectors and not list(module.children()):  # a norm or a scale of someone's own
        return Evidence(widths=frozenset(vectors), why=kind)
    return None


def _composite(leaves: list[Evidence]) -> Evidence:
    sides = [leaf.side for leaf in leaves if leaf.side is not None]
    one = sides[0] if len(set(sides)) == 1 else None
    dims = frozenset().union(*(leaf.dims for leaf in leaves))
    widths = frozenset().union(*(leaf.widths for leaf in leaves))
    kinds = {"first": "convolutions", "last": "linear layers", None: "layers of both kinds"}
    return Evidence(one, dims, widths, len(set(sides)) > 1, why=f"its {kinds[one]}")


def _neighbour(name: str, modules: Mapping[str, nn.Module]) -> Evidence:
    """An activation or a dropout has the layout of the layer before it, else of the one after."""
    names = list(modules)
    here = names.index(name)
    inside = sum(other.startswith(f"{name}.") for other in names)
    before = (
        n
        for n in reversed(names[:here])
        if n and not name.startswith(f"{n}.") and _leaf(modules[n])
    )
    after = (n for n in names[here + 1 + inside :] if _leaf(modules[n]))
    for which, found in ("after", next(before, None)), ("before", next(after, None)):
        if found is not None:
            leaf = _leaf(modules[found])
            why = f"{which} {found}, {type(modules[found]).__name__}"
            return leaf._replace(is_leaf=False, why=why)
    return Evidence()


def _batch_first(name: str, modules: Mapping[str, nn.Module]) -> tuple[bool | None, ...]:
    """What it declares itself, what its parts or its block declare, what is declared far off."""

    def declared(prefix: str) -> bool | None:
        values = {
            module.batch_first
            for other, module in modules.items()
            if (not prefix or other == prefix or other.startswith(f"{prefix}."))
            and isinstance(getattr(module, "batch_first", None), bool)
        }
        return values.pop() if len(values) == 1 else None

    own = getattr(modules[name], "batch_first", None)
    near, parent = declared(name) if name else None, name
    while near is None and "." in parent:
        parent = parent.rpartition(".")[0]
        near = declared(parent) if parent in modules else None
    return own if isinstance(own, bool) else None, near, declared("")
