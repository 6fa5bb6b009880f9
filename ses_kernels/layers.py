"""Which modules of a model are hooked: by name, glob, type or predicate, or as a kind of part."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from ses_kernels import blocks

Layers = str | type | Callable[[str, nn.Module], bool] | Sequence | None

TARGETS = ("blocks", "attention", "mlp", "heads", "head_similarity", "attention_weights")

_POOLED = re.compile(r"(AdaptiveAvgPool\dd|SelectAdaptivePool2d|GlobalAvgPool(2d)?)$")
# Names of the parts of a block in torch, torchvision, timm, transformers and the papers' code.
_ATTENTION = re.compile(r"^(attn\d?|self_?attn|\w+_attn|\w*attention)$", re.I)
_MLP = ("mlp", "feed_forward", "ffn_output", "ffn", "DenseReluDense", "mlp_channels", "moe",
        "block_sparse_moe", "output", "linear2", "fc2", "pwconv2")  # fmt: skip
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")


class Hook(NamedTuple):
    """What is measured at one module."""

    # In entropies, beta and alpha: the name of the layer, ":heads", ":similarity" or ":weights"
    # behind.
    key: str
    name: str  # of the layer
    module: nn.Module  # the hook is on this one: the layer or a part of it
    # "output" or "input" of that module, or "beside": what its output has behind the features
    takes: str = "output"
    kind: str = "features"  # "features", "heads", "similarity" or "weights"
    heads: int = 1


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "nn.DataParallel runs replicas of the model in threads, and their layers cannot be "
                "told apart; use DistributedDataParallel"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def named(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names that they have without wrappers; the outermost wrapper wins."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        # Spectral norm and the like are modules too, but what they return is a weight.
        if "parametrizations" not in parts:
            wrappers = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
            clean = ".".join(part for part in parts if part not in wrappers)
            modules.setdefault(clean, module)
    return modules


def find(modules: dict[str, nn.Module], layers: Layers, last: int | None) -> list[Hook]:
    """What ``layers`` asks for, in the model's order; of each target the last ``last``.

    Names, globs, types and predicates are one target together. ValueError where nothing is found.
    """
    several = isinstance(layers, Sequence) and not isinstance(layers, str)
    wanted: list = list(layers) if several else [layers]  # type: ignore[arg-type]
    if not wanted:
        raise ValueError("layers= is empty; None means the default layers")
    found: list[Hook] = []
    names: set[str] = set()
    for spec in wanted:
        if spec is None or (isinstance(spec, str) and spec in TARGETS):
            found += _last(_target(spec, modules), last)
        else:
            names.update(_matching(spec, modules))
    plain = [Hook(n, n, m) for n, m in modules.items() if n in names]
    chosen = {hook.key: hook for hook in [*found, *_last(plain, last)]}
    order = list(modules)
    return sorted(chosen.values(), key=lambda hook: order.index(hook.name))


def _last(hooks: list[Hook], last: int | None) -> list[Hook]:
    return hooks if last is None else hooks[-last:]


def _matching(spec, modules: dict[str, nn.Module]) -> list[str]:
    if isinstance(spec, str):
        found = [name for name in modules if fnmatchcase(name, spec)]
    elif isinstance(spec, type):
        found = [name for name, module in modules.items() if isinstance(unwrap(module), spec)]
    elif callable(spec):
        found = [name for name, module in modules.items() if spec(name, module)]
    else:
        raise TypeError(
            "layers= takes names, globs, module types, a predicate (name, module) -> bool, or one "
            f"of {TARGETS}; got {spec!r}"
        )
    found = [name for name in found if name]  # the model itself is no layer of it
    if not found:
        raise no_match("layers", spec, [name for name in modules if name])
    return found


def no_match(option: str, pattern, names) -> ValueError:
    wanted = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
    near = difflib.get_close_matches(wanted, list(names), n=5, cutoff=0.3) or list(names)[:10]
    return ValueError(f"{option}: nothing matches {wanted!r}; the nearest names are {near}")


# ---- targets ----


def _target(target: str | None, modules: dict[str, nn.Module]) -> list[Hook]:
    found = blocks.find({name: unwrap(module) for name, module in modules.items()})
    if not found:
        names = [name for name in modules if name]
        raise ValueError(
            f"{type(unwrap(modules[''])).__name__} has no residual or attention blocks that its "
            "structure shows; pass layers=, names or globs among "
            f"{names[:20]}, a module type, or a predicate"
        )
    attention = [name for block in found for name in _attention(block, modules)]
    if target is None:
        pooled = [] if attention else _pooled(found, modules)
        names = [name for name in modules if name in {*found, *pooled}]
        return [Hook(name, name, modules[name]) for name in names]
    if target == "blocks":
        return [Hook(name, name, modules[name]) for name in found]
    if target == "mlp":
        mlps = [name for block in found if (name := _mlp(block, attention, modules))]
        if not mlps:
            raise _no_part(target, found, modules)
        return [Hook(name, name, modules[name]) for name in mlps]
    if not attention:
        raise _no_part(target, found, modules)
    if target == "attention":
        return [Hook(name, name, modules[name]) for name in attention]
    if target in ("heads", "head_similarity"):
        kind = target.removeprefix("head_")
        return [_heads(name, modules, target)._replace(key=f"{name}:{kind}", kind=kind)
                for name in attention]  # fmt: skip
    return [_weights(name, modules) for name in attention]


def _no_part(target: str, found: list[str], modules) -> ValueError:
    parts = [name for name in modules if name.startswith(f"{found[-1]}.")]
    return ValueError(
        f"layers={target!r}: the blocks, {found[-1]} the last of them, have no such part; pass "
        f"names or globs among {parts[:20]}"
    )


def _pooled(found: list[str], modules) -> list[str]:
    """The pooled features behind residual blocks; of modules one inside the other, the outer.

    What a classifier pools are its scores (SqueezeNet).
    """
    pooled: list[str] = []
    for name, module in modules.items():
        known = _POOLED.search(type(unwrap(module)).__name__)
        if known and not _inside(name, [*found, *pooled, "classifier"]):
            pooled.append(name)
    return pooled


def _inside(name: str, parents: Sequence[str]) -> bool:
    return any(name.startswith(f"{parent}.") for parent in parents)


def _attention(block: str, modules) -> list[str]:
    """The attention of a block, self and cross; not what is inside of it."""
    found: list[str] = []
    for name, module in modules.items():
        if not name.startswith(f"{block}.") or _inside(name, found):
            continue
        module = unwrap(module)
        named = _ATTENTION.match(name.rpartition(".")[2]) and blocks.maps(module)
        gates = type(module) is nn.Sequential  # squeeze and excitation
        if isinstance(module, nn.MultiheadAttention) or (named and not gates):
            found.append(name)
    return found


def _mlp(block: str, attention: list[str], modules) -> str | None:
    parts = [name for name in modules if _inside(name, [block]) and not _inside(name, attention)]
    parts.sort(key=lambda name: name.count("."))  # children before their children
    for wanted in _MLP:
        for name in parts:
            if name.rpartition(".")[2] == wanted and blocks.maps(modules[name]):
                return name
    return None


def _heads(name: str, modules, target: str) -> Hook:
    """The input of the output projection: the heads side by side."""
    module = unwrap(modules[name])
    if isinstance(module, nn.MultiheadAttention):
        raise ValueError(
            f'layers="{target}": {name} is a torch.nn.MultiheadAttention, which never calls its '
            'out_proj as a module, so that its heads cannot be seen; use layers="attention", or an '
            "attention module with an output projection of its own"
        )
    inner = [m for n, m in modules.items() if _inside(n, [name])]
    counts = (getattr(m, a, None) for m in (module, *map(unwrap, inner)) for a in _HEADS)
    heads = next((count for count in counts if isinstance(count, int)), None)
    linear = [m for m in inner if blocks.is_map(unwrap(m))]
    if heads is None or not linear:
        missing = f"number of heads (looked for {', '.join(_HEADS)})"
        raise ValueError(
            f'layers="{target}": {name}, a {type(module).__name__}, shows no '
            f"{'output projection' if heads is not None else missing}; pass layers=, a name or "
            "glob of what puts out the heads, with pool="
        )
    return Hook(name, name, linear[-1], "input", heads=heads)


def _weights(name: str, modules) -> Hook:
    """Into a dropout of their own (timm), out of a softmax that is a module, or put out beside."""
    key, attention = f"{name}:weights", modules[name]
    if not isinstance(unwrap(attention), nn.MultiheadAttention):
        if (dropped := modules.get(f"{name}.attn_drop")) is not None:
            return Hook(key, name, dropped, "input", "weights")
        inner = [m for n, m in modules.items() if _inside(n, [name])]
        softmax = [m for m in inner if isinstance(unwrap(m), nn.Softmax)]
        if len(softmax) == 1:
            return Hook(key, name, softmax[0], "output", "weights")
    return Hook(key, name, attention, "beside", "weights")
