"""The standard integrator of Theorem 2.1 with d + 1 gradients: the reference for the others."""

from dataclasses import dataclass, replace

from .. import _geometry as geometry
from .. import _ops
from .._ops import Array
from .._ranks import RankRule
from .._tensor import TuckerPoint, check_finite, pair_of, real_number
from ._base import Evaluate, OneStep, State, StepResult, finish, widen

__all__ = ["Standard"]


@dataclass(frozen=True)
class Standard(OneStep):
    """Integrate the reparametrised system of Theorem 2.1 (arXiv:2305.19059) mode by mode.

    For each mode, QR ``Mat_i(C)^T = Q_i S_i^T`` and an Euler step for ``K_i = U_i S_i``::

        K_i(1) = K_i - lr grad_{K_i} L(Ten_i(Q_i^T) x_{j != i} U_j x_i K_i)

    with a gradient of its own, at the point written in that form. Then one step of the core
    with a gradient at the new bases: d + 1 gradients in all. `TDLRT` needs one and is tested
    against this; use this one to check, not to train.

    Parameters
    ----------
    lr : float or callable
        Step size, or a function from the number of the step (from 0) to it.
    scheme : CoreScheme
        One-step scheme for the core.
    augmented : bool
        True: bases ``orth[U_i | K_i(1)]``, rank-adaptive, the tensor unchanged before the
        core's step (Ceruti, Kusch, Lubich 2022). False: bases ``orth K_i(1)``, the core
        projected on them (Ceruti, Lubich 2022, the unconventional integrator): ranks never
        grow, and moments, projected too, move the core only.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> target = np.diag([3.0, 2.0, 0.0])
    >>> objective = lambda w: (0.0, gt.to_dense(w) - target)
    >>> start, integrator = gt.hosvd(np.ones((3, 3)), 1), gt.Standard(lr=1.0)
    >>> result = integrator.step(start, objective, integrator.init(start), gt.Tolerance(1e-8))
    >>> result.report.ranks, result.report.evaluations
    ((2, 2), 3)
    """

    augmented: bool = True

    def step(
        self, point: TuckerPoint, evaluate: Evaluate, state: State, ranks: RankRule
    ) -> StepResult:
        """Take one step; nothing that is passed in is changed.

        Parameters
        ----------
        point : TuckerPoint
            With orthonormal factors.
        evaluate : callable
            From a point (with factors that need not be orthonormal) to
            ``(loss, ambient gradient)``; called d + 1 times.
        state : State
        ranks : RankRule

        Returns
        -------
        StepResult

        Raises
        ------
        NonFiniteError
            If a gradient or the new core is not finite.
        """
        point, rate = pair_of(point), self.rate(state)
        forms = [_k_form(point, mode) for mode in range(point.order)]
        evaluated = [evaluate(form) for form in forms]
        ends = [
            form.factors[mode] - rate * _k_gradient(form, mode, gradient)
            for mode, (form, (_, gradient)) in enumerate(zip(forms, evaluated, strict=True))
        ]
        loss, gradient = evaluated[0]
        norm = geometry.norm_tangent(geometry.project(point, gradient))
        if self.augmented:
            wide, moments = widen(point, ends, state)
        else:
            wide, moments = _rebase(point, ends, state)
        core_gradient = geometry.contract(evaluate(wide)[1], wide.factors)
        measured = (real_number(loss, "loss"), norm, point.order + 1)
        fixed = replace(self, lr=rate)  # a schedule is asked once a step
        return finish(fixed, wide, core_gradient, moments, state, ranks, point.ranks, measured)


def _k_form(point: TuckerPoint, mode: int) -> TuckerPoint:
    """Write the same tensor as ``Ten_i(Q_i^T) x_{j != i} U_j x_i K_i``."""
    gauged, s = geometry.gauge(point.core, mode)
    factors = tuple(u @ s if i == mode else u for i, u in enumerate(point.factors))
    return TuckerPoint(gauged, factors)


def _k_gradient(form: TuckerPoint, mode: int, gradient: geometry.Gradient) -> Array:
    """Return ``grad_{K_i} L``, which is a factor gradient of the point in that form."""
    geometry.check_gradient(gradient, form)
    g = _ops.unfold(geometry.contract(gradient, form.factors, skip=mode), mode)
    check_finite(g, "gradient")
    return g @ _ops.unfold(form.core, mode).T


def _rebase(
    point: TuckerPoint, ends: list[Array], state: State
) -> tuple[TuckerPoint, tuple[Array, ...]]:
    """Project core and moments on the bases ``orth K_i(1)``."""
    factors = tuple(_ops.qr(k)[0] for k in ends)
    tensors = [geometry.tangent_to_point(point, moment) for moment in state.moments]
    core = geometry.contract(point, factors)
    return TuckerPoint(core, factors), tuple(geometry.contract(t, factors) for t in tensors)
