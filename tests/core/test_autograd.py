"""What only PyTorch has: Parameters, and a graph that nobody asked for."""

import numpy as np
import pytest
import torch

import geotucker as gt

from .cases import arrays_in, step
from .test_backends import INTEGRATORS


def parameters():
    """Return a point of Parameters in float64."""
    core, factors = gt.testing.random_point((5, 4), (2, 2))
    wrap = torch.nn.Parameter
    return wrap(torch.tensor(core)), [wrap(torch.tensor(u)) for u in factors]


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_parameters_work_without_a_graph(integrator):
    pair = parameters()
    plain = gt.TuckerPoint(pair[0].data, tuple(u.data for u in pair[1]))
    z = torch.ones(5, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        result = step(integrator, gt.as_point(pair), lambda w: (0.0, z), 2)
        rest = gt.hosvd(z, 2), gt.round(gt.add(pair, pair), 1), gt.project(pair, z)
    arrays = [*arrays_in(result.point), *arrays_in(result.state.moments), *arrays_in(rest)]
    assert not any(array.requires_grad for array in arrays)
    expected = step(integrator, plain, lambda w: (0.0, z.detach()), 2)
    for got, wanted in zip(arrays_in(result.point), arrays_in(expected.point), strict=True):
        assert torch.equal(got, wanted)
    assert all(parameter.grad is None for parameter in (pair[0], *pair[1]))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_gradients_go_through_a_decomposition_in_any_precision(name):
    # Which works in another one inside.
    tensor = np.random.default_rng(0).standard_normal((4, 5, 6))

    def gradient(dtype):
        array = torch.tensor(tensor, dtype=dtype, requires_grad=True)
        gt.to_dense(gt.hosvd(array, 2))[0, 0].sum().backward()
        return array.grad.double()

    expected, got = gradient(torch.float64), gradient(getattr(torch, name))
    tolerance = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.01}[name]
    assert torch.linalg.norm(got - expected) < tolerance * torch.linalg.norm(expected)


def test_numbers_come_without_warnings():
    # float() of a tensor that requires grad warns; warnings are errors here.
    pair = parameters()
    assert gt.norm(pair) == pytest.approx(np.sqrt(gt.inner(pair, pair)))


def test_zeros_of_a_scheme_need_no_gradient():
    (velocity,) = gt.HeavyBall().init(parameters()[0])
    assert not velocity.requires_grad


def test_dtype_and_default_are_kept():
    assert torch.get_default_dtype() == torch.float32
    point = gt.hosvd(torch.ones(3, 4, dtype=torch.float64), 2)
    assert point.core.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
