"""Beside pymanopt: solvers of first and second order on many manifolds.

Run with pymanopt 2.2.1 installed beside the extra ``torch``::

    python benchmarks/peers/with_pymanopt.py
"""

import numpy as np
import pymanopt
import torch
from checks import attempt, begin, tell
from pymanopt.manifolds import FixedRankEmbedded, Grassmann, Product
from pymanopt.optimizers import ConjugateGradient, TrustRegions

import geotucker as gt

SIZE, RANK = 12, 3


def solved(optimizer, manifold, cost, start, **limits):
    """Return what a solver reaches: cost, norm of the gradient, steps."""
    result = optimizer(verbosity=0, **limits).run(
        pymanopt.Problem(manifold, cost), initial_point=start
    )
    return result.cost, result.gradient_norm, result.iterations


def text(cost, gradient, steps):
    return f"{cost:.6g}, gradient {gradient:.0e}, {steps} steps"


def distance(tensor):
    """Return half the squared distance to a tensor, and its gradient."""

    def objective(w):
        residual = gt.to_dense(w) - tensor
        return 0.5 * np.sum(residual**2), residual

    return objective


def best_approximation(tensor, start):
    """Find the nearest tensor of low rank, by both."""
    manifold = Product([Grassmann(SIZE, RANK)] * 3)
    data = torch.from_numpy(tensor)

    @pymanopt.function.pytorch(manifold)
    def cost(*bases):
        core = torch.einsum("abc,ai,bj,ck->ijk", data, *bases)
        return 0.5 * (data.square().sum() - core.square().sum())

    theirs = solved(TrustRegions, manifold, cost, list(start.factors), min_gradient_norm=1e-10)
    return theirs, own(distance(tensor), start, gt.Tangent(lr=1.0), 1e-10)


def completion(truth, known, start):
    """Complete a matrix of rank 3 from half of its entries, by both."""
    manifold = FixedRankEmbedded(*truth.shape, RANK)
    data, mask = torch.from_numpy(truth), torch.from_numpy(known)

    @pymanopt.function.pytorch(manifold)
    def cost(u, s, vt):
        return 0.5 * (mask * ((u * s) @ vt - data)).square().sum()

    left, s, right = np.linalg.svd(start.core)
    point = type(manifold.random_point())(start.factors[0] @ left, s, right @ start.factors[1].T)
    theirs = solved(ConjugateGradient, manifold, cost, point, max_iterations=300)
    second = attempt(lambda: solved(TrustRegions, manifold, cost, point))

    def objective(w):
        residual = known * (gt.to_dense(w) - truth)
        return 0.5 * np.sum(residual**2), residual

    return theirs, own(objective, start, gt.Tangent(lr=1.7), 1e-6), second


def own(objective, start, integrator, gradient):
    stop = gt.when_flat(gradient_norm=gradient)
    result = gt.minimize(objective, start, integrator=integrator, steps=300, stop=stop)
    last = result.history[-1]
    return result.loss, last.gradient_norm, len(result.history)


def main():
    begin("pymanopt")
    rng = np.random.default_rng(0)
    tell("manifolds", len(pymanopt.manifolds.__all__))
    tensor = 3 * gt.to_dense(gt.testing.random_point((SIZE,) * 3, (RANK,) * 3, seed=1))
    tensor = tensor + 0.1 * rng.standard_normal(tensor.shape)
    start = gt.hosvd(tensor, (RANK,) * 3)
    theirs, mine = best_approximation(tensor, start)
    tell("nearest tensor of rank 3", text(*theirs), text(*mine))
    grown = gt.minimize(
        distance(tensor), gt.round(start, 1), integrator=gt.TDLRT(lr=1.0),
        ranks=gt.Tolerance(0.2), steps=50,
    )  # fmt: skip
    tell("the rank, from rank 1", "", grown.point.ranks)
    truth = gt.to_dense(gt.testing.random_point((30, 30), (RANK, RANK), seed=1))
    known = rng.random(truth.shape) < 0.5
    start = gt.hosvd(known * truth / known.mean(), (RANK, RANK))
    theirs, mine, second = completion(truth, known, start)
    tell("completion of a matrix", text(*theirs), text(*mine))
    tell("the same, trust regions", second)


if __name__ == "__main__":
    main()
