"""What is known of the axes of a module's output before it runs: its types, widths, neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from ses_kernels import context
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

    def leaf(side: str | None, *widths: int, dims: int | None = None) -> Evidence:
        of_maps = frozenset() if dims is None else frozenset({dims})
        return Evidence(side, of_maps, frozenset(widths), is_leaf=True, why=type(module).__name__)

    if isinstance(module, context.CONVOLUTION):
        return leaf("first", module.out_channels, dims=len(module.kernel_size) + 2)
    if isinstance(module, context.BATCH_OR_INSTANCE_NORM):
        return leaf("first", module.num_features)
    if isinstance(module, nn.GroupNorm):
        same = type(module).forward is nn.GroupNorm.forward
        return leaf("first" if same else None, module.num_channels)
    for channels_first, dims in _CHANNELS_FIRST.items():
        if isinstance(module, channels_first):
            return leaf("first", dims=dims)
    if isinstance(module, nn.MultiheadAttention):
        return leaf("last", module.embed_dim)
    if isinstance(module, nn.RNNBase):
        return leaf("last", (module.proj_size or module.hidden_size) * (1 + module.bidirectional))
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return leaf("last", module.embedding_dim)
    if is_map(module):
        width = getattr(module, "out_features", getattr(module, "nf", None))
        return leaf("last", *((width,) if isinstance(width, int) else ()))
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        same = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        return leaf("last" if same else None, module.normalized_shape[-1])
    own = [p for p in module.parameters(recurse=False) if not is_lazy(p)]
    vectors = [p.shape[0] for p in own if p.dim() == 1]
    if vectors and not list(module.children()):  # a norm or a scale of someone's own
        return Evidence(widths=frozenset(vectors), why=type(module).__name__)
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
    before = [n for n in reversed(names[:here]) if n and not name.startswith(f"{n}.")]
    for which, near in ("before", before), ("after", names[here + 1 + inside :]):
        for other in near:
            if leaf := _leaf(modules[other]):
                why = f"the layer {which} it, {other} ({type(modules[other]).__name__})"
                return leaf._replace(is_leaf=False, why=why)
    return Evidence()


def _batch_first(
    name: str, modules: Mapping[str, nn.Module]
) -> tuple[bool | None, bool | None, bool | None]:
    """What it declares itself, what its parts or its block declare, what is declared far off."""

    def declared(prefix: str) -> bool | None:
        inside = [n for n in modules if not prefix or n == prefix or n.startswith(f"{prefix}.")]
        values = {value for n in inside if (value := _declares(modules[n])) is not None}
        return values.pop() if len(values) == 1 else None

    near, parent = declared(name) if name else None, name
    while near is None and "." in parent:
        parent = parent.rpartition(".")[0]
        near = declared(parent) if parent in modules else None
    return _declares(modules[name]), near, declared("")


def _declares(module: nn.Module) -> bool | None:
    value = getattr(module, "batch_first", None)
    return value if isinstance(value, bool) else None
