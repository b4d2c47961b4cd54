"""The tangent step: Riemannian gradient descent, or parallel BUG with one Euler step."""

from dataclasses import dataclass

from .. import _geometry as geometry
from .._ranks import RankRule
from .._tensor import TuckerPoint, pair_of, real_number
from ._base import Evaluate, OneStep, State, StepResult, finish, widen

__all__ = ["Tangent"]


@dataclass(frozen=True)
class Tangent(OneStep):
    """Step along the projected gradient, ``W - lr P(W) Z``, then HOSVD truncation.

    ``W - lr P(W) Z`` has ranks at most 2 r_i: in the bases ``[U_i | Utilde_i]`` its core is
    ``C - lr grad_C`` in the old block, ``-lr Ten_i(Utilde_i^T G_i Q_i Q_i^T)`` in the block
    that is new in mode i only, and zero elsewhere. This is the parallel BUG integrator
    (Ceruti, Kusch, Lubich 2024) with one Euler step in each of its problems, GeoLoRA (ICLR
    2025) for matrices, and Riemannian gradient descent with the HOSVD retraction. All its
    gradients are taken at one point, and no inverse of the core occurs.

    Parameters
    ----------
    lr : float or callable
        Step size, or a function from the number of the step (from 0) to it.
    scheme : CoreScheme
        One-step scheme for the core, applied in the bases ``[U_i | Utilde_i]``.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> target = np.ones((3, 3))
    >>> objective = lambda w: (0.0, gt.to_dense(w) - target)
    >>> start, integrator = gt.hosvd(2 * target, 1), gt.Tangent(lr=1.0)
    >>> result = integrator.step(start, objective, integrator.init(start), gt.Fixed(1))
    >>> np.allclose(gt.to_dense(result.point), target)
    True
    """

    def step(
        self, point: TuckerPoint, evaluate: Evaluate, state: State, ranks: RankRule
    ) -> StepResult:
        """Take one step; nothing that is passed in is changed.

        Parameters
        ----------
        point : TuckerPoint
            With orthonormal factors.
        evaluate : callable
            From a point to ``(loss, ambient gradient)``; called once.
        state : State
        ranks : RankRule

        Returns
        -------
        StepResult

        Raises
        ------
        NonFiniteError
            If the gradient or the new core is not finite.
        """
        point = pair_of(point)
        loss, gradient = evaluate(point)
        tangent = geometry.project(point, gradient)
        wide, moments = widen(point, tangent.factors, state)
        wide_gradient = geometry.tangent_core(point, wide, tangent)
        norm = geometry.norm_tangent(tangent)
        measured = (real_number(loss, "loss"), norm, 1)
        return finish(self, wide, wide_gradient, moments, state, ranks, point.ranks, measured)
