"""Tucker tensors: what a point is, how it is checked, and arithmetic without densifying."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import _ops
from ._errors import BackendError, NonFiniteError, RankError, ShapeError
from ._ops import Array

__all__ = [
    "TuckerPoint",
    "TuckerTangent",
    "add",
    "as_point",
    "inner",
    "norm",
    "scale",
    "to_dense",
]


class TuckerPoint(NamedTuple):
    """A tensor in Tucker format, ``W = core x_1 U_1 ... x_d U_d``.

    A plain pair: TensorLy's functions unpack it as it is. The integrators keep the factors
    orthonormal, ``U_i^T U_i = I``; the arithmetic of this module does not need that.

    Parameters
    ----------
    core : array, shape (r_1, ..., r_d)
        Core tensor.
    factors : tuple of arrays, shapes (n_i, r_i)
        Factor matrices (bases of the modes).

    Examples
    --------
    >>> import numpy as np, tensorly as tl, geotucker as gt
    >>> point = gt.hosvd(np.arange(24.0).reshape(2, 3, 4), gt.Tolerance(1e-12))
    >>> point.shape, point.ranks
    ((2, 3, 4), (2, 2, 2))
    >>> tl.tucker_to_tensor(point).shape
    (2, 3, 4)
    """

    core: Array
    factors: tuple[Array, ...]

    @property
    def order(self) -> int:
        """Number of modes d."""
        return len(self.factors)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (n_1, ..., n_d) of the tensor that is represented."""
        return tuple(_ops.shape(factor)[0] for factor in self.factors)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Shape (r_1, ..., r_d) of the core."""
        return _ops.shape(self.core)

    @property
    def size(self) -> int:
        """Number of stored entries: ``prod r_i + sum n_i r_i``."""
        pairs = zip(self.shape, self.ranks, strict=True)
        return math.prod(self.ranks) + sum(n * r for n, r in pairs)


class TuckerTangent(NamedTuple):
    """A tangent vector at a point (C, U) of the manifold of fixed multilinear rank.

    It stands for ``core x_1 U_1 ... x_d U_d + sum_i Ten_i(Q_i^T) x_i factors[i] x_{j != i} U_j``
    with ``Mat_i(C)^T = Q_i S_i^T`` (QR) and ``U_i^T factors[i] = 0``. These are the
    coordinates of Theorem 2.1 (arXiv:2305.19059): the factor part is a velocity of
    ``K_i = U_i S_i``, not of ``U_i``, so that no inverse of the core occurs, and since the
    Q_i are orthonormal the Euclidean inner product of coordinates is the one of tensors.

    Parameters
    ----------
    core : array, shape (r_1, ..., r_d)
        Velocity of the core.
    factors : tuple of arrays, shapes (n_i, r_i)
        Velocities of the K_i, orthogonal to U_i.
    """

    core: Array
    factors: tuple[Array, ...]


def as_point(pair: Any, name: str = "point") -> TuckerPoint:
    """Check any ``(core, factors)``, TensorLy's ``TuckerTensor`` included, and return a point.

    Parameters
    ----------
    pair : pair
        Core of shape (r_1, ..., r_d) and d factors of shapes (n_i, r_i), real floating
        arrays of one library and dtype.
    name : str
        What the error messages call it.

    Returns
    -------
    TuckerPoint
        The same arrays, not copied.

    Raises
    ------
    ShapeError
        If it is no pair, or the shapes do not fit.
    BackendError
        If an array is of an unknown library, or libraries or dtypes are mixed, or the
        dtype is not real floating.
    NonFiniteError
        If an entry is NaN or infinite.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> gt.as_point((np.ones((1, 1)), [np.ones((3, 1)), np.ones((2, 1))])).shape
    (3, 2)
    """
    point = as_fitting(pair, name)
    arrays = (point.core, *point.factors)
    if not all(map(math.isfinite, _ops.largest(arrays))):
        for part, array in zip(labels(point, name), arrays, strict=True):
            check_finite(array, part)
    return point


def as_fitting(pair: Any, name: str = "point") -> TuckerPoint:
    """Check all that `as_point` checks but that the entries are finite."""
    if isinstance(pair, TuckerTangent):
        raise ShapeError(
            f"{name}: expected a Tucker tensor, got a tangent vector in its own coordinates; "
            "write it as a tensor with geotucker.tangent_to_point"
        )
    try:
        core, factors = pair
        factors = tuple(factors)
    except (TypeError, ValueError) as error:
        raise ShapeError(
            f"{name}: expected a pair (core, factors), got {type(pair).__name__}"
        ) from error
    check_floating(core, f"{name}.core")
    ranks = _ops.shape(core)
    if len(ranks) != len(factors) or not ranks:
        raise ShapeError(
            f"{name}: expected one factor per mode of the core (order at least 1), "
            f"got {len(factors)} factors for a core of shape {ranks}"
        )
    for i, factor in enumerate(factors):
        check_like(factor, core, f"{name}.factors[{i}]")
        got = _ops.shape(factor)
        if len(got) != 2 or got[1] != ranks[i]:
            raise ShapeError(
                f"{name}.factors[{i}]: expected shape (n, {ranks[i]}) to fit the core of shape "
                f"{ranks}, got {got}"
            )
    return TuckerPoint(core, factors)


def labels(point: TuckerPoint, name: str) -> list[str]:
    """Return the names of core and factors for error messages."""
    return [f"{name}.core", *(f"{name}.factors[{i}]" for i in range(point.order))]


def check_floating(array: Array, name: str) -> None:
    """Raise BackendError unless `array` is dense, real floating and of a known library."""
    try:
        _ops.backend_name(array)
    except BackendError as error:
        raise BackendError(f"{name}: {error}") from None
    if not _ops.is_dense(array):
        raise BackendError(
            f"{name}: expected a dense array, got one of layout {array.layout}; convert it with "
            "to_dense()"
        )
    if not _ops.is_real_floating(array):
        kind = _ops.dtype_name(array)
        hint = "complex tensors are not supported" if "complex" in kind else "convert it first"
        raise BackendError(f"{name}: expected a real floating dtype, got {kind} ({hint})")
    if 0 in _ops.shape(array):
        raise ShapeError(f"{name}: expected at least one entry, got shape {_ops.shape(array)}")


def check_like(array: Array, reference: Array, name: str) -> None:
    """Raise BackendError unless `array` has the library and dtype of `reference`."""
    check_floating(array, name)
    got = (_ops.backend_name(array), _ops.dtype_name(array))
    expected = (_ops.backend_name(reference), _ops.dtype_name(reference))
    if got != expected:
        raise BackendError(
            f"{name}: expected {expected[0]} {expected[1]} as the other arrays, "
            f"got {got[0]} {got[1]}"
        )


def check_finite(array: Array, name: str) -> None:
    """Raise NonFiniteError if an entry is NaN or infinite."""
    if not math.isfinite(_ops.max_abs(array)):
        raise NonFiniteError(
            f"{name}: expected finite numbers, got NaN or infinity. Nothing was changed. "
            "The usual causes are a step size that is too large and input that is not finite"
        )


def check_norm(array: Array, name: str) -> None:
    """Raise NonFiniteError if the norm, and so perhaps a decomposition, is beyond the dtype."""
    norm, limit = _ops.norm(array), _ops.largest_number(array)
    if not norm <= limit:
        check_finite(array, name)
        raise NonFiniteError(
            f"{name}: expected a norm of at most {limit:.1e}, the largest number of "
            f"{_ops.dtype_name(array)}, got {norm:.1e}; scale it, or use a wider dtype"
        )


def check_alike(a: TuckerPoint, b: TuckerPoint) -> None:
    """Raise an error unless both stand for tensors of one shape, library and dtype."""
    check_like(b.core, a.core, "b")
    if a.shape != b.shape:
        raise ShapeError(f"b: expected a tensor of shape {a.shape} as a, got {b.shape}")


def to_dense(point: Any) -> Array:
    """Return the full array ``core x_1 U_1 ... x_d U_d`` of shape (n_1, ..., n_d).

    Raises
    ------
    ShapeError, BackendError
        If it is no ``(core, factors)``, as for `as_point`; NaN and infinity go through.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> gt.to_dense((np.full((1, 1), 2.0), [np.ones((2, 1)), np.ones((1, 1))])).tolist()
    [[2.0], [2.0]]
    """
    core, factors = as_fitting(point)
    return _ops.multi_mode_product(core, factors)


def pair_of(point: Any) -> TuckerPoint:
    """Unpack any pair, checking its dtypes only and not as `as_point` does (for inner loops)."""
    core, factors = point
    check_real(point)
    if isinstance(point, TuckerPoint) and isinstance(factors, tuple):
        return point  # the very object: objectives may know it again
    return TuckerPoint(core, tuple(factors))


def check_real(pair: Any, name: str = "point") -> None:
    """Raise BackendError unless all arrays of a point or tangent vector are real floating."""
    core, factors = pair
    for array in (core, *factors):
        if not _ops.is_real_floating(array):
            check_floating(array, name)


def real_number(value: Any, name: str) -> float:
    """Return a Python float; complex numbers, which some libraries would cut, are refused."""
    kind = _ops.dtype_name(value) if hasattr(value, "dtype") else type(value).__name__
    if "complex" in kind:
        raise BackendError(
            f"{name}: expected a real number, got {kind} (complex tensors are not supported)"
        )
    return float(value)


def inner(a: Any, b: Any) -> float:
    """Inner product ``<A, B>`` of two Tucker tensors, without densifying either.

    Works for any factors: ``<C_a x_i (U_b,i^T U_a,i), C_b>``, which costs about
    ``sum_i n_i r_i^2`` operations beside those on cores.

    Raises
    ------
    ShapeError
        If the tensors differ in shape.
    BackendError
        If they differ in library or dtype.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> a = (np.ones((1, 1)), [np.ones((3, 1)), np.ones((2, 1))])
    >>> gt.inner(a, a)
    6.0
    """
    a, b = as_point(a, "a"), as_point(b, "b")
    check_alike(a, b)
    grams = [ub.T @ ua for ua, ub in zip(a.factors, b.factors, strict=True)]
    return _ops.vdot(_ops.multi_mode_product(a.core, grams), b.core)


def norm(point: Any) -> float:
    """Frobenius norm of a Tucker tensor, without densifying.

    The factors are orthonormalised first: the square root of ``inner(a, a)`` would lose half
    the digits under cancellation.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> round(gt.norm((np.full((1, 1), 2.0), [np.ones((2, 1)), np.ones((2, 1))])), 12)
    4.0
    """
    point = as_point(point)
    triangles = [_ops.qr(factor)[1] for factor in point.factors]
    return _ops.norm(_ops.multi_mode_product(point.core, triangles))


def scale(point: Any, number: float) -> TuckerPoint:
    """Return ``number * W``; only the core is touched.

    Raises
    ------
    BackendError
        If the number is complex.
    NonFiniteError
        If the product is not finite.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> gt.scale((np.ones((1,)), [np.ones((2, 1))]), 3.0).core.tolist()
    [3.0]
    """
    point = as_point(point)
    # float(): NumPy's own float64 scalars would turn a float32 core into a float64 one.
    core = point.core * real_number(number, "number")
    check_finite(core, "number * core")
    return TuckerPoint(core, point.factors)


def add(a: Any, b: Any) -> TuckerPoint:
    """Return ``A + B`` with ranks ``r_a + r_b``: block-diagonal core, factors side by side.

    The result is exact and its factors are not orthonormal; `geotucker.round` brings it back
    to orthonormal factors and lower ranks.

    Raises
    ------
    ShapeError
        If the tensors differ in shape.
    BackendError
        If they differ in library or dtype.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> a = (np.ones((1, 1)), [np.ones((3, 1)), np.ones((2, 1))])
    >>> gt.add(a, a).ranks, gt.to_dense(gt.add(a, a))[0, 0].item()
    ((2, 2), 2.0)
    """
    a, b = as_point(a, "a"), as_point(b, "b")
    check_alike(a, b)
    ranks = [p + q for p, q in zip(a.ranks, b.ranks, strict=True)]
    core = pad(a.core, ranks) + pad(b.core, ranks, front=True)
    pairs = zip(a.factors, b.factors, strict=True)
    return TuckerPoint(core, tuple(_ops.concatenate(pair, 1) for pair in pairs))


def pad(core: Array, ranks: Sequence[int], front: bool = False) -> Array:
    """Zero-pad `core` behind (or in front of) its entries to the shape `ranks`."""
    for mode, rank in enumerate(ranks):
        extent = list(_ops.shape(core))
        extent[mode] = rank - extent[mode]
        if extent[mode]:
            block = _ops.zeros(extent, like=core)
            core = _ops.concatenate([block, core] if front else [core, block], mode)
    return core


def feasible(ranks: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Clamp ranks until ``r_i <= min(n_i, prod_{j != i} r_j)`` for every mode.

    No tensor has a multilinear rank that breaks this, and TensorLy 0.10 returns a wrong
    tensor for a rank above its dimension.

    Raises
    ------
    RankError
        If there is not one positive rank per mode.
    """
    if len(ranks) != len(shape) or any(rank < 1 for rank in ranks):
        raise RankError(
            f"ranks: expected {len(shape)} positive integers for a tensor of shape {tuple(shape)}, "
            f"got {tuple(ranks)}"
        )
    clamped = [min(rank, n) for rank, n in zip(ranks, shape, strict=True)]
    changed = True
    while changed:
        changed = False
        for i, rank in enumerate(clamped):
            others = math.prod(clamped[:i] + clamped[i + 1 :])
            if rank > others:
                clamped[i], changed = others, True
    return tuple(clamped)
