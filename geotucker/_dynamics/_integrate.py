"""The driver of dynamical low-rank approximation: steps, their size, truncation, history."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from .. import _ops
from .._errors import NonFiniteError, StepSizeError
from .._geometry import Gradient, norm_tangent, project
from .._hosvd import Truncation, orthonormalise, truncate
from .._progress import bar
from .._ranks import Facts, RankRule, Tolerance, as_rule, in_force
from .._tensor import TuckerPoint
from ._bug import STEPS, Attempt, Step
from ._fields import Field, evaluate

__all__ = ["Evolution", "TimeStep", "integrate"]


class TimeStep(NamedTuple):
    """What happened in one accepted step of `integrate`.

    Parameters
    ----------
    time : float
        After the step.
    length : float
        Of the step; negative where time runs backwards.
    ranks : tuple of int
        After truncation.
    error : float
        Estimate of the error in time: the distance of two methods of neighbouring order. nan for
        order 1 at fixed steps, where it would cost an evaluation.
    truncation : float
        Bound of the truncation error of this step, as a Frobenius norm.
    defect : float
        Norm of the field's part that the step's bases did not hold: what low ranks leave out,
        whatever the step. nan if the field is an object that hides its norm.
    evaluations : int
        Values of the field that were asked for, those of rejected attempts included.
    rejected : int
        Attempts with a longer step that failed before.
    """

    time: float
    length: float
    ranks: tuple[int, ...]
    error: float
    truncation: float
    defect: float
    evaluations: int
    rejected: int


Callback: TypeAlias = Callable[[TuckerPoint, TimeStep], Any]


class Evolution(NamedTuple):
    """What `integrate` returns.

    Parameters
    ----------
    point : TuckerPoint
        The solution at the end, with orthonormal factors.
    history : list of TimeStep
        One record per accepted step.
    stopped : str
        ``"span"`` or ``"callback"``: what ended the run.
    """

    point: TuckerPoint
    history: list[TimeStep]
    stopped: str


class _Control(NamedTuple):
    """Elementary step size control (Hairer, Norsett, Wanner, Solving ODEs I, II.4).

    Order 2 bounds the error of Euler's method, which the midpoint rule corrects, per step; order
    1 bounds its own error per unit of time. Either way the error at the end is in proportion to
    the tolerance.

    Where the ranks may grow, the defect counts too: it is large when new directions appear, for as
    long as a step cannot take them in, and the steps are to be short until then.
    """

    tolerance: float
    order: int
    duration: float
    growing: bool  # whether the ranks follow the tolerance

    def ratio(self, attempt: Attempt, point: TuckerPoint, length: float) -> float:
        """Return the estimated error over the allowed one."""
        share = length / self.duration if self.order == 1 else 1.0
        error = attempt.error / share
        if self.growing and attempt.defect > 0.0:  # not if it is nan
            error = max(error, length * attempt.defect)
        if error == 0.0:
            return 0.0
        allowed = self.tolerance * max(_ops.norm(point.core), _ops.norm(attempt.end.core))
        return error / allowed if allowed > 0.0 else math.inf

    def factor(self, ratio: float) -> float:
        """Return by what to multiply the length of the step."""
        wanted = 0.9 / math.pow(max(ratio, 1e-30), 1 / self.order)
        return min(5.0, max(0.2, wanted))


def integrate(
    field: Field,
    start: Any,
    span: tuple[float, float],
    *,
    order: int = 2,
    step: float | None = None,
    tolerance: float | None = None,
    ranks: Any = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Evolution:
    """Integrate ``dY/dt = F(t, Y)`` over Tucker tensors whose ranks adapt.

    Dynamical low-rank approximation: the solution is kept in Tucker format, nothing dense is
    formed unless the field itself is dense, and no inverse of the core occurs, so that the error
    does not depend on small singular values.

    Parameters
    ----------
    field : callable
        From time and point to F: a dense array of the tensor's shape, a Tucker tensor
        ``(core, factors)``, a `Sum` of such, or an object with a method
        ``contract(factors, skip)``. The factors of the point are orthonormal.
    start : pair
        Any ``(core, factors)``; it is orthonormalised.
    span : pair of float
        Time at the start and at the end, which may be the earlier one.
    order : int
        1: augmented basis-update & Galerkin integrator, bases of up to twice the ranks. 2: its
        midpoint form, up to four times. A step asks for the field so many times.
    step : float, optional
        Length of the steps: without a tolerance the longest equal ones up to it that fill the span,
        with one the first trial.
    tolerance : float, optional
        The step size adapts such that the relative error in time at the end is about so large,
        as long as the field does not amplify errors.
    ranks : RankRule, int, float or tuple, optional
        What each step is truncated to. By default, with a tolerance, the smallest ranks with
        which all truncations together stay within it; without, the ranks of `start`.
    callback : callable, optional
        Called after each step with the new point and its `TimeStep`; stops if it returns a
        true value.
    progress : bool
        Show a progress bar (needs the package rich).

    Returns
    -------
    Evolution

    Raises
    ------
    ValueError
        If `order`, `span`, `step` or `tolerance` cannot be used, or both of the last two are
        missing.
    ShapeError, BackendError, RankError
        For a start, a field or ranks that do not fit.
    NonFiniteError
        If the field or the solution is NaN or infinite; the message names the time. Points
        that the callback was given stay valid.
    StepSizeError
        If `step` is, or the tolerance asks for steps, too short to move the time.

    References
    ----------
    Ceruti, Kusch, Lubich. A rank-adaptive robust integrator for dynamical low-rank
    approximation. BIT 62 (2022).

    Ceruti, Einkemmer, Kusch, Lubich. A robust second-order low-rank BUG integrator based on the
    midpoint rule. BIT 64 (2024).

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> decay = lambda t, y: gt.scale(y, -1.0)
    >>> result = gt.integrate(decay, gt.hosvd(np.ones((4, 5)), 1), (0.0, 1.0), tolerance=1e-4)
    >>> bool(abs(gt.to_dense(result.point)[0, 0] - np.exp(-1.0)) < 1e-4)
    True
    >>> result.history[-1].time, result.point.ranks
    (1.0, (1, 1))
    """
    begin, end = _check_span(span)
    if order not in tuple(STEPS):
        raise ValueError(f"order: expected 1 or 2, got {order!r}")
    point = orthonormalise(start)
    _check_pace(step, tolerance, _ops.eps(point.core), begin, end)
    duration = abs(end - begin)
    control = (
        None if tolerance is None else _Control(float(tolerance), order, duration, ranks is None)
    )
    count = 0
    if control is None and step is not None:
        count = math.ceil(duration / step * (1 - 1e-12))
        step = duration / count
    rule = as_rule(point.ranks if ranks is None else ranks)
    truncation = None if control and ranks is None else rule
    run = _Run(field, STEPS[order], begin, end, count, control, truncation)
    time, length, history, stopped = begin, step, list[TimeStep](), "span"
    with bar("integrate", duration, progress) as advance:
        while time != end:
            try:
                point, record, length = run.step(time, point, length, len(history))
            except NonFiniteError as error:
                raise NonFiniteError(f"time {time:g}: {error}") from error
            time = record.time
            history.append(record)
            advance(abs(record.length), f"time {time:.3g}  ranks {record.ranks}")
            if callback is not None and callback(point, record):
                stopped = "callback"
                break
    return Evolution(point, history, stopped)


class _Run(NamedTuple):
    """What does not change from step to step."""

    field: Field
    method: Step
    begin: float
    end: float
    fixed: int  # number of fixed steps; 0 if they adapt
    control: _Control | None
    rule: RankRule | None  # None: what the control's tolerance leaves for truncation

    def step(
        self, time: float, point: TuckerPoint, length: float | None, number: int
    ) -> tuple[TuckerPoint, TimeStep, float]:
        """Take one step, of at most `length` if that is known; return the next length too."""
        slope = evaluate(self.field, time, point)
        if length is None:
            length = _first_length(point, slope, abs(self.end - time))
        rejected = 0
        while True:
            signed, after = self._aim(time, length, number)
            size, ratio, cause = abs(signed), math.inf, None
            try:
                attempt = self.method(
                    self.field, time, point, slope, signed, self.control is not None
                )
                ratio = self.control.ratio(attempt, point, size) if self.control else 0.0
                if ratio <= 1.0:
                    break
            except NonFiniteError as error:  # a shorter step may do
                if self.control is None:
                    raise
                cause = error
            assert self.control is not None
            length, rejected = size * self.control.factor(ratio), rejected + 1
            if length <= 16 * _EPS * max(abs(time), abs(self.end)):
                raise StepSizeError(_SHRUNK.format(time, length)) from cause
        cut = self._truncate(attempt, point, size, number)
        record = TimeStep(
            after,
            signed,
            cut.point.ranks,
            attempt.error,
            cut.error_bound,
            attempt.defect,
            1 + (rejected + 1) * attempt.evaluations,
            rejected,
        )
        return cut.point, record, size * self.control.factor(ratio) if self.control else length

    def _aim(self, time: float, length: float, number: int) -> tuple[float, float]:
        """Return the signed length of the next step and the time after it."""
        if number + 1 < self.fixed:  # lengths that are added up would gather rounding errors
            signed = math.copysign(length, self.end - self.begin)
            return signed, self.begin + (number + 1) * signed
        left = self.end - time
        if self.fixed or length >= abs(left) * (1 - 1e-9):  # no last step of the size of rounding
            return left, self.end
        signed = math.copysign(length, left)
        return signed, time + signed

    def _truncate(
        self, attempt: Attempt, point: TuckerPoint, size: float, number: int
    ) -> Truncation:
        if self.rule is not None:
            rule = in_force(self.rule, number)
        else:
            assert self.control is not None
            share = self.control.tolerance * size / self.control.duration
            rule = Tolerance(max(share, 16 * _ops.eps(point.core)))
        return truncate([attempt.end], rule, [Facts(previous=point.ranks)])[0]


_EPS = 2.0**-52  # of times, which are Python's floats

_SHRUNK = (
    "time {:g}: the tolerance asks for steps of {:.1e}, too short to move the time. The usual "
    "causes are a solution that blows up, a field that is not smooth, and a tolerance below the "
    "rounding of the field"
)


def _first_length(point: TuckerPoint, slope: Gradient, duration: float) -> float:
    """Return a step in which the solution changes by about a hundredth."""
    speed, size = norm_tangent(project(point, slope)), _ops.norm(point.core)
    return min(duration, 0.01 * size / speed) if size > 0.0 and speed > 0.0 else 0.01 * duration


def _check_span(span: tuple[float, float]) -> tuple[float, float]:
    try:
        begin, end = (float(time) for time in span)
    except (TypeError, ValueError) as error:
        raise ValueError(f"span: expected two numbers, got {span!r}") from error
    if not (math.isfinite(begin) and math.isfinite(end) and begin != end):
        raise ValueError(f"span: expected two different finite times, got {span!r}")
    return begin, end


def _check_pace(
    step: float | None, tolerance: float | None, eps: float, begin: float, end: float
) -> None:
    if step is None and tolerance is None:
        raise ValueError("step: expected a length, or a tolerance by which it adapts; got neither")
    if step is not None and not (math.isfinite(step) and step > 0):
        raise ValueError(f"step: expected a positive number, got {step}")
    shortest = _EPS * max(abs(begin), abs(end))
    if step is not None and step < shortest:
        raise StepSizeError(
            f"step: expected at least {shortest:.1e}, to which the times {begin:g} to {end:g} are "
            f"rounded, got {step:g}; count time from the start"
        )
    if tolerance is not None and not 16 * eps <= tolerance < 1:
        raise ValueError(
            f"tolerance: expected a number from {16 * eps:.1e}, the rounding of the dtype, "
            f"to 1, got {tolerance}"
        )
