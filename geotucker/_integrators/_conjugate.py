"""Riemannian conjugate gradients with a line search: the fastest way to a minimum at hand."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .. import _geometry as geometry
from .. import _ops
from .._hosvd import Truncation, truncate
from .._linesearch import backtrack
from .._ranks import Facts, RankRule, in_force
from .._tensor import TuckerPoint, TuckerTangent, check_finite, pair_of, real_number
from ._base import Evaluate, Report, State, StepResult

__all__ = ["ConjugateGradient"]


@dataclass(frozen=True)
class ConjugateGradient:
    """Nonlinear conjugate gradients on the manifold, with the step length found by search.

    1. ``xi = -P(W) Z + beta eta``, with the last step eta transported to W and beta of Hestenes
       and Stiefel, ``<g, y> / <eta, y>`` for the change y of the gradient g, or 0 if that is
       negative or xi would not descend;
    2. a first length ``-<g, xi> / L''(xi, xi)`` where the gradient has a method
       ``curvature(direction)``, as those of `Fit` have: exact for a quadratic loss. Elsewhere
       from the change of the gradient along the last step;
    3. ``W + t xi``, truncated by the rank rule, with t shortened until Armijo's condition holds.

    The loss rises only where no length makes up for what the rule cuts from the start, or from any
    point as its schedule goes on: then that is cut all the same, and the next step starts there.
    Ranks may be fixed or grow (`Growing`); a rule that cuts more than a step gains later on, such
    as a coarse `Tolerance`, brings it to a halt: use `TDLRT` for those.

    Parameters
    ----------
    conjugate : bool
        False: steepest descent, beta is always 0.
    first : float
        Length of the very first step to try where nothing else is known, relative to ``||W||``;
        also of what is tried if all lengths from a longer one on were too long.
    decrease : float
        Share in (0, 1) of the predicted descent that a step must reach.
    trials : int
        Lengths to try from each first one. If none is good enough the point stays, but for what
        the rule cuts, and the next step is one of steepest descent.

    Raises
    ------
    ValueError
        If a setting is out of its range.

    References
    ----------
    Kressner, Steinlechner, Vandereycken. Low-rank tensor completion by Riemannian
    optimization. BIT 54 (2014), Algorithm 1.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> truth = gt.testing.random_point((8, 9, 10), (2, 2, 2))
    >>> start = gt.testing.random_point((8, 9, 10), (2, 2, 2), seed=1)
    >>> result = gt.minimize(gt.least_squares(gt.to_dense(truth)), start,
    ...                      integrator=gt.ConjugateGradient(), steps=50)
    >>> result.loss < 1e-12
    True
    """

    conjugate: bool = True
    first: float = 1.0
    decrease: float = 1e-4
    trials: int = 12

    def __post_init__(self) -> None:
        """Check the settings."""
        if not self.first > 0.0:
            raise ValueError(f"first: expected a positive number, got {self.first}")
        if not 0.0 < self.decrease < 1.0:
            raise ValueError(f"decrease: expected a number in (0, 1), got {self.decrease}")
        if self.trials < 1:
            raise ValueError(f"trials: expected a positive integer, got {self.trials}")

    def init(self, point: TuckerPoint) -> State:
        """Return the state before the first step: there is no last one."""
        return State(0, ())

    def step(
        self, point: TuckerPoint, evaluate: Evaluate, state: State, ranks: RankRule
    ) -> StepResult:
        """Take one step; nothing that is passed in is changed.

        Parameters
        ----------
        point : TuckerPoint
            With orthonormal factors.
        evaluate : callable
            From a point to ``(loss, ambient gradient)``; called once, and once for each length.
        state : State
            Its moments are the last step and the gradient before it, transported to `point`.
        ranks : RankRule

        Returns
        -------
        StepResult

        Raises
        ------
        NonFiniteError
            If the gradient is not finite.
        """
        point = pair_of(point)
        loss, gradient = evaluate(point)
        loss = real_number(loss, "loss")
        tangent = geometry.project(point, gradient)
        norm = geometry.norm_tangent(tangent)
        direction = self._direction(tangent, state.moments)
        slope = geometry.inner_tangent(tangent, direction)
        wide = geometry.augment(point, direction.factors)
        along = geometry.tangent_core(point, wide, direction)
        rule = in_force(ranks, state.step)

        def at(length: float) -> tuple[float, Truncation]:
            core = wide.core + length * along
            check_finite(core, "core after the step")
            facts = Facts(point.ranks, -length * slope / norm)
            (cut,) = truncate([TuckerPoint(core, wide.factors)], rule, [facts])
            return real_number(evaluate(cut.point)[0], "loss"), cut

        length, cut, count = 0.0, None, 0
        if slope < 0.0:
            bend = _curvature(gradient, TuckerPoint(along, wide.factors))
            if bend is None or not math.isfinite(bend):
                bend = _secant(tangent, direction, state.moments)
            guess = self.first * (_ops.norm(point.core) / norm or 1.0)
            first = -slope / bend if 0.0 < bend < math.inf else guess
            noise = 8 * _ops.eps(point.core) * abs(loss)
            # Where a loss is all but flat its second derivative may be no guide to a length.
            for longest in (first, guess) if guess < first else (first,):
                length, cut, tried = backtrack(
                    at,
                    loss,
                    slope,
                    longest,
                    decrease=self.decrease,
                    trials=self.trials,
                    noise=noise,
                )
                count += tried
                if cut is not None:
                    break
        if cut is None:  # the next step forgets the past
            end, bound = point, 0.0
            if state.step == 0 or rule is not ranks:  # the rule has not seen this point
                (own,) = truncate([point], rule, [Facts(point.ranks, 0.0)])
                if own.shrunk:
                    end, bound = own.point, own.error_bound
            report = Report(loss, norm, end.ranks, bound, 1 + count)
            return StepResult(end, State(state.step + 1, ()), report)
        report = Report(loss, norm, cut.point.ranks, cut.error_bound, 1 + count)
        past = (_combined(length, direction), tangent)
        moments = tuple(geometry.transport(point, vector, cut.point) for vector in past)
        return StepResult(cut.point, State(state.step + 1, moments), report)

    def _direction(self, tangent: TuckerTangent, moments: Sequence[TuckerTangent]) -> TuckerTangent:
        """Return the direction of search."""
        steepest = _combined(-1.0, tangent)
        if not (self.conjugate and moments):
            return steepest
        last, _ = moments
        change = _combined(1.0, tangent, -1.0, moments[1])
        along = geometry.inner_tangent(last, change)
        beta = geometry.inner_tangent(tangent, change) / along if along > 0.0 else 0.0
        if beta <= 0.0:
            return steepest
        direction = _combined(-1.0, tangent, beta, last)
        return direction if geometry.inner_tangent(tangent, direction) < 0.0 else steepest


def _curvature(gradient: geometry.Gradient, direction: TuckerPoint) -> float | None:
    """Return ``L''(xi, xi)``, if the gradient knows it."""
    known = getattr(gradient, "curvature", None)
    return None if known is None else real_number(known(direction), "curvature")


def _secant(
    tangent: TuckerTangent, direction: TuckerTangent, moments: Sequence[TuckerTangent]
) -> float:
    """Estimate ``L''(xi, xi)`` by the change of the gradient along the last step; 0 if unknown."""
    if not moments:
        return 0.0
    last, before = moments
    square = geometry.inner_tangent(last, last)
    if square == 0.0:
        return 0.0
    bend = geometry.inner_tangent(last, _combined(1.0, tangent, -1.0, before)) / square
    return bend * geometry.inner_tangent(direction, direction)


def _combined(
    a: float, x: TuckerTangent, b: float = 0.0, y: TuckerTangent | None = None
) -> TuckerTangent:
    """Return ``a x + b y`` of tangent vectors at one point."""
    if y is None:
        return TuckerTangent(a * x.core, tuple(a * k for k in x.factors))
    pairs = zip(x.factors, y.factors, strict=True)
    return TuckerTangent(a * x.core + b * y.core, tuple(a * k + b * m for k, m in pairs))
