"""Lookups in a table that is a Tucker tensor of higher order: contraction and lift.

A table of shape ``(v_1 ... v_p, c_1 ... c_q)`` is kept as a tensor of shape ``(v_1, ..., v_p, c_1,
..., c_q)``. An index is one of each mode of the rows, and its row is the core contracted with these
rows of the factors, then applied to the factors of the columns. A lookup is the adjoint of the
linear map with the same weight, on vectors with a single one (see `_adjoint_maps`): its gradients
are those of `_tensorised`, with what is looked up in place of projected output gradients.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import geotucker as gt

from ._contract import without_autocast
from ._lift import deliver
from ._tensor_plan import TensorSizes, cheapest_projections
from ._tensorised import Seen, applied, sizes_of, tensor_linear, weight_gradient

if TYPE_CHECKING:
    from ._tensor_embedding import TuckerTensorEmbedding

__all__ = ["lifting_lookup", "multi_index", "row_products", "tensor_lookup"]


def multi_index(x: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Split indices of rows into one of each mode, the last running fastest.

    An index out of range gives one that is out of range in the first mode.

    Examples
    --------
    >>> multi_index(torch.tensor([7, 24, -1]), (2, 3, 4))
    [tensor([ 0,  2, -1]), tensor([1, 0, 2]), tensor([3, 0, 3])]
    """
    found: list[Tensor] = []
    for size in reversed(shape[1:]):
        found.insert(0, x % size)
        x = x // size
    return [x, *found]


def row_products(indices: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Return the Kronecker products of rows of factors, the last running fastest.

    Parameters
    ----------
    indices : sequence of Tensor, shapes (...)
        Of at least one mode.
    factors : sequence of Tensor, shapes (v_i, r_i)

    Returns
    -------
    Tensor, shape (..., r_1 ... r_p)
    """
    product, *others = map(F.embedding, indices, factors)
    for rows in others:
        product = (product.unsqueeze(-1) * rows.unsqueeze(-2)).flatten(-2)
    return product


def tensor_lookup(
    x: Tensor,  # shape: (batch,)
    core: Tensor,  # shape: (r_1, ..., r_p, s_1, ..., s_q)
    row_factors: Sequence[Tensor],  # shapes: (v_1, r_1), ..., (v_p, r_p)
    column_factors: Sequence[Tensor],  # shapes: (c_1, s_1), ..., (c_q, s_q)
) -> Tensor:  # shape: (batch, c_1, ..., c_q)
    """Look up rows of ``core x_1 U_1 ... x_{p+q} U_{p+q}``.

    Parameters
    ----------
    x : Tensor
        Indices of rows.
    core, row_factors, column_factors
        Of the tensor; the factors need not be orthonormal.

    Returns
    -------
    Tensor, shape (batch, c_1, ..., c_q)

    Raises
    ------
    IndexError
        If an index is out of range.

    Examples
    --------
    >>> rows = [torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]])]
    >>> tensor_lookup(torch.arange(4), torch.ones(1, 1, 1), rows, [torch.ones(2, 1)])
    tensor([[1., 1.],
            [3., 3.],
            [2., 2.],
            [6., 6.]])
    """
    modes = len(row_factors)
    looked_up = row_products(multi_index(x, [len(u) for u in row_factors]), row_factors)
    turned = core.permute(*range(modes, core.dim()), *range(modes))
    sizes = sizes_of(len(x), core, row_factors, column_factors)._replace(looked_up=True)
    projected = cheapest_projections(sizes)[modes:]
    return tensor_linear(looked_up, turned, column_factors, (), projected)


# One pass


def lifting_lookup(layer: "TuckerTensorEmbedding", x: Tensor) -> Tensor:
    """Return the rows, reshaped; as `geotucker_torch._lift.lifting` otherwise.

    Parameters
    ----------
    layer : TuckerTensorEmbedding
        Its gradient with respect to the core goes straight to ``core.grad``.
    x : Tensor, shape (batch,)
    """
    output: Tensor = _Lifting.apply(x, layer.core, layer)  # type: ignore[no-untyped-call]
    return output


class _Lifting(torch.autograd.Function):
    """The contraction by hand, then the lift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, core: Tensor, layer: "TuckerTensorEmbedding") -> Tensor:
        # As in `_lift`: the point keeps the old values when the lift gives parameters new memory.
        point = layer.point if layer.narrow is None else layer.narrow
        ctx.layer, ctx.point = layer, point
        ctx.save_for_backward(x)
        layer.sizes = ctx.sizes = layer.sizes_for(len(x))
        layer.uses += 1
        rows, columns = point.factors[: layer.row_modes], point.factors[layer.row_modes :]
        return tensor_lookup(x, point.core, rows, columns).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        layer, point, (x,) = ctx.layer, ctx.point, ctx.saved_tensors
        with without_autocast(point.core):
            seen = _Seen(x, g, point, ctx.sizes)
            deliver(layer, point, lambda: seen.use(layer), seen.core_in)
        return None, None, None


class _Seen(Seen):
    """The gradient of the table, known by what is seen of it through bases.

    Parameters
    ----------
    x : Tensor, shape (batch,)
        Indices.
    g : Tensor, shape (batch, c_1, ..., c_q)
        Gradient of the rows.
    point : TuckerPoint
    sizes : TensorSizes
    """

    def __init__(self, x: Tensor, g: Tensor, point: gt.TuckerPoint, sizes: TensorSizes) -> None:
        super().__init__(g, x, point, sizes)
        self.indices = multi_index(x, sizes.out_shape)

    def _form(self, bases: Sequence[Tensor], modes: Iterable[int]) -> Tensor:
        rows = len(self.indices)
        looked_up = row_products(self.indices, bases[:rows])
        h = looked_up.unflatten(-1, [basis.shape[1] for basis in bases[:rows]])
        return weight_gradient(self.x, h, bases, [mode for mode in modes if mode >= rows])

    def _direction(self, mode: int, gauged: Tensor) -> Tensor:
        rows, factors = len(self.indices), self.point.factors
        if mode >= rows:
            return super()._direction(mode, gauged)
        # The gradient of what is looked up, from the columns through the core and the other rows.
        d = F.linear(self._seen_columns, gauged.flatten(rows).flatten(0, rows - 1))
        d = d.unflatten(1, gauged.shape[:rows])
        for other in reversed(range(rows)):
            if other != mode:
                looked_up = F.embedding(self.indices[other], factors[other])
                looked_up = looked_up.unflatten(0, (-1, *(1,) * (d.dim() - 2)))
                d = torch.linalg.vecdot(d.movedim(other + 1, -1), looked_up)
        return torch.zeros_like(factors[mode]).index_add_(0, self.indices[mode], d)

    @cached_property
    def _seen_columns(self) -> Tensor:
        """The gradient of the rows, seen through the bases of the columns."""
        rows = len(self.indices)
        seen = {i: u.t() for i, u in enumerate(self.point.factors[rows:])}
        return applied(self.x, seen).flatten(1)
