"""The matrices of a model or a checkpoint: which tensors are weights, and as what they are taken.

A weight is the matrix (out, everything else): a convolution is (out, in * kernel), the fused
projections of attention are three matrices, Q, K and V, and a recurrent weight is one a gate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ses_lab.names import ConfigError

Source = nn.Module | Mapping[str, Any]

# nn.MultiheadAttention; timm and ours; MPT; GPT-2. BLOOM and GPT-NeoX interleave Q, K and V by
# head in `query_key_value`, which is left whole.
_FUSED = ("in_proj_weight", "qkv.weight", "Wqkv.weight", "c_attn.weight")


def load(path: str | Path) -> Mapping[str, Any]:
    """A checkpoint (``.safetensors``, or ``torch.save`` read with weights_only=True) on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: the file is something else, or holds more than tensors and containers.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file of another kind can make a parser raise anything
        raise ConfigError(
            f"{path} is no checkpoint of tensors: neither .safetensors nor what torch.save wrote "
            f"without other objects in it ({type(error).__name__})"
        ) from error
    if not isinstance(state, Mapping):
        raise ConfigError(f"{path} holds no state dict but {type(state).__name__}")
    return state


def matrices(source: Source) -> dict[str, Tensor]:
    """Layer -> (rows, columns) view of each weight of a model, state dict or checkpoint.

    A weight is a floating-point tensor of two or more axes, none of size 1 after flattening to
    two, whose name ends in ``weight``: linear layers, convolutions, embeddings. So are those of
    recurrent layers, of which each gate is a matrix of its own, and the stacked weights of a
    mixture's ``experts``, (experts, rows, columns), a matrix each. Of a checkpoint the entry
    ``model``, ``state_dict`` or ``model_state_dict`` is taken. Weight norm is multiplied out; under
    ``nn.utils.parametrizations.spectral_norm`` it is the weight before the division: all but its
    norms are the same. float8 comes as float32, without the scales that may stand beside it.

    Raises:
        ConfigError: there is none.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    weights = _weights(state)
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        parts = {name: value}
        if value.dim() == 3 and ".experts." in f".{name}":
            parts = {f"{name.removesuffix('.weight')}.{i}": w for i, w in enumerate(value)}
        elif not _WEIGHT.search(name):
            continue
        for part, w in parts.items():
            matrix = w.detach().flatten(1)
            if min(matrix.shape) > 1:
                found |= _split(part, matrix, _gates(part, weights))
    if not found:
        raise ConfigError(
            f"no weight matrix among {list(state)[:10]}; expected a module, a state dict, or a "
            "checkpoint that holds one as 'model', 'state_dict' or 'model_state_dict'"
        )
    return found


_WEIGHT = re.compile(r"weight(_[ih]h_l\d+(_reverse)?)?$")
_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original[01]?$")


def _weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Floats of two or more axes, by the names that they have without a parametrisation."""
    found = {}
    for name, value in state.items():
        for size, direction in ((".original0", ".original1"), ("_g", "_v")):
            v = state.get(name.removesuffix(size) + direction) if name.endswith(size) else None
            if v is not None:
                # g lies along the axes that it shares with v, and |v| is over the others.
                axes = [i for i in range(v.dim()) if value.dim() != v.dim() or value.shape[i] == 1]
                value = v * (value / v.norm(dim=axes, keepdim=True))
                name = name.removesuffix("_g")
        name = _PARAMETRIZED.sub(r"\1", name)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            # The second of a pair comes after its product, under a name of its own or the same.
            found.setdefault(name, value.float() if value.itemsize == 1 else value)
    return found


def _gates(name: str, weights: Mapping[str, Tensor]) -> str:
    """The gates that a recurrent weight stacks: those of an LSTM, of a GRU, or none."""
    hidden = weights.get(re.sub(r"_ih_l(\d+)", r"_hh_l\1", name))
    if hidden is None or "weight_" not in name:
        return ""
    return {4: "ifgo", 3: "rzn"}.get(hidden.shape[0] / hidden.shape[1], "")


def _split(name: str, matrix: Tensor, gates: str) -> dict[str, Tensor]:
    layer = name.removesuffix("weight").rstrip("._").replace("weight_", "") or name
    if gates:
        return {f"{layer}.{g}": m for g, m in zip(gates, matrix.chunk(len(gates)), strict=True)}
    rows, columns = matrix.shape
    if name.endswith(_FUSED) and 3 in (rows / columns, columns / rows):
        # GPT-2 keeps (in, out): there the three stand side by side.
        parts = matrix.chunk(3, dim=0 if rows > columns else 1)
        return {f"{layer}.{part}": m for part, m in zip("qkv", parts, strict=True)}
    return {layer: matrix}
