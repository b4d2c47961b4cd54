"""The public test tools: they must be able to fail."""

import numpy as np
import pytest
from hypothesis import given

import geotucker as gt
from geotucker import testing

from .cases import Case, assert_orthonormal


@given(testing.shapes_and_ranks())
def test_shapes_and_ranks_are_feasible(drawn):
    shape, ranks = drawn
    assert 1 <= len(shape) == len(ranks) <= 5
    assert all(1 <= r <= n <= 6 for n, r in zip(shape, ranks, strict=True))
    point = testing.random_point(shape, ranks)
    # Feasible: a random core of these ranks has them indeed.
    assert gt.hosvd(gt.to_dense(point), gt.Tolerance(1e-10)).ranks == ranks


@given(testing.shapes_and_ranks(min_order=2, max_order=3, max_side=4))
def test_shapes_and_ranks_keep_their_limits(drawn):
    assert 2 <= len(drawn[0]) <= 3
    assert max(drawn[0]) <= 4


def test_random_points():
    first, again, other = (testing.random_point((5, 4), (3, 2), seed) for seed in (1, 1, 2))
    assert first.core.dtype == np.float64
    assert np.array_equal(first.core, again.core)
    assert not np.array_equal(first.core, other.core)
    testing.check_orthonormal(first)
    values = (4.0, 1.0, 1e-12)
    point = testing.random_point((6, 5, 4), (3, 3, 3), singular_values=values)
    for mode in range(3):
        unfolded = np.moveaxis(gt.to_dense(point), mode, 0).reshape(point.shape[mode], -1)
        got = np.linalg.svd(unfolded, compute_uv=False)[:3]
        np.testing.assert_allclose(got, values, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_check_orthonormal_can_fail(backend, dtype):
    case = Case(backend, dtype, (6, 5), (2, 2), 0)
    point = gt.orthonormalise(case.point())
    assert_orthonormal(case, point)
    testing.check_orthonormal(point)
    core, factors = case.pull(point)
    factors[1][:, 1] *= 1.0 + 60.0 * case.eps
    bad = case.put(core, factors)
    with pytest.raises(AssertionError, match=r"factors\[1\]: U\^T U differs from I by"):
        testing.check_orthonormal(bad)
    testing.check_orthonormal(bad, multiple=1000.0)


def test_gradient_slope(backend):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    target = case.normal(5, 3, 4)

    def quartic(error):
        def objective(w):
            residual = case.dense(w) - target
            loss = np.sum(residual**2) / 2 + np.sum(residual**4) / 4
            return loss, case.array((residual + residual**3) * (1.0 + error))

        return objective

    assert testing.gradient_slope(quartic(0.0), case.point()) == pytest.approx(2.0, abs=0.1)
    wrong = testing.gradient_slope(quartic(0.1), case.point())
    assert wrong == pytest.approx(1.0, abs=0.2)
    linear = testing.gradient_slope(
        lambda w: (float(np.sum(case.dense(w))), case.array(np.ones((5, 3, 4)))), case.point()
    )
    assert linear == np.inf
