"""One budget for all tensors of a network, in parameters, operations or bytes."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from .._errors import RankError
from .._tensor import feasible
from ._allocate import Allocation, Tensor, allocate, leeway
from ._base import (
    Ranks,
    Spectrum,
    Values,
    check_bounds,
    check_hysteresis,
    is_count,
)
from ._knapsack import Floats, Ints

__all__ = ["Budget"]

Unit: TypeAlias = Literal["parameters", "flops", "bytes"]

USED = 0.99  # share of a fraction that is aimed at, and that previous ranks must use to stay
LEAST = 1e-3  # heuristic: a tensor without gradients, as of a dead layer, is not given up
MORE = 0.5  # heuristic: by so much worse may ranks be that reach the aim, see `leeway`


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The best ranks that a budget over the whole network affords.

    A network is a chain, of which each layer lets a share of the energy pass, and what arrives is
    the product. So of all ranks within the budget those are chosen for which the product of
    ``kept_i = sum_{j < r_i} s_ij^2 / ||W||^2`` over tensors and modes is largest, with the
    singular values s_ij of mode i: relative to each tensor, so that the scale of a layer does not
    matter, and no layer becomes a bottleneck. (A heuristic: layers, and the modes of a tensor, are
    taken as independent.)

    Where the caller knows how sensitive the objective is to an error of each tensor (`Facts`), as
    the PyTorch binding does from gradients so far, ``kept_i`` has the tensor's sensitivity as
    exponent, divided by the mean of all: ranks go where they matter.

    The *attenuation* of a tensor, ``-sum_i log(kept_i)``, is at least ``sum_i (1 - kept_i)``, which
    bounds its squared relative truncation error (De Lathauwer, De Moor, Vandewalle 2000, Property
    10), and hardly more where nearly all is kept. Networks of a few layers of moderate size get
    the least attenuation, larger ones a choice within a proven distance and within milliseconds:
    see `geotucker._ranks._allocate`.

    Give exactly one of `parameters`, `flops` and `bytes`. A float in (0, 1] is a fraction of what
    the dense tensors take together: it is met within 1 % where steps in rank are that fine, also
    by ranks that are a little worse than the best ones, which cost less: by at most half of the
    attenuation and of the energy that passes. An integer is an absolute limit. Neither is spent
    on singular values that are zero to rounding.

    Parameters
    ----------
    parameters : float or int, optional
        Stored entries, ``prod r_i + sum n_i r_i`` per tensor.
    flops : float or int, optional
        Operations; the caller must supply them, see `Facts`.
    bytes : float or int, optional
        Memory of the entries: tensors of different dtypes differ.
    floor : int
        No mode goes below this rank (or its dimension).
    cap : int, optional
        No mode goes above this rank.
    hysteresis : float
        In [0, 1). Previous ranks, where all are known, within the budget, and using 99 % of what
        the best use, stay unless the best lower the attenuation by more than this fraction of it
        or, where it exceeds 1, by more than this number; so what passes is not less by more than
        this fraction either.
    steps : int
        Length of the schedule: with `start`, the budget moves there geometrically to its value
        within so many steps, see `at`.
    start : float or int, optional
        Budget at step 0, a fraction or absolute like the budget.

    Raises
    ------
    RankError
        If a value is out of its range; when called, if even the least ranks exceed the budget or
        operations are not known.

    Examples
    --------
    One tensor is flat, the other is nearly of rank 1; they share 60 parameters:

    >>> import numpy as np, geotucker as gt
    >>> flat, steep = gt.hosvd(np.eye(6), 4), gt.hosvd(np.diag([9.0, 2, 1, 1, 1, 1]), 4)
    >>> [cut.point.ranks for cut in gt.truncate([flat, steep], gt.Budget(parameters=60))]
    [(3, 3), (1, 1)]

    Neither tensor becomes a bottleneck, though a rank of the large one costs more and keeps less
    (the largest sum of what is kept has the ranks 1 and 8):

    >>> large, small = gt.hosvd(np.eye(60), 60), gt.hosvd(np.eye(8), 8)
    >>> [cut.point.ranks for cut in gt.truncate([large, small], gt.Budget(parameters=400))]
    [(2, 2), (6, 6)]

    Start with a quarter of the dense parameters and come down to a twentieth:

    >>> rule = gt.Budget(parameters=0.05, steps=1000, start=0.25)
    >>> [round(rule.at(step).parameters, 3) for step in (0, 500, 1000, 2000)]
    [0.25, 0.112, 0.05, 0.05]
    """

    parameters: float | int | None = None
    flops: float | int | None = None
    bytes: float | int | None = None
    floor: int = 1
    cap: int | None = None
    hysteresis: float = 0.1
    steps: int = 0
    start: float | int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        given = {
            name: value
            for name, value in vars(self).items()
            if name in ("parameters", "flops", "bytes") and value is not None
        }
        if len(given) != 1:
            raise RankError(
                "Budget: expected exactly one of parameters, flops and bytes, "
                f"got {', '.join(given) or 'none'}"
            )
        _check_amount(self._unit, self._amount)
        check_bounds(self.floor, self.cap)
        check_hysteresis(self.hysteresis)
        if not (is_count(self.steps) or (self.steps == 0 and self.steps is not False)):
            raise RankError(f"steps: expected an integer of at least 0, got {self.steps}")
        if self.start is not None:
            _check_amount("start", self.start)
            if _is_fraction(self.start) != _is_fraction(self._amount):
                raise RankError(
                    f"start: expected a fraction or absolute as {self._unit} = {self._amount}, "
                    f"got {self.start}"
                )

    @property
    def _unit(self) -> Unit:
        if self.parameters is not None:
            return "parameters"
        return "bytes" if self.flops is None else "flops"

    @property
    def _amount(self) -> float | int:
        amount: float | int = getattr(self, self._unit)
        return float(amount) if _is_fraction(amount) else amount  # NumPy's half would overflow

    def at(self, step: int) -> "Budget":
        """Return the budget in force at a step, which has no schedule.

        Integrators ask for it by the number of their step, from 0.

        Examples
        --------
        >>> import geotucker as gt
        >>> gt.Budget(bytes=1000, steps=2, start=4000).at(1).bytes
        2000
        """
        amount = self._amount
        if self.start is not None and step < self.steps:
            share = max(step, 0) / self.steps
            between = float(self.start) ** (1.0 - share) * float(amount) ** share
            amount = between if _is_fraction(amount) else round(between)
        changes: dict[str, Any] = {self._unit: amount, "steps": 0, "start": None}
        return replace(self, **changes)

    def __call__(self, spectra: Sequence[Spectrum], /) -> list[Ranks]:
        """Return the ranks of all tensors."""
        if not spectra:
            return []
        prices = [self._price(number, spectrum) for number, spectrum in enumerate(spectra)]
        dense = sum(amount for _, amount in prices)
        amount = self._amount
        budget = amount * dense if _is_fraction(amount) else amount
        exponents = _exponents([spectrum.facts.sensitivity for spectrum in spectra])
        tensors = [
            self._tensor(spectrum, cost, exponent)
            for spectrum, (cost, _), exponent in zip(spectra, prices, exponents, strict=True)
        ]
        least = sum(_cost(tensor, tensor.lower) for tensor in tensors)
        if least > budget:
            # A lookup in a dense table costs nothing.
            part = f"{least / dense:.4g} of the dense tensors' {dense}" if dense else "dense: none"
            raise RankError(
                f"{self._unit}: expected at least {least} ({part}), which the least ranks take "
                f"with floor = {self.floor}, got {amount}"
                + (f" ({budget:.6g})" if _is_fraction(amount) else "")
            )
        aim = USED * budget if _is_fraction(amount) else 0.0
        best = allocate(tensors, budget, (aim, MORE))
        previous = [spectrum.facts.previous for spectrum in spectra]
        stay = [ranks for ranks in previous if ranks is not None]
        if len(stay) == len(tensors) and self._stays(tensors, stay, best, budget):
            return stay
        return best.ranks

    def _stays(
        self, tensors: Sequence[Tensor], previous: list[Ranks], best: Allocation, budget: float
    ) -> bool:
        """Tell whether the previous ranks are nearly as good as the best."""
        pairs = list(zip(tensors, previous, strict=True))
        if not all(_fits(tensor, ranks) for tensor, ranks in pairs):
            return False
        cost = sum(_cost(tensor, ranks) for tensor, ranks in pairs)
        now = sum(_attenuation(tensor, ranks) for tensor, ranks in pairs)
        enough = USED * best.cost <= cost <= budget
        return enough and now - best.attenuation <= leeway(now, self.hysteresis)

    def _price(self, number: int, spectrum: Spectrum) -> tuple[Callable[[Ints], Ints], int]:
        """Return the cost of ranks, and of the dense tensor."""
        shape, size = spectrum.shape, spectrum.itemsize
        if self._unit == "flops":
            flops = spectrum.facts.flops
            if flops is None:
                raise RankError(
                    f"flops: expected the operations of every tensor, got none for tensor {number} "
                    f"of shape {shape}; pass facts=[Facts(flops=Cost(...)), ...] to truncate, or "
                    "give the budget in parameters"
                )
            return partial(_each, flops.tucker), flops.dense
        unit = size if self._unit == "bytes" else 1
        sides = np.array(shape)

        def entries(ranks: Ints) -> Ints:
            cost: Ints = unit * (ranks.prod(axis=0) + sides @ ranks)
            return cost

        return entries, unit * math.prod(shape)

    def _tensor(self, spectrum: Spectrum, cost: Callable[[Ints], Ints], exponent: float) -> Tensor:
        counts = [len(values) for values in spectrum.values]
        floors = [min(self.floor, count) for count in counts]
        caps = [count if self.cap is None else min(self.cap, count) for count in counts]
        upper = feasible(caps, spectrum.shape)
        lower = feasible([min(f, u) for f, u in zip(floors, upper, strict=True)], spectrum.shape)
        losses = tuple(
            exponent * _attenuations(values, spectrum.itemsize) for values in spectrum.values
        )
        return Tensor(lower, upper, losses, cost)


def _exponents(sensitivities: Sequence[float | None]) -> list[float]:
    """Return the sensitivities divided by their mean, which counts where none is known."""
    known = [number for number in sensitivities if number is not None]
    for number in known:
        if not (math.isfinite(number) and number >= 0.0):
            raise RankError(f"sensitivity: expected a finite number of at least 0, got {number}")
    mean = sum(known) / len(known) if known else 0.0
    if mean == 0.0:
        return [1.0] * len(sensitivities)
    relative = [1.0 if number is None else number / mean for number in sensitivities]
    return [max(number, LEAST) for number in relative]


def _attenuations(values: Values, itemsize: int) -> Floats:
    """Return -log of the share of energy that rank 0, 1, ... keeps, without rounding errors."""
    values = np.asarray(values, dtype=np.float64)
    eps = 2.0**-52 if itemsize >= 8 else 2.0**-23  # half precision is decomposed in float32
    # Heuristic: the error of singular values, about sqrt(n) eps of the largest.
    noise = 2.0 * eps * math.sqrt(len(values)) * values[0]
    values = np.where(values > noise, values, 0.0)
    if values[0] == 0.0:
        return np.zeros(len(values) + 1)  # nothing can be lost
    squares = (values / values[0]) ** 2
    kept = np.cumsum(squares)
    beyond = np.append(np.cumsum(squares[:0:-1])[::-1], 0.0)
    # -log(kept / (kept + beyond)), exact to rounding whichever of the two is small.
    attenuations: Floats = np.append(np.inf, np.log1p(beyond / kept))
    return attenuations


def _each(cost: Callable[[Any], Any], ranks: Ints) -> Ints:
    """Return the cost of each column of ranks, asked for at once where that can be answered."""
    some = sorted({0, ranks.shape[1] // 2, ranks.shape[1] - 1})
    with suppress(AttributeError, TypeError, ValueError):  # it decides by or rounds single numbers
        many: Ints = cost(tuple(ranks))
        fits = many.shape == ranks.shape[1:] and many.dtype.kind in "iu"
        if fits and all(many[k] == cost(tuple(ranks[:, k].tolist())) for k in some):
            return many
    return np.array([cost(tuple(column)) for column in ranks.T.tolist()], dtype=np.int64)


def _cost(tensor: Tensor, ranks: Ranks) -> int:
    return int(tensor.cost(np.array(ranks)[:, None])[0])


def _attenuation(tensor: Tensor, ranks: Ranks) -> float:
    return float(sum(mode[rank] for mode, rank in zip(tensor.attenuation, ranks, strict=True)))


def _fits(tensor: Tensor, ranks: Ranks) -> bool:
    """Tell whether ranks lie in the tensor's box and are feasible."""
    box = zip(ranks, tensor.lower, tensor.upper, strict=True)
    return all(low <= r <= high for r, low, high in box) and feasible(ranks, ranks) == ranks


def _is_fraction(amount: Any) -> bool:
    return isinstance(amount, (float, np.floating))


def _check_amount(name: str, amount: Any) -> None:
    if _is_fraction(amount):
        if not 0.0 < amount <= 1.0:
            raise RankError(f"{name}: expected a fraction in (0, 1] or an integer, got {amount}")
    elif not is_count(amount):
        raise RankError(
            f"{name}: expected a fraction in (0, 1] or a positive integer, got {amount!r}"
        )
