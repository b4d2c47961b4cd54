"""Rules that decide mode by mode, and the shorthands for them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .._errors import RankError
from .._tensor import feasible
from ._base import (
    ModeRule,
    RankRule,
    Ranks,
    Values,
    check_bounds,
    check_hysteresis,
    clip,
    is_count,
    smallest_rank,
    tail_norms,
)

__all__ = ["Fixed", "Growing", "Tolerance", "as_rule"]


@dataclass(frozen=True)
class Tolerance(ModeRule):
    """Smallest ranks whose truncation error is at most ``tau ||W||``.

    Each of the d modes may drop a tail of norm ``tau ||W|| / sqrt(d)``; the squared errors
    of the modes add up to at most ``(tau ||W||)^2`` (De Lathauwer, De Moor, Vandewalle 2000,
    Property 10; line 11 of Algorithm 1 in arXiv:2305.19059).

    Parameters
    ----------
    tau : float
        Relative tolerance in [0, 1).
    floor : int
        No mode goes below this rank (or its dimension).
    cap : int, optional
        No mode goes above this rank. A cap that acts voids the error bound.
    hysteresis : float
        In [0, 1). A mode goes below its previous rank, where that is known, only if the tail
        there is at most ``1 - hysteresis`` of what it may drop, so that a singular value near
        the threshold does not come and go. The bound of the error stays.
    spare : int
        Directions that are kept beyond these, as far as there are any: the largest of those that
        the tolerance would cut. A new direction is far smaller than a coarse tolerance when it
        appears; here it can grow until it counts. Without any, ranks hardly ever grow in training.

    Raises
    ------
    RankError
        If a value is out of its range.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> gt.hosvd(np.diag([4.0, 3.0, 1e-9]), gt.Tolerance(1e-6)).ranks
    (2, 2)
    """

    tau: float
    floor: int = 1
    cap: int | None = None
    hysteresis: float = 0.0
    spare: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0.0 <= self.tau < 1.0:
            raise RankError(f"tau: expected a number in [0, 1), got {self.tau}")
        if self.spare != 0 and not is_count(self.spare):
            raise RankError(f"spare: expected zero or a positive integer, got {self.spare}")
        check_bounds(self.floor, self.cap)
        check_hysteresis(self.hysteresis)

    def mode_rank(
        self, values: Values, mode: int, shape: Sequence[int], previous: int | None = None
    ) -> int:
        """Return the smallest rank whose tail is within the mode's share of the tolerance."""
        tails = tail_norms(values)
        allowed = self.tau * tails[0] / math.sqrt(len(shape))
        rank = smallest_rank(tails, allowed)
        if previous is not None and rank < (counted := previous - self.spare):
            rank = min(counted, smallest_rank(tails, (1.0 - self.hysteresis) * allowed))
        return clip(rank + self.spare, self.floor, self.cap, len(values))


@dataclass(frozen=True)
class Fixed(ModeRule):
    """Ranks that do not depend on the singular values.

    Parameters
    ----------
    ranks : int, float or tuple of int
        A tuple gives the rank of each mode. An integer is a common cap of all modes: mode i
        gets ``min(ranks, n_i)``, so that the small modes of a convolution stay full. A float
        in (0, 1] is the largest such cap at which the Tucker format takes at most that
        fraction of the dense tensor's entries (and at least 1).

    Raises
    ------
    RankError
        If a rank is not positive or a fraction is outside (0, 1].

    Examples
    --------
    >>> import geotucker as gt
    >>> gt.Fixed(10).for_shape((50, 20, 5, 5))
    (10, 10, 5, 5)
    >>> gt.Fixed(0.1).for_shape((128, 128, 3, 3))
    (28, 28, 3, 3)
    """

    ranks: int | float | tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the settings."""
        ranks = self.ranks
        if isinstance(ranks, (float, np.floating)):
            if not 0.0 < ranks <= 1.0:
                raise RankError(f"ranks: expected a fraction in (0, 1], got {ranks}")
        elif isinstance(ranks, tuple):
            if not ranks or any(not is_count(rank) for rank in ranks):
                raise RankError(f"ranks: expected positive integers, got {ranks}")
        elif not is_count(ranks):
            raise RankError(
                f"ranks: expected a positive integer, a fraction or a tuple, got {ranks!r}"
            )

    def for_shape(self, shape: Sequence[int]) -> Ranks:
        """Return the feasible ranks for a tensor of this shape.

        Raises
        ------
        RankError
            If a tuple of ranks has another length than `shape`.
        """
        if isinstance(self.ranks, tuple):
            return feasible(self.ranks, shape)
        if isinstance(self.ranks, (int, np.integer)):
            return feasible([int(self.ranks)] * len(shape), shape)
        budget = float(self.ranks) * math.prod(shape)  # NumPy's half precision would overflow
        low, high = 1, max(shape)  # the size grows with the cap: bisection
        while low < high:
            cap = (low + high + 1) // 2
            ranks = feasible([cap] * len(shape), shape)
            size = math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))
            low, high = (cap, high) if size <= budget else (low, cap - 1)
        return feasible([low] * len(shape), shape)

    def mode_rank(
        self, values: Values, mode: int, shape: Sequence[int], previous: int | None = None
    ) -> int:
        """Return the mode's rank, or the number of singular values if that is less."""
        return min(self.for_shape(shape)[mode], len(values))


@dataclass(frozen=True)
class Growing(ModeRule):
    """Ranks that grow from a common start by one every few steps, up to given ones.

    Each step of an integrator offers up to twice the ranks, of which the leading directions are
    kept, so that the dominant parts of a tensor are found first. Where few entries are known this
    guards against fitting them by chance.

    Parameters
    ----------
    ranks : int, float or tuple of int
        Where growth ends, as for `Fixed`.
    every : int
        Steps between two increments.
    start : int
        Rank of every mode in the first step.
    step : int, optional
        In force is what this step allows; by default the end. Integrators and `minimize` ask
        for ``rule.at(step)``.

    Raises
    ------
    RankError
        If a value is out of its range.

    Examples
    --------
    >>> import geotucker as gt
    >>> rule = gt.Growing((6, 4, 2), every=10)
    >>> [rule.at(step).for_shape((9, 9, 9)) for step in (0, 25, 1000)]
    [(1, 1, 1), (3, 3, 2), (6, 4, 2)]
    """

    ranks: int | float | tuple[int, ...]
    every: int = 10
    start: int = 1
    step: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        Fixed(self.ranks)
        if not is_count(self.every):
            raise RankError(f"every: expected a positive integer, got {self.every}")
        if not is_count(self.start):
            raise RankError(f"start: expected a positive integer, got {self.start}")

    def at(self, step: int) -> "Growing":
        """Return the rule in force at a step, from 0."""
        return replace(self, step=step)

    def for_shape(self, shape: Sequence[int]) -> Ranks:
        """Return the feasible ranks for a tensor of this shape."""
        ends = Fixed(self.ranks).for_shape(shape)
        if self.step is None:
            return ends
        cap = self.start + self.step // self.every
        return feasible([min(rank, cap) for rank in ends], shape)

    def mode_rank(
        self, values: Values, mode: int, shape: Sequence[int], previous: int | None = None
    ) -> int:
        """Return the mode's rank, or the number of singular values if that is less."""
        return min(self.for_shape(shape)[mode], len(values))


def as_rule(ranks: Any) -> RankRule:
    """Return a rule: rules pass through, numbers and tuples become `Fixed`.

    Raises
    ------
    RankError
        If `ranks` is neither.

    Examples
    --------
    >>> import geotucker as gt
    >>> gt.as_rule(8)
    Fixed(ranks=8)
    """
    if isinstance(ranks, (int, float, np.number)):
        return Fixed(ranks)  # type: ignore[arg-type]
    if isinstance(ranks, (tuple, list)):
        return Fixed(tuple(ranks))
    if callable(ranks) and not isinstance(ranks, type):
        return ranks  # type: ignore[no-any-return]
    raise RankError(
        "ranks: expected a rank rule such as Tolerance(0.1), an integer, a fraction or a tuple "
        f"of integers, got {ranks!r}"
    )
