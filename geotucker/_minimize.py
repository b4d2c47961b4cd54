"""The driver: minimise an explicit objective over tensors of low multilinear rank."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

from . import _ops
from ._errors import NonFiniteError, ShapeError
from ._geometry import Gradient
from ._hosvd import orthonormalise
from ._integrators import Integrator, Report, State
from ._integrators._base import Evaluate
from ._ranks import as_rule
from ._tensor import TuckerPoint, as_point, real_number

__all__ = ["Result", "minimize", "when_flat"]

History: TypeAlias = list[Report]


class Result(NamedTuple):
    """What `minimize` returns.

    Parameters
    ----------
    point : TuckerPoint
        The last point, with orthonormal factors.
    loss : float
        Its loss.
    history : list of Report
        One report per step: loss and gradient norm before it, ranks after it, the bound of
        its truncation error, the number of gradients.
    state : object
        The integrator's state; pass it with `point` to a further call to go on.
    stopped : str
        ``"steps"``, ``"stop"`` or ``"callback"``: what ended the run.
    """

    point: TuckerPoint
    loss: float
    history: History
    state: State
    stopped: str


def minimize(
    objective: Evaluate,
    start: Any,
    *,
    integrator: Integrator,
    ranks: Any = None,
    steps: int = 100,
    stop: Callable[[History], bool] | None = None,
    callback: Callable[[TuckerPoint, Report], Any] | None = None,
    state: State | None = None,
    progress: bool = False,
) -> Result:
    """Minimise ``L(W)`` over Tucker tensors by the steps of an integrator.

    Parameters
    ----------
    objective : callable
        From a point ``(core, factors)`` to ``(loss, Z)``, where Z is the gradient of L with
        respect to the full tensor: a dense array of its shape, a Tucker tensor
        ``(core, factors)``, or an object with a method ``contract(factors, skip)``.
        `least_squares`, `completion`, `regression` and `Autodiff` make such. Of an objective with
        a method ``at(step)``, such as `Batches`, each step sees what that returns for it.
    start : pair
        Any ``(core, factors)`` of one of TensorLy's backends; it is orthonormalised.
    integrator : Integrator
        Such as ``geotucker.TDLRT(lr=0.1)``.
    ranks : RankRule, int, float or tuple, optional
        What to truncate to after each step; by default the ranks of `start`.
    steps : int
        At most so many steps.
    stop : callable, optional
        From the history so far to True to stop; see `when_flat`.
    callback : callable, optional
        Called after each step with the new point and the report; stops if it returns a true
        value.
    state : State, optional
        Of an earlier result, to go on from there exactly; `start` is then that result's point,
        whose bases the state refers to, and is taken as it is.
    progress : bool
        Show a progress bar (needs the package rich).

    Returns
    -------
    Result

    Raises
    ------
    ShapeError, BackendError, RankError
        For input that does not fit.
    NonFiniteError
        If the loss or a gradient is NaN or infinite; the message names the step. Points that
        the callback was given stay valid.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> target = np.add.outer(np.arange(4.0), np.arange(5.0))  # a matrix of rank 2
    >>> def objective(w):
    ...     residual = gt.to_dense(w) - target
    ...     return 0.5 * np.sum(residual**2), residual
    >>> result = gt.minimize(objective, gt.hosvd(np.ones((4, 5)), 1),
    ...                      integrator=gt.TDLRT(lr=0.5), ranks=gt.Tolerance(1e-6), steps=60)
    >>> result.point.ranks, result.loss < 1e-12
    ((2, 2), True)
    """
    if steps < 0:
        raise ValueError(f"steps: expected a number of at least 0, got {steps}")
    point = orthonormalise(start) if state is None else as_point(start, "start")
    rule = as_rule(point.ranks if ranks is None else ranks)
    for moment in () if state is None else state.moments:
        if (found := _ops.shape(moment.core)) != point.ranks:
            raise ShapeError(
                f"state: expected moments of the ranks {point.ranks} of start, got {found}; "
                "both are those of one result"
            )
    state = integrator.init(point) if state is None else state
    history: History = []
    stopped, evaluate = "steps", _Once(objective)
    with _bar(range(steps), progress, history) as numbers:
        for number in numbers:
            try:
                evaluate = _once(objective, state.step, evaluate)
                point, state, report = integrator.step(point, evaluate, state, rule)
                _check_loss(report.loss)
            except NonFiniteError as error:
                raise NonFiniteError(f"step {number}: {error}") from error
            history.append(report)
            if callback is not None and callback(point, report):
                stopped = "callback"
                break
            if stop is not None and stop(history):
                stopped = "stop"
                break
    whole = objective if hasattr(objective, "at") else evaluate
    loss = real_number(whole(point)[0], "loss")
    try:
        _check_loss(loss)
    except NonFiniteError as error:
        raise NonFiniteError(f"after {len(history)} steps: {error}") from None
    return Result(point, loss, history, state, stopped)


def when_flat(
    gradient_norm: float = 0.0, relative_change: float = 0.0, window: int = 10
) -> Callable[[History], bool]:
    """Return a stopping rule: the gradient is small, or the loss has hardly changed.

    Parameters
    ----------
    gradient_norm : float
        Stop once ``||P(W) Z||`` is at most this.
    relative_change : float
        Stop once the loss has moved over the last `window` steps by at most this times its
        magnitude.
    window : int
        Number of steps to look back.

    Returns
    -------
    callable
        For `minimize`.

    Examples
    --------
    >>> import geotucker as gt
    >>> stop = gt.when_flat(gradient_norm=1e-6)
    >>> stop([gt.Report(loss=1.0, gradient_norm=1e-7, ranks=(1,), error_bound=0.0, evaluations=1)])
    True
    """
    if window < 1:
        raise ValueError(f"window: expected a positive integer, got {window}")

    def stop(history: History) -> bool:
        last = history[-1]
        if last.gradient_norm <= gradient_norm:
            return True
        if relative_change == 0.0 or len(history) <= window:
            return False
        losses = [report.loss for report in history[-window - 1 :]]
        return max(losses) - min(losses) <= relative_change * abs(last.loss)

    return stop


class _Once:
    """An objective that is not asked twice in a row for one point.

    The end of a line search is where the next step starts.
    """

    def __init__(self, objective: Evaluate) -> None:
        self.objective = objective
        self.last: tuple[TuckerPoint, tuple[float, Gradient]] | None = None

    def __call__(self, point: TuckerPoint) -> tuple[float, Gradient]:
        if self.last is None or self.last[0] is not point:
            self.last = (point, self.objective(point))
        return self.last[1]


def _once(objective: Evaluate, step: int, previous: _Once) -> _Once:
    """Return the objective in force at a step."""
    at: Callable[[int], Evaluate] | None = getattr(objective, "at", None)
    return previous if at is None else _Once(at(step))


def _check_loss(loss: float) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(f"loss: expected a finite number, got {loss}; try a smaller step")


@contextmanager
def _bar(numbers: range, progress: bool, history: History) -> Iterator[Iterable[int]]:
    """Yield the step numbers, behind a progress bar if asked."""
    if not progress:
        yield numbers
        return
    try:
        from rich.progress import Progress  # optional: the core needs NumPy and TensorLy only
    except ImportError as error:
        raise ImportError("progress=True needs the package rich: pip install rich") from error

    def tick(bar: Progress) -> Iterator[int]:
        task = bar.add_task("minimize", total=len(numbers))
        for number in numbers:
            yield number
            last = history[-1]
            text = f"loss {last.loss:.3e}  ranks {last.ranks}"
            bar.update(task, advance=1, description=text)

    with Progress() as bar:
        yield tick(bar)
