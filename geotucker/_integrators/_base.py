"""What all integrators share: their interface, the core's one-step scheme, the last phases.

Every integrator here is the same four phases and differs in the first two only:

1. new bases that contain the old ones, so that the tensor does not change (`widen`);
2. a gradient with respect to the core in these bases;
3. one step of a one-step scheme on the core;
4. truncation to the ranks that a rule chooses.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from .. import _ops
from .._geometry import Gradient, augment
from .._hosvd import truncate
from .._moments import carry, lift, zero
from .._ops import Array
from .._ranks import Facts, RankRule, Ranks, in_force, sensitivity
from .._tensor import TuckerPoint, TuckerTangent, check_finite, check_like, pair_of

__all__ = ["CoreScheme", "Euler", "Evaluate", "HeavyBall", "Report", "State", "StepResult"]

Evaluate: TypeAlias = Callable[[TuckerPoint], tuple[float, Gradient]]
"""An objective: from a point to its loss and ambient gradient Z (see `geotucker.project`)."""

Schedule: TypeAlias = float | Callable[[int], float]
"""A step size, or a function from the step's number (from 0) to it."""


class State(NamedTuple):
    """What an integrator carries from step to step.

    Parameters
    ----------
    step : int
        Steps taken.
    moments : tuple of TuckerTangent
        Of the one-step scheme, as tangent vectors at the point (see `geotucker._moments`).
    """

    step: int
    moments: tuple[TuckerTangent, ...]


class Report(NamedTuple):
    """What happened in a step.

    Parameters
    ----------
    loss : float
        Before the step.
    gradient_norm : float
        ``||P(W) Z||`` before the step.
    ranks : tuple of int
        After the step.
    error_bound : float
        Bound of the truncation error of this step, ``||W - W_truncated||``.
    evaluations : int
        Gradients that were asked for.
    """

    loss: float
    gradient_norm: float
    ranks: tuple[int, ...]
    error_bound: float
    evaluations: int


class StepResult(NamedTuple):
    """The new point, the new state and the report of one step."""

    point: TuckerPoint
    state: State
    report: Report


class CoreScheme(Protocol):
    """A one-step scheme for the core: any callable of this form.

    A scheme with memory also has a method ``init(core) -> tuple of zeros like the core``;
    the integrators keep these moments, linear in the gradients, as tangent vectors.
    """

    def __call__(
        self, core: Array, gradient: Array, lr: float, moments: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        """Return the new core and the new moments."""
        ...


@dataclass(frozen=True)
class Euler:
    """Explicit Euler, ``C - lr * gradient``: gradient descent.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> gt.Euler()(np.ones(1), np.ones(1), 0.25, ())[0].tolist()
    [0.75]
    """

    def __call__(
        self, core: Array, gradient: Array, lr: float, moments: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        """Take the step."""
        return core - lr * gradient, moments


@dataclass(frozen=True)
class HeavyBall:
    """Gradient descent with momentum, ``v <- momentum * v + gradient; C <- C - lr * v``.

    Parameters
    ----------
    momentum : float
        In [0, 1).

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> core, moments = gt.HeavyBall(0.5)(np.ones(1), np.ones(1), 0.1, (np.ones(1),))
    >>> core.tolist(), moments[0].tolist()
    ([0.85], [1.5])
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum: expected a number in [0, 1), got {self.momentum}")

    def init(self, core: Array) -> tuple[Array, ...]:
        """Return a velocity of zero."""
        return (_ops.zeros(_ops.shape(core), like=core),)

    def __call__(
        self, core: Array, gradient: Array, lr: float, moments: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        """Take the step."""
        velocity = float(self.momentum) * moments[0] + gradient
        return core - lr * velocity, (velocity,)


class Integrator(Protocol):
    """The interface of all integrators: settings are fields, state goes in and comes out."""

    def init(self, point: TuckerPoint) -> State:
        """Return the state before the first step."""
        ...

    def step(
        self, point: TuckerPoint, evaluate: Evaluate, state: State, ranks: RankRule
    ) -> StepResult:
        """Take one step; nothing that is passed in is changed."""
        ...


@dataclass(frozen=True)
class OneStep:
    """Settings that all integrators have.

    Parameters
    ----------
    lr : float or callable
        Step size, or a function from the number of the step (from 0) to it.
    scheme : CoreScheme
        One-step scheme for the core: `Euler`, `HeavyBall`, or any callable like them.

    Raises
    ------
    ValueError
        If `lr` is not positive.
    """

    lr: Schedule = 0.1
    scheme: CoreScheme = Euler()

    def __post_init__(self) -> None:
        """Check the settings."""
        if not callable(self.lr) and not self.lr > 0:
            raise ValueError(f"lr: expected a positive number or a schedule, got {self.lr}")

    def init(self, point: TuckerPoint) -> State:
        """Return the state before the first step."""
        point, init = pair_of(point), getattr(self.scheme, "init", None)
        cores = init(point.core) if init is not None else ()
        return State(0, tuple(TuckerTangent(core, zero(point)) for core in cores))

    def rate(self, state: State) -> float:
        """Return the step size of the coming step.

        As a Python float: NumPy's own float64 scalars would make float32 arrays float64.
        """
        return float(self.lr(state.step) if callable(self.lr) else self.lr)


def widen(
    point: TuckerPoint,
    directions: Sequence[Array],  # shapes: (n_i, k_i)
    state: State,
) -> tuple[TuckerPoint, tuple[Array, ...]]:
    """Phase 1: extend the bases by new directions and by those of the moments; lift the moments."""
    # Zero columns would be completed by arbitrary ones, and the step would depend on the gauge.
    moments = [m.factors for m in state.moments if max(_ops.largest(m.factors)) > 0.0]
    stacks = [_ops.concatenate(columns, 1) for columns in zip(directions, *moments, strict=True)]
    wide = augment(point, stacks)
    return wide, tuple(lift(point, wide, moment) for moment in state.moments)


def finish(
    settings: OneStep,
    wide: TuckerPoint,
    gradient: Array,  # with respect to the core of `wide`
    moments: tuple[Array, ...],  # shaped like the core of `wide`
    state: State,
    ranks: RankRule,
    previous: Ranks,  # before the bases were extended
    measured: tuple[float, float, int],  # loss, gradient norm, evaluations
) -> StepResult:
    """Phases 3 and 4: one step of the scheme on the wide core, then truncation."""
    check_finite(gradient, "gradient")
    core, moments = settings.scheme(wide.core, gradient, settings.rate(state), moments)
    check_like(core, wide.core, "core after the step")
    check_finite(core, "core after the step")
    (facts,) = observed([wide.core], [gradient], [core - wide.core], [previous])
    rule = in_force(ranks, state.step)
    end = TuckerPoint(core, wide.factors)
    (cut,) = truncate([end], rule, [facts])
    carried = tuple(carry(end, cut, moment) for moment in moments)
    loss, gradient_norm, evaluations = measured
    report = Report(loss, gradient_norm, cut.point.ranks, cut.error_bound, evaluations)
    return StepResult(cut.point, State(state.step + 1, carried), report)


def observed(
    cores: Sequence[Array],
    gradients: Sequence[Array],
    steps: Sequence[Array],  # all three shaped as the wide cores, before the step
    previous: Sequence[Ranks],
) -> list[Facts]:
    """Return what rank rules are told of a step, with one question to the device.

    The allowance is ``max(0, -<gradient, step>) / ||gradient||``. The sensitivity is that of this
    step alone, in the bases before they were extended: most of a wider gradient may not be known.
    """
    narrow = [_ops.leading(g, ranks) for g, ranks in zip(gradients, previous, strict=True)]
    descents = map(_ops.component, gradients, steps)
    # Norms, as <a, a> / ||a||: they stay on the device, and do not overflow.
    norms = [_ops.component(array, array) for array in (*cores, *narrow)]
    numbers = iter(_ops.floats([*descents, *norms]))
    allowed, sizes, slopes = ([next(numbers) for _ in cores] for _ in range(3))
    return [
        Facts(
            ranks,
            max(-descent, 0.0) if math.isfinite(descent) else 0.0,  # a huge core may overflow
            sensitivity=sensitivity(size, slope, math.prod(ranks)),
        )
        for ranks, descent, size, slope in zip(previous, allowed, sizes, slopes, strict=True)
    ]
