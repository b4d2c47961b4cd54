"""Right-hand sides: what a field may return, how it is checked, its norm."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .. import _ops, _tensor
from .._geometry import Gradient, check_gradient, contract, is_contractable, is_pair
from .._ops import Array
from .._tensor import TuckerPoint, pair_of

__all__ = ["Field", "Sum", "evaluate", "norm"]

Field: TypeAlias = Callable[[float, TuckerPoint], Gradient]
"""A right-hand side F(t, Y): dense, in Tucker format, a `Sum`, or any `Contractable`."""


@dataclass(frozen=True)
class Sum:
    """A sum of tensors of one shape that is never formed: only its contractions are.

    It goes wherever an ambient tensor does: as the value of a field for `integrate`, as the
    gradient of an objective for `minimize`, into `project`.

    Parameters
    ----------
    terms : sequence
        Dense arrays, Tucker tensors ``(core, factors)``, or objects with a method ``contract``.

    Raises
    ------
    ValueError
        If there is no term.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.ones((3, 4)), 1)
    >>> total = gt.Sum([point, np.ones((3, 4))])
    >>> abs(gt.project(point, total).core).round(6).tolist()
    [[6.928203]]
    """

    terms: Sequence[Gradient]

    def __post_init__(self) -> None:
        """Check the terms."""
        object.__setattr__(self, "terms", tuple(self.terms))
        if not self.terms:
            raise ValueError("terms: expected at least one tensor, got none")

    def contract(self, factors: Sequence[Array], skip: int | None) -> Array:
        """Return the sum of the terms' contractions (see `Contractable`)."""
        first, *others = (contract(term, factors, skip) for term in self.terms)
        for other in others:
            first = first + other
        return first


def evaluate(field: Field, time: float, point: TuckerPoint) -> Gradient:
    """Return ``field(time, point)``, if it fits the point and is finite."""
    value = field(time, point)
    _check(value, point, f"field({time:g}, Y)")
    return value


def _check(value: Gradient, point: TuckerPoint, name: str) -> None:
    if not isinstance(value, Sum):
        return check_gradient(value, point, name)
    for number, term in enumerate(value.terms):
        _check(term, point, f"{name}.terms[{number}]")
    return None


def norm(value: Gradient) -> float:
    """Return the Frobenius norm of a field's value; nan where a `Contractable` hides it.

    That of a sum comes from inner products, so that cancellation costs half of the digits.
    """
    if isinstance(value, Sum):
        return math.sqrt(max(_inner(value, value), 0.0))
    if is_contractable(value):
        return math.nan
    return _tensor.norm(value) if is_pair(value) else _ops.norm(value)


def _inner(a: Gradient, b: Gradient) -> float:
    """Return ``<a, b>``; nan if neither side gives it away."""
    if isinstance(a, Sum):
        return sum(_inner(term, b) for term in a.terms)
    if is_pair(a):
        core, factors = pair_of(a)
        return _ops.vdot(contract(b, factors), core)
    if isinstance(b, Sum) or is_pair(b):
        return _inner(b, a)
    opaque = is_contractable(a) or is_contractable(b)
    return math.nan if opaque else _ops.vdot(a, b)
