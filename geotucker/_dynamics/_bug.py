"""Basis-update & Galerkin steps of first and second order, before truncation.

Both take one explicit step in each of their small problems. All of these begin at one and the
same tensor, so that one value of the field serves the updates of all bases and the core: a step
of order p asks for the field p times. Neither contains an inverse of the core.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from .. import _ops
from .._geometry import Gradient, augment, contract, project
from .._ops import Array
from .._tensor import TuckerPoint, check_finite
from ._fields import Field, evaluate, norm

__all__ = ["STEPS", "Attempt", "Step"]


class Attempt(NamedTuple):
    """A step that is neither accepted nor truncated yet."""

    end: TuckerPoint  # in the bases of the step, orthonormal
    error: float  # embedded estimate of the error in time; nan if not asked for
    defect: float  # the part of the field that the bases do not hold; nan if not known
    evaluations: int


Step: TypeAlias = Callable[[Field, float, TuckerPoint, Gradient, float, bool], Attempt]
"""From field, time, point, the field there, signed length and whether to estimate the error."""


def bug(
    field: Field, time: float, point: TuckerPoint, slope: Gradient, length: float, estimate: bool
) -> Attempt:
    """Augmented BUG with Euler's method (Ceruti, Kusch, Lubich 2022; for Tucker CLS 2023).

    ``K_i(1) = K_i + h F_i Q_i`` in every mode, ``Uhat_i = orth[U_i | K_i(1)]``, and in these
    bases ``C(1) = C + h F(t_0, Y_0) x_i Uhat_i^T``. The estimate is the distance from Heun's
    method.
    """
    wide = _extend(point, slope)
    velocity = _seen(slope, wide)
    end = TuckerPoint(wide.core + length * velocity, wide.factors)
    defect = _defect(slope, velocity)
    if not estimate:
        return Attempt(end, math.nan, defect, 0)
    after = _seen(evaluate(field, time + length, end), wide)
    return Attempt(end, abs(length) / 2 * _ops.norm(after - velocity), defect, 1)


def midpoint(
    field: Field, time: float, point: TuckerPoint, slope: Gradient, length: float, estimate: bool
) -> Attempt:
    """Midpoint BUG (Ceruti, Einkemmer, Kusch, Lubich 2024), for Tucker tensors.

    A step of `bug` to the middle, not truncated; its bases extended by the ``F_i Q_i`` there;
    in these at most 4 r_i directions ``C(1) = C + h F(t_1/2, Y_1/2) x_i Ubar_i^T``. The estimate
    is the distance from Euler's method in the same bases, which costs nothing more.
    """
    half = bug(field, time, point, slope, length / 2, estimate=False).end
    middle = evaluate(field, time + length / 2, half)
    factors = _extend(half, middle).factors
    start = TuckerPoint(contract(point, factors), factors)
    velocity = _seen(middle, start)
    end = TuckerPoint(start.core + length * velocity, factors)
    error = abs(length) * _ops.norm(velocity - _seen(slope, start)) if estimate else math.nan
    return Attempt(end, error, _defect(middle, velocity), 1)


STEPS: dict[int, Step] = {1: bug, 2: midpoint}
"""The step of each order."""


def _extend(point: TuckerPoint, slope: Gradient) -> TuckerPoint:
    """Extend the bases U_i by the K_i(1): what of ``F_i Q_i`` they do not hold already."""
    return augment(point, project(point, slope).factors)


def _seen(slope: Gradient, point: TuckerPoint) -> Array:
    """Return the field seen through the bases, if it is finite."""
    seen = contract(slope, point.factors)
    check_finite(seen, "field")
    return seen


def _defect(slope: Gradient, velocity: Array) -> float:
    """Return the norm of the field's part that is orthogonal to the bases."""
    whole, part = norm(slope), _ops.norm(velocity)
    if not whole > part:  # also nan
        return 0.0 if whole <= part else whole
    return whole * math.sqrt((1 - part / whole) * (1 + part / whole))
