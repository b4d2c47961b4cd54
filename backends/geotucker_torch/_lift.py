"""One pass: an armed layer extends its bases in its own backward (lift in backward).

Extending the bases leaves the weight unchanged, so the gradient of the core in the wider bases
is taken at the weight of the forward pass that has just been made: it is a contraction of that
pass's input and of the gradient of its output, and no second pass is needed. In backward an
armed layer

1. forms the gradients of its factors,
2. extends its bases and pads its core with zeros, in place (the weight does not change),
3. leaves the gradient of the wider core in ``core.grad``.

From then on everything is ordinary: further micro-batches run in the wide bases and their
gradients add up, gradients can be clipped and scaled, and the wrapped optimizer steps a core
that is just larger.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

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


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Lifting(torch.autograd.Function):
    """Contract as ever in forward; in backward lift, and contract for the wider core."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, core: Tensor, bias: Tensor | None, layer: "TuckerModule"
    ) -> Tensor:
        # `core` is an argument so that the output asks for gradients. It and the factors are
        # read as `.data`: these aliases keep the old values when the lift writes new ones.
        ctx.layer = layer
        ctx.x = x.detach().requires_grad_(x.requires_grad)
        ctx.bias = None if bias is None else bias.detach().requires_grad_(bias.requires_grad)
        ctx.factors = [factor.data.requires_grad_() for factor in layer.factors]
        # Not through hooks on saved tensors: activation checkpointing would run the layer again
        # for them, after the lift, and find another graph. (What it saves is not saved here.)
        with torch.enable_grad(), saved_tensors_hooks(_same, _same):
            ctx.y = layer.contract(ctx.x, core.data, ctx.factors, ctx.bias)
        return ctx.y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        layer = ctx.layer
        factors = ctx.factors if layer.armed else []
        wanted = [t for t in (ctx.x, ctx.bias) if t is not None and t.requires_grad]
        gradients = torch.autograd.grad(ctx.y, [*wanted, *factors], g, retain_graph=True)
        by_input = dict(zip(map(id, wanted), gradients, strict=False))
        directions = gradients[len(wanted) :]
        if directions and all(bool(torch.isfinite(d).all()) for d in directions):
            layer.lift(directions)
        bases = [factor.data for factor in layer.factors]
        gradient = layer.core_gradient(ctx.x.detach(), g, bases).to(layer.core.dtype)
        layer.core.grad = gradient if layer.core.grad is None else layer.core.grad + gradient
        return by_input.get(id(ctx.x)), None, by_input.get(id(ctx.bias)), None
