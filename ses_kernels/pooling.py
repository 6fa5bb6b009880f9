"""From a module's output to the matrix of samples x features whose spectrum is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Pool = str | Callable[[Tensor], Tensor]
Selector = int | str | Callable | None

_BLOCK = 2**16  # elements


def select(output, selector: Selector, layer: str) -> Tensor:
    """The one tensor of a layer's output: what ``selector`` names or returns, else the first."""
    if callable(selector):
        chosen = selector(output)
    elif selector is not None:
        chosen = output[selector]
    elif isinstance(output, Mapping):
        chosen = output.get("last_hidden_state", next(iter(output.values()), None))
    elif isinstance(output, Sequence):
        chosen = output[0] if len(output) else None
    else:
        chosen = output
    if not isinstance(chosen, Tensor):
        raise TypeError(
            f"{layer}: expected a tensor in its output, got {type(chosen).__name__} from "
            f"{type(output).__name__} with select={selector!r}; select= takes an index, a key, or "
            "a function of the output"
        )
    return chosen


def pool(x: Tensor, how: Pool, layer: str) -> Tensor:
    """``(N, D)``, ``(N, T, D)`` tokens or ``(N, C, *space)`` maps -> ``(samples, features)``.

    A mean comes in float32 (float64), whatever the dtype of x; its gradient is a broadcast view.
    """
    if callable(how):
        pooled = how(x)
        if not isinstance(pooled, Tensor) or pooled.dim() != 2:
            got = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise ValueError(
                f"{layer}: pool= returned {got} for {tuple(x.shape)}, expected a 2-D tensor"
            )
        return pooled
    if x.dim() < 2:
        raise ValueError(
            f"{layer}: expected 2 or more axes, (samples, features), got shape {tuple(x.shape)}"
        )
    if x.dim() == 2:
        return x
    if how in ("cls", "tokens") and x.dim() != 3:
        raise ValueError(
            f'{layer}: pool="{how}" needs tokens (N, T, D), got {tuple(x.shape)}; use '
            '"mean", "none" or a function'
        )
    if how == "cls":
        return x[:, 0]
    features_last = x if x.dim() == 3 else x.movedim(1, -1)
    if how in ("none", "tokens"):
        return features_last.flatten(0, -2)
    return _MeanOverPositions.apply(features_last)


class _MeanOverPositions(torch.autograd.Function):
    """(N, *positions, D) -> (N, D). Autograd's own backward would allocate a map in float32."""

    @staticmethod
    def forward(x):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        axes = tuple(range(1, x.dim() - 1))
        if x.device.type != "cpu" or x.dtype == wide:
            return x.mean(axes, dtype=wide)
        # The CPU widens its whole argument first: some samples at a time, not a map in float32.
        rows = max(1, _BLOCK // math.prod(x.shape[1:]))
        return torch.cat([block.mean(axes, dtype=wide) for block in x.split(rows)])

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
