"""Logistic loss with a free intercept, which is minimised over wherever the loss is asked for."""

from dataclasses import dataclass, field

import numpy as np
from scipy.special import expit, logit

import geotucker as gt

from ._samples import Array

__all__ = ["ProfiledLogistic"]


@dataclass(frozen=True, eq=False)
class ProfiledLogistic(gt.Logistic):
    """``min_b sum_k l(p_k + b, y_k)`` for the logistic loss l, one b for each output.

    A minimum over a part of the arguments of a convex function is convex in the others, and its
    gradient is the one at the minimising b: an intercept needs no place in the tensor, where it
    would cost ranks and be shrunk by the ridge.

    Parameters
    ----------
    observed : array, shape (m,) or (m, q)
        The y, of which each output has zeros and ones.
    """

    observed: Array = field(repr=False)

    def intercept(self, predicted: Array) -> Array:
        """Return the b at which probabilities add up to the number of ones, shape () or (q,).

        Newton's method, kept in an interval that holds the root and is halved where it leaves it.
        """
        p = np.asarray(predicted, np.float64)
        ones = self.observed.sum(axis=0, dtype=np.float64)
        level = logit(ones / len(p))
        low, high = level - p.max(axis=0), level - p.min(axis=0)
        b = level - p.mean(axis=0)
        for _ in range(100):  # halving alone would need fewer
            q = expit(p + b)
            excess = q.sum(axis=0) - ones
            low, high = np.where(excess < 0.0, b, low), np.where(excess > 0.0, b, high)
            with np.errstate(all="ignore"):  # where all probabilities are 0 or 1
                newton = b - excess / (q * (1.0 - q)).sum(axis=0)
            inside = (low < newton) & (newton < high)
            last, b = b, np.where(inside, newton, 0.5 * (low + high))
            if np.all(abs(b - last) <= 1e-14 * (1.0 + abs(b))):
                break
        return b.astype(predicted.dtype)[()]

    def value(self, predicted: Array, observed: Array) -> float:
        """Return the least sum of cross entropies."""
        return super().value(predicted + self.intercept(predicted), observed)

    def slope(self, predicted: Array, observed: Array) -> Array:
        """Return probability minus observation."""
        return super().slope(predicted + self.intercept(predicted), observed)

    def curvature(self, predicted: Array) -> Array:
        """Return the variances of the predicted probabilities, an upper bound."""
        return super().curvature(predicted + self.intercept(predicted))
