"""How all estimators minimise: conjugate gradients, until they stand still."""

import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state, check_scalar

import geotucker as gt

__all__ = ["minimise"]

# Steps over which descent is measured: single ones of conjugate gradients may be short.
_WINDOW = 10


def minimise(
    fit: gt.Fit,
    ranks: Any,
    *,
    growth: int | None = None,
    max_iter: int,
    tol: float,
    random_state: Any,
) -> tuple[gt.TuckerPoint, int]:
    """Return the minimum that is found, and the number of steps.

    Parameters
    ----------
    fit : Fit
    ranks : int, float or tuple of int
        As for `geotucker.Fixed`.
    growth : int, optional
        Steps between two increments of the ranks, from one; fewer, but at least one, where they
        would not be full after half of `max_iter`. By default they are full at once.
    max_iter : int
        At most so many steps; a ConvergenceWarning says if they did not suffice, for growth or for
        descent.
    tol : float
        Stop once ten steps at the full ranks lower the loss by at most this share of what it is
        at zero. (A share of itself would never do where data are fitted exactly.)
    random_state : int, RandomState or None
        Of the starting point.
    """
    check_scalar(max_iter, "max_iter", Integral, min_val=1)
    check_scalar(tol, "tol", Real, min_val=0.0)
    if growth is not None:
        check_scalar(growth, "growth", Integral, min_val=1)
    full = gt.Fixed(ranks).for_shape(fit.shape)
    increments = max(full) - 1 if growth is not None else 0
    every = max(1, min(growth or 1, max_iter // (2 * max(increments, 1))))
    rule = gt.Fixed(ranks) if growth is None else gt.Growing(ranks, every=every)
    seed = int(check_random_state(random_state).randint(2**31 - 1))
    start = fit.start(full if growth is None else 1, seed=seed)
    scale, _ = fit(gt.scale(start, 0.0))
    result = gt.minimize(
        fit,
        start,
        integrator=gt.ConjugateGradient(),
        ranks=rule,
        steps=max_iter,
        stop=_flat(tol * scale, increments * every),
    )
    if max_iter <= increments * every:
        warnings.warn(
            f"after max_iter={max_iter} steps the ranks had grown to {result.point.ranks}, not to "
            f"{full}; raise max_iter above {increments}, or start with the full ranks, growth=None",
            ConvergenceWarning,
            stacklevel=3,
        )
    elif result.stopped == "steps":
        warnings.warn(
            f"after max_iter={max_iter} steps the loss still fell by more than tol={tol} of what "
            "it was at zero in ten steps; raise one of them",
            ConvergenceWarning,
            stacklevel=3,
        )
    return result.point, len(result.history)


def _flat(least: float, begin: int) -> Callable[[list[gt.Report]], bool]:
    """Return a stopping rule: since a step the loss has moved by at most `least` in ten."""

    def stop(history: list[gt.Report]) -> bool:
        return (
            len(history) > begin + _WINDOW
            and history[-_WINDOW - 1].loss - history[-1].loss <= least
        )

    return stop
