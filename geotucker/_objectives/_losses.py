"""Losses of single numbers: what a predicted number costs beside an observed one."""

from dataclasses import dataclass
from typing import Protocol

from .. import _ops
from .._ops import Array

__all__ = ["SQUARED", "EntryLoss", "Logistic", "Poisson", "Squared"]


class EntryLoss(Protocol):
    """A loss ``sum_k l(p_k, y_k)`` of predicted and observed numbers, arrays of one shape.

    Convex in the p_k, for the sake of the line search; any object with these methods will do.
    """

    def check(self, observed: Array) -> None:
        """Raise ValueError if `observed` holds numbers that cannot be observed."""
        ...

    def value(self, predicted: Array, observed: Array) -> float:
        """Return the sum of the losses."""
        ...

    def slope(self, predicted: Array, observed: Array) -> Array:
        """Return the derivatives ``dl/dp``."""
        ...

    def curvature(self, predicted: Array) -> Array | float:
        """Return the second derivatives, or their one value where it is constant."""
        ...


@dataclass(frozen=True)
class Squared:
    """``(p - y)^2 / 2``: normal noise of variance one.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> gt.Squared().value(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    2.0
    """

    def check(self, observed: Array) -> None:
        """Accept all numbers."""

    def value(self, predicted: Array, observed: Array) -> float:
        """Return half of the sum of squares."""
        return 0.5 * _ops.square_norm(predicted - observed)

    def slope(self, predicted: Array, observed: Array) -> Array:
        """Return the residual."""
        return predicted - observed

    def curvature(self, predicted: Array) -> float:
        """Return one."""
        return 1.0


SQUARED = Squared()


@dataclass(frozen=True)
class Logistic:
    """``log(1 + exp(p)) - y p``: p is the logit of the probability of a one, y is in [0, 1].

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> float(gt.Logistic().slope(np.zeros(1), np.ones(1))[0])
    -0.5
    """

    def check(self, observed: Array) -> None:
        """Refuse what is not in [0, 1]."""
        if _ops.max_abs(observed - 0.5) > 0.5:
            raise ValueError("observed: expected numbers from 0 to 1 for a logistic loss")

    def value(self, predicted: Array, observed: Array) -> float:
        """Return the sum of cross entropies."""
        return _ops.total(_ops.softplus(predicted) - observed * predicted)

    def slope(self, predicted: Array, observed: Array) -> Array:
        """Return probability minus observation."""
        return _ops.sigmoid(predicted) - observed

    def curvature(self, predicted: Array) -> Array:
        """Return the variances ``q (1 - q)`` of the predicted probabilities q."""
        probability = _ops.sigmoid(predicted)
        return probability * (1.0 - probability)


@dataclass(frozen=True)
class Poisson:
    """``exp(p) - y p``: p is the logarithm of the mean of a count y.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> float(gt.Poisson().slope(np.zeros(1), np.full(1, 3.0))[0])
    -2.0
    """

    def check(self, observed: Array) -> None:
        """Refuse negative numbers."""
        if _ops.max_abs(observed - abs(observed)) > 0.0:
            raise ValueError("observed: expected no negative numbers for a Poisson loss")

    def value(self, predicted: Array, observed: Array) -> float:
        """Return the negative log-likelihood but for what does not depend on p."""
        return _ops.total(_ops.exp(predicted) - observed * predicted)

    def slope(self, predicted: Array, observed: Array) -> Array:
        """Return mean minus observation."""
        return _ops.exp(predicted) - observed

    def curvature(self, predicted: Array) -> Array:
        """Return the means."""
        return _ops.exp(predicted)
