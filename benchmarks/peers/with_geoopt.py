"""Beside geoopt: parameters on manifolds, and optimizers that keep them there.

Run with geoopt 0.5.1 installed beside the extra ``torch``::

    python benchmarks/peers/with_geoopt.py
"""

from functools import partial

import geoopt
import torch
from checks import attempt, begin, best, data_parallel, departure, fit, start, tell
from torch import nn

import geotucker as gt
from geotucker_torch import TDLRT, TuckerLinear, distribute


class Stiefel(nn.Module):
    """U S Vᵀ with orthonormal U and V, as one would write it with geoopt."""

    def __init__(self, core, u, v):
        super().__init__()
        self.core = nn.Parameter(core.clone())
        self.u = geoopt.ManifoldParameter(u.clone(), manifold=geoopt.EuclideanStiefel())
        self.v = geoopt.ManifoldParameter(v.clone(), manifold=geoopt.EuclideanStiefel())

    def forward(self, x):
        """Apply the matrix."""
        return x @ self.v @ self.core.T @ self.u.T


def own(core, u, v):
    layer = TuckerLinear(len(v), len(u), ranks=len(core), bias=False)
    with torch.no_grad():
        for mine, given in zip((layer.core, *layer.factors), (core, u, v), strict=True):
            mine.copy_(given)
    return layer


def theirs_adam(model, rate=0.01):
    return geoopt.optim.RiemannianAdam(model.parameters(), rate)


def theirs_sgd(model, rate):
    return geoopt.optim.RiemannianSGD(model.parameters(), rate)


def own_adam(model, rate=0.01, rule=None):
    return TDLRT(torch.optim.Adam(model.parameters(), rate), model, rule)


def own_sgd(model, rate):
    return TDLRT(torch.optim.SGD(model.parameters(), rate), model)


def main():
    begin("geoopt")
    x, target = torch.randn(256, 32), torch.randn(32, 4) @ torch.randn(4, 32) / 10
    y, even = x @ target, start(1)

    manifolds = [c for c in vars(geoopt).values() if isinstance(c, type)]
    manifolds = [c for c in manifolds if issubclass(c, geoopt.Manifold)]
    tell("classes of manifolds", len(set(manifolds) - {geoopt.Manifold}))
    methods = {"SGD": (theirs_sgd, own_sgd), "Adam": (theirs_adam, own_adam)}
    for name, given in {"singular values of 1": even, "tiny singular values": start(1e-9)}.items():
        for method, (theirs, mine) in methods.items():
            tell(
                f"{name}, {method}",
                best(partial(Stiefel, *given), theirs, x, y),
                best(partial(own, *given), mine, x, y),
            )

    model, layer = Stiefel(*even), own(*even)
    theirs, mine = theirs_adam(model), own_adam(layer, rule=gt.Tolerance(0.01, spare=4))
    full = x @ torch.randn(32, 32)
    fit(model, theirs, x, full, 200)
    fit(layer, mine, x, full, 200)
    tell("bases after training", departure(model.u.detach(), model.v.detach()),
         departure(*layer.factors))  # fmt: skip
    tell("ranks, for a full target", tuple(model.core.shape), layer.ranks)
    moment = theirs.state[model.u]["exp_avg"]
    inside = model.u.detach().mT @ moment
    tell("Adam's first moment", f"tangent to {(inside + inside.mT).abs().max():.0e}",
         f"of shape {tuple(mine.state[layer.core]['exp_avg'].shape)}")  # fmt: skip
    tell(
        "two processes (DDP)",
        attempt(lambda: data_parallel(lambda: (m := Stiefel(*even), theirs_adam(m), x, y))),
        attempt(lambda: data_parallel(lambda: (m := distribute(own(*even)), own_adam(m), x, y))),
    )


if __name__ == "__main__":
    main()
