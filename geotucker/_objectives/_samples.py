"""Linear functions of the tensor are observed: regression on tensor inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .. import _ops
from .._errors import ShapeError
from .._ops import Array
from .._tensor import TuckerPoint, check_finite, check_floating, check_like
from ._fit import Fit
from ._losses import SQUARED, EntryLoss

__all__ = ["Samples", "regression"]


@dataclass(frozen=True, eq=False)
class Samples:
    """The map ``W -> <X_k, W>`` for inputs X_k, over the leading modes of W.

    Parameters
    ----------
    inputs : array, shape (m, p_1, ..., p_a)
        One tensor for each sample, a at least 1.
    outputs : tuple of int
        Shape (q_1, ..., q_b) of an output; empty for a number. The tensor W then has the shape
        ``(p_1, ..., p_a, q_1, ..., q_b)``.

    Raises
    ------
    BackendError, NonFiniteError, ShapeError
        If the inputs are not real floating, not finite, or not of order 2 at least.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.ones((3, 4)), 1)
    >>> gt.Samples(np.ones((5, 3)), (4,)).predict(point).shape
    (5, 4)
    """

    inputs: Array = field(repr=False)
    outputs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the inputs."""
        check_floating(self.inputs, "inputs")
        if len(_ops.shape(self.inputs)) < 2:
            raise ShapeError(
                "inputs: expected shape (m, p_1, ..., p_a) with a at least 1, "
                f"got {_ops.shape(self.inputs)}"
            )
        check_finite(self.inputs, "inputs")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(p_1, ..., p_a, q_1, ..., q_b)`` of the tensor."""
        return (*_ops.shape(self.inputs)[1:], *self.outputs)

    @property
    def observed_shape(self) -> tuple[int, ...]:
        """``(m, q_1, ..., q_b)``."""
        return (_ops.shape(self.inputs)[0], *self.outputs)

    def predict(self, point: TuckerPoint) -> Array:
        """Return the outputs for all inputs, shape (m, q_1, ..., q_b)."""
        count = len(_ops.shape(self.inputs)) - 1
        seen = _behind(self.inputs, point.factors[:count], transpose=True)
        modes = range(count)
        core = _ops.tensordot(seen, point.core, ([i + 1 for i in modes], list(modes)))
        return _behind(core, point.factors[count:], transpose=False)

    def adjoint(self, weights: Array) -> "_Outer":
        """Return ``sum_k X_k (x) weights_k``, never formed."""
        return _Outer(self.inputs, weights)

    def select(self, numbers: "np.ndarray[Any, np.dtype[Any]]") -> "Samples":
        """Return the map to the outputs of some samples."""
        index = _ops.index_like(numbers, self.inputs)
        return Samples(_ops.take(self.inputs, index), self.outputs)


class _Outer(NamedTuple):
    """The tensor ``sum_k X_k (x) Y_k``."""

    inputs: Array  # shape: (m, p_1, ..., p_a)
    outputs: Array  # shape: (m, q_1, ..., q_b)

    def contract(self, factors: Sequence[Array], skip: int | None) -> Array:
        """Return ``Z x_{j != skip} factors[j]^T``."""
        count = len(_ops.shape(self.inputs)) - 1
        ahead = skip if skip is not None and skip < count else None
        behind = skip - count if skip is not None and skip >= count else None
        x = _behind(self.inputs, factors[:count], transpose=True, skip=ahead)
        y = _behind(self.outputs, factors[count:], transpose=True, skip=behind)
        return _ops.tensordot(x, y, ((0,), (0,)))


def _behind(
    tensor: Array, matrices: Sequence[Array], transpose: bool, skip: int | None = None
) -> Array:
    """Apply matrices to all modes behind the first."""
    for mode, matrix in enumerate(matrices):
        if mode != skip:
            tensor = _ops.mode_product(tensor, matrix, mode + 1, transpose)
    return tensor


def regression(inputs: Array, outputs: Array, loss: EntryLoss = SQUARED, ridge: float = 0.0) -> Fit:
    """Return the objective of Tucker regression, ``sum_k l(<X_k, W>, Y_k)``.

    Parameters
    ----------
    inputs : array, shape (m, p_1, ..., p_a)
        The X_k. They are contracted with the bases one mode at a time.
    outputs : array, shape (m,) or (m, q_1, ..., q_b)
        The Y_k: numbers, vectors or tensors. The tensor of coefficients W has the shape
        ``(p_1, ..., p_a, q_1, ..., q_b)``.
    loss : EntryLoss
        `Squared`; `Logistic` for zeros and ones, `Poisson` for counts.
    ridge : float
        Weight of ``||W||^2 / 2``.

    Returns
    -------
    Fit

    Raises
    ------
    BackendError, NonFiniteError, ShapeError, ValueError
        If inputs and outputs do not fit each other, and as for `Samples` and `Fit`.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> rng = np.random.default_rng(0)
    >>> truth = gt.to_dense(gt.testing.random_point((5, 6), (1, 1)))
    >>> inputs = rng.standard_normal((100, 5, 6))
    >>> objective = gt.regression(inputs, np.tensordot(inputs, truth, 2))
    >>> result = gt.minimize(objective, objective.start(1), integrator=gt.ConjugateGradient())
    >>> np.allclose(gt.to_dense(result.point), truth)
    True
    """
    check_floating(inputs, "inputs")
    check_like(outputs, inputs, "outputs")
    got = _ops.shape(outputs)
    if not got or got[0] != (_ops.shape(inputs) or (0,))[0]:
        raise ShapeError(
            f"outputs: expected one for each of {(_ops.shape(inputs) or (0,))[0]} inputs, "
            f"got shape {got}"
        )
    return Fit(Samples(inputs, got[1:]), outputs, loss, ridge)
