"""Optimizer moments through basis change and truncation.

A moment that is shaped like the core and linear in its gradients (momentum, Adam's
exp_avg) transforms like the core: zeros where a basis grew, ``P_i^T`` where it was rotated.
Both are exact. A second moment (exp_avg_sq) is a diagonal in the old coordinates and has no
exact transport; the squared entries of P_i give the diagonal of the rotated matrix, if the
off-diagonal part that was never known is taken as zero.
"""

from collections.abc import Sequence

from . import _ops
from ._ops import Array
from ._tensor import pad

__all__ = ["lift", "rotate"]


def lift(moment: Array, ranks: Sequence[int]) -> Array:
    """Zero-pad a core-shaped moment to the ranks of the augmented bases.

    Examples
    --------
    >>> import numpy as np
    >>> from geotucker._moments import lift
    >>> lift(np.ones((1, 1)), (2, 1)).tolist()
    [[1.0], [0.0]]
    """
    return pad(moment, ranks)


def rotate(moment: Array, rotations: Sequence[Array], squared: bool = False) -> Array:
    """Carry a core-shaped moment through a truncation, ``moment x_i P_i^T``.

    Parameters
    ----------
    moment : array, shape (m_1, ..., m_d)
    rotations : sequence of arrays, shapes (m_i, r_i)
        Of a `Truncation`.
    squared : bool
        For second moments: use the squared entries of the P_i (see the module's text).

    Returns
    -------
    array, shape (r_1, ..., r_d)

    Examples
    --------
    >>> import numpy as np
    >>> from geotucker._moments import rotate
    >>> rotate(np.array([[3.0], [4.0]]), [np.array([[0.6], [0.8]]), np.eye(1)]).round(9).tolist()
    [[5.0]]
    """
    if squared:
        rotations = [p * p for p in rotations]
    return _ops.multi_mode_product(moment, rotations, transpose=True)
