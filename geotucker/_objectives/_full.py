"""Every entry is observed."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _ops
from .._errors import ShapeError
from .._ops import Array
from .._tensor import TuckerPoint, check_floating
from ._fit import Fit
from ._losses import SQUARED, EntryLoss

__all__ = ["Full", "least_squares"]


@dataclass(frozen=True)
class Full:
    """The identity: all entries of a tensor are observed, as a dense array.

    Parameters
    ----------
    shape : tuple of int
        Shape (n_1, ..., n_d) of the tensor.
    """

    shape: tuple[int, ...]

    @property
    def observed_shape(self) -> tuple[int, ...]:
        """The tensor's own shape."""
        return self.shape

    def predict(self, point: TuckerPoint) -> Array:
        """Return the full tensor."""
        return _ops.multi_mode_product(point.core, point.factors)

    def adjoint(self, weights: Array) -> Array:
        """Return the weights, which are a dense gradient."""
        return weights

    def select(self, numbers: "np.ndarray[Any, np.dtype[Any]]") -> "Full":
        """Refuse: a batch of a full tensor is a completion problem."""
        raise ShapeError(
            "batches: a full tensor has no batches; observe its entries with geotucker.completion"
        )


def least_squares(tensor: Array, loss: EntryLoss = SQUARED, ridge: float = 0.0) -> Fit:
    """Return the objective ``||W - T||^2 / 2`` for a dense tensor T, or another loss of entries.

    Parameters
    ----------
    tensor : array, shape (n_1, ..., n_d)
        Real floating array of any backend, order at least 1.
    loss : EntryLoss
        Of each entry.
    ridge : float
        Weight of ``||W||^2 / 2``.

    Returns
    -------
    Fit

    Raises
    ------
    BackendError, NonFiniteError, ShapeError, ValueError
        As for `Fit`.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> tensor = gt.to_dense(gt.testing.random_point((6, 7, 8), (2, 2, 2)))
    >>> objective = gt.least_squares(tensor)
    >>> result = gt.minimize(objective, gt.hosvd(tensor, 1), ranks=2,
    ...                      integrator=gt.ConjugateGradient(), steps=30)
    >>> result.loss < 1e-12
    True
    """
    check_floating(tensor, "tensor")
    if not _ops.shape(tensor):
        raise ShapeError("tensor: expected order at least 1, got a scalar")
    return Fit(Full(_ops.shape(tensor)), tensor, loss, ridge)
