"""Tucker tensors: what goes in, what comes out, and arithmetic against full tensors."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import tensorly as tl
from hypothesis import given
from hypothesis import strategies as st
from tensorly.tucker_tensor import TuckerTensor

import geotucker as gt
from geotucker import _ops

from .cases import Case, assert_close, cases


class Pair(NamedTuple):
    core: object
    factors: object


def loose(case, stream=0, extra=0):
    """Return a pair whose factors are not orthonormal, maybe with more columns than rows."""
    ranks = [r + extra for r in case.ranks]
    core = case.normal(*ranks, stream=stream + 50)
    pairs = zip(case.shape, ranks, strict=True)
    return case.put(core, [case.normal(n, r, stream=stream + 51 + r) for n, r in pairs])


@pytest.mark.parametrize("container", [tuple, list, lambda p: Pair(*p), TuckerTensor])
def test_any_pair_goes_in(backend, container):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    point = case.point()
    with tl.backend_context(backend.name):  # TuckerTensor's own checks ask the global backend
        pair = container((point.core, list(point.factors)))
    accepted = gt.as_point(pair)
    assert isinstance(accepted, gt.TuckerPoint)
    assert accepted.core is point.core  # nothing is copied
    assert all(a is b for a, b in zip(accepted.factors, point.factors, strict=True))
    direction = [u[:, :1] for u in point.factors]
    everywhere = [
        gt.to_dense(pair),
        gt.to_dense(gt.orthonormalise(pair)),
        gt.to_dense(gt.round(pair, gt.Tolerance(0.0))),
        gt.to_dense(gt.scale(pair, 1.0)),
        gt.to_dense(gt.add(pair, gt.scale(pair, 0.0))),
        gt.to_dense(gt.augment(pair, direction)),
        gt.to_dense(gt.truncate([pair], gt.Fixed(4))[0].point),
        gt.to_dense(gt.tangent_to_point(pair, gt.project(pair, pair))),
        gt.to_dense(gt.minimize(lambda w: (0.0, w), pair, integrator=gt.TDLRT(), steps=0).point),
    ]
    for dense in everywhere:
        assert_close(backend.numpy(dense), case.dense(point), 1e-13)
    assert math.isclose(gt.inner(pair, pair), gt.norm(pair) ** 2, rel_tol=1e-13)


@pytest.mark.parametrize("integrator", [gt.TDLRT, gt.Tangent, gt.Standard, gt.Flow])
def test_integrators_take_any_pair(backend, integrator):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    point, z = case.point(), case.array(case.normal(*case.shape, stream=1))
    settings = integrator(0.1, gt.HeavyBall(0.5))
    ends = [
        settings.step(pair, lambda w: (0.0, z), settings.init(pair), gt.Fixed(2)).point
        for pair in (point, (point.core, list(point.factors)))
    ]
    assert_close(case.dense(ends[1]), case.dense(ends[0]), 1e-14)


@given(data=st.data())
def test_results_unpack_into_tensorly(backend, data):
    case = data.draw(cases(backend, min_order=2))
    points = [
        case.point(),
        gt.orthonormalise(loose(case)),
        gt.hosvd(case.array(case.normal(*case.shape)), gt.Tolerance(0.3)),
        gt.add(case.point(), case.point(1)),
    ]
    with tl.backend_context(backend.name):
        for point in points:
            core, factors = point
            assert_close(backend.numpy(tl.tucker_to_tensor(point)), case.dense(point), case.tol)
            assert point.shape == case.shape
            assert point.ranks == tuple(core.shape)
            assert point.order == len(factors) == len(case.shape)
            entries = [backend.numpy(array).size for array in (core, *factors)]
            assert point.size == sum(entries)


@given(data=st.data())
def test_arithmetic_is_that_of_full_tensors(backend, data):
    case = data.draw(cases(backend))
    a, b = loose(case, extra=data.draw(st.integers(0, 1))), loose(case, 100)
    dense_a, dense_b = case.dense(a), case.dense(b)
    size = np.linalg.norm(dense_a) * np.linalg.norm(dense_b)
    assert_close(backend.numpy(gt.to_dense(a)), dense_a, case.tol)
    assert abs(gt.inner(a, b) - np.sum(dense_a * dense_b)) <= case.tol * size
    assert math.isclose(gt.norm(a), np.linalg.norm(dense_a), rel_tol=case.tol)
    assert gt.add(a, b).ranks == tuple(p + q for p, q in zip(a.ranks, b.ranks, strict=True))
    scale = np.linalg.norm(dense_a) + np.linalg.norm(dense_b)
    assert_close(case.dense(gt.add(a, b)), dense_a + dense_b, case.tol, scale)
    assert_close(case.dense(gt.scale(a, -2.5)), -2.5 * dense_a, case.tol)


@given(data=st.data())
def test_the_dtype_stays(backend, data):
    case = data.draw(cases(backend))
    point, other = case.point(), case.point(1)
    results = [
        gt.scale(point, np.float64(0.5)),  # NumPy promotes float32 arrays by such a scalar
        gt.add(point, other),
        gt.round(gt.add(point, other), 1),
        gt.orthonormalise(other),
        gt.retract(point, gt.project(point, other)),
    ]
    for core, factors in results:
        for array in (core, *factors):
            assert array.dtype == backend.dtype(case.dtype)
    assert all(isinstance(number, float) for number in (gt.norm(point), gt.inner(point, other)))


def test_norm_survives_cancellation(backend):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 3)
    point = case.point()
    nearly = gt.scale(point, -(1.0 - 1e-10))
    difference = gt.norm(gt.add(point, nearly))
    # sqrt(inner(x, x)) has an absolute error of 1e-8 here, 100 times the value.
    assert math.isclose(difference, 1e-10 * gt.norm(point), rel_tol=1e-4)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_norm_neither_overflows_nor_underflows(backend, dtype):
    case = Case(backend, dtype, (6, 5), (2, 2), 0)
    point = case.point()
    for exponent in (-300, 300, 307.5) if dtype == "float64" else (-30, 37, 37.5):
        scaled = gt.scale(point, 10.0**exponent)
        assert math.isclose(gt.norm(scaled), gt.norm(point) * 10.0**exponent, rel_tol=1e-5)
    assert gt.norm(gt.scale(point, 0.0)) == 0.0


def test_to_dense_shows_what_is_not_finite(backend):
    point = (backend.array(np.full((1, 1), np.nan)), [backend.array(np.ones((2, 1)))] * 2)
    assert np.isnan(backend.numpy(gt.to_dense(point))).all()


ENDS = pytest.mark.parametrize(
    ("dtype", "count", "value"),
    [
        ("float32", 3, 3e38),  # whose reciprocal is no normal number
        ("float64", 3, 1.5e308 / 3**0.5),
        ("float32", 3, 2e-38),
        ("float64", 3, 3e-308),
        ("float16", 70_000, 1.0),  # whose sum of squares is no number of this precision
        ("float16", 70_000, 6e4),
        ("float16", 70_000, 1e-7),
    ],
)


@ENDS
def test_norms_at_the_ends_of_each_precision(backend, dtype, count, value):
    array = backend.array(np.full(count, value), dtype)
    entry = float(backend.numpy(array)[0])
    expected = entry * math.sqrt(count)
    assert entry == pytest.approx(value, rel=0.2)
    assert _ops.norm(array) == pytest.approx(expected, rel=1e-5)
    component = _ops.component(array, _ops.sign(array))  # the sum of magnitudes by the norm
    assert float(component.item()) == pytest.approx(math.sqrt(count), rel=1e-5)


@ENDS
def test_inner_products_at_the_ends_of_each_precision(backend, dtype, count, value):
    array = backend.array(np.full(count, value), dtype)
    pairs = [(array, _ops.sign(array)), (array, 0.0 * array)]
    expected = float(backend.numpy(array)[0]) * count
    assert _ops.vdots(pairs) == pytest.approx([expected, 0.0], rel=1e-5)


def test_squares_may_leave_single_precision(backend):
    huge = backend.array([1e25, 2e25], "float32")
    assert _ops.vdot(huge, huge) == pytest.approx(5e50, rel=1e-6)
    assert _ops.vdot(1e-50 * huge, 1e-50 * huge) == pytest.approx(5e-50, rel=1e-6)


def test_norms_of_several_arrays_are_those_of_each(backend):
    huge, tiny = 1e300, 1e-300
    values = [[3.0, 4.0], [3 * huge, 4 * huge], [3 * tiny, 4 * tiny], [0.0, 0.0]]
    values += [[np.inf, 1.0], [np.nan, 1.0], [np.inf, np.nan]]
    arrays = [backend.array(value, "float64") for value in values]
    arrays.append(_ops.zeros((0, 2), like=arrays[0]))
    found = _ops.norms(arrays)
    assert found[:3] == pytest.approx([5.0, 5 * huge, 5 * tiny], rel=1e-12, abs=0)
    assert (found[3], found[4], found[7]) == (0.0, np.inf, 0.0)
    assert np.isnan(found[5]) and np.isnan(found[6])
    for array, number in zip(arrays, found, strict=True):
        assert _ops.norm(array) == number or np.isnan(number)
    assert _ops.vdots([(arrays[0], arrays[0]), (arrays[0], arrays[3])]) == [25.0, 0.0]
    assert _ops.norms([]) == _ops.vdots([]) == []
