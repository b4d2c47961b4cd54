"""Beside tucker-riemopt: Riemannian gradients on tensors of fixed multilinear rank.

Run with tucker-riemopt 1.0.1, which needs NumPy 1, installed beside the extra ``torch``::

    python benchmarks/peers/with_tucker_riemopt.py
"""

import torch
import tucker_riemopt
from checks import attempt, begin, tell
from tucker_riemopt import SFTucker, Tucker, TuckerRiemannian

import geotucker as gt

SHAPE, RANKS = (8, 9, 10), (3, 3, 3)


def turned(values, rotations, factors):
    """Return the tensor with the given singular values in every mode, the core in new bases."""
    core = torch.zeros(RANKS, dtype=torch.float64)
    core[range(3), range(3), range(3)] = torch.tensor(values, dtype=torch.float64)
    core = torch.einsum("abc,ia,jb,kc->ijk", core, *rotations)
    return gt.TuckerPoint(core, tuple(u @ o.T for u, o in zip(factors, rotations, strict=True)))


def gradients(ratio, rotations, factors, z):
    """Compare projections of `z` with those at equal singular values: the same tangent space."""
    point = turned((1.0, ratio, ratio**2), rotations, factors)
    even = turned((1.0, 1.0, 1.0), rotations, factors)
    exact = gt.to_dense(gt.tangent_to_point(even, gt.project(even, z)))

    def error(dense):
        return f"{((dense - exact).norm() / exact.norm()).item():.0e}"

    def theirs():
        x = Tucker(point.core, list(point.factors))
        tangent, _ = TuckerRiemannian.grad(lambda w: (w.to_dense() * z).sum(), x)
        return error(tangent.construct().to_dense())

    mine = error(gt.to_dense(gt.tangent_to_point(point, gt.project(point, z))))
    return attempt(theirs), mine


def completion(truth, known, start, steps=200):
    """Descend on the manifold with a fixed step, by both."""

    def objective(w):
        residual = known * (gt.to_dense(w) - truth)
        return 0.5 * (residual**2).sum().item(), residual

    x = Tucker(start.core, list(start.factors))
    for _ in range(steps):
        tangent, _ = TuckerRiemannian.grad(
            lambda w: 0.5 * ((known * (w.to_dense() - truth)) ** 2).sum(), x
        )
        x = (-2.0 * tangent + TuckerRiemannian.TangentVector(x)).construct().round(RANKS)
    theirs = objective(gt.as_point((x.core, x.factors)))[0]
    result = gt.minimize(objective, start, integrator=gt.Tangent(lr=2.0), steps=steps)
    return f"{theirs:.0e}", f"{result.loss:.0e}"


def main():
    begin("tucker-riemopt")
    tucker_riemopt.set_backend("pytorch")
    z = torch.randn(SHAPE, dtype=torch.float64)
    rotations = [torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q for _ in RANKS]
    factors = [torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64)).Q for n in SHAPE]
    for ratio in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        pair = gradients(ratio, rotations, factors, z)
        tell(f"gradient, values to {ratio**2:.0e}", *pair)
    truth = gt.to_dense(turned((3.0, 2.0, 1.0), rotations, factors))
    known = (torch.rand(SHAPE) < 0.5).double()
    start = gt.hosvd(known * truth / known.mean(), RANKS)
    tell("completion: loss", *completion(truth, known, start))
    noisy = truth + 0.03 * torch.randn(SHAPE, dtype=torch.float64)

    def distance(w):
        residual = gt.to_dense(w) - noisy
        return 0.5 * residual.square().sum().item(), residual

    grown = gt.minimize(
        distance, gt.hosvd(noisy, 1), integrator=gt.TDLRT(lr=1.0),
        ranks=gt.Tolerance(0.25), steps=50,
    )  # fmt: skip
    tell("the rank, from rank 1", "", grown.point.ranks)
    shared = SFTucker.from_dense(truth[:8, :8, :8], ds=2)
    tell("factors shared by modes", f"{shared.rank}, of {shared.shape}")


if __name__ == "__main__":
    main()
