"""Partial pooling: slices of a tensor are expected to be alike, as far as data do not tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import _ops
from .._geometry import Gradient, contract
from .._ops import Array
from .._tensor import TuckerPoint, as_fitting
from ._fit import LinearMap

__all__ = ["Pooled"]


@dataclass(frozen=True, eq=False)
class Pooled:
    """A map in coordinates in which a ridge draws slices to their mean, and not to zero.

    A tensor is written as ``W = V x_1 A_1 ... x_d A_d``, where ``A_i`` is the square root of
    ``(1 - pooling) I + pooling 1 1^T``, and V is sought, of the same ranks. So
    ``Fit(Pooled(map, pooling), y, ridge=ridge)`` has the penalty ``ridge / 2 ||V||^2``. For squared
    loss this is a normal prior for W: the variance of an entry is ``1 / ridge`` times that of the
    noise, and two entries are correlated by `pooling` to the number of modes in which they differ.
    The common mean is penalised least, effects of one mode more, and interactions the more, the
    more modes they join.

    Where the ridge counts, steps in V are better conditioned than steps in W; where data are
    exact and plenty it is the other way round.

    Parameters
    ----------
    map : LinearMap
        Of W, such as `Entries`.
    pooling : float
        Correlation in [0, 1) of entries that differ in one mode; 0 for an ordinary ridge.

    Raises
    ------
    ValueError
        If `pooling` is out of its range.

    References
    ----------
    Gelman, Hill. Data Analysis Using Regression and Multilevel/Hierarchical Models. Cambridge
    2007, Section 12.2 (partial pooling). Kaufman, Sain. Bayesian functional ANOVA modeling using
    Gaussian process prior distributions. Bayesian Analysis 5 (2010) (several modes).

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> seen = gt.Entries(([0, 1], [0, 1]), (3, 2), np.ones(1))  # the last row was never seen
    >>> fit = gt.Fit(gt.Pooled(seen, pooling=0.9), np.array([4.0, 6.0]), ridge=0.1)
    >>> result = gt.minimize(fit, fit.start(1), integrator=gt.ConjugateGradient(), steps=50)
    >>> gt.to_dense(fit.map.tensor(result.point)).round(1)[2].tolist()
    [4.2, 4.8]
    """

    map: LinearMap
    pooling: float

    def __post_init__(self) -> None:
        """Check the setting."""
        if not 0.0 <= self.pooling < 1.0:
            raise ValueError(f"pooling: expected a number in [0, 1), got {self.pooling}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.map.shape

    @property
    def observed_shape(self) -> tuple[int, ...]:
        """That of the map."""
        return self.map.observed_shape

    def tensor(self, point: TuckerPoint) -> TuckerPoint:
        """Return W from V; its factors are not orthonormal."""
        return self._times(as_fitting(point), 0.5)

    def coordinates(self, point: TuckerPoint) -> TuckerPoint:
        """Return V from W; its factors are not orthonormal."""
        return self._times(as_fitting(point), -0.5)

    def predict(self, point: TuckerPoint) -> Array:
        """Return the map of W, from V."""
        return self.map.predict(self.tensor(point))

    def adjoint(self, weights: Array) -> "_Gathered":
        """Return the gradient with respect to V."""
        return _Gathered(self, self.map.adjoint(weights))

    def select(self, numbers: "np.ndarray[Any, np.dtype[Any]]") -> "Pooled":
        """Return the map to some of the observations."""
        return Pooled(self.map.select(numbers), self.pooling)

    def _times(self, point: TuckerPoint, power: float) -> TuckerPoint:
        factors = tuple(self.apply(u, 0, power) for u in point.factors)
        return TuckerPoint(point.core, factors)

    def apply(self, tensor: Array, mode: int, power: float) -> Array:
        """Return ``tensor x_mode A^(2 power)``, at the cost of a mean."""
        n = _ops.shape(tensor)[mode]
        apart = (1.0 - self.pooling) ** power  # eigenvalue of what has no mean
        common = (1.0 - self.pooling + self.pooling * n) ** power
        average = _ops.zeros((1, n), like=tensor) + (common - apart) / n
        return apart * tensor + _ops.mode_product(tensor, average, mode)


class _Gathered(NamedTuple):
    """A gradient with respect to W, seen in V."""

    pooled: Pooled
    gradient: Gradient

    def contract(self, factors: Sequence[Array], skip: int | None) -> Array:
        """Return ``(Z x_1 A_1 ... x_d A_d) x_{j != skip} factors[j]^T``."""
        wide = [self.pooled.apply(u, 0, 0.5) for u in factors]
        contraction = contract(self.gradient, wide, skip)
        return contraction if skip is None else self.pooled.apply(contraction, skip, 0.5)
