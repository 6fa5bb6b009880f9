"""Which modules of a model are hooked: by name, glob, type or predicate, or by kind of model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

Layers = str | type | Callable[[str, nn.Module], bool] | Sequence | None

# Names of the blocks of residual networks in torchvision, timm, transformers and the papers' code.
_RESIDUAL = re.compile(
    r"(Block|Bottleneck|BottleNeckLayer|ResNetBasicLayer|InvertedResidual|[wW]ide_?[bB]asic)$"
)
_POOLED = re.compile(r"(AdaptiveAvgPool\dd|SelectAdaptivePool2d|GlobalAvgPool(2d)?)$")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A transformer block has one of each among its children; the first of these that it has.
_ATTENTION = ("attn", "attention", "self_attn", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn_output", "output", "ffn", "linear2")


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
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def find(model: nn.Module, layers: Layers, last: int | None) -> dict[str, nn.Module]:
    """Name -> module of the (last) layers that match, in the model's order."""
    modules = _named(model)
    if layers is None:
        found = _default(model, modules)
    else:
        wanted = (
            list(layers)
            if isinstance(layers, Sequence) and not isinstance(layers, str)
            else [layers]
        )
        if not wanted:
            raise ValueError("layers= is empty; None means the default layers")
        matched = [_matching(spec, modules) for spec in wanted]
        found = {name for names in matched for name in names}
    names = [name for name in modules if name in found]
    return {name: modules[name] for name in (names if last is None else names[-last:])}


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Submodules by the names that they have without wrappers; the outermost wrapper wins."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        # Spectral norm and the like are modules too, but what they return is a weight.
        if name and "parametrizations" not in parts:
            wrappers = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
            clean = ".".join(part for part in parts if part not in wrappers)
            modules.setdefault(clean, module)
    return modules


def _matching(spec, modules: dict[str, nn.Module]) -> list[str]:
    if isinstance(spec, str):
        found = [name for name in modules if fnmatchcase(name, spec)]
    elif isinstance(spec, type):
        found = [name for name, module in modules.items() if isinstance(unwrap(module), spec)]
    elif callable(spec):
        found = [name for name, module in modules.items() if spec(name, module)]
    else:
        raise TypeError(
            "layers= takes names, globs, module types, or a predicate (name, module) -> bool, got "
            f"{spec!r}"
        )
    if not found:
        raise no_match("layers", spec, modules)
    return found


def no_match(option: str, pattern, names) -> ValueError:
    wanted = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
    near = difflib.get_close_matches(wanted, list(names), n=5, cutoff=0.3) or list(names)[:10]
    return ValueError(f"{option}: nothing matches {wanted!r}; the nearest names are {near}")


def _default(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """Attention and MLP outputs of transformers, else residual blocks and pooled features."""
    found: list[str] = []
    for name, module in modules.items():
        children = dict(unwrap(module).named_children())
        pair = [next((c for c in kind if c in children), None) for kind in (_ATTENTION, _MLP)]
        if all(pair) and name not in found and not _inside(name, found):
            found += [f"{name}.{child}" for child in pair]
    if found:
        return set(found)
    blocks = [
        name
        for name, module in modules.items()
        if _RESIDUAL.search(type(unwrap(module)).__name__)
        and any(isinstance(child, _CONVOLUTIONS) for child in module.modules())
    ]
    blocks = [name for name in blocks if not any(_inside(other, [name]) for other in blocks)]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no residual or attention blocks known by name; pass "
            f"layers=, names or globs among {list(modules)[:20]}, a module type, or a predicate"
        )
    pooled = [
        name
        for name, module in modules.items()
        if _POOLED.search(type(unwrap(module)).__name__) and not _inside(name, blocks)
    ]
    return {*blocks, *pooled}


def _inside(name: str, parents: Sequence[str]) -> bool:
    return any(name.startswith(f"{parent}.") for parent in parents)
