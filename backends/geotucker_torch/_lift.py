"""One pass: an armed layer extends its bases in its own backward (lift in backward).

Extending the bases leaves the weight unchanged, so the gradient of the core in the wider bases
is taken at the weight of the forward pass that has just been made: it is a contraction of that
pass's input and of the gradient of its output, and no second pass is needed. In backward an
armed layer

1. forms the gradients ``grad_{K_i} L = G_i Q_i`` of Theorem 2.1 (arXiv:2305.19059), mode by mode;
2. extends its bases by them and pads its core with zeros, in place (the weight does not change);
3. leaves the gradient of the wider core in ``core.grad``.

From then on everything is ordinary: further micro-batches run in the wide bases and their
gradients add up, gradients can be clipped and scaled, and the wrapped optimizer steps a core
that is just larger.

*No inverse.* ``grad_{U_i} L = (grad_{K_i} L) S_i^T`` is what autograd would give; it scales each
direction by a singular value, and small ones drown in rounding. Here the forward pass runs in the
gauge of the output mode, ``y = K_out (Ten(Q_out^T) o U_in^T x)``, and the backward pass in that of
the input mode, so that the gradients of these two factors *are* the ones with respect to K_out and
K_in, at the cost of the plain ones. Those of the small spatial modes (and of a channel mode whose
factor is folded into the kernel) are ``G_i Q_i``, from the kernel's gradient.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from geotucker import _ops
from geotucker._geometry import gauge

from ._contract import core_gradient, fold_channels, fold_spatial, without_autocast
from ._plan import Contraction, Sizes, cheapest

if TYPE_CHECKING:
    from ._layers import TuckerModule

__all__ = ["lifting"]


def lifting(layer: "TuckerModule", x: Tensor) -> Tensor:
    """Return the layer's output; its backward lifts the layer if that is still armed then.

    Parameters
    ----------
    layer : TuckerModule
        Its gradient with respect to the core goes straight to ``core.grad``.
    x : Tensor
        Input of the layer.
    """
    output: Tensor = _Lifting.apply(x, layer.core, layer.bias, layer)  # type: ignore[no-untyped-call]
    return output


class _Lifting(torch.autograd.Function):
    """The chain of `_maps` by hand: forward in one gauge, backward in the other, then the lift."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, core: Tensor, bias: Tensor | None, layer: "TuckerModule"
    ) -> Tensor:
        # `core` is an argument so that the output asks for gradients. It and the factors are
        # read as `.data`: these aliases keep the old values when the lift writes new ones.
        core, factors = core.data, [factor.data for factor in layer.factors]
        layer_map, kind = layer.map, x.device.type
        layer_map.check(x, factors[1].shape[0])
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.layer, ctx.x, ctx.core, ctx.factors, ctx.dtype = layer, x.detach(), core, factors, dtype
        with without_autocast(core):
            rows = layer_map.enter(_cast(ctx.x, dtype))
            sizes = layer_map.sizes(rows, core, factors[0], factors[1])
            ctx.sizes, ctx.order = sizes, cheapest(sizes)
            u_in = _cast(factors[1], dtype)
            a = layer_map.project_input(rows, u_in) if ctx.order.project_input else rows
            own_bias = None if bias is None else _cast(bias.detach(), dtype)
            if ctx.order.project_output:
                gauged, s = gauge(core, 0)
                kernel = _cast(_kernel(gauged, factors, ctx.order, sizes), dtype)
                b = layer_map.apply(a, kernel, None, split=True)
                y = layer_map.spread_output(b, _cast(factors[0] @ s, dtype), own_bias)
            else:
                b = None
                kernel = _cast(_kernel(core, factors, ctx.order, sizes), dtype)
                y = layer_map.apply(a, kernel, own_bias, split=False)
        ctx.rows, ctx.a, ctx.b = rows, a, b
        return layer_map.leave(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        layer, factors, order, dtype = ctx.layer, ctx.factors, ctx.order, ctx.dtype
        layer_map = layer.map
        with without_autocast(ctx.core):
            g = layer_map.enter_gradient(_cast(g, dtype), ctx.x)
            u_out = _cast(factors[0], dtype)
            h = layer_map.project_output(g, u_out) if order.project_output else g
            dx, grad_k_in = _input_gradients(ctx, h)
            lifts = layer.armed
            if lifts:
                directions = _directions(ctx, g, h, grad_k_in)
                lifts = _all_finite(directions)
            if lifts:
                layer.lift(directions)
            # Another use of the layer in this graph may have extended the bases before.
            bases = [_cast(factor.data, dtype) for factor in layer.factors]
            a = ctx.a if order.project_input else None
            known = (h if order.project_output else None, a) if lifts else (None, None)
            gradient = core_gradient(layer_map, ctx.rows, g, bases, known, ctx.core.shape[:2])
            gradient = gradient.to(layer.core.dtype)
            layer.core.grad = gradient if layer.core.grad is None else layer.core.grad + gradient
            bias = layer_map.bias_gradient(g) if ctx.needs_input_grad[2] else None
        if bias is not None:
            bias = bias.to(layer.bias.dtype)
        return None if dx is None else dx.to(ctx.x.dtype), None, bias, None


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _kernel(core: Tensor, factors: Sequence[Tensor], order: Contraction, sizes: Sizes) -> Tensor:
    kernel = fold_spatial(core, factors[2:])
    return fold_channels(kernel, factors[0], factors[1], order, sizes)


def _input_gradients(ctx: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradient of the input, and with respect to K_in if U_in is projected."""
    layer_map, order, dtype = ctx.layer.map, ctx.order, ctx.dtype
    split, wanted = order.project_output, ctx.needs_input_grad[0]
    core, s = gauge(ctx.core, 1) if order.project_input else (ctx.core, None)
    if s is None and not wanted:
        return None, None
    kernel = _cast(_kernel(core, ctx.factors, order, ctx.sizes), dtype)
    d = layer_map.input_gradient(h, kernel, ctx.a, split)
    if s is None:
        return layer_map.leave_gradient(d, ctx.x), None
    grad_k_in = layer_map.input_factor_gradient(ctx.rows, d)
    if not wanted:
        return None, grad_k_in
    dx = layer_map.spread_input(d, _cast(ctx.factors[1] @ s, dtype))
    return layer_map.leave_gradient(dx, ctx.x), grad_k_in


def _directions(ctx: Any, g: Tensor, h: Tensor, grad_k_in: Tensor | None) -> list[Tensor]:
    """Return the ``grad_{K_i} L`` of all modes; of modes whose basis is complete, nothing."""
    layer_map, order, core = ctx.layer.map, ctx.order, ctx.core
    found: list[Tensor | None] = [None] * core.dim()
    if order.project_output:
        found[0] = layer_map.output_factor_gradient(g, ctx.b)
    found[1] = grad_k_in
    for mode, factor in enumerate(ctx.factors):
        if factor.shape[0] == factor.shape[1]:
            found[mode] = factor[:, :0]
    if any(direction is None for direction in found):
        kernel = layer_map.kernel_gradient(ctx.a, h, split=order.project_output).to(core.dtype)
        # Projected axes are in their bases already.
        done = (order.project_output, order.project_input, *[False] * (core.dim() - 2))
        for mode in (mode for mode, direction in enumerate(found) if direction is None):
            others = kernel
            for axis, factor in enumerate(ctx.factors):
                if axis != mode and not done[axis]:
                    others = _ops.mode_product(others, factor, axis, transpose=True)
            gauged, _ = gauge(core, mode)
            found[mode] = _ops.unfold(others, mode) @ _ops.unfold(gauged, mode).T
    return [d.to(core.dtype) for d in found if d is not None]


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    """Tell whether every entry is finite, with one look at the device."""
    largest = [tensor.abs().max() for tensor in tensors if tensor.numel()]
    return not largest or bool(torch.isfinite(torch.stack(largest)).all())
