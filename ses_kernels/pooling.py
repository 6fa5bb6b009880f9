"""From a module's output to the matrix of samples x features whose spectrum is taken."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ses_kernels import checks, context
from ses_kernels.layout import Layout

Pool = str | Callable[[Tensor], Tensor]
Selector = int | str | Callable | None

NAMES = ("mean", "masked", "none", "tokens", "cls")
_BLOCK = 2**16  # elements


# ---- the tensor of an output ----


def select(output, selector: Selector, layer: str) -> Tensor:
    """The one tensor of a layer's output; TypeError where it is not one that has a spectrum.

    ``selector``: a function of the output; an index or key of a tuple, mapping or dataclass, which
    leaves a tensor as it is. None: ``last_hidden_state``, the first of a tuple, or the only
    floating-point tensor that there is.
    """
    if callable(selector):
        chosen = selector(output)
    elif isinstance(output, Tensor):
        chosen = output
    elif selector is not None:
        chosen = _item(output, selector, layer)
    else:
        chosen = _main(output, layer)
    if not isinstance(chosen, Tensor):
        raise TypeError(
            f"{layer}: expected a tensor in its output, got {type(chosen).__name__} from "
            f"{type(output).__name__} with select={selector!r}; select= takes an index, a key, or "
            "a function of the output"
        )
    _check(chosen, layer)
    return chosen


def unpack(output):
    """(output, mask): a PackedSequence in it, from an RNN, as a tensor (N, T, D) with its padding.

    mask: bool (N, T), True for what is no padding; None where nothing was packed.
    """
    packed = output[0] if isinstance(output, tuple) and len(output) else output
    if isinstance(output, PackedSequence):
        packed = output
    if not isinstance(packed, PackedSequence):
        return output, None
    x, lengths = pad_packed_sequence(packed, batch_first=True)
    mask = (torch.arange(x.shape[1])[None, :] < lengths[:, None]).to(x.device)  # (N, T)
    return x, mask


def _parts(output) -> list[tuple[object, object]] | None:
    """(key, item) of a structure of one level; None for what is none."""
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return list(zip(output._fields, output, strict=True))
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    if is_dataclass(output) and not isinstance(output, type):
        return [(field.name, getattr(output, field.name)) for field in fields(output)]
    return None


def _item(output, selector: int | str, layer: str):
    parts = _parts(output)
    if parts is not None:
        for index, (key, item) in enumerate(parts):
            if selector in (key, index, index - len(parts)):
                return item
    keys = type(output).__name__ if parts is None else [key for key, _ in parts]
    raise TypeError(f"{layer}: select={selector!r} is not in its output, which has {keys}")


def _main(output, layer: str):
    for key, item in _parts(output) or ():
        if key == "last_hidden_state" and isinstance(item, Tensor):
            return item
    if isinstance(output, tuple) and len(output) and _is_floating(output[0]):
        return output[0]
    found: list[tuple[str, Tensor]] = []
    _floating(output, "", found)
    if len(found) == 1:
        return found[0][1]
    if not found:
        return output[0] if isinstance(output, tuple) and len(output) else output
    shapes = ", ".join(f"{path} {tuple(x.shape)}" for path, x in found)
    raise TypeError(
        f"{layer}: its output has {len(found)} tensors, {shapes}; select= takes an index, a key, "
        "or a function of the output"
    )


def _is_floating(x) -> bool:
    return isinstance(x, Tensor) and x.dtype.is_floating_point


def _floating(value, path: str, found: list[tuple[str, Tensor]]) -> None:
    """Appends the floating-point tensors of a structure, with where they are."""
    if _is_floating(value):
        found.append((path, value))
    for key, item in _parts(value) or ():
        _floating(item, f"{path}[{key!r}]", found)


def _check(x: Tensor, layer: str) -> None:
    what, advice = None, "leave the layer out, or let select= return another tensor"
    if x.is_nested:
        what, advice = "a nested tensor", "let select= return to_padded_tensor(0.0) of it"
    elif x.layout is not torch.strided:
        what, advice = f"a sparse tensor ({x.layout})", "let select= return to_dense() of it"
    elif hasattr(x, "full_tensor"):
        what = f"a {type(x).__name__}, sharded over devices"
        advice = "let select= return full_tensor() of it"
    elif x.dtype.is_complex:
        what = f"a tensor of {x.dtype}"
        advice = "let select= return torch.view_as_real(x).flatten(-2), or the part that is meant"
    elif x.dtype not in checks.FLOATING:
        what = f"a tensor of {x.dtype}"
    elif 0 in x.shape:
        what = f"an empty tensor of shape {tuple(x.shape)}"
    if what is not None:
        raise TypeError(f"{layer}: its output is {what}, which has no spectrum; {advice}")
    if not torch.compiler.is_compiling() and context.is_batched(x):
        raise ValueError(
            f"{layer}: it runs under torch.vmap, one sample at a time, and the spectrum is that of "
            "a batch: call the model without vmap for it, or vmap it within disabled()"
        )


# ---- the matrix ----


def pool(x: Tensor, how: Pool, layout: Layout | None, mask: Tensor | None, layer: str) -> Tensor:
    """An output and its layout -> ``(samples, features)`` that nothing later can change.

    A mean comes in float32 (float64), whatever the dtype of x; its gradient is a broadcast view. A
    matrix that would share memory with the output is copied. ``layout`` is not needed where ``how``
    is a function.
    """
    if callable(how):
        return _by_function(x, how, layer)
    assert layout is not None
    y = x.movedim((layout.batch, layout.features), (0, -1))  # (N windows, *positions, D)
    if how in ("none", "tokens"):
        if how == "tokens" and x.dim() != 3:
            raise _no_tokens(how, x, layer)
        return y.clone(memory_format=torch.contiguous_format).flatten(0, -2)
    if how == "cls":
        if x.dim() != 3 or layout.windows > 1:
            raise _no_tokens(how, x, layer)
        return y[:, 0].clone()
    if how == "masked" and mask is None:
        raise ValueError(
            f'{layer}: pool="masked" found no mask of shape (N, T) for its output of shape '
            f"{tuple(x.shape)}: it looks for attention_mask and key_padding_mask among the keyword "
            "arguments of the model and of the layer"
        )
    if mask is not None:
        with _saving_its_own():
            return _apply(_MaskedMean, y, mask)
    if y.dim() > 2:
        y = _apply(_MeanOverPositions, y)
    elif layout.windows == 1:
        y = y.clone()
    if layout.windows > 1:  # equally many positions each: the mean of their means
        y = y.unflatten(0, (-1, layout.windows)).mean(1, dtype=_wide(y))
    return y


def _no_tokens(how: str, x: Tensor, layer: str) -> ValueError:
    return ValueError(
        f'{layer}: pool="{how}" needs tokens (N, T, D), got {tuple(x.shape)}; use "mean", "none" '
        "or a function"
    )


def _by_function(x: Tensor, how: Callable[[Tensor], Tensor], layer: str) -> Tensor:
    with _saving_its_own():
        pooled = how(x)
    if not isinstance(pooled, Tensor) or pooled.dim() != 2:
        got = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        raise ValueError(
            f"{layer}: pool= returned {got} for {tuple(x.shape)}, expected a 2-D tensor"
        )
    if torch.compiler.is_compiling() or context.share_memory(pooled, x):
        return pooled.clone()
    return pooled


def _saving_its_own() -> contextlib.AbstractContextManager:
    """What is saved for backward in it is kept from activation checkpointing.

    A checkpointed block runs again in the backward pass, where we measure nothing, and has to save
    what it saved the first time. Detached, since an operation may save its own output.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(
        lambda x: (x.detach(), context.version(x)), _unchanged
    )


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    x, version = saved
    if context.version(x) != version:
        raise RuntimeError(
            "SESRegularizer: a tensor that pool= saved for its gradient was changed in place "
            "afterwards; let pool= work on a copy, x.clone()"
        )
    return x


def head_matrices(x: Tensor, heads: int, layout: Layout, mask, layer: str) -> Tensor:
    """(N, T, heads * D) before the output projection -> (heads, N, D), the mean over tokens."""
    if x.shape[layout.features] % heads:
        raise ValueError(f"{layer}: {heads} heads do not divide the features of {tuple(x.shape)}")
    pooled = pool(x, "mean", layout, mask, layer)  # the mean does not mix features
    return pooled.unflatten(-1, (heads, -1)).movedim(1, 0)


def head_similarities(x: Tensor, heads: int, layout: Layout, mask, layer: str) -> Tensor:
    """(N, T, heads * D) before the output projection -> (N^2, heads).

    A column is G_a = X_a X_a^T over its norm, as a vector, of the centred outputs (N, D) of head a.
    Its mean is 0, and the Gram matrix of the columns is linear CKA (Kornblith et al., ICML 2019),
    which no rotation of what a head puts out can change.
    """
    with _saving_its_own(), torch.autocast(x.device.type, enabled=False):
        y = head_matrices(x, heads, layout, mask, layer)  # (heads, N, D)
        y = y - y.mean(1, keepdim=True)
        least = torch.finfo(y.dtype).tiny
        # Over the largest: the squares of small numbers would be 0.
        y = y / y.detach().abs().amax((1, 2), keepdim=True).clamp_min(least)
        g = (y @ y.mT).flatten(1)  # (heads, N^2)
        return (g / g.norm(dim=1, keepdim=True).clamp_min(least)).mT


def weight_matrix(x: Tensor, layout: Layout, layer: str) -> Tensor:
    """Attention weights (N, heads, Tq, Tk) or (N, Tq, Tk) -> (N, heads * Tk), mean of queries."""
    y = _apply(_MeanOverPositions, x if x.dim() == 3 else x.flatten(0, 1))  # (N heads, Tk)
    if x.dim() == 4:
        y = y.unflatten(0, (x.shape[0], -1)).flatten(1)
    if layout.windows > 1:
        y = y.unflatten(0, (-1, layout.windows)).mean(1)
    return y


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> int:
    """Some samples at a time: the CPU widens its whole argument first, a map in float32."""
    return max(1, _BLOCK // math.prod(x.shape[1:]))


def _apply(function: type[torch.autograd.Function], *args: Tensor) -> Tensor:
    """Without binding arguments to a signature, which takes longer than the mean."""
    if torch.compiler.is_compiling() or context.is_transformed(()):
        return function.apply(*args)
    return context.bare_apply(function)(*args)


class _MeanOverPositions(torch.autograd.Function):
    """(N, *positions, D) -> (N, D). Autograd's own backward would allocate a map in float32."""

    @staticmethod
    def forward(x):
        axes = tuple(range(1, x.dim() - 1))
        if x.device.type != "cpu" or x.dtype == _wide(x):
            return x.mean(axes, dtype=_wide(x))
        return torch.cat([block.mean(axes, dtype=_wide(x)) for block in x.split(_rows(x))])

    @staticmethod
    def setup_context(ctx, inputs, output):
        (x,) = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx, g):
        positions = ctx.shape[1:-1]
        # d mean / dx = 1 / positions, in float32 until it is x's turn
        g = (g / math.prod(positions)).to(ctx.dtype)
        return g.reshape(g.shape[0], *[1] * len(positions), g.shape[1]).expand(ctx.shape)


class _MaskedMean(torch.autograd.Function):
    """(N, T, D) and a mask (N, T) -> (N, D), the mean of the tokens that count; 0 for none."""

    @staticmethod
    @context.without_autocast
    def forward(x, mask):
        wide = _wide(x)
        weights = mask.to(wide) / mask.sum(1, keepdim=True).clamp_min(1)  # (N, T)
        rows = _rows(x) if x.device.type == "cpu" else len(x)
        blocks = zip(weights.split(rows), x.split(rows), strict=True)
        return torch.cat([torch.einsum("nt,ntd->nd", w, block.to(wide)) for w, block in blocks])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, mask = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx, g):
        (mask,) = ctx.saved_tensors
        # d mean / dx_t = mask_t / sum mask
        g = (g / mask.sum(1, keepdim=True).clamp_min(1)).to(ctx.dtype)
        return mask[:, :, None] * g[:, None, :], None
