"""The projected gradient flow itself, by explicit Euler in small steps: ground truth."""

from dataclasses import dataclass

from .._ranks import RankRule, in_force
from .._tensor import TuckerPoint
from ._base import Evaluate, OneStep, State, StepResult
from ._tangent import Tangent

__all__ = ["Flow"]


@dataclass(frozen=True)
class Flow(OneStep):
    """Integrate ``dW/dt = -P(W) grad L(W)`` over time `lr` by `substeps` small tangent steps.

    As the number of substeps grows, this converges with order one to the flow that all
    other integrators approximate; they are measured against it.

    Parameters
    ----------
    lr : float or callable
        Time that one step covers.
    scheme : CoreScheme
        Leave it at `Euler`: another scheme integrates another equation.
    substeps : int
        Number of small steps.

    Raises
    ------
    ValueError
        If `substeps` is not positive.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> objective = lambda w: (0.0, gt.to_dense(w))  # dW/dt = -W
    >>> start, flow = gt.hosvd(np.ones((3, 3)), 1), gt.Flow(lr=1.0, substeps=1000)
    >>> result = flow.step(start, objective, flow.init(start), gt.Fixed(1))
    >>> bool(abs(gt.to_dense(result.point)[0, 0] - np.exp(-1.0)) < 1e-3)
    True
    """

    substeps: int = 100

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.substeps < 1:
            raise ValueError(f"substeps: expected a positive integer, got {self.substeps}")

    def step(
        self, point: TuckerPoint, evaluate: Evaluate, state: State, ranks: RankRule
    ) -> StepResult:
        """Take one step of `substeps` small ones; see `Tangent.step`.

        The report gives loss and gradient norm before the first substep and the sum of the
        bounds of all truncations.
        """
        small = Tangent(self.rate(state) / self.substeps, self.scheme)
        inner, ranks = State(0, state.moments), in_force(ranks, state.step)
        first = result = small.step(point, evaluate, inner, ranks)
        bound = first.report.error_bound
        for _ in range(self.substeps - 1):
            result = small.step(result.point, evaluate, result.state, ranks)
            bound += result.report.error_bound
        report = first.report._replace(
            ranks=result.point.ranks, error_bound=bound, evaluations=self.substeps
        )
        return StepResult(result.point, State(state.step + 1, result.state.moments), report)
