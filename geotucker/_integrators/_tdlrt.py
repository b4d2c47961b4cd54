"""TDLRT: augment, Galerkin step of the core, truncate. Algorithm 1 of arXiv:2305.19059."""

from dataclasses import dataclass

from .. import _geometry as geometry
from .._ranks import RankRule
from .._tensor import TuckerPoint, pair_of, real_number
from ._base import Evaluate, OneStep, State, StepResult, finish, widen

__all__ = ["TDLRT"]


@dataclass(frozen=True)
class TDLRT(OneStep):
    """Geometry-aware, rank-adaptive step of Algorithm 1 (Zangrando et al., NeurIPS 2024).

    1. ``grad_{K_i} L = G_i Q_i`` in every mode;
    2. ``Uhat_i = orth[U_i | grad_{K_i} L]``, core padded with zeros;
    3. one step of the scheme on the core with ``grad_C L = Z x_i Uhat_i^T``;
    4. HOSVD truncation by the rank rule.

    The paper has ``grad_{U_i} L = G_i Mat_i(C)^T`` in 1 and 2, which spans the same with U_i
    (Corollary 2.2) where the core has full rank. But it scales each direction by a singular
    value: small ones drown in rounding, and at the ends of the exponent range the product of
    core and gradient over- or underflows. An explicit Z gives the G_i, so G_i Q_i costs no more.

    Step 2 leaves W unchanged, so that an explicit ambient gradient Z serves both steps and is
    asked for once. With fixed ranks the rule cuts back to them.

    Parameters
    ----------
    lr : float or callable
        Step size, or a function from the number of the step (from 0) to it.
    scheme : CoreScheme
        One-step scheme for the core.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> target = np.diag([3.0, 2.0, 0.0])
    >>> objective = lambda w: (0.0, gt.to_dense(w) - target)
    >>> start, integrator = gt.hosvd(np.ones((3, 3)), 1), gt.TDLRT(lr=1.0)
    >>> result = integrator.step(start, objective, integrator.init(start), gt.Tolerance(1e-8))
    >>> result.report.ranks, result.report.evaluations
    ((2, 2), 1)
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
        wide_gradient = geometry.contract(gradient, wide.factors)
        norm = geometry.norm_tangent(tangent)
        measured = (real_number(loss, "loss"), norm, 1)
        return finish(self, wide, wide_gradient, moments, state, ranks, point.ranks, measured)
