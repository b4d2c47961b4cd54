"""Any function of a Tucker tensor, by the automatic differentiation of the library at hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import _ops
from .._errors import BackendError
from .._geometry import Gradient
from .._ops import Array
from .._tensor import TuckerPoint, as_fitting, pad

__all__ = ["Autodiff"]


@dataclass(frozen=True)
class Autodiff:
    """An objective from a function that PyTorch or JAX can differentiate.

    Parameters
    ----------
    function : callable
        From a `TuckerPoint` to a scalar of the library. Its factors need not be orthonormal and
        its ranks vary, as the function is also called with other forms of a tensor. With `dense`,
        from the full array.
    dense : bool
        The function takes the full array: one backward pass gives the whole gradient, of the
        array's size. Otherwise nothing dense is formed, and each contraction of the gradient is
        a backward pass: d + 1 a step.

    Raises
    ------
    BackendError
        When called with arrays of a library without automatic differentiation, or if the
        function's value does not depend on its argument or is complex.

    Notes
    -----
    ``Z x_{j != i} V_j^T`` is the gradient at ``K = 0`` of ``L(W + Ten_i(I) x_i K x_{j != i} V_j)``
    with respect to K: so contractions with any bases are gradients with respect to one factor,
    without an inverse.

    Examples
    --------
    >>> import torch, geotucker as gt
    >>> target = torch.eye(4, 5, dtype=torch.float64)
    >>> objective = gt.Autodiff(lambda w: ((gt.to_dense(w) - target) ** 2).sum())
    >>> start = gt.hosvd(torch.ones(4, 5, dtype=torch.float64), 2)
    >>> loss, gradient = objective(start)
    >>> torch.allclose(gt.project(start, gradient).core,
    ...                gt.project(start, 2 * (gt.to_dense(start) - target)).core)
    True
    """

    function: Callable[[Any], Any]
    dense: bool = False

    def __call__(self, point: Any) -> tuple[float, Gradient]:
        """Return the loss at a point and the gradient there."""
        point = as_fitting(point)
        if self.dense:
            return _ops.value_and_gradient(
                _real(self.function), _ops.multi_mode_product(point.core, point.factors)
            )
        value = _real(self.function)(point)
        return float(value.detach() if hasattr(value, "detach") else value), _Backward(self, point)


class _Backward(NamedTuple):
    """The gradient at a point, contraction by contraction."""

    objective: Autodiff
    point: TuckerPoint

    def contract(self, factors: Sequence[Array], skip: int | None) -> Array:
        """Return ``Z x_{j != skip} factors[j]^T`` by one backward pass."""
        ranks = [_ops.shape(u)[1] for u in factors]
        if skip is None:
            return self._slope(_ops.zeros(ranks, like=factors[0]), factors)
        others = math.prod(ranks) // ranks[skip]
        extent = list(ranks)
        extent[skip] = others
        core = _ops.fold(_ops.eye(others, like=factors[0]), skip, extent)
        k = _ops.zeros((self.point.shape[skip], others), like=factors[0])
        extent[skip] = self.point.shape[skip]
        return _ops.fold(self._slope(k, factors, core, skip), skip, extent)

    def _slope(
        self,
        zero: Array,
        factors: Sequence[Array],
        core: Array | None = None,
        skip: int | None = None,
    ) -> Array:
        """Differentiate the objective of ``W + core x_j factors`` with respect to one part.

        The part is the core, or with `skip` the factor of that mode; it is zero.
        """

        def loss(part: Array) -> Array:
            added = part if core is None else core
            bases = [part if mode == skip else v for mode, v in enumerate(factors)]
            return _real(self.objective.function)(_beside(self.point, added, bases))

        return _ops.value_and_gradient(loss, zero)[1]


def _beside(point: TuckerPoint, core: Array, factors: Sequence[Array]) -> TuckerPoint:
    """Return the sum of two Tucker tensors, unchecked: it is differentiated."""
    ranks = [p + q for p, q in zip(point.ranks, _ops.shape(core), strict=True)]
    total = pad(point.core, ranks) + pad(core, ranks, front=True)
    pairs = zip(point.factors, factors, strict=True)
    return TuckerPoint(total, tuple(_ops.concatenate(pair, 1) for pair in pairs))


def _real(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the function, with a check that its value is a real scalar."""

    def checked(argument: Any) -> Any:
        value = function(argument)
        kind = _ops.dtype_name(value) if hasattr(value, "dtype") else type(value).__name__
        extent = tuple(getattr(value, "shape", ()))
        if "complex" in kind or extent:
            raise BackendError(
                f"function: expected a real scalar, got {kind} of shape {extent} "
                "(complex tensors are not supported)"
            )
        return value

    return checked
