"""What rules are told, what they are, and how their answers are checked."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from .._errors import RankError

__all__ = [
    "Cost",
    "Facts",
    "ModeRule",
    "RankRule",
    "Ranks",
    "Spectrum",
    "Values",
    "check_bounds",
    "check_hysteresis",
    "choose",
    "clip",
    "in_force",
    "is_count",
    "smallest_rank",
    "tail_norms",
]

Ranks: TypeAlias = tuple[int, ...]

Values: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
"""Singular values of one unfolding, descending."""


class Cost(NamedTuple):
    """What applying a tensor costs, in operations.

    Parameters
    ----------
    tucker : callable
        From the ranks (r_1, ..., r_d) to the operations in Tucker format; it must not fall
        where a rank grows. Sums and products of the ranks, which also work on arrays of ranks,
        are evaluated for thousands of ranks at a time; anything else is called once for each.
    dense : int
        Operations with the dense tensor.
    """

    tucker: Callable[[Ranks], int]
    dense: int


class Facts(NamedTuple):
    """What a caller knows of a tensor beyond its singular values; some rules need it.

    Parameters
    ----------
    previous : tuple of int, optional
        Ranks before the bases were extended.
    allowance : float, optional
        Truncation error, as a Frobenius norm, that the step's own predicted descent pays for.
    flops : Cost, optional
        Operations of the layer, for ``Budget(flops=...)``.
    sensitivity : float, optional
        What a relative error of the tensor costs the objective, per square, in a unit that all
        tensors share: see `geotucker._ranks._sensitivity`.
    """

    previous: Ranks | None = None
    allowance: float | None = None
    flops: Cost | None = None
    sensitivity: float | None = None


class Spectrum(NamedTuple):
    """What a rule knows of one tensor.

    Parameters
    ----------
    shape : tuple of int
        Shape (n_1, ..., n_d) of the tensor.
    values : tuple of numpy.ndarray
        Per mode, the singular values of the unfolding, descending. No more ranks than
        values can be kept.
    itemsize : int
        Bytes of one entry of the tensor.
    facts : Facts
        What else the caller knows.
    """

    shape: tuple[int, ...]
    values: tuple[Values, ...]
    itemsize: int = 8
    facts: Facts = Facts()


@runtime_checkable
class RankRule(Protocol):
    """Anything that maps the spectra of all tensors to the ranks to keep."""

    def __call__(self, spectra: Sequence[Spectrum], /) -> Sequence[Ranks]:
        """Return one tuple of ranks per spectrum."""
        ...


class ModeRule:
    """A rule that decides each mode of each tensor on its own."""

    def mode_rank(
        self, values: Values, mode: int, shape: Sequence[int], previous: int | None = None
    ) -> int:
        """Return the rank for one mode, given its singular values.

        `previous` is its rank before the bases were extended, where that is known.
        """
        raise NotImplementedError

    def __call__(self, spectra: Sequence[Spectrum], /) -> list[Ranks]:
        """Apply `mode_rank` to every mode of every tensor."""
        return [
            tuple(
                self.mode_rank(values, mode, spectrum.shape, previous)
                for mode, (values, previous) in enumerate(
                    zip(spectrum.values, _previous(spectrum), strict=True)
                )
            )
            for spectrum in spectra
        ]


def _previous(spectrum: Spectrum) -> Sequence[int | None]:
    previous, order = spectrum.facts.previous, len(spectrum.values)
    if previous is not None and len(previous) != order:
        raise RankError(
            f"facts.previous: expected {order} ranks for a tensor of shape {spectrum.shape}, "
            f"got {previous}"
        )
    return [None] * order if previous is None else previous


def in_force(rule: RankRule, step: int) -> RankRule:
    """Return the rule in force at a step: ``rule.at(step)`` of a rule with a schedule."""
    at: Callable[[int], RankRule] | None = getattr(rule, "at", None)
    return rule if at is None else at(step)


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


def tail_norms(values: Values) -> Values:
    """Return the norms of ``values[r:]`` for r = 0, ..., len(values); the last is 0."""
    values = np.asarray(values, dtype=np.float64)
    largest = values[0] if values[0] > 0 else 1.0  # squares must not overflow
    squares = np.cumsum((values / largest)[::-1] ** 2)[::-1]
    tails: Values = np.append(largest * np.sqrt(squares), 0.0)
    return tails


def smallest_rank(tails: Values, allowed: float) -> int:
    """Return the smallest rank whose tail is at most `allowed` (tails descend to 0)."""
    return int(np.argmax(tails <= allowed))


def is_count(value: Any) -> bool:
    """Tell whether `value` is a positive integer (True is none)."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and bool(value >= 1)


def check_bounds(floor: Any, cap: Any) -> None:
    """Raise RankError unless ``1 <= floor <= cap``; `cap` may be None."""
    if not is_count(floor):
        raise RankError(f"floor: expected a positive integer, got {floor}")
    if cap is not None and not (is_count(cap) and cap >= floor):
        raise RankError(f"cap: expected an integer of at least floor = {floor}, got {cap}")


def check_hysteresis(hysteresis: float) -> None:
    """Raise RankError unless ``0 <= hysteresis < 1``."""
    if not 0.0 <= hysteresis < 1.0:
        raise RankError(f"hysteresis: expected a number in [0, 1), got {hysteresis}")


def clip(rank: int, floor: int, cap: int | None, count: int) -> int:
    """Return the rank within floor and cap, and at most the number of singular values."""
    return min(max(rank, floor), count if cap is None else min(cap, count))
