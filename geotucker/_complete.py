"""Completion where all is chosen: ranks, ridge and pooling by entries that are held out."""

import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import _ops
from ._errors import BackendError, RankError, ShapeError
from ._hosvd import orthonormalise, round
from ._integrators import ConjugateGradient
from ._minimize import minimize, when_flat
from ._objectives import Entries, Fit, Pooled
from ._ops import Array
from ._ranks import Fixed, is_count
from ._tensor import TuckerPoint, check_finite, check_floating

__all__ = ["Completion", "Trial", "complete"]

# Folds are held out until they have so many entries: the error is then known to a percent or two.
_ENOUGH = 10_000
# With fewer entries than this for each slice, fits that pool slices are tried first.
_PLENTY = 20
# A fall of the held-out error by less than this share is none.
_MARGIN = 1e-3
# Share of the time that is left to the last fit, and how many times the steps of a trial it has.
_LAST_SHARE, _LAST_STEPS = 0.15, 3


class Trial(NamedTuple):
    """Settings that were tried, and their error on the held-out entries, relative to their norm."""

    ranks: tuple[int, ...]
    ridge: float
    pooling: float
    error: float


class Completion(NamedTuple):
    """What `complete` returns.

    Parameters
    ----------
    point : TuckerPoint
        The tensor, with orthonormal factors, fitted to all observed entries.
    ridge, pooling : float
        As chosen: the point is a minimum of ``Fit(Pooled(Entries(...), pooling), values,
        ridge=ridge)``, or near one.
    error : float
        On the entries that were held out, relative to their norm. It was chosen among many, and
        is therefore a little optimistic.
    trials : tuple of Trial
        All that was tried, in this order.
    """

    point: TuckerPoint
    ridge: float
    pooling: float
    error: float
    trials: tuple[Trial, ...]


class _Settings(NamedTuple):
    """A place in the search."""

    level: int  # which of the candidates for the ranks
    ridge: float  # in units of the noise's share of the energy
    pooling: float


class _Fold(NamedTuple):
    """Entries to fit and entries to judge by."""

    fitted: Entries
    values: Array
    held_out: Entries
    targets: Array


class _Stand(NamedTuple):
    """Where a climb has come to: one fit for each fold."""

    settings: _Settings
    points: list[TuckerPoint]
    error: float
    squares: Array  # of the errors, of each entry held out

    def surely_beats(self, other: "_Stand") -> bool:
        """Tell whether the error is smaller by more than a standard error of the difference."""
        gain = other.squares - self.squares
        (count,) = _ops.shape(gain)
        mean = _ops.total(gain) / count
        return mean > _ops.norm(gain - mean) / count


_Move: TypeAlias = Callable[[_Settings], _Settings]


def complete(
    indices: Sequence[Any],
    values: Array,
    shape: Sequence[int],
    *,
    candidates: Sequence[Any] | None = None,
    folds: int = 5,
    steps: int = 10,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> Completion:
    """Complete a tensor from entries that may be few and noisy: nothing has to be chosen.

    Ranks, the weight of the ridge and how much slices are pooled (`Pooled`) are found by a search
    that cross-validates: from rank one, a setting is changed at a time, each fit goes on from
    the last one, and a change stays if the error on the held-out entries has fallen. There are two
    climbs, with pooling and without, the more promising one first (pooled where there are few
    entries for each slice); the second one counts if it is better by more than a standard error.
    The settings are then fitted to all entries. Every
    ridge is in proportion to the error reached so far, an estimate of the noise. Of many entries
    only as many folds are held out as tell the error well.

    Parameters
    ----------
    indices : sequence of d integer arrays, shape (m,)
        Coordinates of the entries, as ``numpy.nonzero`` returns them; see `Entries`.
    values : array, shape (m,)
        The entries, of the library, dtype and device that are to compute.
    shape : sequence of int
        Shape (n_1, ..., n_d) of the tensor.
    candidates : sequence, optional
        For the ranks, each as for `Fixed`, from small to large; all ones comes before them. By
        default common ranks, in steps of half of what there is.
    folds : int
        At least 2; each is held out once. Not more than there are entries.
    steps : int
        Of conjugate gradients, at most, for each trial and fold.
    seconds : float
        The search ends in time for the last fit to end then, but for the step in progress. Without
        it the search takes what it takes: seconds to minutes for some ten thousand entries.
    clock : callable
        What tells the seconds; ``time.process_time`` does not see other processes.
    seed : int
        Of the folds.

    Returns
    -------
    Completion

    Raises
    ------
    BackendError, NonFiniteError, ShapeError
        If indices, values and shape do not fit each other, as for `completion`; if values have half
        precision, or there are fewer than two.
    RankError
        If a candidate cannot be used, or is smaller in a mode than the one before.
    ValueError
        If `folds`, `steps` or `seconds` is out of its range.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> rng = np.random.default_rng(0)
    >>> truth = np.add.outer(np.add.outer(np.arange(6.0), np.arange(7.0)), np.arange(8.0))
    >>> known = np.nonzero(rng.random(truth.shape) < 0.3)
    >>> noisy = truth + rng.standard_normal(truth.shape)
    >>> result = gt.complete(known, noisy[known], truth.shape, seconds=10)
    >>> bool(np.linalg.norm(gt.to_dense(result.point) - truth) < 0.1 * np.linalg.norm(truth))
    True
    """
    began = clock()
    check_floating(values, "values")
    entries = Entries(indices, tuple(operator.index(n) for n in shape), values)
    if _ops.shape(values) != entries.observed_shape:
        raise ShapeError(
            f"values: expected shape {entries.observed_shape}, one for each index, "
            f"got {_ops.shape(values)}"
        )
    check_finite(values, "values")
    (count,) = entries.observed_shape
    if _ops.itemsize(values) < 4:
        raise BackendError(f"values: expected float32 or float64, got {_ops.dtype_name(values)}")
    if count < 2:
        raise ShapeError(f"values: expected at least two entries, one is held out, got {count}")
    if not (is_count(folds) and folds > 1):
        raise ValueError(f"folds: expected an integer of at least 2, got {folds}")
    if not is_count(steps):
        raise ValueError(f"steps: expected a positive integer, got {steps}")
    if not seconds > 0.0:
        raise ValueError(f"seconds: expected a positive number, got {seconds}")
    # Squares of values in other units may overflow or vanish.
    scale = _ops.norm(values) / math.sqrt(count) or 1.0
    values = values / scale
    search = _Search(
        candidates=_candidates(candidates, entries.shape, count),
        folds=list(_folds(entries, values, min(folds, count), seed)),
        steps=steps,
        exact=100.0 * _ops.eps(values),  # beyond, errors are nothing but rounding
        out_of_time=lambda: clock() - began > (1.0 - _LAST_SHARE) * seconds,
    )
    first, second = _climbs(count, entries.shape)
    best = search.climb(*first)
    if not search.out_of_time():
        other = search.climb(*second)
        best = other if other.surely_beats(best) else best
    settings, points, error, _ = best
    fit, level = search.fit(entries, values, settings, error)
    point = _advance(fit, level, points[0], _LAST_STEPS * steps, lambda: clock() - began > seconds)
    point = TuckerPoint(scale * point.core, point.factors)
    return Completion(point, fit.ridge, settings.pooling, error, tuple(search.trials))


class _Search:
    """What all trials have in common, and what came of them."""

    def __init__(
        self,
        candidates: list[tuple[int, ...]],
        folds: list[_Fold],
        steps: int,
        exact: float,
        out_of_time: Callable[[], bool],
    ) -> None:
        self.candidates, self.folds, self.steps, self.exact = candidates, folds, steps, exact
        self.out_of_time = out_of_time
        self.norm = math.hypot(*(_ops.norm(fold.targets) for fold in folds)) or 1.0
        self.trials: list[Trial] = []

    def climb(self, start: _Settings, moves: Sequence[_Move]) -> _Stand:
        """Move for as long as a move helps; one that has helped is tried again at once."""
        stand = self._try(start, None)
        queue, failures = list(moves), 0
        while stand.error > self.exact and failures < len(queue) and not self.out_of_time():
            settings = queue[0](stand.settings)
            level = min(max(settings.level, 0), len(self.candidates) - 1)
            tried = self._try(settings._replace(level=level), stand)
            if tried.error < (1.0 - _MARGIN) * stand.error:
                stand, failures = tried, 0
            else:
                queue, failures = [*queue[1:], queue[0]], failures + 1
        return stand

    def fit(
        self, entries: Entries, values: Array, settings: _Settings, error: float
    ) -> tuple[Fit, tuple[int, ...]]:
        """Return the objective and the ranks, given the error so far."""
        ridge = settings.ridge * min(1.0, error) ** 2
        objective = Fit(Pooled(entries, settings.pooling), values, ridge=ridge)
        return objective, self.candidates[settings.level]

    def _try(self, settings: _Settings, stand: _Stand | None) -> _Stand:
        """Fit and judge all folds, from where a climb stands."""
        points, residuals, ridge = [], [], 0.0
        for number, fold in enumerate(self.folds):
            if stand is not None and self.out_of_time():
                return stand  # a trial of some of the folds cannot be compared
            before = None if stand is None else stand.points[number]
            error = 1.0 if stand is None else stand.error
            fit, ranks = self.fit(fold.fitted, fold.values, settings, error)
            points.append(_advance(fit, ranks, before, self.steps, self.out_of_time))
            residuals.append(fold.held_out.predict(points[-1]) - fold.targets)
            ridge = fit.ridge
        residual = _ops.concatenate(residuals, 0)
        error = _ops.norm(residual) / self.norm
        self.trials.append(Trial(self.candidates[settings.level], ridge, settings.pooling, error))
        return _Stand(settings, points, error, residual * residual)


def _advance(
    fit: Fit,
    ranks: tuple[int, ...],
    before: TuckerPoint | None,
    steps: int,
    out_of_time: Callable[[], bool],
) -> TuckerPoint:
    """Return a better tensor, of given ranks, than one of any ranks cut to these."""
    pooled = fit.map
    assert isinstance(pooled, Pooled)
    if before is None:
        start = fit.start(ranks)
    else:
        start = round(pooled.coordinates(before), ranks)
        if start.ranks != ranks:
            start = fit.grow(start, ranks)
    result = minimize(
        fit,
        start,
        integrator=ConjugateGradient(),
        ranks=ranks,
        steps=steps,
        stop=when_flat(relative_change=1e-3, window=3),
        callback=lambda point, report: out_of_time(),
    )
    return orthonormalise(pooled.tensor(result.point))


def _climbs(count: int, shape: tuple[int, ...]) -> list[tuple[_Settings, list[_Move]]]:
    """Return where climbs start, and what they try, the more promising one first.

    Where a tensor of low rank spreads over all its entries, m of N observed ones weigh as a ridge
    of ``m / N`` does.
    """
    share = count / math.prod(shape)
    plain = _Settings(0, 0.3 * share, 0.0), [_wider, _ridge(0.1), _ridge(10.0), _again, _narrower]
    pooled = (
        _Settings(0, share, 0.5),
        [_wider, _ridge(10.0), _pooling(0.1), _ridge(0.1), _pooling(10.0), _again, _narrower],
    )
    return [plain, pooled] if count > _PLENTY * sum(shape) else [pooled, plain]


def _wider(settings: _Settings) -> _Settings:
    return settings._replace(level=settings.level + 1)


def _narrower(settings: _Settings) -> _Settings:
    """Go back: more ranks may have helped only because they came with more steps."""
    return settings._replace(level=settings.level - 1)


def _again(settings: _Settings) -> _Settings:
    return settings


def _ridge(factor: float) -> _Move:
    return lambda settings: settings._replace(ridge=factor * settings.ridge)


def _pooling(factor: float) -> _Move:
    """Multiply the odds."""

    def move(settings: _Settings) -> _Settings:
        odds = factor * settings.pooling / (1.0 - settings.pooling)
        return settings._replace(pooling=min(odds / (1.0 + odds), 0.999))

    return move


def _candidates(
    given: Sequence[Any] | None, shape: tuple[int, ...], count: int
) -> list[tuple[int, ...]]:
    """Return feasible ranks from ones upwards."""
    given = _common(shape, count) if given is None else given
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise RankError(f"candidates: expected a sequence of ranks, got {given!r}")
    found = dict.fromkeys(Fixed(one).for_shape(shape) for one in (1, *given))
    candidates = list(found)
    for smaller, larger in pairwise(candidates):
        if any(a > b for a, b in zip(smaller, larger, strict=True)):
            raise RankError(
                f"candidates: expected ranks from small to large, got {larger} after {smaller}"
            )
    return candidates


def _common(shape: tuple[int, ...], count: int) -> list[int]:
    """Return common ranks for which the core has at most as many entries as were observed."""
    ranks = [1]
    while ranks[-1] < max(shape):
        rank = ranks[-1] + max(1, ranks[-1] // 2)
        if math.prod(min(n, rank) for n in shape) > count:
            break
        ranks.append(rank)
    return ranks


def _folds(entries: Entries, values: Array, folds: int, seed: int) -> Iterator[_Fold]:
    """Yield folds until enough entries are held out."""
    (count,) = entries.observed_shape
    order = np.random.default_rng(seed).permutation(count)
    parts = np.array_split(order, folds)
    seen = 0
    for number, part in enumerate(parts):
        rest = np.sort(np.concatenate(parts[:number] + parts[number + 1 :]))
        yield _Fold(
            entries.select(rest),
            _ops.take(values, _ops.index_like(rest, values)),
            entries.select(part),
            _ops.take(values, _ops.index_like(part, values)),
        )
        seen += len(part)
        if seen >= _ENOUGH:
            return
