"""Layers of every kind with inputs for them, which several tests draw."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

import geotucker as gt
from geotucker._geometry import augment_all, mode_gradients, right_basis
from geotucker_torch import (
    TDLRT,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerConvTranspose1d,
    TuckerConvTranspose2d,
    TuckerConvTranspose3d,
    TuckerEmbedding,
    TuckerLinear,
    TuckerModule,
    factorize,
)

DOUBLE = {"dtype": torch.float64}
CONVS = {1: TuckerConv1d, 2: TuckerConv2d, 3: TuckerConv3d}
TRANSPOSED = {1: TuckerConvTranspose1d, 2: TuckerConvTranspose2d, 3: TuckerConvTranspose3d}


def close(a: Tensor, b: Tensor) -> None:
    """Check equality in double precision, up to rounding."""
    assert a.shape == b.shape
    assert (a - b).norm() <= 1e-12 * b.norm()


def sgd(model: nn.Module, **settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def some_loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y - 1).square().mean() + (y**3).mean() / 10


def trained(
    model: Any,
    x: Tensor,
    *,
    one_pass: bool,
    rule: Any = None,
    number: int = 3,
    loss_of: Callable[[nn.Module, Tensor], Tensor] = some_loss,
) -> Any:
    """Train a copy for a few steps of TDLRT, without a closure if one pass suffices."""
    model = copy.deepcopy(model)
    optimizer = TDLRT(sgd(model), model, rule, integrator="tdlrt", one_pass=one_pass)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    for _ in range(number):
        if one_pass:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    return model


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(16 * 4, 10),
    ).double()
    model(image())  # the normalisation has seen something
    return factorize(model, 2, exclude="0", verbose=False)


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, **DOUBLE)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[TuckerModule, Tensor]:
    order = draw(st.integers(1, 3))
    sides = st.tuples(*[st.integers(1, 3)] * order)
    groups = draw(st.integers(1, 3))
    kernel, dilation, stride = draw(sides), draw(sides), draw(sides)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "numbers":
        padding = draw(st.tuples(*[st.integers(0, 2)] * order))
    elif padding == "same":
        stride = (1,) * order
    layer = CONVS[order](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        ranks=draw(st.integers(1, 3)),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        **DOUBLE,
    )
    x = torch.randn(layer.in_channels, *(draw(st.integers(7, 9)) for _ in kernel), **DOUBLE)
    return layer, x if draw(st.booleans()) else torch.stack([x, x.flip(1)])


@st.composite
def linears(draw: st.DrawFn) -> tuple[TuckerModule, Tensor]:
    sizes = [draw(st.integers(1, 6)) for _ in range(2)]
    layer = TuckerLinear(*sizes, ranks=draw(st.integers(1, 3)), bias=draw(st.booleans()), **DOUBLE)
    return layer, torch.randn(*draw(st.sampled_from([(), (3,), (2, 3)])), sizes[0], **DOUBLE)


def training(steps: int = 2, ranks: Any = None, **options: Any) -> tuple[TDLRT, Callable[[], None]]:
    """Return an optimizer in training and a function that takes it to just before a step."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 16), nn.Linear(16, 3)
    )
    model = factorize(model, {"0": (4, 2, 2, 2), "3": 6}, verbose=False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = TDLRT(sgd, model, ranks or gt.Tolerance(0.2), **options)
    x, y = torch.randn(16, 2, 5, 5), torch.randint(3, (16,))

    def backward() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()

    for _ in range(steps):
        backward()
        optimizer.step()
    return optimizer, backward


@st.composite
def embeddings(draw: st.DrawFn) -> tuple[TuckerModule, Tensor]:
    torch.manual_seed(draw(st.integers(0, 99)))
    number, size = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    layer = TuckerEmbedding(
        number,
        size,
        draw(st.integers(1, 6)),
        draw(st.none() | st.integers(-number, number - 1)),
        draw(st.booleans()),
        **DOUBLE,
    )
    shape = draw(st.sampled_from([(), (5,), (2, 7), (0,)]))
    return layer, torch.randint(
        number, shape, dtype=draw(st.sampled_from([torch.int32, torch.int64]))
    )


@st.composite
def transposed(draw: st.DrawFn) -> tuple[TuckerModule, Tensor]:
    torch.manual_seed(draw(st.integers(0, 99)))
    order = draw(st.integers(1, 3))
    sides = st.tuples(*[st.integers(1, 3)] * order)
    groups = draw(st.integers(1, 3))
    kernel, dilation, stride = draw(sides), draw(sides), draw(sides)
    room = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    extra = tuple(draw(st.integers(0, most)) for most in room)
    padding = tuple(draw(st.integers(0, 2)) for _ in kernel)
    n = draw(st.integers(2, 4))
    sizes = zip(stride, padding, dilation, kernel, extra, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + e >= 0 for s, p, d, k, e in sizes))
    layer = TRANSPOSED[order](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        draw(st.integers(1, 3)),
        stride,
        padding,
        extra,
        groups,
        draw(st.booleans()),
        dilation,
        **DOUBLE,
    )
    x = torch.randn(layer.in_channels, *[n] * order, **DOUBLE)
    return layer, x if draw(st.booleans()) else torch.stack([x, x.flip(1)])


def backward_with_exact_directions(
    layer: TuckerModule, x: Tensor, g: Tensor, smallest: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[gt.TuckerPoint, Tensor]:
    """Lift a layer whose core has a small singular value in each mode; check what lifts it.

    Returned are the point before and the gradient of the dense weight there, as a tensor.
    """
    core = torch.randn(layer.ranks, **DOUBLE)
    for mode in range(core.dim()):
        scales = torch.tensor([1.0, smallest], **DOUBLE)
        core = torch.tensordot(torch.diag(scales), core, ([1], [mode])).movedim(0, mode)
    with torch.no_grad():
        layer.core.copy_(core)
    found: list[Tensor] = []

    def watched(points: Any, directions: Any) -> Any:
        found.extend(directions[0])
        return augment_all(points, directions)

    monkeypatch.setattr("geotucker_torch._lift.augment_all", watched)
    point = gt.TuckerPoint(layer.core.detach().clone(), tuple(layer.point.factors))
    dense: Any = layer.to_dense()
    optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer)
    layer(x).backward(g)
    dense(x).backward(g)
    gradient = dense.weight.grad.reshape(layer.shape)
    modes = mode_gradients(point, gradient)
    for mode, (seen, direction) in enumerate(zip(modes, found, strict=True)):
        exact = seen @ right_basis(point.core, mode)  # Q_i is free up to rotation
        error = (direction @ direction.T - exact @ exact.T).norm()
        assert error <= 1e-12 * (exact @ exact.T).norm()
    assert optimizer is not None
    return point, gradient
