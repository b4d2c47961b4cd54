"""One pass: an armed layer extends its bases in its own backward (lift in backward).

Extending the bases leaves the weight unchanged, so the gradient of the core in the wider bases
is taken at the weight of the forward pass that has just been made: it is a contraction of that
pass's input and of the gradient of its output, and no second pass is needed. In backward an
armed layer

1. forms the gradients ``grad_{K_i} L = G_i Q_i`` of Theorem 2.1 (arXiv:2305.19059), mode by mode;
2. extends its bases by them and pads its core with zeros, in place (the weight does not change);
3. leaves the gradient of the wider core in ``core.grad``: all of it (the Galerkin step of TDLRT),
   or its projection on the tangent space, which needs nothing beyond ``grad_C L`` and step 1.

A weight may be used several times in one graph, by one layer or by layers that are tied, and layers
of like shapes share the linear algebra; so steps 2 and 3 wait for the end of the backward pass, and
happen there for all at once. (Where several processes train the model, the gradients of all of
them are averaged first: see `_peers`.) Only the whole gradient is formed at once where it can be,
since it needs the pass's input.

From then on everything is ordinary: gradients can be clipped and scaled, further micro-batches add
theirs in the same bases, and the wrapped optimizer steps a core that is just larger. Until the
step the weight is that of the narrow point, so that is what further passes contract.

*No inverse.* ``grad_{U_i} L = (grad_{K_i} L) S_i^T`` is what autograd would give; it scales each
direction by a singular value, and small ones drown in rounding. Here the forward pass runs in the
gauge of the output mode, ``y = K_out (Ten(Q_out^T) o U_in^T x)``, and the backward pass in that of
the input mode, so that the gradients of these two factors *are* the ones with respect to K_out and
K_in, at the cost of the plain ones. Those of the small spatial modes (and of a channel mode whose
factor is folded into the kernel) are ``G_i Q_i``, from the kernel's gradient.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import once_differentiable

import geotucker as gt
from geotucker import _ops
from geotucker._geometry import augment_all, gauge, tangent_core

from ._contract import core_gradient, fold, without_autocast
from ._lifted import Drift, Right, Use
from ._maps import LayerMap, core_turned, modes_turned
from ._plan import cheapest

if TYPE_CHECKING:
    from ._layers import TuckerModule

__all__ = ["deliver", "finish", "lifting"]

_Points: TypeAlias = Sequence[gt.TuckerPoint | None]
_Agree: TypeAlias = Callable[[_Points], _Points]

# Projected inputs of more entries than this, and than an eighth of the input's, are computed again
# in backward (a twelfth of a convolution's step) rather than kept: with them a network would need
# more memory than the dense one.
_KEPT = 2**20


def lifting(layer: "TuckerModule", layer_map: LayerMap, x: Tensor) -> Tensor:
    """Return the layer's output; its backward lifts the layer if that is still armed then.

    Parameters
    ----------
    layer : TuckerModule
        Its gradient with respect to the core goes straight to ``core.grad``.
    layer_map : LayerMap
        The layer's map, for this input.
    x : Tensor
        Input of the layer.
    """
    output: Tensor = _Lifting.apply(x, layer.core, layer.bias, layer, layer_map)  # type: ignore[no-untyped-call]
    return output


class _Lifting(torch.autograd.Function):
    """The chain of `_maps` by hand: forward in one gauge, backward in the other, then the lift."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        core: Tensor,
        bias: Tensor | None,
        layer: "TuckerModule",
        layer_map: LayerMap,
    ) -> Tensor:
        # `core` is an argument so that the output asks for gradients. The point shares memory with
        # the parameters and keeps the old values when the lift gives them new memory.
        at = layer.point if layer.narrow is None else layer.narrow
        turned = core_turned(layer_map, at.core), tuple(modes_turned(layer_map, at.factors))
        # `point` has the output's mode first, `at` the weight's first axis.
        ctx.at, ctx.point, ctx.map = at, gt.TuckerPoint(*turned), layer_map
        point, kind = ctx.point, x.device.type
        layer_map.check(x, point.shape[1])
        ctx.layer, ctx.x, ctx.gauges = layer, x.detach(), {}
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with without_autocast(point.core):
            rows = layer_map.enter(_cast(ctx.x, ctx.dtype))
            u_out, u_in = point.factors[:2]
            ctx.sizes = layer_map.sizes(rows, point.core, u_out, u_in)
            ctx.order = order = cheapest(ctx.sizes)
            ctx.rows = rows
            a = _entered(ctx)
            own_bias = None if bias is None else _cast(bias.detach(), ctx.dtype)
            b = None
            if order.project_output:
                gauged, s = _gauge(ctx, 0)
                b = layer_map.apply(a, _kernel(ctx, gauged), None, order)
                y = layer_map.spread_output(b, _cast(u_out @ s, ctx.dtype), own_bias)
            else:
                y = layer_map.apply(a, _kernel(ctx, point.core), own_bias, order)
        ctx.a, ctx.b = (a if a.numel() <= max(_KEPT, x.numel() // 8) else None), b
        layer.sizes = ctx.sizes
        layer.uses += 1
        return layer_map.leave(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        layer, layer_map, order, dtype = ctx.layer, ctx.map, ctx.order, ctx.dtype
        with without_autocast(ctx.point.core):
            if ctx.a is None:
                ctx.a = _entered(ctx)
            g = layer_map.enter_gradient(_cast(g, dtype), ctx.x)
            h = g
            if order.project_output:
                h = layer_map.project_output(g, _cast(ctx.point.factors[0], dtype))
            dx, grad_k_in = _input_gradients(ctx, h)
            deliver(
                layer,
                ctx.at,
                lambda: _use(ctx, g, h, grad_k_in),
                lambda bases: core_gradient(
                    layer_map, ctx.rows, g, [_cast(basis, dtype) for basis in bases]
                ),
            )
            bias = layer_map.bias_gradient(g) if ctx.needs_input_grad[2] else None
        if bias is not None:
            bias = bias.to(layer.bias.dtype)
        return None if dx is None else dx.to(ctx.x.dtype), None, bias, None, None


def deliver(
    layer: "TuckerModule",
    point: gt.TuckerPoint,
    use: Callable[[], Use],
    elsewhere: Callable[[Sequence[Tensor]], Tensor],
) -> None:
    """Bring what a backward pass knows to the core's gradient, and extend the bases if armed.

    Parameters
    ----------
    layer : TuckerModule
        What has been used.
    point : TuckerPoint
        That of the forward pass; it shares its memory with the parameters of that moment.
    use : callable
        Gives the use, if the bases are those of the point, an extension of them, or to be extended.
    elsewhere : callable
        Else: from the layer's bases to the gradient of the core in them.
    """
    extends = layer.armed and _same(point, layer.point)
    if layer.peers is not None:
        layer.peers.expect()
    # The whole gradient keeps input and output in memory, so that it only waits where it must.
    waits = layer.uses > 1 or not layer.extension.galerkin or layer.peers is not None
    if extends and waits:
        _wait(layer, use())
    elif extends or (layer.narrow is not None and _same(point, layer.narrow)):
        finish([(layer, [use()])])
    else:  # not to be lifted, or lifted by a pass at another point
        _accumulate(layer, elsewhere([factor.detach() for factor in layer.factors]))


def _wait(layer: "TuckerModule", use: Use) -> None:
    """Keep a use until the end of this backward pass, where others may have been added to it.

    All layers of an optimizer then extend their bases together.
    """
    waiting, backward = layer.waiting, torch._C._current_graph_task_id()
    if backward not in waiting:

        def at_end() -> None:
            uses = waiting.pop(backward, {}).values()
            with torch.no_grad(), without_autocast(use.point.core):
                finish([(one[0][0], [part for _, part in one]) for one in uses])

        waiting[backward] = {}
        if layer.peers is None:  # else they finish it
            Variable._execution_engine.queue_callback(at_end)
    waiting[backward].setdefault(id(layer.core), []).append((layer, use))


def finish(
    used: Sequence[tuple["TuckerModule", Sequence[Use]]], agree: _Agree = lambda points: points
) -> None:
    """Extend the bases of the layers that are armed, and give all cores the gradients.

    Parameters
    ----------
    used : sequence of pairs
        A layer of each Tucker tensor that has been used, and its uses: at least one, all at one
        point.
    agree : callable, optional
        From the points in wider bases, None where one is not finite, to those that count.
    """
    directions = [
        [_sum(parts) for parts in zip(*(use.directions for use in uses), strict=True)]
        for _, uses in used
    ]
    armed = [(*one, own) for one, own in zip(used, directions, strict=True) if one[0].armed]
    lifted = _lift(armed, agree)
    for (layer, uses), own in zip(used, directions, strict=True):
        gradient = _gradient(layer, uses, own)
        if layer in lifted:
            layer.lifted_norm = gradient.abs().amax()  # squares of a scaled loss's may overflow
        _accumulate(layer, gradient)


def _lift(
    used: Sequence[tuple["TuckerModule", Sequence[Use], Sequence[Tensor]]], agree: _Agree
) -> "list[TuckerModule]":
    """Extend the bases by the directions; of layers where these are not finite, nothing happens."""
    points = [layer.point for layer, _, _ in used]
    moved = [
        _with_drift(directions, layer.extension.drift, uses[0].right, layer.loss_scale)
        for layer, uses, directions in used
    ]
    wides = augment_all(points, moved)
    for index, (_, _, directions) in enumerate(used):
        if wides[index] is None:  # the drift of a scaled loss may have overflown
            (wides[index],) = augment_all([points[index]], [directions])
    lifted = []
    for (layer, uses, _), wide in zip(used, agree(wides), strict=True):
        if wide is not None:
            layer.lift(wide, uses[0].right)
            lifted.append(layer)
    return lifted


def _gradient(layer: "TuckerModule", uses: Sequence[Use], directions: Sequence[Tensor]) -> Tensor:
    """Return the gradient of the core in the bases that the layer has now."""
    point, wide = uses[0].point, layer.point
    if layer.extension.galerkin:
        return _sum([use.whole(wide.factors) for use in uses if use.whole is not None])
    gradient = _sum([use.tangent for use in uses if use.tangent is not None])
    if layer.narrow is None or not _same(point, layer.narrow):
        return gradient
    return tangent_core(point, wide, gt.TuckerTangent(gradient, tuple(directions)), layer.right)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    first, *others = tensors
    return sum(others, first)


def _accumulate(layer: "TuckerModule", gradient: Tensor) -> None:
    gradient = gradient.to(layer.core.dtype)
    layer.core.grad = gradient if layer.core.grad is None else layer.core.grad + gradient


def _use(ctx: Any, g: Tensor, h: Tensor, grad_k_in: Tensor | None) -> Use:
    """Return what a use of the weight has for the gradients, in the order of the weight's axes."""
    galerkin, core = ctx.layer.extension.galerkin, ctx.point.core
    kernel = cache(lambda: _kernel_gradient(ctx, h))
    directions: list[Tensor] = []
    right: list[Tensor | None] = []
    if ctx.layer.armed or not galerkin:
        directions = modes_turned(ctx.map, _directions(ctx, g, grad_k_in, kernel))
    if ctx.layer.armed:
        right = [
            None if gauged is None else _ops.unfold(core_turned(ctx.map, gauged[0]), mode).T
            for mode, gauged in enumerate(modes_turned(ctx.map, _gauges(ctx)))
        ]
    if not galerkin:
        seen = core_turned(ctx.map, _seen(ctx, kernel()))
        return Use(ctx.at, directions, right, seen, None)
    known = h if ctx.order.project_output else None, ctx.a if ctx.order.project_input else None

    def whole(bases: Sequence[Tensor]) -> Tensor:
        bases = [_cast(basis, ctx.dtype) for basis in bases]
        with without_autocast(core):
            gradient = core_gradient(ctx.map, ctx.rows, g, bases, known, core.shape)
        return gradient.to(core.dtype)

    return Use(ctx.at, directions, right, None, whole)


def _with_drift(
    gradients: Sequence[Tensor], drift: Drift | None, right: Right, scale: Tensor | float
) -> list[Tensor]:
    """Add what the moments contribute; gradients may be those of a scaled loss."""
    if drift is None or not drift.fits(right):
        return list(gradients)
    pairs = zip(gradients, drift.at(right), strict=True)
    return [d + scale * v if d.shape == v.shape else d for d, v in pairs]


def _same(a: gt.TuckerPoint, b: gt.TuckerPoint) -> bool:
    """Tell whether two points share their memory."""
    return a.core.data_ptr() == b.core.data_ptr() and a.ranks == b.ranks


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _entered(ctx: Any) -> Tensor:
    """Return what the kernel is applied to."""
    if not ctx.order.project_input:
        rows: Tensor = ctx.rows
        return rows
    a: Tensor = ctx.map.project_input(ctx.rows, _cast(ctx.point.factors[1], ctx.dtype))
    return a


def _gauge(ctx: Any, mode: int) -> tuple[Tensor, Tensor]:
    """Return core and S_i in the gauge of a mode of `point`.

    It is that of the weight's core, whatever comes first here: a decomposition is unique up to
    rotations only, and the gradients of several uses add up in one of them.
    """
    if mode not in ctx.gauges:
        own = modes_turned(ctx.map, range(ctx.point.order))[mode]
        core, s = gauge(ctx.at.core, own)
        ctx.gauges[mode] = core_turned(ctx.map, core), s
    gauged: tuple[Tensor, Tensor] = ctx.gauges[mode]
    return gauged


def _gauges(ctx: Any) -> list[tuple[Tensor, Tensor] | None]:
    """Return the gauges of the modes, None where the basis is complete."""
    complete = [factor.shape[0] == factor.shape[1] for factor in ctx.point.factors]
    return [None if full else _gauge(ctx, mode) for mode, full in enumerate(complete)]


def _kernel(ctx: Any, core: Tensor) -> Tensor:
    return _cast(fold(core, ctx.point.factors, ctx.order, ctx.sizes), ctx.dtype)


def _input_gradients(ctx: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradient of the input, and with respect to K_in if U_in is projected."""
    layer_map, order, wanted = ctx.map, ctx.order, ctx.needs_input_grad[0]
    core, s = _gauge(ctx, 1) if order.project_input else (ctx.point.core, None)
    if s is None and not wanted:
        return None, None
    d = layer_map.input_gradient(h, _kernel(ctx, core), ctx.a, order)
    if s is None:
        return layer_map.leave_gradient(d, ctx.x), None
    grad_k_in = layer_map.input_factor_gradient(ctx.rows, d)
    if not wanted:
        return None, grad_k_in
    dx = layer_map.spread_input(d, _cast(ctx.point.factors[1] @ s, ctx.dtype))
    return layer_map.leave_gradient(dx, ctx.x), grad_k_in


def _directions(
    ctx: Any, g: Tensor, grad_k_in: Tensor | None, kernel: Callable[[], Tensor]
) -> list[Tensor]:
    """Return the ``grad_{K_i} L`` of all modes; of modes whose basis is complete, nothing."""
    order, core = ctx.order, ctx.point.core
    found = []
    for mode, gauged in enumerate(_gauges(ctx)):
        if gauged is None:
            direction = ctx.point.factors[mode][:, :0]
        elif mode == 0 and order.project_output:
            direction = ctx.map.output_factor_gradient(g, ctx.b)
        elif mode == 1 and grad_k_in is not None:
            direction = grad_k_in
        else:
            others = _seen(ctx, kernel(), mode)
            direction = _ops.unfold(others, mode) @ _ops.unfold(gauged[0], mode).T
        found.append(direction.to(core.dtype))
    return found


def _kernel_gradient(ctx: Any, h: Tensor) -> Tensor:
    gradient: Tensor = ctx.map.kernel_gradient(ctx.a, h, ctx.order)
    return gradient.to(ctx.point.core.dtype)


def _seen(ctx: Any, kernel: Tensor, skip: int | None = None) -> Tensor:
    """See the kernel's gradient through the bases of its modes, but `skip`."""
    projected = [mode for mode, done in enumerate(ctx.order) if done]  # seen through them already
    skipped = projected if skip is None else [*projected, skip]
    seen: Tensor = _ops.multi_mode_product(kernel, ctx.point.factors, transpose=True, skip=skipped)
    return seen
