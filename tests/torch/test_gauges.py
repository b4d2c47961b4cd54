"""The gradients of the K_i come from gauges: exact at any singular value, in any precision."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import geotucker as gt
from geotucker._geometry import mode_gradients, right_basis
from geotucker_torch import TDLRT, TuckerConv1d, TuckerConv2d, TuckerConv3d, TuckerLinear
from geotucker_torch import _lift as lift_module

CONVS = {1: TuckerConv1d, 2: TuckerConv2d, 3: TuckerConv3d}


def spread(layer, smallest):
    """Give the core singular values down to about `smallest`, in the form a truncation leaves."""
    core = layer.core.detach().double()
    for mode, rank in enumerate(core.shape):
        q, _ = torch.linalg.qr(torch.randn(rank, rank).double())
        scales = torch.logspace(0, float(np.log10(smallest)), rank).double()
        core = torch.tensordot(q * scales, core, ([1], [mode])).movedim(0, mode)
    with torch.no_grad():
        layer.core.copy_(gt.hosvd(core / core.norm(), 100).core)


def directions_of(layer, x, g, monkeypatch, autocast=False):
    """Return the directions that a backward pass extends the bases by, and the point before."""
    found = []
    original = lift_module._directions

    def spy(*arguments):
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(lift_module, "_directions", spy)
    optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer)
    point = gt.TuckerPoint(*(layer.point.core.clone(), layer.point.factors))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(g.to(y.dtype))
    assert optimizer is not None
    return point, found[0]


def exact(layer, point, x, g):
    """Return the G_i Q_i from the dense weight's gradient, all in float64."""
    double = gt.TuckerPoint(point.core.double(), tuple(u.double() for u in point.factors))
    dense = layer.to_dense().double()
    with torch.no_grad():
        dense.weight.copy_(gt.to_dense(double))
    dense(x.double()).backward(g.double())
    modes = mode_gradients(double, dense.weight.grad)
    return [m @ right_basis(double.core, i) for i, m in enumerate(modes)]


def relative(got, expected):
    """Return the largest relative error of the projectors' images: Q_i is free up to rotation."""
    return float((got.double() @ got.double().T - expected @ expected.T).norm()) / float(
        (expected @ expected.T).norm()
    )


@pytest.mark.parametrize("smallest", [1.0, 1e-6, 1e-12])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "folded"])
def test_exact_at_any_singular_value(kind, dtype, tolerance, smallest, monkeypatch):
    torch.manual_seed(0)
    layer, shape = {
        "linear": lambda: (TuckerLinear(30, 20, 5), (40, 30)),
        "conv": lambda: (TuckerConv2d(12, 16, 3, (4, 4, 2, 2), padding=1), (3, 12, 7, 7)),
        "grouped": lambda: (TuckerConv2d(12, 16, 3, (4, 2, 2, 2), groups=2), (3, 12, 7, 7)),
        "folded": lambda: (TuckerConv2d(6, 8, 3, (6, 4, 2, 3)), (3, 6, 9, 9)),
    }[kind]()
    layer = layer.to(dtype)
    with torch.no_grad():
        for factor in layer.factors:
            factor.copy_(torch.linalg.qr(torch.randn_like(factor))[0])
    spread(layer, smallest)
    x = torch.randn(shape, dtype=dtype)
    g = torch.randn_like(layer(x))
    point, got = directions_of(layer, x, g, monkeypatch)
    for direction, expected, factor in zip(
        got, exact(layer, point, x, g), point.factors, strict=True
    ):
        if factor.shape[0] == factor.shape[1]:
            assert direction.shape[1] == 0
        else:
            assert relative(direction, expected) < tolerance


def test_in_bf16_autocast_small_singular_values_are_no_worse(monkeypatch):
    errors = []
    for smallest in (1.0, 1e-12):
        torch.manual_seed(0)
        layer = TuckerConv2d(24, 32, 3, (6, 6, 3, 3), padding=1)
        spread(layer, smallest)
        x = torch.randn(4, 24, 9, 9)
        g = torch.randn(4, 32, 9, 9)
        point, got = directions_of(layer, x, g, monkeypatch, autocast=True)
        pairs = zip(got[:2], exact(layer, point, x, g)[:2], strict=True)
        errors.append(max(relative(direction, expected) for direction, expected in pairs))
    assert max(errors) < 0.02


@given(
    order=st.integers(0, 3),
    ranks=st.integers(1, 4),
    groups=st.sampled_from([1, 2]),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same"]),
    mode=st.sampled_from(["zeros", "circular", "reflect"]),
)
def test_the_tangent_gradient_is_the_projected_dense_one(
    order, ranks, groups, stride, padding, mode
):
    torch.manual_seed(0)
    if order == 0:
        layer, shape = TuckerLinear(7, 9, ranks).double(), (5, 7)
    else:
        stride = 1 if padding == "same" else stride
        layer = CONVS[order](
            6, 8, 3, ranks, stride, padding, groups=groups, padding_mode=mode
        ).double()
        shape = (2, 6, *range(5, 5 + order))
    x = torch.randn(shape).double()
    optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer)
    point, dense = layer.point, layer.to_dense()
    g = torch.randn_like(layer(x))
    layer(x).backward(g)
    dense(x).backward(g)
    tangent = gt.project(point, dense.weight.grad)
    got = gt.to_dense((layer.core.grad, [u.detach() for u in layer.factors]))
    torch.testing.assert_close(
        got, gt.to_dense(gt.tangent_to_point(point, tangent)), rtol=0, atol=1e-11
    )
    # What is clipped is the norm of the projected gradient.
    assert float(layer.core.grad.norm()) == pytest.approx(
        float(np.sqrt(gt.inner_tangent(tangent, tangent))), rel=1e-10
    )
    assert optimizer is not None


@pytest.mark.parametrize("integrator", ["tangent", "tdlrt"])
def test_micro_batches_add_up_to_the_batch(integrator):
    torch.manual_seed(0)
    layer = nn.Sequential(TuckerConv2d(4, 6, 3, 2), nn.Tanh(), nn.Flatten(), TuckerLinear(54, 5, 2))
    layer = layer.double()
    x, weights = torch.randn(3, 4, 5, 5).double(), []
    for parts in (1, 3):
        torch.manual_seed(1)
        model = nn.Sequential(*(type(m)(*a) for m, a in _parts(layer))).double()
        model.load_state_dict(layer.state_dict())
        sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        optimizer = TDLRT(sgd, model, integrator=integrator)
        for _ in range(4):
            optimizer.zero_grad()
            for _ in range(parts):
                (model(x).square().sum() / parts).backward()
            optimizer.step()
        weights.append(model[0].dense_weight().detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-10)


def _parts(layer):
    return zip(layer, [(4, 6, 3, 2), (), (), (54, 5, 2)], strict=True)


def test_a_scaled_loss_changes_nothing_with_momentum():
    weights = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        layer = TuckerLinear(12, 10, 3).double()
        x, y = torch.randn(20, 12).double(), torch.randn(20, 10).double()
        optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9), layer)
        for _ in range(8):
            optimizer.zero_grad()
            (scale * (layer(x) - y).square().mean()).backward()
            for parameter in layer.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale
            optimizer.step()
        weights.append(layer.dense_weight().detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


def test_a_projection_that_is_not_kept_is_computed_again(monkeypatch):
    gradients = []
    for kept in (2**20, 0):
        monkeypatch.setattr(lift_module, "_KEPT", kept)
        torch.manual_seed(0)
        layer = TuckerConv2d(8, 10, 3, 3).double()
        optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer)
        layer(torch.randn(2, 8, 6, 6).double()).square().sum().backward()
        gradients.append(layer.core.grad)
        assert optimizer is not None
    assert torch.equal(*gradients)
