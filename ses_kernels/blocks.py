"""The repeated blocks of a model, found by how its modules are nested.

A block is a module of several weight maps (convolutions, linear maps, attention) that stands in a
sequence: in an nn.Sequential or nn.ModuleList, or among numbered attributes such as
``inception3a``. A stage holds a sequence of blocks and little else, and is looked through; so is a
backbone that others wrap. Names are a hint: a class called ``...Block`` is taken for one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from torch import nn
from torch.nn.parameter import is_lazy

from ses_kernels.context import CONVOLUTION

_SEQUENCES = (nn.Sequential, nn.ModuleList)
_CONTAINERS = (*_SEQUENCES, nn.ModuleDict)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
# Blocks in the words of torchvision, timm, transformers and the papers' code.
_BLOCK = re.compile(
    r"(Block|Bottleneck|BottleNeckLayer|InvertedResidual|DepthwiseSeparableConv)(\dd)?$"
    r"|[wW]ide_?[bB]asic$"
)
_NUMBERED = re.compile(r"^([A-Za-z_]*?)_?\d+[a-z]?$")
_OUTSIDE = re.compile(r"(^|\.)(stem|downsample|head|aux)\d*(\.|$)")  # of the sequence of blocks


def find(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the blocks of every stage, in the model's order; [] where there are none.

    ``modules`` are those of the model by name, the root under "". Without a block of several maps:
    repeated modules of one map (MobileNet V1), else what max or average pooling puts out (VGG).
    """
    tree, lenient = _Tree(modules), _Tree(modules, alone=True)
    return tree.blocks("") or lenient.blocks("") or tree.single_maps() or tree.pools()


def is_map(module: nn.Module) -> bool:
    """Whether it multiplies features by weights: a convolution, linear map or recurrence."""
    if isinstance(module, (CONVOLUTION, nn.Bilinear, *_RECURRENT)):
        return True
    # Linear, and what stands in for it: quantized, low-rank, transformers' Conv1D (nx -> nf).
    known = isinstance(getattr(module, "out_features", getattr(module, "nf", None)), int)
    return known and any(is_lazy(p) or p.dim() > 1 for p in module.parameters(recurse=False))


def maps(module: nn.Module) -> int:
    """How many of them a module has, itself included."""
    return sum(is_map(m) + isinstance(m, nn.MultiheadAttention) for m in module.modules())


class _Tree:
    def __init__(self, modules: dict[str, nn.Module], alone: bool = False) -> None:
        self.modules = modules
        self.alone = alone  # whether one module in an nn.Sequential may be a block
        self.children: dict[str, list[str]] = defaultdict(list)
        for name in modules:
            if name:
                self.children[self._parent(name)].append(name)
        self.maps = dict.fromkeys(modules, 0)  # weight maps in a module, itself included
        self.parameters = dict.fromkeys(modules, 0)
        mixing = dict.fromkeys(modules, 0)  # the maps without depthwise convolutions
        for name, module in modules.items():
            maps = is_map(module) + 2 * isinstance(module, nn.MultiheadAttention)
            depthwise = getattr(module, "groups", 1) == getattr(module, "in_channels", 0) > 1
            own = module.parameters(recurse=False)
            count = sum(1 if is_lazy(p) else p.numel() for p in own)
            for ancestor in self._up(name):
                self.maps[ancestor] += maps
                self.parameters[ancestor] += count
                mixing[ancestor] += 0 if depthwise else maps
        self.instances = Counter(type(m) for m in modules.values())
        # By type: EfficientNetV2 begins with blocks of one convolution, its others have two.
        most: dict[type, int] = defaultdict(int)
        for name, module in modules.items():
            maps = self.maps[name] if self._is_named(name) else mixing[name]
            most[type(module)] = max(most[type(module)], maps)
        self.composite = {
            name
            for name, module in modules.items()
            if self.maps[name]
            and not is_map(module)
            and (mixing[name] if type(module) in _CONTAINERS else most[type(module)]) > 1
        }
        self._stage_types: dict[type, bool] = {}

    def _parent(self, name: str) -> str:
        while name:
            name = name.rpartition(".")[0]
            if name in self.modules:
                break
        return name

    def _up(self, name: str):
        yield name
        while name:
            name = self._parent(name)
            yield name

    def blocks(self, name: str) -> list[str]:
        """Those inside a module that is not a block itself."""
        found = []
        for child, in_sequence in self._members(name):
            if child not in self.composite or _OUTSIDE.search(child):
                continue
            if (self._is_named(child) or in_sequence) and not self._is_stage(child):
                found.append(child)
            else:
                found += self.blocks(child)
        return found

    def _members(self, name: str) -> list[tuple[str, bool]]:
        """Children, plain containers replaced by their elements; and whether in a sequence."""
        inside = isinstance(self.modules[name], _SEQUENCES)
        children = self.children[name]
        by_name = isinstance(self.modules[name], nn.ModuleDict)  # in any order: a dense block
        numbered = set() if by_name else self._numbered(children)
        members = []
        for child in children:
            if type(self.modules[child]) in _CONTAINERS:
                members += self._members(child)
            else:
                members.append((child, (inside and self._repeats(child)) or child in numbered))
        return members

    def _repeats(self, name: str) -> bool:
        """In a list, or one of several in an nn.Sequential: not the MLP at a network's end."""
        parent = self._parent(name)
        if not re.search(r"\d", name.rpartition(".")[2]):
            return False
        if isinstance(self.modules[parent], nn.ModuleList) or self.alone:
            return True
        beside = [child for child in self.children[parent] if child != name]
        composite = [child for child in beside if child in self.composite]
        other = [child for child in beside if self.parameters[child] and child not in composite]
        return bool(composite or not other) or self.instances[type(self.modules[name])] > 1

    def _numbered(self, children: list[str]) -> set[str]:
        """Attributes of one stem, such as layer1 and layer2, of modules of several maps."""
        stems = defaultdict(list)
        for child in children:
            match = _NUMBERED.match(child.rpartition(".")[2])
            if match and match[1] and child in self.composite:
                stems[match[1]].append(child)
        return {child for stem in stems.values() if len(stem) > 1 for child in stem}

    def _is_named(self, name: str) -> bool:
        return _BLOCK.search(type(self.modules[name]).__name__) is not None

    def _is_stage(self, name: str) -> bool:
        """By type, so that a stage of one block is treated as its siblings are."""
        kind = type(self.modules[name])
        if kind not in self._stage_types:
            self._stage_types[kind] = False  # inside itself
            self._stage_types[kind] = any(
                self._looks_like_a_stage(other)
                for other, module in self.modules.items()
                if type(module) is kind
            )
        return self._stage_types[kind]

    def _looks_like_a_stage(self, name: str) -> bool:
        inner = self.blocks(name)
        if not inner:
            return False
        kinds = Counter(type(self.modules[block]) for block in inner)
        outside = self.maps[name] - sum(self.maps[block] for block in inner)
        if self._is_named(name):  # as torchvision's MaxVitBlock, a sequence of MaxVitLayer
            return not outside and len(kinds) == 1 and len(inner) > 1
        if any(self._is_named(block) for block in inner):
            # An attribute called a block may be a part of one: a sequence of them is none.
            return any(seq and child in inner for child, seq in self._deep_members(name))
        if len(kinds) == len(inner) > 1:
            return False  # self-attention, cross-attention, MLP: the parts of one block
        if self.instances[type(self.modules[name])] == 1:  # a backbone that something wraps
            held = sum(self.parameters[block] for block in inner)
            return 2 * held > self.parameters[name]
        return outside <= 1  # a convolution between stages

    def _deep_members(self, name: str):
        for child, in_sequence in self._members(name):
            yield child, in_sequence
            if not self._is_named(child):
                yield from self._deep_members(child)

    def single_maps(self) -> list[str]:
        """Repeated modules around one map each, or plain sequences, the outermost of them."""
        found: list[str] = []
        for name in self.modules:
            if any(name.startswith(f"{block}.") for block in found):
                continue
            sequence = isinstance(self.modules[name], _CONTAINERS)
            children = self.children[name]
            numbered = [c for c in children if _NUMBERED.match(c.rpartition(".")[2])]
            candidates = [
                child
                for child in (children if sequence else numbered)
                if self.maps[child] and self.children[child] and not _OUTSIDE.search(child)
            ]
            if len(candidates) > 1:
                found += candidates
        return found

    def pools(self) -> list[str]:
        """Pooling layers of a flat sequence: each ends a stage."""
        for name, module in self.modules.items():
            if isinstance(module, nn.Sequential):
                found = [c for c in self.children[name] if isinstance(self.modules[c], _POOLS)]
                if len(found) > 1:
                    return found
        return []
