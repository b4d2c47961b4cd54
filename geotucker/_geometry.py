"""The manifold of tensors of fixed multilinear rank: gradients, tangent space, retraction.

A point is ``W = C x_1 U_1 ... x_d U_d`` with orthonormal U_i. An ambient gradient Z enters
only through its contractions ``Z x_{j != i} U_j^T``, so it may be a dense array, a Tucker
tensor, or any object with a method ``contract`` (sparse entries, say).

Tangent vectors live in the coordinates of `TuckerTangent`, in which no inverse of the core
occurs at any singular value and which are isometric to the ambient space.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

from . import _ops
from ._errors import NonFiniteError, ShapeError
from ._hosvd import truncate
from ._ops import Array
from ._ranks import as_rule
from ._tensor import (
    TuckerPoint,
    TuckerTangent,
    as_point,
    check_finite,
    check_like,
    check_real,
    labels,
    pad,
    pair_of,
)

__all__ = [
    "Contractable",
    "augment",
    "inner_tangent",
    "project",
    "retract",
    "tangent_to_point",
    "transport",
]


@runtime_checkable
class Contractable(Protocol):
    """An ambient gradient that is neither dense nor in Tucker format."""

    def contract(self, factors: Sequence[Array], skip: int | None) -> Array:
        """Return ``Z x_{j != skip} factors[j]^T``; every mode if `skip` is None."""
        ...


Gradient: TypeAlias = Any
"""An ambient gradient: a dense array, any ``(core, factors)``, or a `Contractable`."""


def is_contractable(gradient: Gradient) -> TypeGuard[Contractable]:
    """Do what isinstance does, which takes as long as a small contraction."""
    return callable(getattr(gradient, "contract", None))


def contract(gradient: Gradient, factors: Sequence[Array], skip: int | None = None) -> Array:
    """Return ``Z x_{j != skip} U_j^T``, the gradient seen through the bases."""
    if is_contractable(gradient):
        return _checked(gradient.contract(factors, skip), factors, skip)
    if is_pair(gradient):
        core, own = pair_of(gradient)
        maps = [
            v if mode == skip else u.T @ v
            for mode, (u, v) in enumerate(zip(factors, own, strict=True))
        ]
        return _ops.multi_mode_product(core, maps)
    skipped = () if skip is None else (skip,)
    return _ops.multi_mode_product(gradient, factors, transpose=True, skip=skipped)


def _checked(contraction: Array, factors: Sequence[Array], skip: int | None) -> Array:
    """Return what a `Contractable` gave, if its dtype and shape are right."""
    check_like(contraction, factors[0], "gradient.contract(...)")
    expected = tuple(_ops.shape(u)[0 if mode == skip else 1] for mode, u in enumerate(factors))
    if _ops.shape(contraction) != expected:
        raise ShapeError(
            f"gradient.contract(factors, skip={skip}): expected an array of shape {expected}, "
            f"got {_ops.shape(contraction)}"
        )
    return contraction


def check_gradient(gradient: Gradient, point: TuckerPoint, name: str = "gradient") -> None:
    """Raise an error unless the gradient fits the tensor and is finite.

    A `Contractable` is checked contraction by contraction.
    """
    if is_contractable(gradient):
        return
    if is_pair(gradient):
        got = as_point(gradient, name)
        check_like(got.core, point.core, f"{name}.core")
        shape = got.shape
    else:
        check_like(gradient, point.core, name)
        check_finite(gradient, name)
        shape = _ops.shape(gradient)
    if shape != point.shape:
        raise ShapeError(f"{name}: expected the shape {point.shape} of the tensor, got {shape}")


def is_pair(gradient: Gradient) -> bool:
    """Tell whether an ambient tensor is given as ``(core, factors)``."""
    return not hasattr(gradient, "dtype") and hasattr(gradient, "__len__") and len(gradient) == 2


def mode_gradients(point: TuckerPoint, gradient: Gradient) -> list[Array]:
    """Return the ``G_i = Mat_i(Z x_{j != i} U_j^T)``, of shapes (n_i, prod_{j != i} r_j).

    Raises
    ------
    NonFiniteError
        If the gradient holds NaN or infinity.
    """
    check_gradient(gradient, point)
    unfolded = []
    for mode in range(point.order):
        g = _ops.unfold(contract(gradient, point.factors, skip=mode), mode)
        check_finite(g, "gradient")
        unfolded.append(g)
    return unfolded


def right_basis(core: Array, mode: int) -> Array:
    """Return the Q_i of ``Mat_i(C)^T = Q_i S_i^T``, of shape (prod_{j != i} r_j, r_i).

    Householder's Q is orthonormal also where the core is rank-deficient.
    """
    return _ops.qr(_ops.unfold(core, mode).T)[0]


def right_bases(core: Array) -> list[Array]:
    """Return `right_basis` of every mode."""
    (found,) = right_bases_of([(core, range(len(_ops.shape(core))))])
    return [found[mode] for mode in range(len(_ops.shape(core)))]


def right_bases_of(cores: Iterable[tuple[Array, Iterable[int]]]) -> list[dict[int, Array]]:
    """Return `right_basis` of some modes of each core, those of like shapes at once."""
    wanted = [(core, list(modes)) for core, modes in cores]
    rows = [(_ops.transpose(_ops.unfold(core, mode)),) for core, modes in wanted for mode in modes]
    found = iter(_ops.batched(lambda matrix: _ops.qr(matrix)[:1], rows))
    return [{mode: next(found)[0] for mode in modes} for _, modes in wanted]


def fold_right(
    q: Array,  # shape: (prod_{j != i} r_j, k)
    mode: int,
    ranks: Sequence[int],
) -> Array:  # shape: (r_1, ..., k, ..., r_d), k = min(r_i, prod_{j != i} r_j)
    """Return ``Ten_i(Q_i^T)``; k is below r_i where no tensor has these ranks."""
    extent = list(ranks)
    extent[mode] = _ops.shape(q)[1]
    return _ops.fold(q.T, mode, extent)


def gauge(core: Array, mode: int) -> tuple[Array, Array]:
    """Write ``C = Ten_i(Q_i^T) x_i S_i``, with orthonormal rows in the unfolding of the first.

    Then ``K_i = U_i S_i`` and the gradient with respect to K_i is ``G_i Q_i``, whatever the
    singular values of the core (Theorem 2.1 of arXiv:2305.19059).

    Parameters
    ----------
    core : array, shape (r_1, ..., r_d)
    mode : int

    Returns
    -------
    gauged : array, shape (r_1, ..., k, ..., r_d), k = min(r_i, prod_{j != i} r_j)
        ``Ten_i(Q_i^T)``.
    s : array, shape (r_i, k)

    Examples
    --------
    >>> import numpy as np
    >>> from geotucker._geometry import gauge
    >>> core = np.array([[3.0, 4.0], [0.0, 1e-12]])
    >>> gauged, s = gauge(core, 0)
    >>> np.allclose(gauged @ gauged.T, np.eye(2)), np.allclose(s @ gauged, core, atol=1e-15)
    (True, True)
    """
    unfolded = _ops.unfold(core, mode)
    q, _ = _ops.qr(unfolded.T)
    return fold_right(q, mode, _ops.shape(core)), unfolded @ q


def augment(point: TuckerPoint, directions: Sequence[Array]) -> TuckerPoint:
    """Widen the bases by new directions; the tensor does not change.

    Lines 3-6 of Algorithm 1 (arXiv:2305.19059): ``Uhat_i = orth[U_i | D_i]``, whose leading
    columns are U_i, and the core padded with zeros. Bases that are orthonormal only to
    rounding come out orthonormal, the triangular factor goes into the core.

    Parameters
    ----------
    point : TuckerPoint
        Factors of shapes (n_i, r_i).
    directions : sequence of arrays, shapes (n_i, k_i)
        For TDLRT the gradients with respect to the U_i or the K_i. Their scale does not matter.

    Returns
    -------
    TuckerPoint
        Ranks ``min(n_i, r_i + k_i)``. Where directions are zero or dependent the new
        columns are an arbitrary orthonormal completion.

    Raises
    ------
    NonFiniteError
        If a direction holds NaN or infinity.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.ones((4, 5)), 1)
    >>> wide = gt.augment(point, [np.arange(4.0)[:, None], np.arange(5.0)[:, None]])
    >>> wide.ranks, np.allclose(gt.to_dense(wide), 1.0)
    ((2, 2), True)
    """
    point = pair_of(point)
    check_real((point.core, directions), "directions")
    (wide,) = augment_all([point], [directions])
    if wide is None:
        for mode, direction in enumerate(directions):
            check_finite(direction, f"directions[{mode}]")
        raise NonFiniteError("point: expected finite numbers, got NaN or infinity in a factor")
    return wide


def augment_all(
    points: Sequence[TuckerPoint], directions: Sequence[Sequence[Array]]
) -> list[TuckerPoint | None]:
    """Return `augment` of all points together; None where something is not finite.

    Bases of like shapes are extended at once, and the device is asked once whether all went well.
    """
    rows = [
        (u, d)
        for point, own in zip(points, directions, strict=True)
        for u, d in zip(point.factors, own, strict=True)
    ]
    extended = iter(extend(rows))
    wides: list[TuckerPoint | None] = []
    for point in points:
        core, factors = point.core, []
        for mode, found in enumerate([next(extended) for _ in point.factors]):
            if found is None:
                break
            q, r = found
            core = core if r is None else _ops.mode_product(core, r, mode)
            factors.append(q)
        whole = len(factors) == point.order
        core = pad(core, [_ops.shape(q)[1] for q in factors]) if whole else core
        wides.append(TuckerPoint(core, tuple(factors)) if whole else None)
    return wides


def extend(
    rows: Sequence[tuple[Array, Array]],  # shapes: (n, r) and (n, k)
) -> list[tuple[Array, Array | None] | None]:  # shapes: (n, m) and (r, r), m = min(n, r + k)
    """Return, for each basis and directions, orthonormal Q with ``basis = Q[:, :r] R``.

    The rest of Q is from the directions. No R stands for the identity: the basis was orthonormal
    and leads Q as it is. None instead of both: something is not finite.

    The directions are scaled, so that neither huge nor tiny ones spoil the reflections, and
    projected on the complement of the basis before and after the QR ("twice is enough", Giraud et
    al. 2005). Where they are dependent, Householder's Q completes them by columns that need not
    be orthogonal to the basis; then ``[basis | directions]`` is decomposed as a whole. So is a
    basis that has drifted by rounding.
    """
    rows = [(u, d[:, : _ops.shape(u)[0] - _ops.shape(u)[1]]) for u, d in rows]
    candidates = _ops.batched(_beside, rows)
    deviations = _ops.floats([deviation for _, deviation in candidates])
    limits = [4 * math.sqrt(_ops.shape(u)[0]) * _ops.eps(u) for u, _ in rows]
    # NaN is above every limit.
    late = [i for i, limit in enumerate(limits) if not deviations[i] <= limit]
    whole = _ops.batched(_decompose_whole, [rows[i] for i in late])
    largest = _ops.largest([q for q, _ in whole])
    found: list[tuple[Array, Array | None] | None] = [
        (q if _ops.shape(d)[1] else u, None)
        for (u, d), (q, _) in zip(rows, candidates, strict=True)
    ]
    for i, (q, triangle), entry in zip(late, whole, largest, strict=True):
        found[i] = (q, triangle) if math.isfinite(entry) else None
    return found


def _beside(basis: Array, directions: Array) -> tuple[Array, Array]:
    """Set an orthonormal basis of what is new in the directions beside the basis.

    Returned with it is how far the whole is from orthonormal.
    """
    q = basis
    if _ops.shape(directions)[-1]:
        new = _ops.qr(_beyond(basis, _scaled(directions)))[0]
        # Where the triangle is ill-conditioned the columns lean towards the basis. What that was
        # is missing after the second projection, to second order, and to fourth after this step
        # of Newton and Schulz.
        new = _beyond(basis, new)
        new = 1.5 * new - 0.5 * (new @ (_ops.transpose(new) @ new))
        q = _ops.concatenate([basis, new], -1)
    error = _ops.transpose(q) @ q - _ops.eye(_ops.shape(q)[-1], like=basis)
    return q, _ops.max_abs(_ops.max_abs(error, axis=-1), axis=-1)


def _beyond(basis: Array, columns: Array) -> Array:
    """Return what of the columns is orthogonal to a basis."""
    return columns - basis @ (_ops.transpose(basis) @ columns)


def _scaled(columns: Array) -> Array:
    """Scale columns to a largest entry of about one; zero ones stay."""
    return columns / _ops.as_divisor(_ops.max_abs(columns, axis=-2)[..., None, :])


def _decompose_whole(basis: Array, directions: Array) -> tuple[Array, Array]:
    """QR of ``[basis | directions]``, signs chosen such that the basis leads."""
    r = _ops.shape(basis)[-1]
    both = basis
    if _ops.shape(directions)[-1]:
        both = _ops.concatenate([basis, _scaled(directions)], -1)
    q, triangle = _ops.qr(both)
    triangle = triangle[..., :r, :r]
    # Signs, so that the leading columns are the old basis and moments need no rotation.
    signs = _ops.sign(_ops.diagonal(triangle))
    signs = signs + (signs == 0)
    leading = q[..., :r] * signs[..., None, :]
    q = _ops.concatenate([leading, q[..., r:]], -1) if _ops.shape(q)[-1] > r else leading
    return q, triangle * signs[..., :, None]


def project(point: Any, gradient: Gradient) -> TuckerTangent:
    """Orthogonal projection P(W)Z of an ambient tensor on the tangent space at a point.

    Parameters
    ----------
    point : pair
        With orthonormal factors.
    gradient : array, pair or Contractable
        The ambient tensor Z, dense or factored.

    Returns
    -------
    TuckerTangent
        ``Cdot = Z x_i U_i^T`` and ``Kdot_i = (I - U_i U_i^T) G_i Q_i``: Theorem 2.1 of
        arXiv:2305.19059, without the inverse that the form in U_i has.

    Raises
    ------
    ShapeError, BackendError, NonFiniteError
        If the gradient does not fit or is not finite.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.ones((3, 4)), 1)
    >>> tangent = gt.project(point, np.eye(3, 4))
    >>> np.allclose(point.factors[0].T @ tangent.factors[0], 0)
    True
    """
    point = as_point(point)
    return project_modes(point, mode_gradients(point, gradient))


def project_modes(point: TuckerPoint, modes: Sequence[Array]) -> TuckerTangent:
    """Project, given the G_i of `mode_gradients`."""
    core = _ops.mode_product(
        _ops.fold(modes[0], 0, (point.shape[0], *point.ranks[1:])),
        point.factors[0],
        0,
        transpose=True,
    )
    parts = zip(point.factors, modes, right_bases(point.core), strict=True)
    return TuckerTangent(core, tuple(velocity(u, g, q) for u, g, q in parts))


def velocity(u: Array, g: Array, q: Array) -> Array:
    """Return ``Kdot_i = (I - U_i U_i^T) G_i Q_i``, of shape (n_i, k)."""
    k = g @ q
    return k - u @ (u.T @ k)


def inner_tangent(a: TuckerTangent, b: TuckerTangent) -> float:
    """Inner product of two tangent vectors at one point.

    Equal to the ambient inner product, because the coordinates are isometric.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.ones((3, 4)), 1)
    >>> tangent = gt.project(point, np.ones((3, 4)))
    >>> round(gt.inner_tangent(tangent, tangent), 6)
    12.0
    """
    check_real(a, "a")
    check_real(b, "b")
    return sum(_ops.vdots([(a.core, b.core), *zip(a.factors, b.factors, strict=True)]))


def norm_tangent(tangent: TuckerTangent) -> float:
    """Norm of a tangent vector, safe against overflow."""
    return math.hypot(*_ops.norms([tangent.core, *tangent.factors]))


def tangent_to_point(point: Any, tangent: TuckerTangent) -> TuckerPoint:
    """Write a tangent vector as a Tucker tensor of ranks at most 2 r_i (and of no base point).

    Parameters
    ----------
    point : pair
        The base point, with orthonormal factors.
    tangent : TuckerTangent

    Returns
    -------
    TuckerPoint
        Factors ``[U_i | Kdot_i]``, not orthonormal; the core holds Cdot and, next to it along
        each mode i, ``Ten_i(Q_i^T)``.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> z = np.arange(12.0).reshape(3, 4)
    >>> point = gt.hosvd(z, 2)  # rank 2 holds z, so z is tangent
    >>> np.allclose(gt.to_dense(gt.tangent_to_point(point, gt.project(point, z))), z)
    True
    """
    point = pair_of(point)
    check_real(tangent, "tangent")
    blocks = [fold_right(q, mode, point.ranks) for mode, q in enumerate(right_bases(point.core))]
    pairs = zip(point.factors, tangent.factors, strict=True)
    return TuckerPoint(
        _border(tangent.core, blocks), tuple(_ops.concatenate(pair, 1) for pair in pairs)
    )


def _border(core: Array, blocks: Sequence[Array]) -> Array:
    """Return a core with ``blocks[i]`` beside it along mode i and zeros elsewhere."""
    for mode, block in enumerate(blocks):
        if _ops.shape(block)[mode]:
            extents = list(_ops.shape(core))
            extents[mode] = _ops.shape(block)[mode]
            core = _ops.concatenate([core, pad(block, extents)], mode)
    return core


def retract(point: Any, tangent: TuckerTangent, ranks: Any = None) -> TuckerPoint:
    """HOSVD retraction: the quasi-best tensor of lower rank near ``W + xi``.

    Parameters
    ----------
    point : pair
        With orthonormal factors.
    tangent : TuckerTangent
    ranks : RankRule, int, float or tuple, optional
        By default the ranks of `point`.

    Returns
    -------
    TuckerPoint

    Raises
    ------
    RankError
        If the rule gives unusable ranks.
    NonFiniteError
        If point or tangent hold NaN or infinity, or their sum overflows.

    References
    ----------
    Kressner, Steinlechner, Vandereycken. Low-rank tensor completion by Riemannian
    optimization. BIT 54 (2014), Proposition 2.3.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.ones((3, 4)), 1)
    >>> np.allclose(gt.to_dense(gt.retract(point, gt.project(point, np.ones((3, 4))))), 2.0)
    True
    """
    point = as_point(point)
    check_real(tangent, "tangent")
    for label, array in zip(
        labels(point, "tangent"), (tangent.core, *tangent.factors), strict=True
    ):
        check_finite(array, label)
    wide = augment(point, tangent.factors)
    core = wide.core + tangent_core(point, wide, tangent)
    rule = as_rule(point.ranks if ranks is None else ranks)
    return truncate([TuckerPoint(core, wide.factors)], rule)[0].point


def tangent_core(
    point: TuckerPoint,
    wide: TuckerPoint,
    tangent: TuckerTangent,
    right: Sequence[Array | None] | None = None,
) -> Array:
    """Return the core of a tangent vector in the bases of ``augment(point, ...)``.

    The block of the old bases holds Cdot, the block that is new in mode i only holds
    ``Ten_i(Utilde_i^T Kdot_i Q_i^T)``, all others are zero. The Q_i are computed unless `right`
    gives them.
    """
    blocks = []
    for mode, (u, k) in enumerate(zip(wide.factors, tangent.factors, strict=True)):
        new = u[:, point.ranks[mode] :]
        extent = list(point.ranks)
        extent[mode] = _ops.shape(new)[1]
        if not extent[mode]:
            blocks.append(_ops.zeros(extent, like=tangent.core))
            continue
        q = None if right is None else right[mode]
        q = right_basis(point.core, mode) if q is None else q
        blocks.append(_ops.fold((new.T @ k) @ q.T, mode, extent))
    return _border(tangent.core, blocks)


def transport(point: Any, tangent: TuckerTangent, target: Any) -> TuckerTangent:
    """Vector transport: the tangent vector projected on the tangent space at `target`.

    Parameters
    ----------
    point, target : pair
        With orthonormal factors, tensors of one shape; ranks may differ.
    tangent : TuckerTangent
        At `point`.

    Returns
    -------
    TuckerTangent
        At `target`. Never longer than `tangent`.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.ones((3, 4)), 1)
    >>> tangent = gt.project(point, np.eye(3, 4))
    >>> moved = gt.transport(point, tangent, point)
    >>> np.allclose(moved.core, tangent.core)
    True
    """
    return project(target, tangent_to_point(point, tangent))
