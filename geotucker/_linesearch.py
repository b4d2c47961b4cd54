"""Backtracking along a curve until the loss has fallen enough."""

import math
from collections.abc import Callable
from typing import TypeVar

__all__ = ["backtrack"]

T = TypeVar("T")


def backtrack(
    at: Callable[[float], tuple[float, T]],
    loss: float,
    slope: float,
    first: float,
    *,
    decrease: float,
    trials: int,
    noise: float,
) -> tuple[float, T | None, int]:
    """Shorten a step until it meets Armijo's condition ``L(t) <= L(0) + decrease t L'(0)``.

    The next length is the minimum of the parabola through what is known, but from a tenth to a
    half of the last one. A loss that is not finite is too large.

    Parameters
    ----------
    at : callable
        From a length t to the loss there and whatever is to be returned of it.
    loss, slope : float
        L(0) and L'(0), which is negative.
    first : float
        Length to try first.
    decrease : float
        In (0, 1).
    trials : int
        Lengths to try.
    noise : float
        Rounding error of a loss: a rise by so much counts as none.

    Returns
    -------
    length : float
        Zero if no length was good enough.
    end : object or None
        What `at` returned for it.
    evaluations : int
        Lengths that were tried.

    Examples
    --------
    >>> from geotucker._linesearch import backtrack
    >>> settings = {"decrease": 1e-4, "trials": 9, "noise": 0.0}
    >>> backtrack(lambda t: ((t - 1) ** 2, t), 1.0, -2.0, 4.0, **settings)
    (1.0, 1.0, 2)
    """
    length = first
    for trial in range(1, trials + 1):
        there, end = at(length)
        if there <= loss + decrease * length * slope + noise:
            return length, end, trial
        excess = there - loss - length * slope  # of the loss over its tangent
        shorter = -0.5 * slope * length * length / excess if math.isfinite(excess) else 0.0
        length = min(max(shorter, 0.1 * length), 0.5 * length)
    return 0.0, None, trials
