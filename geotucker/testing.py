"""Tools to test code that uses geotucker: checks of points and gradients, random points.

Public, because whoever writes an objective or an integrator needs the same checks as we do.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _ops
from ._errors import RankError
from ._geometry import contract
from ._hosvd import orthonormalise
from ._tensor import TuckerPoint, as_point, feasible, real_number

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["check_orthonormal", "gradient_slope", "random_point", "shapes_and_ranks"]


def random_point(
    shape: Sequence[int],
    ranks: Sequence[int],
    seed: int = 0,
    singular_values: Sequence[float] | None = None,
) -> TuckerPoint:
    """Return a random NumPy point in float64 with orthonormal factors.

    Parameters
    ----------
    shape, ranks : sequence of int
        Of the tensor and of its core.
    seed : int
        Of NumPy's generator.
    singular_values : sequence of float, optional
        Makes the core superdiagonal with these values (as many as the smallest rank), which
        are then the singular values of every unfolding: for ill-conditioned points.

    Returns
    -------
    TuckerPoint

    Raises
    ------
    RankError
        If a rank is above its dimension.

    Examples
    --------
    >>> from geotucker.testing import random_point
    >>> random_point((4, 5), (2, 2)).ranks
    (2, 2)
    """
    if any(r > n for n, r in zip(shape, ranks, strict=True)):
        raise RankError(f"ranks: expected at most the shape {tuple(shape)}, got {tuple(ranks)}")
    rng = np.random.default_rng(seed)
    core = rng.standard_normal(tuple(ranks))
    if singular_values is not None:
        core = np.zeros(tuple(ranks))
        for i, value in enumerate(singular_values):
            core[(i,) * len(ranks)] = value
    pairs = zip(shape, ranks, strict=True)
    factors = tuple(np.linalg.qr(rng.standard_normal((n, r)))[0] for n, r in pairs)
    return TuckerPoint(core, factors)


def check_orthonormal(point: Any, multiple: float = 50.0) -> None:
    """Raise AssertionError unless ``||U_i^T U_i - I||_max`` is at most `multiple` eps.

    Parameters
    ----------
    point : pair
        Any ``(core, factors)``.
    multiple : float
        Of the machine precision of the factors' dtype.

    Examples
    --------
    >>> from geotucker.testing import check_orthonormal, random_point
    >>> check_orthonormal(random_point((4, 5), (2, 2)))
    """
    point = as_point(point)
    for mode, factor in enumerate(point.factors):
        # Formed in float64, so that the check adds no error of its own.
        u = _ops.to_numpy(factor)
        eps = float(np.finfo(u.dtype).eps)
        u = u.astype(np.float64)
        error = float(np.max(np.abs(u.T @ u - np.eye(u.shape[1]))))
        if not error <= multiple * eps:
            raise AssertionError(
                f"factors[{mode}]: U^T U differs from I by {error:.2e}, "
                f"more than {multiple:g} eps = {multiple * eps:.2e}"
            )


def gradient_slope(
    objective: Callable[[TuckerPoint], tuple[float, Any]],
    point: Any,
    seed: int = 0,
    lengths: Sequence[float] = (1e-2, 3e-3, 1e-3, 3e-4),
) -> float:
    """Return the order at which an objective's first-order model errs; 2 if the gradient is right.

    ``|L(W + tD) - L(W) - t <Z, D>|`` along a random direction D of the core is fitted by a
    power of t. A wrong gradient gives 1. (A loss that is linear in D errs by rounding only;
    then infinity is returned.)

    Parameters
    ----------
    objective : callable
        From a point to (loss, ambient gradient), as for `geotucker.minimize`.
    point : pair
        Where to check; orthonormalised first.
    seed : int
        Of the direction.
    lengths : sequence of float
        The values of t, descending.

    Returns
    -------
    float

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> objective = lambda w: (np.sum(gt.to_dense(w) ** 2) / 2, gt.to_dense(w))
    >>> slope = gt.testing.gradient_slope(objective, gt.testing.random_point((4, 5), (2, 2)))
    >>> bool(abs(slope - 2.0) < 0.01)
    True
    """
    point = orthonormalise(point)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(point.ranks)
    direction = _ops.like(noise, point.core)
    loss, gradient = objective(point)
    loss = real_number(loss, "loss")
    slope = _ops.vdot(contract(gradient, point.factors), direction)
    errors = []
    for t in lengths:
        moved = TuckerPoint(point.core + t * direction, point.factors)
        errors.append(abs(float(objective(moved)[0]) - loss - t * slope))
    if max(errors) <= 1e-14 * max(abs(loss), 1e-300):
        return math.inf
    logs = np.log(np.maximum(errors, 1e-300))
    return float(np.polyfit(np.log(lengths), logs, 1)[0])


def shapes_and_ranks(
    min_order: int = 1, max_order: int = 5, max_side: int = 6
) -> "SearchStrategy[tuple[tuple[int, ...], tuple[int, ...]]]":
    """Return a hypothesis strategy of shapes with feasible ranks (needs hypothesis).

    Parameters
    ----------
    min_order, max_order : int
        Number of modes.
    max_side : int
        Largest n_i.

    Examples
    --------
    >>> from geotucker.testing import shapes_and_ranks
    >>> shape, ranks = shapes_and_ranks(max_order=3).example()  # doctest: +SKIP
    """
    from hypothesis import strategies as st  # only tests need it

    def with_ranks(shape: list[int]) -> "SearchStrategy[Any]":
        ranks = st.tuples(*(st.integers(1, n) for n in shape))
        return ranks.map(lambda r: (tuple(shape), feasible(r, shape)))

    sides = st.lists(st.integers(1, max_side), min_size=min_order, max_size=max_order)
    return sides.flatmap(with_ranks)
