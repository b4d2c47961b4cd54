"""HOSVD, orthonormalisation and truncation, with the proven bound of their error."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _ops
from ._errors import RankError, ShapeError
from ._ops import Array
from ._ranks import Facts, ModeRule, RankRule, Ranks, Spectrum, as_rule, choose, tail_norms
from ._tensor import TuckerPoint, as_point, check_finite, check_floating, check_real, pair_of

__all__ = ["Truncation", "hosvd", "orthonormalise", "round", "spectrum", "st_hosvd", "truncate"]


class Truncation(NamedTuple):
    """A truncated point and what is needed to carry other tensors along.

    Parameters
    ----------
    point : TuckerPoint
        Orthonormal factors ``U_i P_i`` and core ``C x_i P_i^T``.
    rotations : tuple of arrays, shapes (old r_i, new r_i)
        The P_i, with orthonormal columns; identities in modes that lost nothing.
    error_bound : float
        Upper bound of ``||W - W_truncated||``: the root of the sum over modes of the
        squared tails of singular values (De Lathauwer et al. 2000, Property 10).
    """

    point: TuckerPoint
    rotations: tuple[Array, ...]
    error_bound: float

    def turn(self, tensor: Array, skip: int | None = None) -> Array:
        """Return ``tensor x_i P_i^T`` over all modes but `skip`.

        Examples
        --------
        >>> import numpy as np, geotucker as gt
        >>> point = gt.hosvd(np.diag([4.0, 3.0]), 2)
        >>> (cut,) = gt.truncate([point], gt.Fixed(1))
        >>> np.allclose(cut.turn(point.core), cut.point.core)
        True
        """
        check_real((tensor, ()), "tensor")
        return _turn(tensor, self.rotations, skip)


def orthonormalise(point: Any) -> TuckerPoint:
    """Return the same tensor with orthonormal factors, by QR of each factor.

    Ranks stay, except that a mode with more columns than rows shrinks to its dimension.

    Parameters
    ----------
    point : pair
        Any ``(core, factors)``.

    Returns
    -------
    TuckerPoint
        Factors with ``U_i^T U_i = I`` to rounding, also where columns were dependent.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.orthonormalise((np.ones((1, 1)), [np.ones((4, 1)), np.ones((9, 1))]))
    >>> abs(point.core).tolist()
    [[6.0]]
    """
    point = as_point(point)
    pairs = [_ops.qr(factor) for factor in point.factors]
    core = _ops.multi_mode_product(point.core, [r for _, r in pairs])
    return TuckerPoint(core, tuple(q for q, _ in pairs))


def _decompose(core: Array, shape: tuple[int, ...], facts: Facts) -> tuple[Spectrum, list[Array]]:
    """Return the singular values and left singular vectors of each unfolding of the core."""
    if len(shape) == 2:  # both unfoldings of a matrix have one SVD
        u, s, v = _ops.svd_both(core)
        pairs = [(u, s), (v, s)]
    else:
        pairs = [_ops.svd(_ops.unfold(core, mode)) for mode in range(len(shape))]
    values = tuple(_values(s) for _, s in pairs)
    return Spectrum(shape, values, _ops.itemsize(core), facts), [u for u, _ in pairs]


def _values(s: Array) -> "np.ndarray[Any, np.dtype[Any]]":
    return _ops.to_numpy(s).astype(np.float64)


def spectrum(point: Any) -> Spectrum:
    """Return the singular values of every unfolding of an orthonormal point.

    They are those of the core's unfoldings, as ``Mat_i(W) = U_i Mat_i(C) (...)^T``: the dense
    tensor is not formed. In every mode their squares add up to ``||W||^2``.

    Parameters
    ----------
    point : pair
        ``(core, factors)`` with orthonormal factors (not checked).

    Returns
    -------
    Spectrum
        What rank rules are told; its values are NumPy's, in float64, per mode at most r_i.

    Raises
    ------
    NonFiniteError
        If the core holds NaN or infinity.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.diag([4.0, 3.0, 0.0]), 2)
    >>> [values.round(6).tolist() for values in gt.spectrum(point).values]
    [[4.0, 3.0], [4.0, 3.0]]
    """
    point = pair_of(point)
    check_finite(point.core, "core")
    return _decompose(point.core, point.shape, Facts())[0]


def truncate(
    points: Sequence[TuckerPoint], rule: RankRule, facts: Sequence[Facts] | None = None
) -> list[Truncation]:
    """Truncate orthonormal points by the HOSVD of their cores, ranks chosen for all at once.

    This is the last phase of Algorithm 1 (arXiv:2305.19059, lines 10-14): the P_i are the
    leading left singular vectors of ``Mat_i(C)``.

    Parameters
    ----------
    points : sequence of TuckerPoint
        With orthonormal factors (not checked).
    rule : RankRule
        Sees the spectra of all points together.
    facts : sequence of Facts, optional
        What else the rule is told, one for each point: some rules need it.

    Returns
    -------
    list of Truncation

    Raises
    ------
    RankError
        If the rule returns unusable ranks, or there is not one of `facts` for each point.
    NonFiniteError
        If a core holds NaN or infinity.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.diag([4.0, 3.0, 1e-3]), gt.Tolerance(0.0))
    >>> cut, = gt.truncate([point], gt.Fixed(2))
    >>> cut.point.ranks, f"{cut.error_bound:.6f}"
    ((2, 2), '0.001414')
    """
    points = [pair_of(point) for point in points]
    for point in points:
        check_finite(point.core, "core")  # else some backends' SVD fails and some returns NaN
    facts = [Facts()] * len(points) if facts is None else facts
    if len(facts) != len(points):
        raise RankError(f"facts: expected one for each of {len(points)} points, got {len(facts)}")
    decomposed = [
        _decompose(point.core, point.shape, known)
        for point, known in zip(points, facts, strict=True)
    ]
    chosen = choose(rule, [spectrum for spectrum, _ in decomposed])
    return [
        _cut(point, ranks, spectrum, vectors)
        for point, ranks, (spectrum, vectors) in zip(points, chosen, decomposed, strict=True)
    ]


def _cut(
    point: TuckerPoint, ranks: Ranks, spectrum: Spectrum, vectors: Sequence[Array]
) -> Truncation:
    # A mode that loses nothing needs no rotation: its moments stay as they are, and time is saved.
    leading = [
        _ops.eye(rank, like=u) if rank == _ops.shape(u)[0] else u[:, :rank]
        for u, rank in zip(vectors, ranks, strict=True)
    ]
    core, rotations = _drop_infeasible(_turn(point.core, leading), leading)
    factors = tuple(
        u if _is_square(p) else u @ p for u, p in zip(point.factors, rotations, strict=True)
    )
    tails = [tail_norms(s)[rank] for s, rank in zip(spectrum.values, ranks, strict=True)]
    return Truncation(TuckerPoint(core, factors), rotations, math.hypot(*tails))


def _turn(tensor: Array, rotations: Sequence[Array], skip: int | None = None) -> Array:
    """Apply the transposes of rotations, of which the square ones are identities."""
    identities = [mode for mode, p in enumerate(rotations) if _is_square(p)]
    skipped = identities if skip is None else [*identities, skip]
    return _ops.multi_mode_product(tensor, rotations, transpose=True, skip=skipped)


def _is_square(matrix: Array) -> bool:
    rows, columns = _ops.shape(matrix)
    return rows == columns


def _drop_infeasible(core: Array, rotations: Sequence[Array]) -> tuple[Array, tuple[Array, ...]]:
    """Make ``r_i <= prod_{j != i} r_j`` hold; nothing is lost, such a mode has null columns."""
    rotations = list(rotations)
    mode = 0
    while mode < len(rotations):
        ranks = _ops.shape(core)
        if ranks[mode] > math.prod(ranks) // ranks[mode]:
            u, _ = _ops.svd(_ops.unfold(core, mode))
            core = _ops.mode_product(core, u, mode, transpose=True)
            rotations[mode] = rotations[mode] @ u
            mode = 0  # a smaller rank here may make another mode infeasible
        else:
            mode += 1
    return core, tuple(rotations)


def round(point: Any, ranks: Any) -> TuckerPoint:
    """Lower the ranks of any Tucker tensor: orthonormalise, then truncate.

    Parameters
    ----------
    point : pair
        Any ``(core, factors)``.
    ranks : RankRule, int, float or tuple
        What to keep; with ``Tolerance(tau)`` the error is at most ``tau ||W||``.

    Returns
    -------
    TuckerPoint
        With orthonormal factors.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> a = gt.hosvd(np.diag([2.0, 1.0]), gt.Tolerance(0.0))
    >>> gt.round(gt.add(a, a), gt.Tolerance(1e-12)).ranks
    (2, 2)
    """
    return truncate([orthonormalise(point)], as_rule(ranks))[0].point


def hosvd(tensor: Array, ranks: Any) -> TuckerPoint:
    """Higher-order SVD of a dense tensor, truncated by a rule.

    Parameters
    ----------
    tensor : array, shape (n_1, ..., n_d)
        Real floating array of any backend, order at least 1.
    ranks : RankRule, int, float or tuple
        With ``Tolerance(tau)`` the error is at most ``tau ||tensor||``; with fixed ranks it
        is at most sqrt(d) times that of the best approximation.

    Returns
    -------
    TuckerPoint
        Orthonormal factors, all-orthogonal core.

    Raises
    ------
    BackendError, NonFiniteError, RankError, ShapeError
        For arrays and ranks that cannot be used.

    References
    ----------
    De Lathauwer, De Moor, Vandewalle. A multilinear singular value decomposition.
    SIAM J. Matrix Anal. Appl. 21 (2000).

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> tensor = np.arange(24.0).reshape(2, 3, 4)
    >>> point = gt.hosvd(tensor, gt.Tolerance(1e-10))
    >>> point.ranks, np.allclose(gt.to_dense(point), tensor)
    ((2, 2, 2), True)
    """
    _check_tensor(tensor)
    spectrum, vectors = _decompose(tensor, _ops.shape(tensor), Facts())
    (chosen,) = choose(as_rule(ranks), [spectrum])
    leading = [u[:, :rank] for u, rank in zip(vectors, chosen, strict=True)]
    core = _ops.multi_mode_product(tensor, leading, transpose=True)
    return TuckerPoint(*_drop_infeasible(core, leading))


def st_hosvd(tensor: Array, ranks: Any) -> TuckerPoint:
    """Sequentially truncated HOSVD: each mode is cut before the next is decomposed.

    Much cheaper than `hosvd` on large tensors and with the same guarantee.

    Parameters
    ----------
    tensor : array, shape (n_1, ..., n_d)
        Real floating array of any backend.
    ranks : ModeRule, int, float or tuple
        A rule that decides mode by mode.

    Returns
    -------
    TuckerPoint

    Raises
    ------
    BackendError, NonFiniteError, RankError, ShapeError
        For arrays and ranks that cannot be used; RankError also if the rule needs the
        spectra of all modes at once.

    References
    ----------
    Vannieuwenhoven, Vandebril, Meerbergen. A new truncation strategy for the higher-order
    singular value decomposition. SIAM J. Sci. Comput. 34 (2012), Theorem 6.5.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> gt.st_hosvd(np.arange(24.0).reshape(2, 3, 4), gt.Tolerance(1e-10)).ranks
    (2, 2, 2)
    """
    _check_tensor(tensor)
    rule = as_rule(ranks)
    if not isinstance(rule, ModeRule):
        raise RankError(
            f"ranks: st_hosvd needs a rule that decides mode by mode, got {rule}; use hosvd"
        )
    shape = _ops.shape(tensor)
    core, factors = tensor, []
    for mode in range(len(shape)):
        u, s = _ops.svd(_ops.unfold(core, mode))
        values = _values(s)
        rank = rule.mode_rank(values, mode, shape)
        if not 1 <= rank <= len(values):
            raise RankError(
                f"ranks: expected from 1 to {len(values)} for mode {mode} of a tensor of shape "
                f"{shape}, got {rank} from {rule}"
            )
        factors.append(u[:, :rank])
        core = _ops.mode_product(core, factors[-1], mode, transpose=True)
    return TuckerPoint(*_drop_infeasible(core, factors))


def _check_tensor(tensor: Array) -> None:
    check_floating(tensor, "tensor")
    if not _ops.shape(tensor):
        raise ShapeError("tensor: expected order at least 1, got a scalar")
    check_finite(tensor, "tensor")
