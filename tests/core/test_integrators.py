"""One step of each integrator against the formulas on full tensors in float64."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt

from . import reference
from .cases import Case, assert_close, assert_orthonormal, cases, keep_all, quadratic, step

LR = 0.3
LOOSE = 1e-8  # after a truncation: rounding is magnified where singular values lie close together


def problem(case):
    """Return a point and a quadratic objective with weights, so that Z depends on where it is."""
    weights = 0.2 + 0.8 * np.abs(case.normal(*case.shape, stream=41)) / 5
    objective, gradient = quadratic(case, case.normal(*case.shape, stream=42), weights)
    return case.point(), objective, gradient


def tdlrt(case, point, gradient):
    """W - lr Z seen through the augmented bases."""
    w = case.dense(point)
    bases = reference.augmented_bases(*case.pull(point), gradient(w))
    return w - LR * reference.seen_through(gradient(w), bases)


def tangent(case, point, gradient):
    """W - lr P(W) Z."""
    w = case.dense(point)
    return w - LR * reference.project(*case.pull(point), gradient(w))


def standard(case, point, gradient):
    """Bases from the K-steps of Theorem 2.1, joined with the old ones."""
    w, (core, factors) = case.dense(point), case.pull(point)
    ends = reference.k_steps(core, factors, gradient(w), LR)
    pairs = zip(factors, ends, strict=True)
    bases = [reference.orth(np.concatenate([u, k - u @ (u.T @ k)], axis=1)) for u, k in pairs]
    return w - LR * reference.seen_through(gradient(w), bases)


def unconventional(case, point, gradient):
    """Bases from the K-steps alone, W projected on them, and a gradient there."""
    w = case.dense(point)
    bases = [reference.orth(k) for k in reference.k_steps(*case.pull(point), gradient(w), LR)]
    w = reference.seen_through(w, bases)
    return w - LR * reference.seen_through(gradient(w), bases)


FORMULAS = [
    pytest.param(gt.TDLRT(LR), tdlrt, id="tdlrt"),
    pytest.param(gt.Tangent(LR), tangent, id="tangent"),
    pytest.param(gt.Standard(LR), standard, id="standard"),
    pytest.param(gt.Standard(LR, augmented=False), unconventional, id="unconventional"),
]


@pytest.mark.parametrize(("integrator", "formula"), FORMULAS)
@given(data=st.data())
def test_step_is_that_of_the_formula(backend, data, integrator, formula):
    case = data.draw(cases(backend))
    point, objective, gradient = problem(case)
    expected = formula(case, point, gradient)
    whole = step(integrator, point, objective, keep_all)
    assert_close(case.dense(whole.point), expected, 3 * case.tol, np.linalg.norm(case.dense(point)))
    assert_orthonormal(case, whole.point)
    # The rank rule comes last: the truncation of the same tensor.
    cut = step(integrator, point, objective, case.ranks)
    assert cut.point.ranks == cut.report.ranks == case.ranks
    error = np.linalg.norm(case.dense(cut.point) - case.dense(whole.point))
    assert error <= cut.report.error_bound + case.tol * np.linalg.norm(expected)
    if case.dtype == "float64":
        assert_close(case.dense(cut.point), reference.truncate(expected, case.ranks), LOOSE)


@given(data=st.data(), tau=st.sampled_from([0.02, 0.2]))
def test_ranks_adapt_by_the_tolerance(backend, data, tau):
    case = data.draw(cases(backend, dtypes=["float64"]))
    point, objective, gradient = problem(case)
    expected = tdlrt(case, point, gradient)
    result = step(gt.TDLRT(LR), point, objective, gt.Tolerance(tau))
    error = np.linalg.norm(case.dense(result.point) - expected)
    assert error <= tau * np.linalg.norm(expected) * (1 + 1e-10)
    assert error <= result.report.error_bound * (1 + 1e-10) + 1e-12
    most = [min(2 * r, n) for r, n in zip(case.ranks, case.shape, strict=True)]
    assert all(1 <= r <= m for r, m in zip(result.point.ranks, most, strict=True))


@given(data=st.data())
def test_corollary_2_2(backend, data):
    # One gradient gives TDLRT the bases for which the standard integrator asks d + 1.
    case = data.draw(cases(backend, dtypes=["float64"]))
    point, objective, _ = problem(case)
    one, many = (step(i, point, objective, keep_all) for i in (gt.TDLRT(LR), gt.Standard(LR)))
    assert_close(case.dense(one.point), case.dense(many.point), 1e-10)
    assert math.isclose(one.report.gradient_norm, many.report.gradient_norm, rel_tol=1e-10)


def test_flow_takes_tangent_steps(backend):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    point, objective, gradient = problem(case)
    w = case.dense(point)
    for _ in range(4):
        slope = reference.project_at(w, case.ranks, gradient(w))
        w = reference.truncate(w - LR / 4 * slope, case.ranks)
    result = step(gt.Flow(LR, substeps=4), point, objective, case.ranks)
    assert_close(case.dense(result.point), w, LOOSE)
    assert result.state.step == 1
    assert result.report.evaluations == 4


def test_flow_converges_with_order_one(backend):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    point, objective, gradient = problem(case)
    exact = reference.flow(case.dense(point), case.ranks, gradient, 1.0, 80)
    errors = []
    for substeps in (16, 32):
        result = step(gt.Flow(1.0, substeps=substeps), point, objective, case.ranks)
        errors.append(np.linalg.norm(case.dense(result.point) - exact))
    assert 1.7 < errors[0] / errors[1] < 2.3


EVALUATIONS = [
    (gt.TDLRT(LR), lambda order: 1),
    (gt.Tangent(LR), lambda order: 1),
    (gt.Standard(LR), lambda order: order + 1),
    (gt.Standard(LR, augmented=False), lambda order: order + 1),
    (gt.Flow(LR, substeps=3), lambda order: 3),
]


@pytest.mark.parametrize(("integrator", "expected"), EVALUATIONS)
@given(data=st.data())
def test_report_tells_what_happened(backend, data, integrator, expected):
    case = data.draw(cases(backend))
    point, objective, gradient = problem(case)
    calls = []

    def counted(w):
        calls.append(w)
        return objective(w)

    report = step(integrator, point, counted, case.ranks).report
    assert report.evaluations == len(calls) == expected(len(case.shape))
    assert math.isclose(report.loss, objective(point)[0], rel_tol=case.tol)
    z = gradient(case.dense(point))
    projected = np.linalg.norm(reference.project(*case.pull(point), z))
    assert abs(report.gradient_norm - projected) <= case.tol * np.linalg.norm(z)
    assert report.error_bound >= 0.0
    assert all(isinstance(number, float) for number in (report[0], report[1], report[3]))


def test_flow_adds_up_the_truncation_errors():
    point = gt.testing.random_point((5, 4), (2, 2))
    target = np.random.default_rng(0).standard_normal((5, 4))

    def objective(w):
        return 0.0, gt.to_dense(w) - target

    flow, bound, end = gt.Flow(0.5, substeps=5), 0.0, point
    for _ in range(5):
        result = step(gt.Tangent(0.1), end, objective, 2)
        bound, end = bound + result.report.error_bound, result.point
    assert math.isclose(step(flow, point, objective, 2).report.error_bound, bound, rel_tol=1e-9)
    assert bound > 0


@pytest.mark.parametrize("integrator", [gt.TDLRT, gt.Tangent, gt.Standard, gt.Flow])
def test_step_sizes_may_follow_a_schedule(integrator):
    asked = []

    def schedule(number):
        asked.append(number)
        return np.float64(1.0 / (1 + number))  # a NumPy scalar must not promote float32 arrays

    point = gt.testing.random_point((4, 3), (2, 2))
    point = gt.TuckerPoint(*(point.core.astype("f4"), tuple(u.astype("f4") for u in point.factors)))
    scheduled, state, ends = integrator(schedule), None, []
    for number in range(3):
        settings = integrator(1.0 / (1 + number))
        expected = step(settings, point, lambda w: (0.0, gt.to_dense(w)), 2).point
        point, state, _ = step(scheduled, point, lambda w: (0.0, gt.to_dense(w)), 2, state)
        ends.append((gt.to_dense(point), gt.to_dense(expected)))
        assert point.core.dtype == np.float32
    assert asked == [0, 1, 2]
    for got, wanted in ends:
        assert_close(got, wanted, 1e-5, 1e-5)


@pytest.mark.parametrize("integrator", [gt.TDLRT, gt.Tangent, gt.Standard, gt.Flow])
def test_a_plain_function_is_a_scheme(backend, integrator):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    point, objective, _ = problem(case)

    def euler(core, gradient, lr, moments):
        assert moments == ()
        return core - lr * gradient, moments

    got, expected = (step(integrator(LR, s), point, objective, 2) for s in (euler, gt.Euler()))
    assert_close(case.dense(got.point), case.dense(expected.point), 1e-14)
    assert got.state == gt.State(1, ())


def test_flow_of_one_substep_is_a_tangent_step_with_its_moments():
    point, rule = gt.testing.random_point((4, 5), (2, 2)), gt.Fixed(2)

    def objective(w):
        return 0.0, gt.to_dense(w) - 1.0

    tangent, flow = gt.Tangent(0.1, gt.HeavyBall()), gt.Flow(0.1, gt.HeavyBall(), substeps=1)
    first = tangent.step(point, objective, tangent.init(point), rule)
    moved = [scheme.step(first.point, objective, first.state, rule) for scheme in (tangent, flow)]
    np.testing.assert_allclose(*[gt.to_dense(result.point) for result in moved], atol=1e-13)
