"""Linear maps whose matrix is a Tucker tensor of higher order: contraction and lift.

A matrix of shape ``(o_1 ... o_p, i_1 ... i_q)`` is kept as a tensor of shape
``(o_1, ..., o_p, i_1, ..., i_q)``. Inputs are tensors then, too: each factor of an input mode is
either *projected*, that is applied to them, or *folded* into the kernel, and so is each factor of
an output mode (see `_plan`, where there is one of either). Which, is decided mode by mode from the
sizes at hand; the dense matrix is formed where folding all of them is cheapest.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import geotucker as gt
from geotucker import _ops
from geotucker._geometry import gauge

from ._contract import autocast_dtype, cast, without_autocast
from ._lift import deliver
from ._lifted import Use
from ._tensor_plan import Projected, TensorSizes, cheapest_projections, ordered

if TYPE_CHECKING:
    from ._tensor_linear import TuckerTensorLinear
    from ._tensor_module import TensorModule

__all__ = [
    "Seen",
    "applied",
    "kernel",
    "lifting_tensorised",
    "sizes_of",
    "tensor_linear",
    "weight_gradient",
]


def tensor_linear(
    x: Tensor,  # shape: (batch, i_1, ..., i_q)
    core: Tensor,  # shape: (r_1, ..., r_p, s_1, ..., s_q)
    out_factors: Sequence[Tensor],  # shapes: (o_1, r_1), ..., (o_p, r_p)
    in_factors: Sequence[Tensor],  # shapes: (i_1, s_1), ..., (i_q, s_q)
    projected: Projected | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # shape: (batch, o_1, ..., o_p)
    """Contract a batch of tensors with ``core x_1 U_1 ... x_{p+q} U_{p+q}``, over its last modes.

    Parameters
    ----------
    x : Tensor
        The batch.
    core, out_factors, in_factors
        Of the tensor; the factors need not be orthonormal.
    projected : tuple of bool, optional
        Forces which factors meet the activations; default: the cheapest.
    dtype : torch.dtype, optional
        What matrices are cast to once they are formed.

    Returns
    -------
    Tensor, shape (batch, o_1, ..., o_p)

    Examples
    --------
    >>> u, v = torch.ones(5, 1), [torch.ones(3, 1), torch.ones(4, 1)]
    >>> tensor_linear(torch.ones(2, 3, 4), torch.ones(1, 1, 1), [u], v)[0]
    tensor([12., 12., 12., 12., 12.])
    """
    projected = projected or cheapest_projections(sizes_of(len(x), core, out_factors, in_factors))
    outputs = len(out_factors)
    with without_autocast(core):
        folded = kernel(core, (*out_factors, *in_factors), projected)
    if dtype is not None:
        folded = folded.to(dtype)
        out_factors, in_factors = _cast(out_factors, dtype), _cast(in_factors, dtype)
    a = applied(x, {i: u.t() for i, u in enumerate(in_factors) if projected[outputs + i]})
    b = F.linear(a.flatten(1), folded.flatten(0, outputs - 1).flatten(1))
    b = b.unflatten(1, folded.shape[:outputs])
    return applied(b, {i: u for i, u in enumerate(out_factors) if projected[i]})


def kernel(core: Tensor, factors: Sequence[Tensor], projected: Projected) -> Tensor:
    """Return the core with the factors that are not projected folded in."""
    folded = {i: u for i, u in enumerate(factors) if not projected[i]}
    return applied(core[None], folded)[0]


def weight_gradient(
    x: Tensor,  # shape: (batch, i_1, ..., i_q)
    g: Tensor,  # shape: (batch, o_1, ..., o_p)
    factors: Sequence[Tensor],  # outputs first
    modes: Iterable[int],
) -> Tensor:
    """Return the gradient of the dense tensor, seen through the bases of some modes.

    Parameters
    ----------
    x, g : Tensor
        Input of the map and gradient of its output.
    factors : sequence of Tensor, shapes (n_i, r_i)
        Of the dtype of `g`.
    modes : iterable of int
        Those that are seen through their bases.

    Returns
    -------
    Tensor
        Of size r_i in these modes, n_i in the others.
    """
    outputs, modes = g.dim() - 1, set(modes)
    h = applied(g, {i: factors[i].t() for i in modes if i < outputs})
    a = applied(x, {i - outputs: factors[i].t() for i in modes if i >= outputs})
    return (h.flatten(1).t() @ a.flatten(1)).reshape(*h.shape[1:], *a.shape[1:])


def _cast(factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [factor.to(dtype) for factor in factors]


def sizes_of(
    batch: int, core: Tensor, out_factors: Sequence[Tensor], in_factors: Sequence[Tensor]
) -> TensorSizes:
    """Return everything that the price of a contraction depends on."""
    out_shape, in_shape = (tuple(len(u) for u in side) for side in (out_factors, in_factors))
    ranks = tuple(core.shape)
    return TensorSizes(out_shape, in_shape, ranks[: len(out_shape)], ranks[len(out_shape) :], batch)


def applied(t: Tensor, matrices: Mapping[int, Tensor]) -> Tensor:
    """Apply matrices to axes of a batch of tensors, numbered behind the batch, cheapest first."""
    axes = list(matrices)
    for i in ordered([(m.shape[1], m.shape[0]) for m in matrices.values()]):
        t = _apply(t, matrices[axes[i]], axes[i] + 1)
    return t


def _apply(t: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Apply a matrix of shape (m, n) to an axis of size n, which stays where it is."""
    if axis == t.dim() - 1:
        return F.linear(t, matrix)
    rest = t.shape[axis + 1 :]
    product = torch.matmul(matrix, t.flatten(axis + 1))  # batched over all axes before
    return product.unflatten(axis + 1, rest)


# One pass


def lifting_tensorised(layer: "TuckerTensorLinear", x: Tensor) -> Tensor:
    """Return the layer's output without bias; as `geotucker_torch._lift.lifting` otherwise.

    Parameters
    ----------
    layer : TuckerTensorLinear
        Its gradient with respect to the core goes straight to ``core.grad``.
    x : Tensor, shape (batch, i_1, ..., i_q)
    """
    output: Tensor = _Lifting.apply(x, layer.core, layer)  # type: ignore[no-untyped-call]
    return output


class _Lifting(torch.autograd.Function):
    """The contraction by hand, then the lift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, core: Tensor, layer: "TuckerTensorLinear") -> Tensor:
        # As in `_lift`: the point keeps the old values when the lift gives parameters new memory.
        point = layer.point if layer.narrow is None else layer.narrow
        own = cast(x, autocast_dtype(x))
        ctx.layer, ctx.point, ctx.x_dtype, ctx.dtype = layer, point, x.dtype, own.dtype
        ctx.save_for_backward(own)
        # The core is folded in its own precision.
        out_factors, in_factors = _split(point.factors, layer)
        layer.sizes = ctx.sizes = layer.sizes_for(len(x))
        layer.uses += 1
        return tensor_linear(x.detach(), point.core, out_factors, in_factors).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        layer, point, (x,) = ctx.layer, ctx.point, ctx.saved_tensors
        g = g.to(ctx.dtype)
        dx = None
        with without_autocast(point.core):
            if ctx.needs_input_grad[0]:
                dx = _adjoint(ctx, g).to(ctx.x_dtype)
            seen = Seen(x, g, point, ctx.sizes)
            deliver(layer, point, lambda: seen.use(layer), seen.core_in)
        return dx, None, None


def _adjoint(ctx: Any, g: Tensor) -> Tensor:
    """Return the gradient of the input."""
    core, (out_factors, in_factors) = ctx.point.core, _split(ctx.point.factors, ctx.layer)
    outputs = len(out_factors)
    turned = core.permute(*range(outputs, core.dim()), *range(outputs))
    return tensor_linear(g, turned, in_factors, out_factors, dtype=g.dtype)


def _split(
    factors: Sequence[Tensor], layer: "TuckerTensorLinear"
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return factors[: layer.row_modes], factors[layer.row_modes :]


class Seen:
    """The gradient of the dense tensor, known by what is seen of it through bases.

    Parameters
    ----------
    x, g : Tensor
        As for `weight_gradient`.
    point : TuckerPoint
    sizes : TensorSizes
        They tell where it pays to see it so while it is formed; through the others afterwards.
    """

    def __init__(self, x: Tensor, g: Tensor, point: gt.TuckerPoint, sizes: TensorSizes) -> None:
        self.x, self.g, self.point, self.sizes = x, g, point, sizes
        self.projected = _meeting(sizes)
        self._seen: Tensor | None = None
        self._gauges: list[tuple[Tensor, Tensor] | None] | None = None

    def use(self, layer: "TensorModule") -> Use:
        """Return what this use of the layer's weight has for the gradients."""
        galerkin = layer.extension.galerkin
        directions = self.directions() if layer.armed or not galerkin else []
        right = self.right() if layer.armed else []
        if galerkin:
            return Use(self.point, directions, right, None, self.core_in)
        return Use(self.point, directions, right, self.core(), None)

    def core(self) -> Tensor:
        """Return ``grad_C L``, the gradient seen through all bases."""
        return self._through(self._formed(), self.point.factors, self.projected)

    def directions(self) -> list[Tensor]:
        """Return the ``grad_{K_i} L = G_i Q_i``; of complete modes, nothing."""
        return [
            self.point.factors[mode][:, :0] if gauged is None else self._direction(mode, gauged[0])
            for mode, gauged in enumerate(self._all_gauges())
        ]

    def right(self) -> list[Tensor | None]:
        """Return the Q_i of ``Mat_i(C)^T = Q_i S_i^T`` of the incomplete modes."""
        gauges = enumerate(self._all_gauges())
        return [gauged and _ops.unfold(gauged[0], mode).T for mode, gauged in gauges]

    def core_in(self, bases: Sequence[Tensor]) -> Tensor:
        """Return the gradient of the core in any bases."""
        outputs, ranks = len(self.sizes.out_shape), tuple(basis.shape[1] for basis in bases)
        modes = _meeting(self.sizes._replace(out_ranks=ranks[:outputs], in_ranks=ranks[outputs:]))
        return self._through(self._form(bases, modes), bases, modes)

    def _direction(self, mode: int, gauged: Tensor) -> Tensor:
        """Return ``G_i Q_i``, where the core in the gauge of the mode has ``Q_i^T`` unfolded."""
        if mode in self.projected:
            modes = self.projected - {mode}
            formed = self._form(self.point.factors, modes)
        else:
            modes, formed = self.projected, self._formed()
        others = self._through(formed, self.point.factors, {*modes, mode})
        direction: Tensor = _ops.unfold(others, mode) @ _ops.unfold(gauged, mode).T
        return direction

    def _formed(self) -> Tensor:
        if self._seen is None:
            self._seen = self._form(self.point.factors, self.projected)
        return self._seen

    def _form(self, bases: Sequence[Tensor], modes: Iterable[int]) -> Tensor:
        gradient = weight_gradient(self.x, self.g, _cast(bases, self.g.dtype), modes)
        return gradient.to(self.point.core.dtype)

    def _through(self, formed: Tensor, bases: Sequence[Tensor], done: Iterable[int]) -> Tensor:
        """See it through the bases of all modes that are not done."""
        seen: Tensor = _ops.multi_mode_product(formed, bases, transpose=True, skip=set(done))
        return seen

    def _all_gauges(self) -> list[tuple[Tensor, Tensor] | None]:
        if self._gauges is None:
            complete = [factor.shape[0] == factor.shape[1] for factor in self.point.factors]
            self._gauges = [
                None if full else gauge(self.point.core, mode) for mode, full in enumerate(complete)
            ]
        return self._gauges


def _meeting(sizes: TensorSizes) -> set[int]:
    return {mode for mode, meets in enumerate(cheapest_projections(sizes)) if meets}
