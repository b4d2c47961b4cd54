"""Every algorithm of the core once, on arrays of a library that the caller supplies."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import geotucker as gt

RANKS = (3, 2, 2)
INTEGRATORS = {
    "TDLRT": gt.TDLRT(0.1, gt.HeavyBall(0.5)),
    "Tangent": gt.Tangent(0.1, gt.HeavyBall(0.5)),
    "Standard": gt.Standard(0.1),
    "Standard, not augmented": gt.Standard(0.1, augmented=False),
    "Flow": gt.Flow(0.1, substeps=2),
    "ConjugateGradient": gt.ConjugateGradient(),
}
LOSSES = {"squared": gt.Squared(), "logistic": gt.Logistic(), "Poisson": gt.Poisson()}


class Problem(NamedTuple):
    """A tensor with entries, samples and a point, all random; the shape grows with `side`."""

    put: Callable[[np.ndarray], Any]
    side: int = 8

    @property
    def shape(self) -> tuple[int, ...]:
        return self.side + 1, self.side, self.side - 1

    @property
    def entries(self) -> int:
        return self.side**3 // 2

    def array(self, *shape: int, seed: int = 0) -> Any:
        return self.put(np.random.default_rng([seed, *shape]).standard_normal(shape))

    def zeros_and_ones(self, *shape: int) -> Any:
        return self.put(1.0 * (np.random.default_rng(shape).random(shape) < 0.5))

    def point(self, seed: int = 0) -> gt.TuckerPoint:
        core, factors = gt.testing.random_point(self.shape, RANKS, seed)
        return gt.TuckerPoint(self.put(core), tuple(map(self.put, factors)))

    def known(self) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(self.side)
        return tuple(rng.integers(0, n, self.entries) for n in self.shape)

    def objectives(self) -> dict[str, gt.Fit]:
        """Return an objective of each kind, with each loss."""
        inputs = self.array(8 * self.side, *self.shape[:2])
        samples = 8 * self.side, self.shape[2]
        return {
            f"{kind}, {name}": make(loss)
            for name, loss in LOSSES.items()
            for kind, make in {
                "least squares": lambda loss: gt.least_squares(
                    self.zeros_and_ones(*self.shape), loss, ridge=0.1
                ),
                "completion": lambda loss: gt.completion(
                    self.known(), self.zeros_and_ones(self.entries), self.shape, loss, ridge=0.1
                ),
                "regression": lambda loss: gt.regression(
                    inputs, self.zeros_and_ones(*samples), loss, ridge=0.1
                ),
            }.items()
        }


def algorithms(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Return calls that need nothing more from the host: what they work on is in place."""
    z, point, other = problem.array(*problem.shape), problem.point(), problem.point(1)
    tangent, field = gt.project(point, z), gt.Sum([z, other])
    found: dict[str, Callable[[], Any]] = {
        "hosvd": lambda: gt.hosvd(z, RANKS),
        "st_hosvd": lambda: gt.st_hosvd(z, gt.Tolerance(0.5)),
        "orthonormalise": lambda: gt.orthonormalise(other),
        "round": lambda: gt.round(gt.add(point, other), gt.Tolerance(0.1)),
        "arithmetic": lambda: (gt.norm(point), gt.inner(point, other), gt.scale(point, 2.0)),
        "to_dense": lambda: gt.to_dense(point),
        "project": lambda: gt.project(point, z),
        "retract": lambda: gt.retract(point, tangent),
        "transport": lambda: gt.transport(point, tangent, other),
        "augment": lambda: gt.augment(point, tangent.factors),
        "truncate": lambda: [
            cut.point for cut in gt.truncate([point, other], gt.Budget(parameters=0.2))
        ],
        "integrate": lambda: gt.integrate(lambda t, y: field, point, (0, 0.1), step=0.1).point,
        "integrate, adaptive": lambda: (
            gt.integrate(lambda t, y: other, point, (0, 0.05), tolerance=0.1).point
        ),
    }
    objectives = problem.objectives()
    for name, fit in objectives.items():
        found[name] = lambda fit=fit: (fit(point)[0], gt.project(point, fit(point)[1]))
        found[f"{name}, start"] = lambda fit=fit: fit.start(RANKS)
        found[f"{name}, grow"] = lambda fit=fit: fit.grow(fit.start(1), RANKS)
    whole = objectives["completion, squared"]
    for name, integrator in INTEGRATORS.items():
        found[name] = lambda integrator=integrator: _steps(whole, point, integrator)
    found["rank rules"] = lambda: [
        _steps(whole, point, INTEGRATORS["TDLRT"], rule)
        for rule in (gt.Tolerance(0.1), gt.DescentSafe(), gt.Budget(parameters=0.2))
    ]
    found["batches"] = lambda: _steps(whole.batches(20), point, INTEGRATORS["TDLRT"])
    return found


def _steps(objective: Any, point: Any, integrator: gt.Integrator, ranks: Any = RANKS) -> Any:
    result = gt.minimize(objective, point, integrator=integrator, ranks=ranks, steps=2)
    return result.point, result.state.moments


def complete(problem: Problem) -> gt.TuckerPoint:
    """Complete random entries, by a few trials."""
    return gt.complete(
        problem.known(),
        problem.array(problem.entries),
        problem.shape,
        candidates=[RANKS],
        folds=2,
        steps=2,
        seconds=20.0,
        clock=itertools.count().__next__,
    ).point
