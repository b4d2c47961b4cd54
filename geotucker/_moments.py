"""Optimizer moments through basis change and truncation.

A moment that is linear in the gradients (momentum, Adam's exp_avg) is a tensor in the ambient
space, and between steps it is kept as the tangent vector nearest to it: its part in the core's
coordinates and, per mode, its part that moves the basis (`TuckerTangent`). A moment of the core
alone would give the core momentum and the bases none. They would then lag behind by a factor of
``1 / (1 - momentum)``, and training at momentum 0.9 is slow or diverges.

1. The bases are extended by gradient *and* moment, so that both can be written in them;
2. `lift` writes the moment in the wide bases, where the scheme updates it with the core;
3. `carry` projects it on the tangent space at the truncated point.

A second moment (exp_avg_sq) is a diagonal in the old coordinates and has no exact transport.
`rotate_squares` takes the squared entries of P_i, which give the diagonal of the rotated matrix
if the off-diagonal part, never known, is zero; `lift_squares` gives a new direction, about which
nothing is known, the mean of the old ones.
"""

import math
from collections.abc import Mapping, Sequence

from . import _ops
from ._geometry import right_basis, tangent_core, velocity
from ._hosvd import Truncation
from ._ops import Array
from ._tensor import TuckerPoint, TuckerTangent

__all__ = ["carry", "lift", "lift_squares", "regauge", "rotate_squares", "zero"]


def zero(point: TuckerPoint) -> tuple[Array, ...]:
    """Return basis parts of zero for a moment at `point`."""
    total = math.prod(point.ranks)
    # As many columns as Q_i: fewer than r_i where no tensor has these ranks.
    columns = [min(r, total // r) for r in point.ranks]
    sides = zip(point.shape, columns, point.factors, strict=True)
    return tuple(_ops.zeros((n, k), like=u) for n, k, u in sides)


def lift(
    point: TuckerPoint,
    wide: TuckerPoint,
    moment: TuckerTangent,
    right: Sequence[Array | None] | None = None,
) -> Array:
    """Write a tangent vector at `point` in the bases of ``wide = augment(point, ...)``.

    Exact where these contain the directions of the moment.

    Parameters
    ----------
    point, wide : TuckerPoint
    moment : TuckerTangent
        At `point`.
    right : sequence of arrays, optional
        The Q_i of ``Mat_i(C)^T = Q_i S_i^T``, where they are known already; of complete modes they
        are not needed.

    Returns
    -------
    array, shape (m_1, ..., m_d)
        Shaped like the core of `wide`.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> from geotucker._moments import lift
    >>> point = gt.hosvd(np.ones((2, 2)), 1)
    >>> moment = gt.project(point, np.array([[1.0, 1.0], [0.0, 0.0]]))
    >>> wide = gt.augment(point, moment.factors)
    >>> lifted = lift(point, wide, moment)
    >>> np.allclose(gt.to_dense((lifted, wide.factors)), [[1.0, 1.0], [0.0, 0.0]])
    True
    """
    return tangent_core(point, wide, moment, right)


def carry(
    wide: TuckerPoint,
    cut: Truncation,
    moment: Array,
    right: Mapping[int, Array] | None = None,
) -> TuckerTangent:
    """Project a moment in the bases of `wide` on the tangent space at the truncated point.

    Both lie in the span of the wide bases, so the projection is computed in their coordinates.

    Parameters
    ----------
    wide : TuckerPoint
        What was truncated.
    cut : Truncation
        Its truncation.
    moment : array, shape (m_1, ..., m_d)
        Shaped like the core of `wide`.
    right : dict of int to array, optional
        The Q_i of the truncated core, by mode, where they are known already; modes that lost
        nothing need none.

    Returns
    -------
    TuckerTangent
        At ``cut.point``; its core is ``moment x_i P_i^T``.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> from geotucker._moments import carry
    >>> wide = gt.hosvd(np.diag([2.0, 1.0]), 2)
    >>> (cut,) = gt.truncate([wide], gt.Fixed(1))
    >>> moment = carry(wide, cut, np.ones((2, 2)))
    >>> abs(moment.core).round(9).tolist(), [abs(k).round(9).tolist() for k in moment.factors]
    ([[1.0]], [[[0.0], [1.0]], [[0.0], [1.0]]])
    """
    parts = list(zero(cut.point))  # nothing of an unchanged basis is outside of it
    for mode in cut.shrunk:
        g = _ops.unfold(cut.turn(moment, skip=mode), mode)
        q = right_basis(cut.point.core, mode) if right is None else right[mode]
        parts[mode] = wide.factors[mode] @ velocity(cut.rotations[mode], g, q)
    return TuckerTangent(cut.turn(moment), tuple(parts))


def regauge(
    parts: Sequence[Array], old: Mapping[int, Array], new: Mapping[int, Array]
) -> tuple[Array, ...]:
    """Return the basis parts of a moment for a core that has been stepped since, in the same bases.

    ``Kdot_i`` stands for ``Kdot_i Q_i^T``, and Q_i is that of the core. What of it lies outside the
    row space of the new core's unfolding is no longer tangent and is dropped. The cost does not
    depend on the n_i but for the product of each part with a matrix of its width.

    Parameters
    ----------
    parts : sequence of arrays, shapes (n_i, k_i)
    old, new : dict of int to array, shapes (prod_{j != i} r_j, k_i)
        By mode, the Q_i of the core that the parts belong to, and of the present one. Parts of
        other modes stay.

    Examples
    --------
    >>> import numpy as np
    >>> from geotucker._geometry import right_basis
    >>> from geotucker._moments import regauge
    >>> old, new = np.diag([2.0, 1.0]), np.diag([-2.0, 1.0])[::-1]
    >>> parts = [np.ones((3, 2)), np.zeros((3, 0))]
    >>> parts = regauge(parts, {0: right_basis(old, 0)}, {0: right_basis(new, 0)})
    >>> [part.shape for part in parts]
    [(3, 2), (3, 0)]
    """
    return tuple(
        part @ (old[mode].T @ new[mode]) if mode in old else part for mode, part in enumerate(parts)
    )


def lift_squares(moment: Array, ranks: Sequence[int]) -> Array:
    """Extend a second moment to the ranks of wider bases, new entries by means of the old.

    Examples
    --------
    >>> import numpy as np
    >>> from geotucker._moments import lift_squares
    >>> lift_squares(np.array([[1.0], [3.0]]), (3, 2)).tolist()
    [[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]]
    """
    for mode, rank in enumerate(ranks):
        old = _ops.shape(moment)[mode]
        if rank > old:
            mean = _ops.like([[1.0 / old] * old] * (rank - old), moment)
            moment = _ops.concatenate([moment, _ops.mode_product(moment, mean, mode)], mode)
    return moment


def rotate_squares(moment: Array, cut: Truncation) -> Array:
    """Carry a second moment through a truncation, by the squared entries of the P_i.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> from geotucker._moments import rotate_squares
    >>> wide = (np.array([[6.0], [8.0]]), [np.eye(2), np.eye(1)])
    >>> (cut,) = gt.truncate([wide], gt.Fixed(1))
    >>> rotate_squares(np.array([[1.0], [2.0]]), cut).round(9).tolist()
    [[1.64]]
    """
    squares = tuple(p * p for p in cut.rotations)
    return cut._replace(rotations=squares).turn(moment)
