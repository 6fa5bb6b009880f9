"""SpectralEntropyFunction: samples -> entropy by a solver, and its closed-form derivatives.

With K the n x n Gram matrix of the centred x on its smaller side and M = dH/dK:

    side "samples"  (B <= d):  K = Xc Xc^T,  dH/dx = 2 M Xc
    side "features" (B > d):   K = Xc^T Xc,  dH/dx = 2 Xc M

One text for every device: ops.py picks the kernels. The arithmetic runs on Xs = s Xc, s a power of
two that keeps squares in range; H does not depend on s, and M(K) = s^2 M(s^2 K).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ses_kernels import entropy, ops, packed, solvers, torch_rows
from ses_kernels.context import (
    bare_apply,
    break_compiled_transforms,
    is_transformed,
    without_autocast,
)
from ses_kernels.solvers import Options, by_layer, solve


def apply(options: Options, *xs: Tensor) -> tuple[Tensor, ...]:  # L x (b_l, B_l, d_l) -> L x (b_l,)
    break_compiled_transforms()
    compiling = torch.compiler.is_dynamo_compiling()
    if torch.jit.is_tracing() and options.group is None:
        return tuple(_traceable(xs, *options[:5]))
    if not compiling and is_transformed(xs):
        return TransformableFunction.apply(options, *xs)[: len(xs)]
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in xs)):
        return solve(options._replace(gradient=False), *xs)[: len(xs)]  # eigenvalues cost less
    if compiling:
        return SpectralEntropyFunction.apply(options, *xs)
    return _bare_apply(options, *xs)


def apply_packed(options: Options, shape: Sequence[int], *xs: Tensor) -> Tensor | None:
    """L x ([b_l,] B_l, d_l) -> all entropies in this shape; None where packed.py is not for x."""
    if options.group is not None or options.backend == "torch":
        return None
    if not packed.is_readable(xs) or is_transformed(xs):
        return None
    for x in xs:
        if solvers.solver_for(x, options) != "rational":
            return None
    if torch.is_grad_enabled():
        for x in xs:
            if x.requires_grad:
                return _bare_apply_packed(options, shape, *xs)
    return packed.solve(xs, shape, options.center, gradient=False)[0]


# For torch.jit.trace, one operation whether or not a gradient is wanted: its check traces again
# under no_grad. The tracer looks no further, and hands it to autograd where the trace is run.


def _traceable_row(xs, center, power, order, solver, backend):
    options = Options(center, power, order, solver, backend, None, gradient=False)
    return list(solve(options, *xs)[: len(xs)])


def _traceable_autograd(xs, center, power, order, solver, backend):
    return list(apply(Options(center, power, order, solver, backend, None), *xs))


def _traceable_fake(xs, center, power, order, solver, backend):
    return [x.new_empty(x.shape[0], dtype=ops.widened(x)) for x in xs]


_traceable = ops.register(
    "entropies",
    "(Tensor[] xs, bool center, float power, float order, str solver, str backend) -> Tensor[]",
    fake=_traceable_fake,
    default=_traceable_row,
    Autograd=_traceable_autograd,
)


def _save(ctx, options, *tensors):
    ctx.options = options
    ctx.set_materialize_grads(False)  # or there would be zeros for every output without a gradient
    ctx.save_for_backward(*tensors)


class SpectralEntropyFunction(torch.autograd.Function):
    """(options, x_1 .. x_L) -> H_1 .. H_L."""

    @staticmethod
    def forward(ctx, options, *xs):
        outs = solve(options, *xs)
        _save(ctx, options, *xs, *outs[len(xs) :])
        return outs[: len(xs)]

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors  # read once: checkpointing recomputes what it unpacks
        # Grad mode is on in backward where the gradient is to be differentiated again.
        gradient = SpectralEntropyBackward.apply if torch.is_grad_enabled() else _gradient
        return None, *(
            gradient(ctx.options, grads[i], *layer)
            if ctx.needs_input_grad[1 + i] and grads[i] is not None
            else None
            for i, layer in enumerate(by_layer(saved))
        )


_bare_apply = bare_apply(SpectralEntropyFunction)


class PackedFunction(torch.autograd.Function):
    """(options, shape, x_1 .. x_L) -> all entropies in this shape."""

    @staticmethod
    def forward(ctx, options, shape, *xs):
        h, saved = packed.solve(xs, shape, options.center, gradient=True)
        ctx.options = options
        ctx.save_for_backward(saved, *xs)
        return h

    @staticmethod
    def backward(ctx, grad):
        saved, *xs = ctx.saved_tensors
        options, needed = ctx.options, ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()  # the gradient is to be differentiated
        if not again and packed.is_readable(xs, saved, grad) and not is_transformed([grad]):
            return None, None, *packed.gradients(grad, xs, needed, saved, options.center)
        gradient = SpectralEntropyBackward.apply if again else _gradient
        layers = list(packed.factors(xs, saved, options.center))
        grads = grad.reshape(-1).split([len(scale) for *_, scale in layers])
        return (
            None,
            None,
            *(
                gradient(options, g, x.reshape(-1, *x.shape[-2:]), *layer).reshape(x.shape)
                if needs
                else None
                for needs, g, x, layer in zip(needed, grads, xs, layers, strict=True)
            ),
        )


_bare_apply_packed = bare_apply(PackedFunction)


class TransformableFunction(SpectralEntropyFunction):
    """The same for forward mode and torch.func, where all that is saved has to be an output.

    Not for the rest: Dynamo refuses a Function that defines jvp, and the outputs take 5 us.
    """

    @staticmethod
    def forward(options, *xs):  # type: ignore[override] # no context: setup_context has it
        return solve(options, *xs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        options, *xs = inputs
        saved = output[len(xs) :]
        ctx.mark_non_differentiable(*saved)
        _save(ctx, options, *xs, *saved)
        ctx.save_for_forward(*xs, *saved)

    @staticmethod
    def jvp(ctx, _, *tangents):
        outs = []
        layers = by_layer(ctx.saved_tensors)
        for (x, m, location, scale), tangent in zip(layers, tangents, strict=True):
            if tangent is None:
                tangent = torch.zeros_like(x)
            # dH = <dH/dx, dx>
            gradient = _gradient(ctx.options, torch.ones_like(scale), x, m, location, scale)
            outs.append((gradient.to(scale.dtype) * tangent).sum((-2, -1)).to(ops.widened(x)))
        return *outs, *[None] * (3 * len(layers))

    @staticmethod
    def vmap(info, in_dims, options, *xs):
        flat = _fold_batch(info.batch_size, in_dims[1:], xs)
        outs = TransformableFunction.apply(options, *flat)
        return tuple(o.unflatten(0, (info.batch_size, -1)) for o in outs), (0,) * len(outs)


class SpectralEntropyBackward(torch.autograd.Function):
    """(options, g, x, M, location, scale) -> g dH/dx; differentiable once more in g and x."""

    @staticmethod
    def forward(options, g, x, m, location, scale):  # (b,), (b, B, d), (b, n, n), (b, 2, d), (b,)
        return _gradient(options, g, x, m, location, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, v):
        if ctx.options.group is not None:
            raise RuntimeError(
                "spectral_entropy(group=...) is once differentiable: its second derivative would "
                "need the other ranks; use group=None for that of a rank's own batch"
            )
        g, x, m, location, scale = ctx.saved_tensors
        unit = _gradient(ctx.options, torch.ones_like(g), x, m, location, scale)
        # d<v, g dH/dx> = <v, dH/dx> dg + g <(d2H/dx2) v, dx>
        dg = (v.to(g.dtype) * unit.to(g.dtype)).sum((-2, -1))
        dx = g[:, None, None] * _hessian_product(ctx.options, v, x, m, location, scale)
        return None, dg, dx.to(x.dtype), None, None, None

    @staticmethod
    def jvp(ctx, _, dg, dx, *constants):
        g, x, m, location, scale = ctx.saved_tensors
        out = torch.zeros_like(x)
        if dg is not None:
            out = out + dg[:, None, None] * _gradient(
                ctx.options, torch.ones_like(g), x, m, location, scale
            )
        if dx is not None:
            out = out + g[:, None, None] * _hessian_product(ctx.options, dx, x, m, location, scale)
        return out.to(x.dtype)

    @staticmethod
    def vmap(info, in_dims, options, *tensors):
        flat = _fold_batch(info.batch_size, in_dims[1:], tensors)
        out = SpectralEntropyBackward.apply(options, *flat)
        return out.unflatten(0, (info.batch_size, -1)), 0


def _fold_batch(size, in_dims, tensors):
    """Make vmap's axis part of the leading one: (v, b, ...) -> (v b, ...)."""
    moved = (
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=True)
    )
    return [t.flatten(0, 1) for t in moved]


@without_autocast
def _gradient(options, g, x, m, location, scale) -> Tensor:  # -> (b, B, d) in x's dtype
    if g.dtype != scale.dtype:
        g = g.to(scale.dtype)
    side = solvers.side(x, options)
    return ops.gram_backward(m, x, location, scale, g, side, options.backend)


@without_autocast
def _hessian_product(options, v, x, m, location, scale) -> Tensor:  # v (b, B, d) -> (b, B, d)
    """(d2H/dx2) v, the derivative of dH/dx = 2 M(K) Xc along v: 2 DM[dK] Xc + 2 M dXc."""
    side = solvers.side(x, options)
    if solvers.needs_svd(x, options):
        w, q, noise = solvers.singular_spectrum(x, location, scale, side)
    else:
        w, q, noise = solvers.spectrum(solvers.gram(x, location, scale, options), options)
    assert q is not None  # options.gradient
    scale = scale.to(q.dtype)
    xs = torch_rows.standardize(x, location.to(q.dtype), scale)
    vs = v.to(q.dtype) * scale[:, None, None]
    if options.center:  # exactly: 1 is in the null space, where the divided differences are largest
        xs, vs = (y - y.mean(1, keepdim=True) for y in (xs, vs))
    if side == "features":
        xs, vs = xs.mT, vs.mT
    # dK = Vc Xc^T + Xc Vc^T
    dk = vs @ xs.mT
    dk = dk + dk.mT
    # DM[dK] = Q (Gamma o (Q^T dK Q) + diag(shared)) Q^T, the Daleckii-Krein formula
    e = q.mT @ dk @ q
    gamma, shared = entropy.second_derivative(
        w, e.diagonal(dim1=-2, dim2=-1), options.power, options.order, noise
    )
    dm = q @ (gamma * e + torch.diag_embed(shared)) @ q.mT
    out = 2 * scale[:, None, None] * (dm @ xs + m.to(q.dtype) @ vs)
    if side == "features":
        out = out.mT
    return out - out.mean(1, keepdim=True) if options.center else out
