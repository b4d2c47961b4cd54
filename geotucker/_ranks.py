"""Rank rules: from the singular values of every mode to the multilinear rank to keep.

A rule is a pure function of spectra. It sees all tensors of a network at once, so that a
rule may trade ranks between layers; most rules look at one mode at a time and are written
as a `ModeRule`. Spectra are small NumPy arrays on the host, whatever the tensors are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from ._errors import RankError
from ._tensor import feasible

__all__ = ["Fixed", "ModeRule", "RankRule", "Spectrum", "Tolerance", "as_rule"]

Ranks: TypeAlias = tuple[int, ...]


class Spectrum(NamedTuple):
    """What a rule knows of one tensor.

    Parameters
    ----------
    shape : tuple of int
        Shape (n_1, ..., n_d) of the tensor.
    values : tuple of numpy.ndarray
        Per mode, the singular values of the unfolding, descending. No more ranks than
        values can be kept.
    """

    shape: tuple[int, ...]
    values: tuple["np.ndarray[Any, np.dtype[Any]]", ...]


@runtime_checkable
class RankRule(Protocol):
    """Anything that maps the spectra of all tensors to the ranks to keep."""

    def __call__(self, spectra: Sequence[Spectrum], /) -> Sequence[Ranks]:
        """Return one tuple of ranks per spectrum."""
        ...


class ModeRule:
    """A rule that decides each mode of each tensor on its own."""

    def mode_rank(
        self,
        values: "np.ndarray[Any, np.dtype[Any]]",
        mode: int,
        shape: Sequence[int],
    ) -> int:
        """Return the rank for one mode, given its singular values."""
        raise NotImplementedError

    def __call__(self, spectra: Sequence[Spectrum], /) -> list[Ranks]:
        """Apply `mode_rank` to every mode of every tensor."""
        return [
            tuple(self.mode_rank(s, i, spectrum.shape) for i, s in enumerate(spectrum.values))
            for spectrum in spectra
        ]


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

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0.0 <= self.tau < 1.0:
            raise RankError(f"tau: expected a number in [0, 1), got {self.tau}")
        if not _is_count(self.floor):
            raise RankError(f"floor: expected a positive integer, got {self.floor}")
        if self.cap is not None and not (_is_count(self.cap) and self.cap >= self.floor):
            raise RankError(
                f"cap: expected an integer of at least floor = {self.floor}, got {self.cap}"
            )

    def mode_rank(
        self,
        values: "np.ndarray[Any, np.dtype[Any]]",
        mode: int,
        shape: Sequence[int],
    ) -> int:
        """Return the smallest rank whose tail is within the mode's share of the tolerance."""
        tails = tail_norms(values)
        allowed = self.tau * tails[0] / math.sqrt(len(shape))
        rank = int(np.argmax(tails <= allowed))  # tails descend to 0, so one entry is True
        rank = max(rank, self.floor)
        return min(rank, len(values) if self.cap is None else min(self.cap, len(values)))


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
            if not ranks or any(not _is_count(rank) for rank in ranks):
                raise RankError(f"ranks: expected positive integers, got {ranks}")
        elif not _is_count(ranks):
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
        budget = self.ranks * math.prod(shape)
        low, high = 1, max(shape)  # the size grows with the cap: bisection
        while low < high:
            cap = (low + high + 1) // 2
            ranks = feasible([cap] * len(shape), shape)
            size = math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))
            low, high = (cap, high) if size <= budget else (low, cap - 1)
        return feasible([low] * len(shape), shape)

    def mode_rank(
        self,
        values: "np.ndarray[Any, np.dtype[Any]]",
        mode: int,
        shape: Sequence[int],
    ) -> int:
        """Return the mode's rank, or the number of singular values if that is less."""
        return min(self.for_shape(shape)[mode], len(values))


@dataclass(frozen=True)
class PerTensor:
    """One rule for each tensor of a network.

    Parameters
    ----------
    rules : tuple of RankRule
        As many as there are tensors, in their order.
    """

    rules: tuple[RankRule, ...]

    def __call__(self, spectra: Sequence[Spectrum], /) -> list[Ranks]:
        """Apply each rule to its own spectrum."""
        pairs = zip(self.rules, spectra, strict=True)
        return [tuple(rule([spectrum])[0]) for rule, spectrum in pairs]


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


def choose(rule: RankRule, spectra: Sequence[Spectrum]) -> list[Ranks]:
    """Apply a rule and check what it returns.

    Raises
    ------
    RankError
        If the rule does not return one usable rank per mode.
    """
    chosen = [tuple(int(rank) for rank in ranks) for ranks in rule(spectra)]
    if len(chosen) != len(spectra):
        raise RankError(f"ranks: {rule} gave ranks for {len(chosen)} of {len(spectra)} tensors")
    for ranks, spectrum in zip(chosen, spectra, strict=True):
        limits = tuple(len(values) for values in spectrum.values)
        if len(ranks) != len(limits) or not all(
            1 <= rank <= limit for rank, limit in zip(ranks, limits, strict=True)
        ):
            raise RankError(
                f"ranks: expected from 1 to {limits} for a tensor of shape {spectrum.shape}, "
                f"got {ranks} from {rule}"
            )
    return chosen


def tail_norms(
    values: "np.ndarray[Any, np.dtype[Any]]",
) -> "np.ndarray[Any, np.dtype[Any]]":
    """Return the norms of ``values[r:]`` for r = 0, ..., len(values); the last is 0."""
    values = np.asarray(values, dtype=np.float64)
    largest = values[0] if values[0] > 0 else 1.0  # squares must not overflow
    squares = np.cumsum((values / largest)[::-1] ** 2)[::-1]
    tails: np.ndarray[Any, np.dtype[Any]] = np.append(largest * np.sqrt(squares), 0.0)
    return tails


def _is_count(value: Any) -> bool:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and bool(value >= 1)
