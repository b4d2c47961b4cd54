"""HOSVD, orthonormalisation and truncation, with the proven bound of their error."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _ops
from ._errors import RankError, ShapeError
from ._ops import Array
from ._ranks import Facts, ModeRule, RankRule, Ranks, Spectrum, Values, as_rule, choose, tail_norms
from ._tensor import (
    TuckerPoint,
    as_fitting,
    as_point,
    check_floating,
    check_norm,
    check_real,
    pair_of,
)

__all__ = [
    "Truncation",
    "follow",
    "hosvd",
    "orthonormalise",
    "round",
    "spectrum",
    "st_hosvd",
    "truncate",
]


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
        squared tails of singular values (De Lathauwer et al. 2000, Property 10). Infinite where no
        singular values were computed.
    """

    point: TuckerPoint
    rotations: tuple[Array, ...]
    error_bound: float

    @property
    def shrunk(self) -> tuple[int, ...]:
        """The modes that have lost something."""
        return tuple(mode for mode, p in enumerate(self.rotations) if not _is_square(p))

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

    Raises
    ------
    ShapeError, BackendError
        If it is no Tucker tensor, as for `as_point`.
    NonFiniteError
        If an entry is NaN or infinite, or the norm is beyond the dtype.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.orthonormalise((np.ones((1, 1)), [np.ones((4, 1)), np.ones((9, 1))]))
    >>> abs(point.core).tolist()
    [[6.0]]
    """
    point = as_fitting(point)
    pairs = [_ops.qr(factor) for factor in point.factors]
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it raises
        core = _ops.multi_mode_product(point.core, [r for _, r in pairs])
    if not _ops.norm(core) <= _ops.largest_number(core):
        as_point(point)  # names what was not finite before
        check_norm(core, "core with orthonormal factors")
    return TuckerPoint(core, tuple(q for q, _ in pairs))


def _decompose_all(
    cores: Sequence[Array], shapes: Sequence[tuple[int, ...]], facts: Sequence[Facts]
) -> list[tuple[Spectrum, list[Array]]]:
    """Return the singular values and left singular vectors of each unfolding of each core."""
    # Both unfoldings of a matrix have one SVD; other modes have their own.
    matrices = [(core,) for core, shape in zip(cores, shapes, strict=True) if len(shape) == 2]
    unfoldings = [
        (_ops.unfold(core, mode),)
        for core, shape in zip(cores, shapes, strict=True)
        if len(shape) != 2
        for mode in range(len(shape))
    ]
    both = iter(_ops.batched(_ops.svd_both, matrices))
    single = iter(_ops.batched(_ops.svd, unfoldings))
    pairs: list[tuple[Array, Array]] = []
    for shape in shapes:
        if len(shape) == 2:
            u, s, v = next(both)
            pairs += [(u, s), (v, s)]
        else:
            pairs += [(u, s) for u, s in (next(single) for _ in shape)]
    values = iter(_ops.lists([s for _, s in pairs]))
    vectors = iter(pairs)
    return [
        (
            Spectrum(
                shape, tuple(_values(next(values)) for _ in shape), _ops.itemsize(core), known
            ),
            [next(vectors)[0] for _ in shape],
        )
        for core, shape, known in zip(cores, shapes, facts, strict=True)
    ]


def _values(s: Sequence[float]) -> Values:
    values: Values = np.asarray(s, np.float64)
    return values


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
        If the core holds NaN or infinity, or its norm is beyond the dtype.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.diag([4.0, 3.0, 0.0]), 2)
    >>> [values.round(6).tolist() for values in gt.spectrum(point).values]
    [[4.0, 3.0], [4.0, 3.0]]
    """
    point = pair_of(point)
    check_norm(point.core, "core")
    ((found, _),) = _decompose_all([point.core], [point.shape], [Facts()])
    return found


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
        If a core holds NaN or infinity, or its norm is beyond the dtype.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.diag([4.0, 3.0, 1e-3]), gt.Tolerance(0.0))
    >>> cut, = gt.truncate([point], gt.Fixed(2))
    >>> cut.point.ranks, f"{cut.error_bound:.6f}"
    ((2, 2), '0.001414')
    """
    points = [pair_of(point) for point in points]
    norms = _ops.norms([point.core for point in points])
    limits = [_ops.largest_number(point.core) for point in points]
    if not all(norm <= limit for norm, limit in zip(norms, limits, strict=True)):
        for point in points:  # else some backends' SVD fails and some returns NaN
            check_norm(point.core, "core")
    facts = [Facts()] * len(points) if facts is None else facts
    if len(facts) != len(points):
        raise RankError(f"facts: expected one for each of {len(points)} points, got {len(facts)}")
    decomposed = _decompose_all([p.core for p in points], [p.shape for p in points], facts)
    chosen = choose(rule, [spectrum for spectrum, _ in decomposed])
    return [
        _cut(point, ranks, spectrum, vectors)
        for point, ranks, (spectrum, vectors) in zip(points, chosen, decomposed, strict=True)
    ]


def follow(
    wides: Sequence[TuckerPoint],
    ranks: Sequence[Ranks],
    right: Sequence[Sequence[Array | None]],
) -> list[Truncation]:
    """Truncate extended points to the ranks that they had before, without a decomposition.

    ``P_i = orth(Mat_i(C) Q_i)`` with the Q_i of the core before it was extended: the K-step of a
    fixed-rank integrator (Ceruti, Lubich 2022), one step of orthogonal iteration towards the
    singular vectors that `truncate` takes. To first order in the step both are the projection of
    the step on the tangent space. Nothing is asked of the device.

    Parameters
    ----------
    wides : sequence of TuckerPoint
        What `augment` returned, and whose cores have been stepped since.
    ranks : sequence of tuples of int
        The ranks before.
    right : sequence of sequences of arrays, shapes (prod_{j != i} r_j, r_i)
        The Q_i of ``Mat_i(C)^T = Q_i S_i^T`` before; None in modes that were not extended.

    Returns
    -------
    list of Truncation
        Their bounds of the error are infinite.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> from geotucker._geometry import right_bases
    >>> from geotucker._hosvd import follow
    >>> point = gt.hosvd(np.diag([2.0, 1.0]), 1)
    >>> wide = gt.augment(point, [np.array([[0.0], [1.0]])] * 2)
    >>> (cut,) = follow([wide], [point.ranks], [right_bases(point.core)])
    >>> np.allclose(gt.to_dense(cut.point), gt.to_dense(point))
    True
    """
    rows = [
        (_ops.unfold(_ops.leading(wide.core, old, mode), mode), q)
        for wide, old, own in zip(wides, ranks, right, strict=True)
        for mode, q in enumerate(own)
        if q is not None and wide.ranks[mode] != old[mode]
    ]
    turned = iter(_ops.batched(lambda unfolded, q: _ops.qr(unfolded @ q)[:1], rows))
    cuts = []
    for wide, old in zip(wides, ranks, strict=True):
        rotations = tuple(
            _ops.eye(after, like=wide.core) if before == after else next(turned)[0]
            for before, after in zip(wide.ranks, old, strict=True)
        )
        cuts.append(_turned(wide, _turn(wide.core, rotations), rotations, math.inf))
    return cuts


def _cut(
    point: TuckerPoint, ranks: Ranks, spectrum: Spectrum, vectors: Sequence[Array]
) -> Truncation:
    # A mode that loses nothing needs no rotation: its moments stay as they are, and time is saved.
    leading = [
        _ops.eye(rank, like=u) if rank == _ops.shape(u)[0] else u[:, :rank]
        for u, rank in zip(vectors, ranks, strict=True)
    ]
    core, rotations = drop_infeasible(_turn(point.core, leading), leading)
    tails = [tail_norms(s)[rank] for s, rank in zip(spectrum.values, ranks, strict=True)]
    return _turned(point, core, rotations, math.hypot(*tails))


def _turned(
    point: TuckerPoint, core: Array, rotations: tuple[Array, ...], bound: float
) -> Truncation:
    factors = tuple(
        u if _is_square(p) else u @ p for u, p in zip(point.factors, rotations, strict=True)
    )
    return Truncation(TuckerPoint(core, factors), rotations, bound)


def _turn(tensor: Array, rotations: Sequence[Array], skip: int | None = None) -> Array:
    """Apply the transposes of rotations, of which the square ones are identities."""
    identities = [mode for mode, p in enumerate(rotations) if _is_square(p)]
    skipped = identities if skip is None else [*identities, skip]
    return _ops.multi_mode_product(tensor, rotations, transpose=True, skip=skipped)


def _is_square(matrix: Array) -> bool:
    rows, columns = _ops.shape(matrix)
    return rows == columns


def drop_infeasible(core: Array, rotations: Sequence[Array]) -> tuple[Array, tuple[Array, ...]]:
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
        For arrays and ranks that cannot be used; NonFiniteError also if the norm, and so perhaps
        an entry of the core, is beyond the dtype.

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
    ((spectrum, vectors),) = _decompose_all([tensor], [_ops.shape(tensor)], [Facts()])
    (chosen,) = choose(as_rule(ranks), [spectrum])
    leading = [u[:, :rank] for u, rank in zip(vectors, chosen, strict=True)]
    core = _ops.multi_mode_product(tensor, leading, transpose=True)
    return TuckerPoint(*drop_infeasible(core, leading))


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
        For arrays and ranks that cannot be used, as for `hosvd`; RankError also if the rule needs
        the spectra of all modes at once.

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
    rule = as_mode_rule(ranks, "st_hosvd")
    core, factors = tensor, []
    for mode in range(len(_ops.shape(tensor))):
        core, factor, _ = cut_mode(core, mode, rule, _ops.shape(tensor))
        factors.append(factor)
    return TuckerPoint(*drop_infeasible(core, factors))


def cut_mode(
    core: Array, mode: int, rule: ModeRule, shape: tuple[int, ...]
) -> tuple[Array, Array, float]:
    """Truncate one mode of a tensor; return the smaller tensor, the basis and the tail.

    `shape` is that of the whole tensor, of which other modes may be cut already.
    """
    u, s = _ops.svd(_ops.unfold(core, mode))
    values = _values(s.tolist())
    rank = choose_rank(rule, values, mode, shape)
    basis = u[:, :rank]
    tail = float(tail_norms(values)[rank])
    return _ops.mode_product(core, basis, mode, transpose=True), basis, tail


def choose_rank(rule: ModeRule, values: Values, mode: int, shape: tuple[int, ...]) -> int:
    """Ask a rule for the rank of one mode, and check the answer."""
    rank = rule.mode_rank(values, mode, shape)
    if not 1 <= rank <= len(values):
        raise RankError(
            f"ranks: expected from 1 to {len(values)} for mode {mode} of a tensor of shape "
            f"{shape}, got {rank} from {rule}"
        )
    return rank


def as_mode_rule(ranks: Any, caller: str) -> ModeRule:
    """Return a rule that decides mode by mode, or raise RankError."""
    rule = as_rule(ranks)
    if not isinstance(rule, ModeRule):
        raise RankError(
            f"ranks: {caller} needs a rule that decides mode by mode, got {rule}; use hosvd"
        )
    return rule


def _check_tensor(tensor: Array) -> None:
    check_floating(tensor, "tensor")
    if not _ops.shape(tensor):
        raise ShapeError("tensor: expected order at least 1, got a scalar")
    check_norm(tensor, "tensor")
