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
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import once_differentiable

import geotucker as gt
from geotucker import _ops
from geotucker._geometry import augment_all, gauge, tangent_core

from ._contract import autocast_dtype, cast, core_gradient, fold, without_autocast
from ._lifted import Drift, Right, Use
from ._maps import LayerMap, core_turned, modes_turned
from ._plan import Contraction, Sizes, cheapest

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


@dataclass
class _Pass:
    """A pass forward, as far as the backward pass needs it.

    Activations are the graph's to keep and to drop (`save_for_backward`), and are here only while
    one of the two runs. Core and factors are not: the lift writes to them.

    Parameters
    ----------
    layer : TuckerModule
    map : LayerMap
    at, point : TuckerPoint
        The point, with the weight's first axis first, and with the output's mode first.
    dtype : torch.dtype, optional
        That of autocast.
    sizes : Sizes
    order : Contraction
    x : Tensor
        Input of the layer, of that dtype.
    rows : Tensor
        The same in the form that the map takes.
    a, b : Tensor, optional
        What the kernel has been applied to, if that is not `rows` and was kept; what came of it,
        if the output's factor came after it.
    gauges : dict
        By mode, what `_gauge` has found.
    """

    layer: "TuckerModule"
    map: LayerMap
    at: gt.TuckerPoint
    point: gt.TuckerPoint
    dtype: torch.dtype | None
    sizes: Sizes
    order: Contraction
    x: Tensor
    rows: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    gauges: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: "TuckerModule", layer_map: LayerMap, x: Tensor) -> "_Pass":
        """Begin a pass."""
        # The point shares memory with the parameters and keeps the old values when the lift gives
        # them new memory.
        at = layer.point if layer.narrow is None else layer.narrow
        turned = core_turned(layer_map, at.core), tuple(modes_turned(layer_map, at.factors))
        point, dtype = gt.TuckerPoint(*turned), autocast_dtype(x)
        layer_map.check(x, point.shape[1])
        x = cast(x.detach(), dtype)
        rows = layer_map.enter(x)
        sizes = layer_map.sizes(rows, point.core, *point.factors[:2])
        return cls(layer, layer_map, at, point, dtype, sizes, cheapest(sizes), x, rows)

    def without_activations(self) -> "_Pass":
        """Return what the graph need not keep."""
        nothing = self.x.new_empty(0)
        return replace(self, x=nothing, rows=nothing, a=None, b=None)

    def with_activations(self, x: Tensor, a: Tensor | None, b: Tensor | None) -> "_Pass":
        """Return the pass with what the graph has kept."""
        one = replace(self, x=x, rows=self.map.enter(x), a=a, b=b)
        one.a = _entered(one)
        return one


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
        # `core` is an argument so that the output asks for gradients.
        one = _Pass.of(layer, layer_map, x)
        with without_autocast(core):
            point, order, dtype = one.point, one.order, one.dtype
            one.a = a = _entered(one)
            own_bias = None if bias is None else cast(bias.detach(), dtype)
            if order.project_output:
                gauged, s = _gauge(one, 0)
                one.b = layer_map.apply(a, _kernel(one, gauged), None, order)
                y = layer_map.spread_output(one.b, cast(point.factors[0] @ s, dtype), own_bias)
            else:
                y = layer_map.apply(a, _kernel(one, point.core), own_bias, order)
        keeps = order.project_input and a.numel() <= max(_KEPT, x.numel() // 8)
        # What autocast has not cast is the input itself, of which the graph notes later changes.
        own = x if one.x.dtype == x.dtype else one.x
        ctx.save_for_backward(own, a if keeps else None, one.b)
        ctx.one, ctx.dtype = one.without_activations(), x.dtype
        layer.sizes = one.sizes
        layer.uses += 1
        # Detached: a view that a function returns could not be changed in place.
        return layer_map.leave(y, x).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        layer, point = ctx.one.layer, ctx.one.point
        with without_autocast(point.core):
            one = ctx.one.with_activations(*ctx.saved_tensors)
            layer_map, order, dtype = one.map, one.order, one.dtype
            g = layer_map.enter_gradient(cast(g, dtype), one.x)
            h = g
            if order.project_output:
                h = layer_map.project_output(g, cast(point.factors[0], dtype))
            dx, grad_k_in = _input_gradients(one, h, ctx.needs_input_grad[0])
            deliver(
                layer,
                one.at,
                lambda: _use(one, g, h, grad_k_in),
                lambda bases: core_gradient(
                    layer_map, one.rows, g, [cast(basis, dtype) for basis in bases]
                ),
            )
            bias = layer_map.bias_gradient(g) if ctx.needs_input_grad[2] else None
        if bias is not None:
            bias = bias.to(layer.bias.dtype)
        return None if dx is None else dx.to(ctx.dtype), None, bias, None, None


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
    waits = layer.uses != 1 or not layer.extension.galerkin or layer.peers is not None
    if extends and layer.pending is not None:
        _add_to_pending(layer, use())
    elif extends and waits:
        _wait(layer, use())
    elif extends:
        _lift_alone(layer, use())
    elif layer.narrow is not None and _same(point, layer.narrow):
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


def _lift_alone(layer: "TuckerModule", use: Use) -> None:
    """Form the whole gradient of a weight that is used once, and lift it at the end of the pass.

    The graph may hold more that leads to the core, such as a penalty: what comes from there has
    the narrow shape.
    """
    (wide,) = _extended([(layer, [use], use.directions)])
    layer.pending = wide, _whole(use, wide)

    def at_end() -> None:
        if layer.pending is not None:
            (wide, gradient), layer.pending = layer.pending, None
            with torch.no_grad():
                if wide is not None:
                    layer.lift(wide, use.right)
                    layer.lifted_norm = gradient.abs().amax()
                _accumulate(layer, gradient)

    Variable._execution_engine.queue_callback(at_end)


def _add_to_pending(layer: "TuckerModule", use: Use) -> None:
    """Add the gradient of a use that could not be known of: of an older graph, or recomputed."""
    wide, gradient = layer.pending
    layer.pending = wide, gradient + _whole(use, wide)


def _whole(use: Use, wide: gt.TuckerPoint | None) -> Tensor:
    """Return the whole gradient in wider bases, or in those that there are."""
    assert use.whole is not None
    return use.whole((use.point if wide is None else wide).factors)


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
    lifted = []
    for (layer, uses, _), wide in zip(armed, agree(_extended(armed)), strict=True):
        if wide is not None:
            layer.lift(wide, uses[0].right)
            lifted.append(layer)
    for (layer, uses), own in zip(used, directions, strict=True):
        gradient = _gradient(layer, uses, own)
        if layer in lifted:
            layer.lifted_norm = gradient.abs().amax()  # squares of a scaled loss's may overflow
        _accumulate(layer, gradient)


def _extended(
    used: Sequence[tuple["TuckerModule", Sequence[Use], Sequence[Tensor]]],
) -> list[gt.TuckerPoint | None]:
    """Return the points in bases extended by the directions; None where these are not finite."""
    points = [layer.point for layer, _, _ in used]
    moved = [
        _with_drift(directions, layer.extension.drift, uses[0].right, layer.loss_scale)
        for layer, uses, directions in used
    ]
    wides = augment_all(points, moved)
    for index, (_, _, directions) in enumerate(used):
        if wides[index] is None:  # the drift of a scaled loss may have overflown
            (wides[index],) = augment_all([points[index]], [directions])
    return wides


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


def _use(one: _Pass, g: Tensor, h: Tensor, grad_k_in: Tensor | None) -> Use:
    """Return what a use of the weight has for the gradients, in the order of the weight's axes."""
    galerkin, core = one.layer.extension.galerkin, one.point.core
    kernel = cache(lambda: _kernel_gradient(one, h))
    directions: list[Tensor] = []
    right: list[Tensor | None] = []
    if one.layer.armed or not galerkin:
        directions = modes_turned(one.map, _directions(one, g, grad_k_in, kernel))
    if one.layer.armed:
        right = [
            None if gauged is None else _ops.unfold(core_turned(one.map, gauged[0]), mode).T
            for mode, gauged in enumerate(modes_turned(one.map, _gauges(one)))
        ]
    if not galerkin:
        seen = core_turned(one.map, _seen(one, kernel()))
        return Use(one.at, directions, right, seen, None)
    known = h if one.order.project_output else None, one.a if one.order.project_input else None

    def whole(bases: Sequence[Tensor]) -> Tensor:
        bases = [cast(basis, one.dtype) for basis in bases]
        with without_autocast(core):
            gradient = core_gradient(one.map, one.rows, g, bases, known, core.shape)
        return gradient.to(core.dtype)

    return Use(one.at, directions, right, None, whole)


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


def _entered(one: _Pass) -> Tensor:
    """Return what the kernel is applied to."""
    if not one.order.project_input:
        return one.rows
    if one.a is not None:
        return one.a
    return one.map.project_input(one.rows, cast(one.point.factors[1], one.dtype))


def _gauge(one: _Pass, mode: int) -> tuple[Tensor, Tensor]:
    """Return core and S_i in the gauge of a mode of `point`.

    It is that of the weight's core, whatever comes first here: a decomposition is unique up to
    rotations only, and the gradients of several uses add up in one of them.
    """
    if mode not in one.gauges:
        own = modes_turned(one.map, range(one.point.order))[mode]
        core, s = gauge(one.at.core, own)
        one.gauges[mode] = core_turned(one.map, core), s
    return one.gauges[mode]


def _gauges(one: _Pass) -> list[tuple[Tensor, Tensor] | None]:
    """Return the gauges of the modes, None where the basis is complete."""
    complete = [factor.shape[0] == factor.shape[1] for factor in one.point.factors]
    return [None if full else _gauge(one, mode) for mode, full in enumerate(complete)]


def _kernel(one: _Pass, core: Tensor) -> Tensor:
    return cast(fold(core, one.point.factors, one.order, one.sizes), one.dtype)


def _input_gradients(one: _Pass, h: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradient of the input, if wanted, and of K_in, if U_in is projected."""
    layer_map, order = one.map, one.order
    core, s = _gauge(one, 1) if order.project_input else (one.point.core, None)
    if s is None and not wanted:
        return None, None
    d = layer_map.input_gradient(h, _kernel(one, core), _entered(one), order)
    if s is None:
        return layer_map.leave_gradient(d, one.x), None
    grad_k_in = layer_map.input_factor_gradient(one.rows, d)
    if not wanted:
        return None, grad_k_in
    dx = layer_map.spread_input(d, cast(one.point.factors[1] @ s, one.dtype))
    return layer_map.leave_gradient(dx, one.x), grad_k_in


def _directions(
    one: _Pass, g: Tensor, grad_k_in: Tensor | None, kernel: Callable[[], Tensor]
) -> list[Tensor]:
    """Return the ``grad_{K_i} L`` of all modes; of modes whose basis is complete, nothing."""
    core, found = one.point.core, []
    for mode, gauged in enumerate(_gauges(one)):
        if gauged is None:
            direction = one.point.factors[mode][:, :0]
        elif mode == 0 and one.b is not None:
            direction = one.map.output_factor_gradient(g, one.b)
        elif mode == 1 and grad_k_in is not None:
            direction = grad_k_in
        else:
            others = _seen(one, kernel(), mode)
            direction = _ops.unfold(others, mode) @ _ops.unfold(gauged[0], mode).T
        found.append(direction.to(core.dtype))
    return found


def _kernel_gradient(one: _Pass, h: Tensor) -> Tensor:
    gradient = one.map.kernel_gradient(_entered(one), h, one.order)
    return gradient.to(one.point.core.dtype)


def _seen(one: _Pass, kernel: Tensor, skip: int | None = None) -> Tensor:
    """See the kernel's gradient through the bases of its modes, but `skip`."""
    projected = [mode for mode, done in enumerate(one.order) if done]  # seen through them already
    skipped = projected if skip is None else [*projected, skip]
    seen: Tensor = _ops.multi_mode_product(kernel, one.point.factors, transpose=True, skip=skipped)
    return seen
