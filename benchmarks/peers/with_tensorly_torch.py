"""Beside tensorly-torch: layers in CP, tensor-train and Tucker format.

Run with the extra ``tltorch`` installed::

    python benchmarks/peers/with_tensorly_torch.py
"""

from functools import partial

import tensorly as tl
import tltorch
import torch
from checks import attempt, begin, best, data_parallel, departure, fit, size, start, tell
from torch import nn

import geotucker as gt
from geotucker_torch import TDLRT, TuckerConv2d, TuckerConvTranspose2d, TuckerLinear, distribute

RANKS = (8, 8, 3, 3)


def theirs(factorization="tucker", rank=RANKS):
    conv = nn.Conv2d(16, 16, 3, padding=1)
    return tltorch.FactorizedConv.from_conv(conv, rank=rank, factorization=factorization)


def ours():
    return TuckerConv2d.from_dense(nn.Conv2d(16, 16, 3, padding=1), RANKS)


def adam(model):
    return torch.optim.Adam(model.parameters(), 0.01)


def tdlrt(model, rule=None):
    return TDLRT(adam(model), model, rule)


def filled(layer, start):
    """Give a matrix in Tucker format, theirs or ours, its core and bases."""
    parameters = [p for n, p in layer.named_parameters() if "core" in n or "factors" in n]
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    return layer


def linear(start):
    options = {"factorization": "tucker", "rank": (4, 4), "bias": False}
    return filled(tltorch.FactorizedLinear((32,), (32,), **options), start)


def own_linear(start):
    return filled(TuckerLinear(32, 32, ranks=4, bias=False), start)


def sgd(model, rate):
    return torch.optim.SGD(model.parameters(), rate)


def own_sgd(model, rate):
    return TDLRT(sgd(model, rate), model)


def main():
    begin("tensorly-torch")
    tl.set_backend("pytorch")
    x = torch.randn(32, 16, 8, 8)
    with torch.no_grad():
        y = nn.Conv2d(16, 16, 3, padding=1)(x)

    def trained(model, optimizer):
        loss = fit(model, optimizer, x, y, 60)
        return f"{size(model)} parameters, loss {loss:.3f}"

    for name in ("cp", "tt"):
        model = theirs(name, 0.5)
        tell(f"convolution, {name}", trained(model, adam(model)))
    model, own = theirs(), ours()
    tell("convolution, tucker", trained(model, adam(model)), trained(own, tdlrt(own)))
    factors = [f.detach() for f in model.weight.factors]
    tell("bases, from orthonormal", departure(*factors), departure(*own.factors))

    own = ours()
    fit(own, tdlrt(own, gt.Budget(parameters=0.2)), x, y, 60)
    tell("ranks after training", tuple(model.weight.core.shape), f"{own.ranks}, by a budget")
    smaller = theirs(rank=(2, 2, 2, 2)).state_dict()
    tell(
        "state_dict of other ranks",
        attempt(lambda: theirs().load_state_dict(smaller)),
        attempt(lambda: ours().load_state_dict(own.state_dict())),
    )
    inputs, target = torch.randn(256, 32), torch.randn(32, 4) @ torch.randn(4, 32) / 10
    for name, smallest in {"singular values of 1": 1, "tiny singular values": 1e-9}.items():
        given = start(smallest)
        tell(
            f"{name}, SGD",
            best(partial(linear, given), sgd, inputs, inputs @ target),
            best(partial(own_linear, given), own_sgd, inputs, inputs @ target),
        )

    transposed = nn.ConvTranspose2d(8, 6, 3)
    tell(
        "transposed convolution",
        attempt(
            lambda: tltorch.FactorizedConv.from_conv(transposed)(torch.zeros(1, 8, 5, 5)).shape
        ),
        type(TuckerConvTranspose2d.from_dense(transposed, 2)).__name__,
    )
    cells = tltorch.FactorizedTensor.new((4, 4), rank=2, factorization="cp", dtype=torch.cfloat)
    tell(
        "complex weights",
        cells.factors[0].dtype,
        attempt(lambda: TuckerLinear(4, 4, ranks=2, dtype=torch.cfloat)),
    )
    tltorch.tensor_dropout(model.weight, p=0.5)
    outputs = {model(x).sum().item() for _ in range(8)}
    tell("tensor dropout", f"{len(outputs)} outputs in 8 calls")
    tell(
        "two processes (DDP)",
        attempt(lambda: data_parallel(lambda: (m := theirs(), adam(m), x, y))),
        attempt(lambda: data_parallel(lambda: (m := distribute(ours()), tdlrt(m), x, y))),
    )


if __name__ == "__main__":
    main()
