"""Moments through basis changes: exact where they can be, a documented choice where not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt
from geotucker._geometry import right_bases
from geotucker._moments import carry, lift, lift_squares, regauge, rotate_squares

from . import reference
from .cases import Case, assert_close, cases, feasible, keep_all, taus


def wider(case, point, moment):
    """Return the point in bases that hold a moment and other directions, the latter first."""
    stacks = []
    for mode, k in enumerate(case.pull(moment)[1]):
        other = case.normal(len(k), 1, stream=20 + mode)
        stacks.append(case.array(np.concatenate([other, k], axis=1)))
    return gt.augment(point, stacks)


def moved(case, wide):
    """Return a generic tensor in the wide bases, as after a step."""
    return gt.TuckerPoint(case.array(case.normal(*wide.ranks, stream=30)), wide.factors)


@given(data=st.data())
def test_lift_and_carry_keep_the_tensor_of_a_moment(backend, data):
    case = data.draw(cases(backend))
    point = case.point()
    moment = gt.project(point, case.array(case.normal(*case.shape, stream=5)))
    tensor = case.tangent(point, moment)
    wide = wider(case, point, moment)
    lifted = lift(point, wide, moment)
    size = np.linalg.norm(tensor)
    assert_close(case.dense((lifted, wide.factors)), tensor, case.tol, size)
    end = moved(case, wide)
    (turned,) = gt.truncate([end], keep_all)
    if turned.point.ranks == wide.ranks:  # a rotation: nothing is cut
        carried = carry(end, turned, lifted)
        back = case.dense(gt.tangent_to_point(turned.point, carried))
        assert_close(back, tensor, case.tol, size)


@given(data=st.data())
def test_carry_is_the_orthogonal_projection_at_the_truncated_point(backend, data):
    case = data.draw(cases(backend))
    point = case.point()
    wide = wider(case, point, gt.project(point, case.array(case.normal(*case.shape, stream=5))))
    end, moment = moved(case, wide), case.array(case.normal(*wide.ranks, stream=31))
    tensor = case.dense((moment, wide.factors))
    for rule in (gt.Fixed(case.ranks), gt.Tolerance(data.draw(taus(backend)))):
        (cut,) = gt.truncate([end], rule)
        carried = carry(end, cut, moment)
        core, factors = case.pull(cut.point)
        expected = reference.project(core, factors, tensor)
        size = np.linalg.norm(tensor)
        assert_close(case.tangent(cut.point, carried), expected, case.tol, size)
        # The coordinates are those of a tangent vector: nothing of the K_i in the span of U_i.
        for u, k in zip(factors, case.pull(carried)[1], strict=True):
            assert k.shape == u.shape
            assert np.abs(u.T @ k).max() <= 100 * case.eps * size


@given(data=st.data())
def test_lift_takes_the_right_bases_that_it_is_given(backend, data):
    # (K_i O, Q_i O) stands for the same part of the moment as (K_i, Q_i).
    case = data.draw(cases(backend))
    point = case.point()
    moment = gt.project(point, case.array(case.normal(*case.shape, stream=5)))
    wide = wider(case, point, moment)
    expected = case.backend.numpy(lift(point, wide, moment))
    right = right_bases(point.core)
    assert_close(case.backend.numpy(lift(point, wide, moment, right)), expected, case.tol)
    o = [np.linalg.qr(case.normal(r, r, stream=60 + i))[0] for i, r in enumerate(case.ranks)]
    o = [case.array(m) for m in o]
    turned = gt.TuckerTangent(
        moment.core, tuple(k @ m for k, m in zip(moment.factors, o, strict=True))
    )
    given_right = [q @ m for q, m in zip(right, o, strict=True)]
    got = case.backend.numpy(lift(point, wide, turned, given_right))
    assert_close(got, expected, case.tol)


@given(data=st.data())
def test_second_moments_are_the_diagonal_of_the_rotated_matrix(backend, data):
    case = data.draw(cases(backend, max_order=3))
    second = case.normal(*case.ranks, stream=5) ** 2
    (cut,) = gt.truncate([case.point()], gt.Fixed(2))
    rotated = backend.numpy(rotate_squares(case.array(second), cut))
    whole = np.ones((1, 1))  # P_1 kron ... kron P_d
    for p in cut.rotations:
        whole = np.kron(whole, backend.numpy(p).astype(np.float64))
    expected = np.diag(whole.T @ np.diag(second.ravel()) @ whole).reshape(cut.point.ranks)
    assert_close(rotated, expected, case.tol)
    assert (rotated >= 0).all()


@given(data=st.data())
def test_constant_second_moments_stay_constant(backend, data):
    case = data.draw(cases(backend))
    (cut,) = gt.truncate([case.point()], gt.Fixed(2))
    lifted = lift_squares(case.array(np.full((1,) * len(case.shape), 3.0)), case.ranks)
    for moment in (lifted, rotate_squares(lifted, cut)):
        assert_close(backend.numpy(moment), np.full(moment.shape, 3.0), case.tol)


@given(data=st.data())
def test_second_moments_of_new_directions_are_means(backend, data):
    case = data.draw(cases(backend, max_order=3))
    second = case.normal(*case.ranks, stream=5) ** 2
    more = [r + mode for mode, r in enumerate(case.ranks)]  # the first mode stays
    lifted = backend.numpy(lift_squares(case.array(second), more)).astype(np.float64)
    assert lifted.shape == tuple(more)
    assert (lifted >= 0).all()
    assert_close(lifted[tuple(slice(r) for r in case.ranks)], second, case.eps)
    for place in np.ndindex(*more):
        new = [mode for mode, a in enumerate(place) if a >= case.ranks[mode]]
        old = tuple(slice(None) if mode in new else slice(a, a + 1) for mode, a in enumerate(place))
        assert lifted[place] == pytest.approx(second[old].mean(), rel=case.tol)


def fixed(case, z):
    """Return an objective with this gradient everywhere."""
    array = case.array(z)
    return lambda w: (0.0, array)


class Two:
    """A scheme with two moments, both linear in the gradients; the core follows their sum."""

    def init(self, core):
        return core * 0, core * 0

    def __call__(self, core, gradient, lr, moments):
        first, second = 0.5 * moments[0] + gradient, 0.25 * moments[1] - 2.0 * gradient
        return core - lr * (first + 0.1 * second), (first, second)


@given(data=st.data())
def test_a_scheme_may_have_several_moments(backend, data):
    case = data.draw(cases(backend, dtypes=["float64"]))
    integrator, least = gt.Tangent(0.1, Two()), feasible([max(r - 1, 1) for r in case.ranks])
    point = case.point()
    state, w = integrator.init(point), case.dense(point)
    first = second = 0.0
    for number, ranks in enumerate((case.ranks, case.ranks, least)):
        z = case.normal(*case.shape, stream=6 + number)
        force = reference.project(*case.pull(point), z)
        first, second = 0.5 * first + force, 0.25 * second - 2.0 * force
        w = w - 0.1 * (first + 0.1 * second)
        point, state, _ = integrator.step(point, fixed(case, z), state, gt.Fixed(ranks))
        w = reference.truncate(w, ranks)
        first, second = (reference.project(*case.pull(point), v) for v in (first, second))
        assert_close(case.dense(point), w, 1e-7)
        assert len(state.moments) == 2
        for got, expected in zip(state.moments, (first, second), strict=True):
            tensor = case.dense(gt.tangent_to_point(point, got))
            assert_close(tensor, expected, 1e-7, np.linalg.norm(z))


@pytest.mark.parametrize("integrator", [gt.TDLRT, gt.Tangent, gt.Standard])
@pytest.mark.parametrize("ranks", [(2, 2), (3, 1)])
def test_a_moment_of_zero_changes_nothing(backend, integrator, ranks):
    # It gives the bases no directions: arbitrary ones would make the step depend on the gauge.
    # And ranks that no tensor has, (3, 1): Q_1 has one column only, and so has the first part.
    case = Case(backend, "float64", (7, 6), ranks, 0)
    point, objective = case.point(), fixed(case, case.normal(7, 6, stream=3))
    ends = []
    for scheme in (gt.Euler(), gt.HeavyBall(0.5)):  # equal in the first step
        method = integrator(0.1, scheme)
        result = method.step(point, objective, method.init(point), gt.Tolerance(1e-9))
        ends.append(case.dense(result.point))
    assert_close(*ends, 1e-12)


@given(data=st.data())
def test_basis_parts_follow_a_core_that_is_stepped(backend, data):
    # Kdot_i stands for Kdot_i Q_i^T, and what of that is still tangent at the new core stays.
    case = data.draw(cases(backend))
    point = case.point()
    moment = gt.project(point, case.array(case.normal(*case.shape, stream=5)))
    new = case.array(case.normal(*case.ranks, stream=6))
    bases = {
        name: dict(enumerate(right_bases(core)))
        for name, core in (("old", point.core), ("new", new), ("minus", -point.core))
    }
    turned = regauge(moment.factors, bases["old"], bases["new"])
    for mode, (before, after) in enumerate(zip(moment.factors, turned, strict=True)):
        old_q, new_q = (
            backend.numpy(right_bases(core)[mode]).astype(np.float64) for core in (point.core, new)
        )
        ambient = backend.numpy(before).astype(np.float64) @ old_q.T
        got = backend.numpy(after).astype(np.float64) @ new_q.T
        assert_close(got, ambient @ new_q @ new_q.T, case.tol)
    # Another sign of the core turns the gauge, and changes nothing.
    for mode, (before, after) in enumerate(
        zip(moment.factors, regauge(moment.factors, bases["old"], bases["minus"]), strict=True)
    ):
        q, minus_q = (
            backend.numpy(right_bases(core)[mode]).astype(np.float64)
            for core in (point.core, -point.core)
        )
        pairs = (before, q), (after, minus_q)
        old, same = (backend.numpy(k).astype(np.float64) @ b.T for k, b in pairs)
        assert_close(same, old, case.tol)
